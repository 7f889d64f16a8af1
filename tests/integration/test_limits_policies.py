"""What becomes of jobs that are not to wait; what a job costs; jobs that cannot be ended."""

import contextlib

import pytest
from celery import chord
from celery.exceptions import ChordError, TaskRevokedError
from harness import DEADLINE, Lab, wait_for
from limits import held, limit, start, stats, unacknowledged, waiting

from rate_limiter import RateLimitExceeded


@pytest.fixture(scope="module")
def shared(redis_url, tmp_path_factory):
    """Yield a lab and a prefork worker that runs through the whole module."""
    url = redis_url()
    lab = Lab(tmp_path_factory.mktemp("shared"), url, url)
    with start(lab, pool="prefork") as worker:
        yield lab, worker
    lab.close()


def members(lab, task, count):
    """Return signatures of a task."""
    return [lab.app.signature(task, args=(number,)) for number in range(count)]


def send_chord(lab, task, count):
    """Send a chord whose body returns what its members have returned."""
    return chord(members(lab, task, count), app=lab.app)(lab.app.signature("total"))


@pytest.fixture(params=["gate", "decorator"])
def retrying(request):
    """Return a lab, a worker that sends jobs back, and what brings their runs into order.

    The gate keeps their order. In the decorator each pool process gives turns of its own.
    """
    if request.param == "gate":
        return *request.getfixturevalue("shared"), list
    lab = request.getfixturevalue("redis_lab")
    worker = request.getfixturevalue("stack").enter_context(start(lab, gate=False))
    return lab, worker, sorted


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


def test_a_job_that_is_sent_back_comes_in_its_turn(retrying):
    """when_limited="retry": each job runs once; that is no retry, and a chord completes."""
    lab, worker, ordered = retrying
    body = send_chord(lab, "sent back", 4)
    assert body.get(DEADLINE) == [[number, 0] for number in range(4)]
    assert ordered(lab.runs("sent back")) == list(range(4))
    assert lab.taken("sent back") == [1] * 4
    lab.assert_bound("sent back", capacity=1, rate=1)
    assert worker.output.count("Sent back sent back[") >= 3
    wait_for(lambda: not unacknowledged(lab))


def test_a_job_that_is_dropped_is_revoked(shared):
    """when_limited="drop": TaskRevokedError is its result, and its chord fails rather than hangs."""
    lab, worker = shared
    results = [lab.send("dropped", number) for number in range(4)]
    for result in results[:2]:
        assert result.get(DEADLINE) is None
    for result in results[2:]:
        with pytest.raises(TaskRevokedError, match="rate limit exceeded: dropped"):
            result.get(DEADLINE)
        wait_for(lambda line=f"Dropped dropped[{result.id}]": line in worker.output)
    with pytest.raises(ChordError, match="rate limit exceeded: dropped"):
        lab.app.AsyncResult(send_chord(lab, "dropped", 2).id).get(DEADLINE)
    assert sorted(lab.runs("dropped")) == [0, 1]
    wait_for(lambda: not unacknowledged(lab))


def test_a_job_that_is_refused_fails_in_its_task(shared):
    """when_limited="raise": RateLimitExceeded with retry_after, as if the task had raised it."""
    lab, _ = shared
    results = [lab.send("refused", number) for number in range(4)]
    for result in results[:2]:
        assert result.get(DEADLINE) is None
    for result in results[2:]:
        with pytest.raises(RateLimitExceeded, match="rate limit exceeded: refused") as error:
            result.get(DEADLINE)
        assert 0 < error.value.retry_after <= 100
    assert sorted(lab.runs("refused")) == [0, 1]
    wait_for(lambda: len(lab.runs("failed")) == 2)  # told after the result is there
    for name, error, process in lab.runs("failed"):
        assert (name, error) == ("refused", "RateLimitExceeded")
        assert process.startswith("ForkPoolWorker")
    wait_for(lambda: not unacknowledged(lab))


def test_bucket_and_cost_come_from_the_job(shared):
    """A callable picks the bucket, another the cost, from a header that the producer sent."""
    lab, _ = shared
    for number, weight in enumerate([3, 2, 1, 3]):
        lab.send("tiered", "free", number, headers={"weight": weight, "headers": "one of them"})
    for number, weight in enumerate([5, 7, 10, 1]):
        lab.send("tiered", "premium", number, headers={"weight": weight})
    lab.send("tiered", "premium", 4)
    runs = lab.wait_for_runs("tiered", 9)
    assert lab.taken("free tier") == [3, 2, 1, 3]
    assert lab.taken("premium") == [5, 7, 10, 1, 1]
    assert runs[-1] == ["free", 3]  # nobody's way but its own tier's


def test_a_slow_callable_is_told_of_once(shared):
    """A callable that takes over 50 ms is logged, once per limit."""
    lab, worker = shared
    for number in range(3):
        lab.send("sluggish", number)
    lab.wait_for_runs("sluggish", 3)
    (line,) = [line for line in worker.output.splitlines() if "its callable took" in line]
    assert "WARNING" in line
    assert "Limit sluggish" in line


@pytest.mark.parametrize("ends", ["there", "elsewhere"])
def test_a_job_that_cannot_be_ended_stops_nobody(redis_lab, ends):
    """With the result backend down a job cannot be dropped; others go on, and it ends later."""
    lab, down = redis_lab, redis_lab.folder / "runs.down"
    for number in range(2):
        lab.send("dropped", number, ignore_result=True)
    with start(lab, limits=(limit("job"),)) as worker:
        lab.wait_for_runs("dropped", 2)
        down.touch()
        job = lab.send("dropped", 2)
        for number in range(5):
            lab.send("job", number)
        assert sorted(lab.wait_for_runs("job", 5)) == list(range(5))
        wait_for(lambda: f"Could not end dropped[{job.id}] yet" in worker.output)
        assert unacknowledged(lab) == 1
        if ends == "there":
            down.unlink()
            wait_for(job.ready)
            wait_for(lambda: not unacknowledged(lab))
        worker.stop()
    if ends == "elsewhere":
        down.unlink()
        with start(lab):  # with full buckets
            wait_for(job.ready)
    assert job.state == {"there": "REVOKED", "elsewhere": "SUCCESS"}[ends]


@pytest.mark.parametrize("policy", ["wait", "drop"])
def test_max_wait(lab, policy):
    """Jobs wait for so long; those whose tokens come later end at once, and cost nothing."""
    patient = limit(capacity=1, rate=2, max_wait=2.2, when_limited=policy)
    with start(lab, limits=(patient,)) as worker:
        for number in range(12):
            lab.send("job", number)
        wait_for(lambda: stats(lab, worker)["rate_limiter"]["limits"]["job"]["refused"] >= 6)
        lab.wait_for_runs("job", 5)
        wait_for(lambda: not held(lab, worker))
    ran = lab.runs("job")
    assert ran == list(range(len(ran)))
    assert 5 <= len(ran) <= 6
    assert waiting(lab) == 0
