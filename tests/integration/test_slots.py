"""Limited jobs and the slots of the pool: when they start, what starts first, and that none is lost."""

import logging
import os
import signal
import time

import pytest
from harness import at_once, excess, wait_for
from limits import break_connections, held, limit, start, stats

from rate_limiter.celery import slots

#: Seconds for which jobs occupy all slots of a pool.
STALL = 1.5


def occupy(lab, count=2):
    """Occupy slots with jobs that run."""
    before = len(lab.log("concurrency"))
    for _ in range(count):
        lab.send("busy", STALL)
    wait_for(lambda: len(lab.log("concurrency")) == before + count)


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_jobs_do_not_start_in_a_burst_after_a_stall(redis_lab, pool):
    """What became due while all slots were busy starts at the rate of its limit, in order, once each."""
    with start(redis_lab, pool=pool, limits=(limit(rate=5),)):
        occupy(redis_lab)
        for number in range(10):
            redis_lab.send("job", number)
        runs = redis_lab.wait_for_runs("job", 10)
    # The first two start together, and each acknowledges before it runs: the first paid before the stall,
    # the second with the token that came back meanwhile.
    assert sorted(runs[:2]) + runs[2:] == list(range(10))
    # capacity + 1, and what a loaded machine delays: all ten without this
    assert excess([entry.at for entry in redis_lab.log("job")], 5) < 4


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_jobs_that_were_held_start_before_unlimited_ones_that_wait(redis_lab, pool):
    """A limited job takes the first slot that is free, in front of what waits for one already."""
    options = {"worker_prefetch_multiplier": 20}
    with start(redis_lab, pool=pool, concurrency=1, limits=(limit(rate=1),), **options) as worker:
        redis_lab.send("job", 0)
        redis_lab.wait_for_runs("job", 1)
        occupy(redis_lab, 1)
        for number in range(10):
            redis_lab.send("other", number)
        redis_lab.send("job", 1)
        redis_lab.wait_for_runs("other", 10)
        assert redis_lab.runs("job") == [0, 1]
        assert redis_lab.log("job")[1].at < redis_lab.log("other")[0].at
        assert redis_lab.runs("other") == list(range(10))
        assert "start behind the unlimited" not in worker.output


def revoke(lab, worker, request, jobs):
    lab.app.control.revoke(jobs[0].id)
    return {0}


def kill_a_child(lab, worker, request, jobs):
    processes = stats(lab, worker)["pool"]["processes"]
    os.kill(processes[0], signal.SIGKILL)
    return set()


def grow(lab, worker, request, jobs):
    lab.app.control.pool_grow(1, destination=[worker.node])
    return set()


def lose_connections(lab, worker, request, jobs):
    break_connections(lab, request)
    return set()


@pytest.mark.parametrize(
    ("pool", "happens"),
    [
        ("prefork", revoke),
        ("prefork", kill_a_child),
        ("prefork", grow),
        ("prefork", lose_connections),
        ("threads", lose_connections),
    ],
)
def test_what_happens_to_a_job_that_waits_for_a_slot(redis_lab, pool, happens, request):
    """All others run, once each, whatever becomes of the one that was let go and has not started."""
    lab = redis_lab
    with start(lab, pool=pool, limits=(limit(rate=5),)) as worker:
        occupy(lab)
        jobs = [lab.send("job", number) for number in range(8)]
        wait_for(lambda: held(lab, worker, "job") == 7)
        assert not lab.runs("job")
        gone = happens(lab, worker, request, jobs)
        wait_for(lambda: set(lab.runs("job")) == set(range(8)) - gone)
        time.sleep(0.5)  # for a second run of one
        assert sorted(lab.runs("job")) == sorted(set(range(8)) - gone)
    assert excess([entry.at for entry in lab.log("job")], 5) < 4


def test_held_jobs_do_not_make_the_pool_grow(redis_lab):
    """--autoscale counts what is for the pool; held jobs are reserved, and not counted."""
    lab = redis_lab
    bound = limit("job", 1, 1e-4, max_held=100)
    with start(lab, "--autoscale=4,1", pool="prefork", limits=(bound,)) as worker:
        for number in range(40):
            lab.send("job", number)
        wait_for(lambda: held(lab, worker, "job") == 39)
        assert len(lab.inspect(worker, "reserved")) == 39
        now = stats(lab, worker)["autoscaler"]
        assert (now["current"], now["qty"]) == (1, 0)
        for _ in range(8):
            lab.send("busy", 0.5)
        wait_for(lambda: lab.log("concurrency")[15:])
        assert at_once(lab.log("concurrency")) > 1
        assert stats(lab, worker)["autoscaler"]["current"] > 1


def test_a_celery_without_its_private_names_is_told_of(caplog):
    """Where a pool keeps its jobs otherwise than known, the worker warns at start, once, and runs."""
    caplog.set_level(logging.WARNING, "rate_limiter")

    class Consumer:
        class pool:  # noqa: N801
            executor = object()

    assert slots._line_of(Consumer) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "start behind the unlimited jobs that wait" in record.getMessage()
