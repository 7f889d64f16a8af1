"""Held jobs that leave before their turn: held for too long, or for a worker that starts later."""

import time
from collections import Counter

import pytest
from harness import wait_for
from kombu_lab import Worker as Consumer
from kombu_lab import running
from limits import declare, fail_at_start, held, limit, start, stats, unacknowledged, waiting
from queue_specs import entity

from rate_limiter import TokenBucket
from rate_limiter.gating.tally import tally_of
from rate_limiter.kombu import Gate

#: The prefetch count of a worker with two slots. A bound may be exceeded by so many.
WINDOW = 8

QUORUM = {"x-queue-type": "quorum", "x-delivery-limit": 2}

KINDS = {"classic": {}, "quorum": QUORUM}


def queue_of(lab, kind):
    """Declare a queue of a kind, and have the producer send to it."""
    name = lab.settings["task_default_queue"]
    spec = (name, "", "direct", name, {"queue_arguments": KINDS[kind]})
    declare(lab, spec)
    lab.app.conf.task_queues = [entity(spec)]
    return spec


def counts(lab, worker):
    return stats(lab, worker)["rate_limiter"]["limits"]["job"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_no_job_is_held_for_longer(rabbitmq_lab, kind, pool):
    """It goes to the end of its queue, more often than a delivery limit allows, and runs once."""
    lab = rabbitmq_lab
    queue = queue_of(lab, kind)
    for number in range(8):
        lab.send("job", number)
    slow = limit(rate=1.5)
    options = {"rate_limiter_longest_hold": 0.4}
    with start(lab, pool=pool, limits=(slow,), queues=(queue,), **options) as worker:
        lab.wait_for_runs("job", 8)
        wait_for(lambda: not held(lab, worker))
        told = counts(lab, worker)
        time.sleep(0.5)  # for copies
    assert sorted(lab.runs("job")) == list(range(8))
    assert told["returned"] > 8 * QUORUM["x-delivery-limit"]
    assert (told["admitted"], told["tokens"]) == (8, 8)
    assert told["longest"] < 1
    assert "Traceback" not in worker.output
    assert waiting(lab) == 0
    lab.assert_bound("job", capacity=1, rate=1.5)


def test_a_job_that_was_sent_back_is_not_held_for_longer(rabbitmq_lab):
    """RabbitMQ: one whose tokens are far away comes again and again, and is not held in between."""
    lab = rabbitmq_lab
    bound = limit(rate=0.01, when_limited="retry")
    with start(lab, limits=(bound,), rate_limiter_longest_hold=1) as worker:
        for number in range(4):
            lab.send("job", number)
        wait_for(lambda: counts(lab, worker)["refused"] >= 9)
        now = counts(lab, worker)
        assert (now["admitted"], now["returned"]) == (1, 0)


def test_redis_needs_no_longest_hold(redis_lab):
    """Redis: the lease of a held job is renewed, and it keeps its place."""
    lab = redis_lab
    for number in range(6):
        lab.send("job", number)
    with start(lab, limits=(limit(rate=3),), rate_limiter_longest_hold=0.2) as worker:
        assert lab.wait_for_runs("job", 6) == list(range(6))
        assert counts(lab, worker)["returned"] == 0


@pytest.mark.parametrize("value", [0, -1, "soon", float("nan")])
def test_a_wrong_longest_hold_ends_the_worker_at_its_start(redis_lab, value):
    """The error names the setting and the value."""
    output = fail_at_start(start(redis_lab, rate_limiter_longest_hold=value))
    assert "rate_limiter_longest_hold must be" in output
    assert repr(value) in output


@pytest.mark.parametrize("setting", ["rate_limiter_enabled", "rate_limiter_control"])
@pytest.mark.parametrize("value", ["false", 0, None])
def test_a_switch_that_is_neither_on_nor_off_ends_the_worker_at_its_start(redis_lab, setting, value):
    """The text "false", from an environment variable say, would count as on."""
    output = fail_at_start(start(redis_lab, **{setting: value}))
    assert f"{setting} must be True or False, not {value!r}" in output


@pytest.mark.parametrize("value", [0, -1, "soon", float("nan"), None])
def test_a_wrong_longest_hold_of_a_gate_is_refused(value):
    """kombu: at the line where it is written."""
    with pytest.raises((TypeError, ValueError), match=r"longest_hold must be .*" + repr(value)):
        Gate(longest_hold=value)


@pytest.mark.parametrize("kind", KINDS)
def test_no_message_is_held_for_longer(rabbitmq_broker, kind):
    """kombu: it goes to the end of its queue as it came, and runs once."""
    broker = rabbitmq_broker
    queue = broker.queue(queue_arguments=KINDS[kind])
    broker.send(queue, *range(8), headers={"size": 3}, priority=2, correlation_id="one")
    gate = Gate(longest_hold=0.4)
    gate.limit(queue.name, bucket=TokenBucket(1, 1.5))
    with running(Consumer(broker, gate, queue)) as worker:
        worker.wait_for_runs(8)
        time.sleep(0.5)  # for copies
    assert sorted(worker.ran) == list(range(8))
    assert tally_of(*gate.limits).snapshot()["returned"] > 8 * QUORUM["x-delivery-limit"]
    for message in worker.messages:
        assert message.headers == {"size": 3}
        assert not message.delivery_info["redelivered"]
        assert (message.properties["priority"], message.properties["correlation_id"]) == (2, "one")
    assert broker.waiting(queue) == 0


@pytest.mark.parametrize(
    ("kind", "pool"),
    [("redis", "prefork"), ("redis", "gevent"), ("classic", "threads"), ("quorum", "prefork")],
)
def test_a_worker_that_starts_later_gets_its_share(request, kind, pool):
    """One worker holds all jobs; it gives the other one the later half, and all run once."""
    lab = request.getfixturevalue("redis_lab" if kind == "redis" else "rabbitmq_lab")
    queues = () if kind == "redis" else (queue_of(lab, kind),)
    options = {"pool": pool, "limits": (limit(rate=4),), "queues": queues, "gossip": True}
    for number in range(80):
        lab.send("job", number)
    with start(lab, **options) as one:
        wait_for(lambda: not waiting(lab) and held(lab, one))
        before = held(lab, one)
        with start(lab, **options) as two:
            wait_for(lambda: "held jobs stay here, other workers get the rest" in one.output)
            wait_for(lambda: held(lab, two) >= WINDOW)
            assert held(lab, one) <= before / 2 + WINDOW
            lab.wait_for_runs("job", 80)
            by = Counter(lab.runs("job by"))
            returned = counts(lab, one)["returned"]
            if kind == "redis":
                wait_for(lambda: not unacknowledged(lab))
    assert sorted(lab.runs("job")) == list(range(80))
    assert min(by.values()) >= WINDOW
    assert returned >= WINDOW
    if kind != "quorum":  # there they go to the end of the queue
        kept = [number for number in lab.runs("job") if number < before / 2 - WINDOW]
        assert kept == list(range(len(kept)))


def test_without_gossip_a_worker_keeps_what_it_holds(redis_lab):
    """Nobody tells it of the other one."""
    lab = redis_lab
    for number in range(20):
        lab.send("job", number)
    slow = limit(rate=1e-3, max_held=100)
    with start(lab, limits=(slow,)) as one:
        wait_for(lambda: held(lab, one) == 19)
        with start(lab, limits=(slow,), gossip=True):
            time.sleep(2)
            assert held(lab, one) == 19
