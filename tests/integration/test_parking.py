"""Jobs of limits with overflow="park" wait in the broker, aside, and come back when their tokens do."""

import pytest
from limits import declare, limit, start

PARKED = (limit(rate=4, overflow="park"),)


@pytest.fixture(params=["redis", "rabbitmq", "quorum"])
def place(request):
    """Return a lab, and a queue of it on each kind of broker."""
    lab = request.getfixturevalue("redis_lab" if request.param == "redis" else "rabbitmq_lab")
    name = lab.settings["task_default_queue"]
    queue = (f"{name}-q", f"{name}-jobs", "direct", "key", request.param == "quorum")
    declare(lab, queue)
    return lab, queue


def send(place, task, *numbers, **options):
    """Send jobs to the queue."""
    lab, queue = place
    for number in numbers:
        lab.send(task, number, exchange=queue[1], routing_key=queue[3], **options)


def run(place, *arguments, limits=PARKED, **options):
    """Start a worker of the queue."""
    lab, queue = place
    return start(lab, *arguments, limits=limits, queues=(queue,), **options)


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_jobs_behind_parked_ones_run(place, pool):
    """Unlimited jobs pass many limited ones; these run in order, once each, at their rate."""
    lab, _ = place
    send(place, "job", *range(200))
    send(place, "other", *range(30))
    with run(place, pool=pool) as worker:
        assert sorted(lab.wait_for_runs("other", 30)) == list(range(30))
        seen = len(lab.runs("job"))
        assert seen < 100
        assert lab.wait_for_runs("job", seen + 12) == list(range(len(lab.runs("job"))))
    lab.assert_bound("job", capacity=1, rate=4)
    assert "Traceback" not in worker.output
