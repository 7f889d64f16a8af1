"""What the gate does with each kind of job and limit, and in each kind of trouble."""

import time

import pytest
from celery.exceptions import TaskRevokedError
from harness import DEADLINE, Lab, at_once, wait_for
from limits import break_connections, control, held, stats


@pytest.fixture(scope="module")
def shared(redis_url, tmp_path_factory):
    """Yield a lab and a prefork worker that runs through the whole module."""
    url = redis_url()
    lab = Lab(tmp_path_factory.mktemp("shared"), url, url)
    with lab.worker("prefork") as worker:
        yield lab, worker
    lab.close()


def test_weights_come_from_the_arguments(shared):
    """A job pays what tokens=… says of its arguments."""
    lab, _ = shared
    sizes = [5, 5, 2, 8, 1, 10, 3]
    for number, size in enumerate(sizes):
        lab.send("upload", number, size)
    lab.wait_for_runs("upload", len(sizes))
    assert lab.taken("upload") == sizes
    lab.assert_bound("upload", capacity=10, rate=40)


def test_tasks_named_by_a_pattern_share_a_bucket(shared):
    """gate.limit("mail.*") is one limit for all the tasks it matches."""
    lab, _ = shared
    for number in range(6):
        lab.send("mail.send" if number % 2 else "mail.print", number)
    assert lab.wait_for_runs("mail", 6) == list(range(6))
    assert lab.taken("mail") == [1] * 6
    lab.assert_bound("mail", capacity=1, rate=10)


def test_a_pattern_never_matches_celerys_own_tasks(shared):
    """gate.limit("ce*") leaves celery.* alone."""
    lab, _ = shared
    for _ in range(3):
        assert lab.send("celery.accumulate", 1, 2).get(DEADLINE) == [1, 2]
    lab.send("cello")
    lab.wait_for_runs("cello", 1)
    assert lab.taken("cello") == [1]


def test_two_limits_on_one_task_are_both_paid(shared):
    """A job takes from each of its buckets; what it took in vain it gives back."""
    lab, _ = shared
    for number in range(12):
        lab.send("both", number)
    assert sorted(lab.wait_for_runs("both", 12)) == list(range(12))
    assert sum(lab.taken("both")) == 12
    refunded = sum(lab.runs("both by name refunded"))
    assert refunded
    assert sum(lab.taken("both by name")) - refunded == 12
    lab.assert_bound("both", capacity=2, rate=20)


def test_revoked_and_expired_jobs_cost_nothing(shared):
    """A job that is revoked or expires while held vanishes, and leaves no gap."""
    lab, worker = shared
    options = {2: {"expires": 0.4}}
    results = [lab.send("slow", number, **options.get(number, {})) for number in range(6)]
    wait_for(lambda: f"{results[-1].id}] received" in worker.output)
    for number in 3, 4:
        results[number].revoke()
    assert lab.wait_for_runs("slow", 3) == [0, 1, 5]
    assert lab.taken("slow") == [1, 1, 1]
    _, before, after = lab.log("slow taken")
    assert after.at - before.at < 2 * 0.5  # one interval and slack; four with the three jobs paid
    for number in 2, 3, 4:
        with pytest.raises(TaskRevokedError):
            results[number].get(DEADLINE)


def test_jobs_with_an_eta_come_through_the_gate(shared):
    """A countdown ends at the gate, not behind it; nothing of it stays in the prefetch count."""
    lab, worker = shared
    before, sent = len(lab.taken("limited")), time.monotonic()
    for number in range(12):
        lab.send("limited", number, countdown=0.5)
    lab.wait_for_runs("limited", before + 12)
    assert len(lab.taken("limited")) == before + 12
    assert lab.log("limited taken")[before].at >= sent + 0.5
    lab.assert_bound("limited", capacity=2, rate=20)
    wait_for(lambda: stats(lab, worker)["prefetch_count"] == 2 * 4)


def test_held_jobs_are_visible_and_leave_the_prefetch_count_as_it_was(redis_lab):
    """`inspect reserved` shows held jobs; the prefetch count rises with them, and comes back."""
    for number in range(120):  # 6 s: the worker answers late on a busy machine
        redis_lab.send("limited", number)
    with redis_lab.worker("prefork") as worker:
        wait_for(lambda: stats(redis_lab, worker)["prefetch_count"] > 20)
        assert len(redis_lab.inspect(worker, "reserved")) > 10
        redis_lab.wait_for_runs("limited", 120)
        wait_for(lambda: stats(redis_lab, worker)["prefetch_count"] == 8)
        assert redis_lab.inspect(worker, "reserved") == []
        assert held(redis_lab, worker) == 0


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("raises", "no price"),
        ("zero", "0"),
        ("negative", "-1"),
        ("nan", "nan"),
        ("text", "'many'"),
        ("none", "None"),
        ("too many", "11"),
    ],
)
def test_a_bad_cost_fails_that_job_alone(shared, kind, value):
    """A cost that cannot be paid is a ValueError for its job; the others go on."""
    lab, _ = shared
    good, bad, other = lab.send("priced", "one"), lab.send("priced", kind), lab.send("priced", "one")
    with pytest.raises(ValueError, match="task priced, limit price list: tokens") as error:
        bad.get(DEADLINE)
    assert value in str(error.value)
    assert good.get(DEADLINE) == other.get(DEADLINE) == "one"
    assert kind not in lab.runs("priced")


def test_the_start_is_announced(shared):
    """One INFO line per limit at start, and a warning where Celery's own rate_limit is set too."""
    lines = shared[1].output.splitlines()
    for name, tasks in (
        ("megabytes", "upload"),
        ("limited", "limited"),
        ("mail.*", "mail.print, mail.send"),
    ):
        (line,) = [line for line in lines if f"Limit {name}:" in line and "enforced" in line]
        assert "INFO" in line
        assert f"for {tasks}, enforced at the gate" in line
    (warning,) = [line for line in lines if "rate_limit=" in line]
    assert "WARNING" in warning
    assert "doubly also has Celery's rate_limit='1000/s'" in warning


def test_no_limit_is_declared_in_a_pool_child(shared):
    """limit() once the worker runs is a RuntimeError, in its children too."""
    assert "before the worker starts" in shared[0].send("declare").get(DEADLINE)


def test_limits_can_be_lifted(redis_lab):
    """rate_limiter_enabled=False: no job pays, in the gate or in the decorator."""
    for number in range(5):
        redis_lab.send("hourly", number)
        redis_lab.send("mail.send", number)
        redis_lab.send("strict", number)
    with redis_lab.worker("threads", rate_limiter_enabled=False) as worker:
        for name in "hourly", "mail", "strict":
            redis_lab.wait_for_runs(name, 5)
            assert redis_lab.taken(name) == []
        assert "rate_limiter_enabled is false" in worker.output


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_eta_jobs_without_an_event_loop(filesystem_lab, pool):
    """Where Celery's timer is a thread, ETA jobs pay, and solo still runs one job at a time."""
    lab, sent = filesystem_lab, time.monotonic()
    with lab.worker(pool):
        for number in range(10):
            lab.send("limited", number, countdown=1.5)
        wait_for(lambda: time.monotonic() > sent + 1)
        lab.send("busy", 1.5)  # it runs while the ETAs come
        lab.wait_for_runs("limited", 10)
        wait_for(lambda: lab.log("concurrency")[-1].value == "end")
    assert sorted(lab.runs("limited")) == list(range(10))
    assert lab.log("limited")[0].at >= sent + 1.5
    assert len(lab.taken("limited")) == 10
    lab.assert_bound("limited", capacity=2, rate=20)
    if pool == "solo":
        assert at_once(lab.log("concurrency")) == 1


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_warm_shutdown_gives_held_jobs_back(redis_lab, pool):
    """Whatever is held at shutdown runs in the next worker: none is lost, none runs twice."""
    for number in range(30):
        redis_lab.send("limited", number)
    with redis_lab.worker(pool) as first:
        redis_lab.wait_for_runs("limited", 5)
        first.stop()
        assert first.process.returncode == 0
    ran = len(redis_lab.runs("limited"))
    assert ran < 30
    assert "held jobs back to the broker" in first.output
    with redis_lab.worker(pool):
        redis_lab.wait_for_runs("limited", 30)
        time.sleep(0.3)  # for a second run of one
    assert sorted(redis_lab.runs("limited")) == list(range(30))


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_lost_connection_loses_no_job(lab, pool, request):
    """Jobs that are held as the connection breaks are forgotten; the broker delivers them again."""
    for number in range(60):
        lab.send("limited", number)
    with lab.worker(pool) as worker:
        control(lab, worker, "limit", name="limited", pause=600)  # rabbitmqctl takes seconds
        # None is under way then: kombu's Redis transport pops a job before it books it.
        wait_for(lambda: worker.output.count(" received") == 60)
        break_connections(lab, request)
        wait_for(lambda: "held jobs back to the broker" in worker.output)
        control(lab, worker, "limit", name="limited", resume=True)
        wait_for(lambda: set(lab.runs("limited")) == set(range(60)))
        time.sleep(0.3)  # for a second run of one
    # At-least-once: the acknowledgement of a job that was running may have been under way.
    assert len(lab.runs("limited")) <= 60 + 2
    lab.assert_bound("limited", capacity=2, rate=20)
