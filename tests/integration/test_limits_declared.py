"""Limits from settings, task annotations and queues, in a worker."""

import time

import pytest
from harness import Lab, wait_for
from limits import control, declare, fail_at_start, limit, start


def test_settings_and_annotations_are_enforced(redis_lab):
    """rate_limiter_limits, and rate_limiter_limit in task_annotations, are limits like any other."""
    settings = {
        "rate_limiter_limits": {"jo?": {"rate": "240/m", "burst": 2}, "nobody.*": "1/s"},
        "task_annotations": {"other": {"rate_limiter_limit": 5}},
    }
    with start(redis_lab, pool="prefork", **settings) as worker:
        sent = time.monotonic()
        for number in range(7):
            redis_lab.send("job", number)
            redis_lab.send("other", number)
            redis_lab.send("free", number)
        redis_lab.wait_for_runs("job", 7)
        redis_lab.wait_for_runs("other", 7)
    for name, capacity, rate in ("job", 2, 4), ("other", 1, 5):
        for count, run in enumerate(redis_lab.log(name), 1):
            assert run.at - sent >= (count - capacity) / rate - 1e-6
    assert redis_lab.log("free")[-1].at < redis_lab.log("job")[-1].at
    (warning,) = [line for line in worker.output.splitlines() if "nobody.*" in line]
    assert "WARNING" in warning
    assert "matches no registered task" in warning


def test_a_deploy_is_no_burst(redis_lab):
    """Jobs that wait for two new workers run at twice the rate from the start, not as two bursts."""
    for number in range(12):
        redis_lab.send("job", number)
    limits = {"jo?": {"rate": "2/s", "burst": 50, "initial": 0}}
    deployed = time.monotonic()
    with (
        start(redis_lab, rate_limiter_limits=limits),
        start(redis_lab, rate_limiter_limits=limits),
    ):
        assert sorted(redis_lab.wait_for_runs("job", 12)) == list(range(12))
    for count, run in enumerate(redis_lab.log("job"), 1):
        assert run.at - deployed >= count / 4 - 1e-6


@pytest.mark.parametrize(
    "setting", [{"worker_prefetch_multiplier": 0}, {"worker_disable_prefetch": True}]
)
def test_what_would_hold_without_bound_is_refused_at_start(tmp_path, setting):
    """Limits that make jobs wait, whatever the policy; not those that hold nobody."""
    lab = Lab(tmp_path, "redis://localhost:1")
    holds = limit("free", max_wait=60, when_limited="drop")
    assert "set" in fail_at_start(start(lab, limits=(holds,), module="limits_app", **setting))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate_limiter_limits": {"job": "fast"}}, "rate_limiter_limits['job']: rate must be"),
        (
            {"rate_limiter_limits": {"job": {"rate": 1, "bust": 2}}},
            "rate_limiter_limits['job']: unknown",
        ),
        ({"rate_limiter_limit": {"job": "1/s"}}, "rate_limiter_limit: unknown setting"),
        (
            {"task_annotations": {"job": {"rate_limiter_limit": "0/s"}}},
            "rate_limiter_limit of job: rate must be",
        ),
        ({"worker_prefetch_multiplier": 0}, "worker_prefetch_multiplier is 0"),
        ({"worker_disable_prefetch": True}, "worker_disable_prefetch is set"),
    ],
    ids=["rate", "option", "setting", "annotation", "no prefetch bound", "no prefetch"],
)
def test_what_cannot_be_enforced_is_refused_at_start(tmp_path, settings, message):
    """A worker with a wrong or unknown setting does not start, and says which it is."""
    lab = Lab(tmp_path, "redis://localhost:1")  # nobody connects
    assert message in fail_at_start(start(lab, limits=(limit("free"),), **settings))


TOPICS = (("slow", "jobs", "topic", "jobs.slow.*", False), ("fast", "jobs", "topic", "#.fast", False))
#: Each queue is bound with the name of the other.
CROSSED = (("slow", "jobs", "direct", "fast", False), ("fast", "jobs", "direct", "slow", False))


@pytest.mark.parametrize(
    ("lab", "queues", "slow", "fast"),
    [("redis", CROSSED, "fast", "slow"), ("rabbitmq", TOPICS, "jobs.slow.eu", "jobs.fast")],
    indirect=["lab"],
)
def test_a_limit_of_a_queue_is_for_what_was_consumed_from_it(lab, queues, slow, fast):
    """queue=… is the queue that the worker consumed the job from, whatever the routing key."""
    queues = tuple((f"{name}-{lab.settings['task_default_queue']}", *rest) for name, *rest in queues)
    exchange = f"jobs-{lab.settings['task_default_queue']}"
    queues = tuple((name, exchange, *rest) for name, _, *rest in queues)
    declare(lab, *queues)
    for number in range(8):
        lab.send("job", number, exchange=exchange, routing_key=slow)
        lab.send("job", 100 + number, exchange=exchange, routing_key=fast)
    with start(lab, queues=queues, limits=(limit("queue", 1, 4, queue=queues[0][0]),)):
        lab.wait_for_runs("job", 16)
    runs = lab.log("job")
    assert sorted(run.value for run in runs) == [*range(8), *range(100, 108)]
    assert lab.taken("queue") == [1] * 8
    taken = lab.log("queue taken")
    slow_runs = [run for run in runs if run.value < 100]
    assert all(paid.at <= run.at for run, paid in zip(slow_runs, taken, strict=True))
    fast_runs = [run for run in runs if run.value >= 100]
    assert fast_runs[-1].at < slow_runs[-1].at
    for number, run in enumerate(slow_runs):
        assert run.at - taken[0].at >= number / 4 - 1e-6


def test_a_paused_queue_stays_limited(lab):
    """What is consumed after a pause is known by its queue still."""
    name = lab.settings["task_default_queue"]
    exchange = f"jobs-{name}"
    queues = (
        (f"slow-{name}", exchange, "direct", f"fast-{name}", False),
        (f"fast-{name}", exchange, "direct", f"slow-{name}", False),
    )
    declare(lab, *queues)
    for number in range(60):
        lab.send("job", number, exchange=exchange, routing_key=f"fast-{name}")
    bound = limit("queue", 1, 40, queue=queues[0][0], max_held=16, overflow="pause")
    with start(lab, concurrency=1, queues=queues, limits=(bound,)) as worker:
        wait_for(lambda: "Paused queue" in worker.output)
        for number in range(100, 130):
            lab.send("job", number, exchange=exchange, routing_key=f"slow-{name}")
        lab.wait_for_runs("job", 90)
    runs = lab.runs("job")
    assert [number for number in runs if number < 100] == list(range(60))
    assert [number for number in runs if number >= 100] == list(range(100, 130))
    assert runs[-1] == 59
    assert lab.taken("queue") == [1] * 60
    assert f"Resumed queue {queues[0][0]}" in worker.output


def test_a_queue_that_is_added_later_is_known(lab):
    """`celery control add_consumer`: what comes from the new queue is limited by it, not by its key."""
    name = lab.settings["task_default_queue"]
    late = f"late-{name}"
    declare(lab, (late, late, "direct", name, False))
    with start(lab, limits=(limit("queue", 1, 10, queue=late),)) as worker:
        control(lab, worker, "add_consumer", queue=late, exchange=late, routing_key=name)
        wait_for(lambda: f"Started consuming from {late}" in worker.output)
        for number in range(6):
            lab.send("job", number, exchange=late, routing_key=name)
        assert lab.wait_for_runs("job", 6) == list(range(6))
    assert lab.taken("queue") == [1] * 6
    lab.assert_bound("queue", capacity=1, rate=10)
