"""What docs/upgrade.md says: workers with and without limits, and of two versions, on one queue."""

import json

import pytest
from harness import Worker, excess, wait_for
from limits import held, stats, waiting


def worker(lab, version, **options):
    """Start a worker. ``version``: its ``rate_limiter_limits``; ``None``: without the library in its code."""
    config = {"settings": lab.settings, "log": str(lab.run_log), "version": version}
    arguments = "-P", "prefork", "-c", "2"
    module = "tests.integration.upgrade_app"
    return Worker(module, arguments, lab.folder, LAB=json.dumps(config), **options)


def outcome(lab, worker, limit, what):
    """Return how many jobs a limit has admitted, refused, …"""
    return stats(lab, worker)["rate_limiter"]["limits"][limit][what]


def test_install(lab):
    """Workers with a limit take over from those without, from one queue: each job runs once, and then at the rate."""
    with worker(lab, None) as old:
        for number in range(20):
            lab.send("job", number)
        lab.wait_for_runs("job", 20)
        with worker(lab, {"job": "20/s"}) as new:
            old.stop()
            for number in range(20, 50):
                lab.send("job", number)
            lab.wait_for_runs("job", 50)
            assert outcome(lab, new, "job", "admitted") == 30
    assert sorted(lab.runs("job")) == list(range(50))
    limited = [entry.at for entry in lab.log("job")[20:]]
    assert excess(sorted(limited), 20) <= 2 + 20 * 0.15 + 1


def test_remove(lab):
    """What was held, and what was sent back, is run once by a worker without the library in its code."""
    limits = {"job": "1/m", "again": {"rate": "30/m", "when_limited": "retry"}}
    with worker(lab, limits) as limited:
        for number in range(6):
            lab.send("job", number)
            lab.send("again", number)
        wait_for(lambda: held(lab, limited, "job") == 5)
        wait_for(lambda: outcome(lab, limited, "again", "refused") >= 5)
        limited.stop()
    assert "held jobs back to the broker" in limited.output
    assert len(lab.runs("job")) == 1
    assert len(lab.runs("again")) < 6
    with worker(lab, None):
        assert sorted(lab.wait_for_runs("job", 6)) == list(range(6))
        assert sorted(lab.wait_for_runs("again", 6)) == list(range(6))
        wait_for(lambda: not waiting(lab))


def test_scale_to_zero(lab):
    """Without a worker all jobs stand in the queue, and the next one runs them at the rate."""
    with worker(lab, {"job": "10/s"}) as first:
        for number in range(20):
            lab.send("job", number)
        lab.wait_for_runs("job", 5)
        first.stop()
    done = lab.runs("job")
    assert waiting(lab) == 20 - len(done)
    with worker(lab, {"job": "10/s"}):
        assert sorted(lab.wait_for_runs("job", 20)) == list(range(20))
    later = sorted(entry.at for entry in lab.log("job")[len(done) :])
    assert excess(later, 10) <= 1 + 10 * 0.15 + 1


def test_two_versions_of_a_limit_per_worker(lab):
    """Each has its own bucket: together they run at the sum of their rates, and no job runs twice."""
    with (
        worker(lab, {"job": "10/s"}) as old,
        worker(lab, {"job": {"rate": "20/s", "max_held": 8}}) as new,
    ):
        for number in range(90):
            lab.send("job", number)
        assert sorted(lab.wait_for_runs("job", 90)) == list(range(90))
        counts = [outcome(lab, each, "job", "admitted") for each in (old, new)]
    assert sum(counts) == 90
    moments = sorted(entry.at for entry in lab.log("job"))
    assert excess(moments, 30) <= 3 + 30 * 0.15 + 1


@pytest.mark.parametrize("rates", [("10/s", "20/s"), ("20/s", "10/s")], ids=["upgrade", "roll back"])
def test_two_versions_of_a_limit_in_redis(redis_lab, rates):
    """They have one bucket: together never more than the higher rate; then the newer one's alone."""
    options = {"burst": 2, "per": "cluster", "max_held": 8}
    before, after = ({"job": {"rate": rate, **options}} for rate in rates)
    lab = redis_lab
    with worker(lab, before) as old, worker(lab, after) as new:
        for number in range(80):
            lab.send("job", number)
        lab.wait_for_runs("job", 50)
        assert {old.node, new.node} == set(lab.runs("job by"))
        old.stop()
        alone = len(lab.runs("job"))
        assert sorted(lab.wait_for_runs("job", 80)) == list(range(80))
    moments = [entry.at for entry in lab.log("job")]
    assert excess(sorted(moments), 20) <= 2 + 20 * 0.15 + 1
    assert excess(sorted(moments[alone:]), float(rates[1][:2])) <= 2 + 20 * 0.15 + 1
