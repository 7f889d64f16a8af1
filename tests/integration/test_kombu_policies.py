"""What becomes of messages that a limit does not let wait, or that cannot be priced."""

import copy
import logging
import sys
import time
from collections import Counter, defaultdict

import pytest
from harness import wait_for
from kombu import Exchange
from kombu_lab import RawWorker, Worker, gate_for, running

from rate_limiter import RateLimitExceeded, TokenBucket
from rate_limiter.gating.tally import tally_of
from rate_limiter.kombu import Gate


def interrupt(error=KeyboardInterrupt):
    """Raise an error; here it is the consumer's thread, which no signal interrupts."""
    raise error


@pytest.fixture
def dead_letters(rabbitmq_broker):
    """Return a queue, and another that gets what it rejects."""
    dead = rabbitmq_broker.queue("dead")
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead.name}
    queue = rabbitmq_broker.queue(queue_arguments=arguments)
    rabbitmq_broker.declare(dead)
    return queue, dead


def test_drop_rejects(rabbitmq_broker, dead_letters, caplog):
    """What is dropped is rejected without being requeued, so it is dead-lettered; one line says so."""
    caplog.set_level(logging.INFO, "rate_limiter")
    queue, dead = dead_letters
    rabbitmq_broker.send(queue, *(f"secret{number}" for number in range(6)))
    gate = gate_for(queue, TokenBucket(2, 0.001), when_limited="drop")
    with running(Worker(rabbitmq_broker, gate, queue)) as worker:
        wait_for(lambda: rabbitmq_broker.waiting(dead) == 4)
        assert worker.ran == ["secret0", "secret1"]
    assert worker.refused == []
    assert caplog.text.count(f"Dropped a message of queue {queue.name}") == 4
    assert "secret" not in caplog.text


def test_drop_on_redis(redis_broker):
    """Redis has no dead letters: what is dropped is gone."""
    queue = redis_broker.queue()
    redis_broker.send(queue, *range(6))
    gate = gate_for(queue, TokenBucket(2, 0.001), when_limited="drop")
    with running(Worker(redis_broker, gate, queue)) as worker:
        worker.wait_for_runs(2)
        wait_for(lambda: not redis_broker.waiting(queue) and not redis_broker.unacknowledged())
    assert worker.ran == [0, 1]


@pytest.mark.parametrize("kind", [Worker, RawWorker])
def test_raise_tells_and_rejects(rabbitmq_broker, dead_letters, kind):
    """The hook gets the message and RateLimitExceeded with retry_after; then the message is rejected."""
    queue, dead = dead_letters
    rabbitmq_broker.send(queue, *range(4))
    gate = gate_for(queue, TokenBucket(1, 0.01), when_limited="raise")
    with running(kind(rabbitmq_broker, gate, queue)) as worker:
        wait_for(lambda: rabbitmq_broker.waiting(dead) == 3)
    assert worker.ran == [0]
    assert [body for body, _ in worker.refused] == [1, 2, 3]
    for _, error in worker.refused:
        assert isinstance(error, RateLimitExceeded)
        assert (str(error), 99 < error.retry_after <= 100) == ("rate limit exceeded: limit", True)


def test_hook_may_settle_the_message(broker):
    """What the hook has acknowledged, rejected or requeued stays as it is."""
    queue, other = broker.queue(), broker.queue("other")
    broker.declare(other)
    broker.send(queue, *range(4))
    gate = gate_for(queue, TokenBucket(1, 0.01), when_limited="raise")
    worker = Worker(broker, gate, queue)

    def hook(message, _error):
        with broker.connection() as connection:  # it runs in the consumer's thread
            connection.Producer().publish(message.payload, routing_key=other.name)
        message.ack()

    worker.on_refused = hook
    with running(worker):
        wait_for(lambda: broker.waiting(other) == 3)
        broker.send(queue, "more")
        wait_for(lambda: broker.waiting(other) == 4)
    assert worker.ran == [0]
    assert broker.waiting(queue) == 0


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
def test_hook_that_fails(rabbitmq_broker, dead_letters, caplog, error):
    """A hook that raises is logged; its message is rejected all the same, and the consumer goes on."""
    queue, dead = dead_letters
    rabbitmq_broker.send(queue, *range(3))
    gate = gate_for(queue, TokenBucket(1, 0.01), when_limited="raise")
    worker = Worker(rabbitmq_broker, gate, queue)
    worker.on_refused = lambda *_: interrupt(error)
    with running(worker):
        wait_for(lambda: rabbitmq_broker.waiting(dead) == 2)
    assert caplog.text.count("on_refused failed") == 2


@pytest.mark.parametrize("kind", [Worker, RawWorker])
def test_retry_gives_each_a_turn(broker, kind):
    """Each runs once, at the rate; a message is delivered twice or so, and not again and again."""
    queue = broker.queue()
    broker.send(queue, *range(20))
    arrivals = Counter()

    def price(body, message):
        arrivals[body] += 1
        return 1

    gate = gate_for(queue, TokenBucket(1, 10), tokens=price, when_limited="retry", max_held=30)
    with running(kind(broker, gate, queue)) as worker:
        assert sorted(worker.wait_for_runs(20)) == list(range(20))
        assert worker.at[-1] - worker.at[0] > 19 / 10 - 0.05
    assert sorted(worker.ran) == list(range(20))
    assert max(arrivals.values()) <= 3
    assert sum(arrivals.values()) >= 30
    assert broker.waiting(queue) == 0


def test_retry_goes_behind_the_others(broker):
    """A message that is sent back goes to the end of its queue: what stands there is served first."""
    queue = broker.queue()
    broker.send(queue, "first", "second", *range(30))
    slow, fast = TokenBucket(1, 2), TokenBucket(1, 20)
    gate = Gate(max_held=4)
    gate.limit(
        queue.name, bucket=lambda body, _: slow if isinstance(body, str) else fast, when_limited="retry"
    )
    worker = Worker(broker, gate, queue)
    worker.prefetch_count = 1
    with running(worker):
        worker.wait_for_runs(32)
    assert worker.ran[0] == "first"
    assert worker.ran.index("second") > 8
    assert sorted(worker.ran, key=str) == sorted(["first", "second", *range(30)], key=str)


PROPERTIES = {
    "headers": {"size": 3, "nested": {"a": [1, "ü"]}},
    "priority": 3,
    "correlation_id": "c-1",
    "reply_to": "answers",
    "message_id": "m-1",
    "app_id": "an app",
    "type": "a type",
    "delivery_mode": 1,
    "expiration": 600,
}


def as_it_came(message):
    """Return everything about a message that is to be the same when it comes again."""
    changing = "delivery_tag", "delivery_info", "application_headers"
    return {
        "body": message.body if isinstance(message.body, str) else bytes(message.body),
        "headers": dict(message.headers),
        "content": (message.content_type, message.content_encoding),
        "properties": {k: v for k, v in message.properties.items() if k not in changing},
        "exchange": message.delivery_info["exchange"],
        "routing key": message.delivery_info["routing_key"],
        "redelivered": bool(message.delivery_info.get("redelivered")),
    }


class Accepting(Worker):
    """Accepts what is no JSON too."""

    def get_consumers(self, consumer, _channel):  # noqa: D102
        return [
            consumer(
                self.queues,
                callbacks=[self.on_task],
                prefetch_count=4,
                accept=["json", "pickle", "application/data"],
            )
        ]


def noted_arrivals():
    """Return what will be noted of each arrival, by the message's id, and the price that notes it."""
    arrivals = defaultdict(list)

    def price(_body, message):
        arrivals[message.properties["message_id"]].append(as_it_came(message))
        return 1

    return arrivals, price


@pytest.mark.parametrize(
    ("serializer", "compression", "kind"),
    [
        *((serializer, None, "classic") for serializer in ("json", "pickle", "raw")),
        *((serializer, "gzip", "classic") for serializer in ("json", "pickle", "raw")),
        ("json", "gzip", "quorum"),
    ],
)
def test_retry_changes_nothing_about_the_message(broker, serializer, compression, kind):
    """What comes again is the same message: body, headers, properties, exchange and routing key."""
    exchange = Exchange(f"{broker.prefix}-x", "topic")
    queue = broker.queue(
        exchange=exchange, routing_key="size.*", queue_arguments={"x-queue-type": kind}
    )
    other, copied = broker.queue("other", exchange, routing_key="#"), broker.queue("copied")
    broker.declare(queue, other, copied)
    body = b"\x00\xff raw" if serializer == "raw" else {"text": "grüße", "n": [1, 2]}
    options = {"serializer": serializer, "compression": compression, **copy.deepcopy(PROPERTIES)}
    if broker.rabbitmq is not None:
        options["headers"]["CC"] = [copied.name]  # more routing keys, for RabbitMQ
    arrivals, price = noted_arrivals()
    gate = gate_for(queue, TokenBucket(1, 4), tokens=price, when_limited="retry")
    for number in range(3):
        options["message_id"] = f"m-{number}"
        broker.send(queue, body, exchange=exchange, routing_key="size.big", **options)
    with running(Accepting(broker, gate, queue)) as worker:
        worker.wait_for_runs(3)
    assert [len(arrivals[f"m-{number}"]) > 1 for number in range(3)] == [False, True, True]
    for number in range(3):
        first, last = arrivals[f"m-{number}"][0], arrivals[f"m-{number}"][-1]
        assert first == last
        assert (first["exchange"], first["routing key"]) == (exchange.name, "size.big")
    assert all(ran == body or bytes(ran) == body for ran in worker.ran)
    assert broker.waiting(other) == 3  # each copy went to one queue
    assert broker.waiting(copied) == 0


def test_retry_says_that_a_message_was_redelivered(rabbitmq_broker):
    """A copy is a new message to the broker; its consumer is told that the original was delivered before."""
    queue = rabbitmq_broker.queue()
    for number in range(2):
        rabbitmq_broker.send(queue, number, message_id=str(number))
    with rabbitmq_broker.connection() as connection:  # delivered, and given back
        channel = connection.channel()
        for _ in range(2):
            assert channel.basic_get(queue.name)
    arrivals, price = noted_arrivals()
    gate = gate_for(queue, TokenBucket(1, 4), tokens=price, when_limited="retry")
    with running(Worker(rabbitmq_broker, gate, queue)) as worker:
        worker.wait_for_runs(2)
    assert len(arrivals["1"]) > 1
    assert {arrival["redelivered"] for arrival in arrivals["1"]} == {True}


def test_retry_of_a_broadcast(broker):
    """It goes to the queue of its consumer alone; on Redis a fanout has no queues, and it is held."""
    fanout = Exchange(f"{broker.prefix}-x", "fanout")
    queues = [broker.queue(name, fanout, routing_key="", auto_delete=True) for name in ("one", "two")]
    arrivals = Counter()
    workers = []
    for queue in queues:

        def price(body, _message, queue=queue):
            arrivals[queue.name, body] += 1
            return 1

        gate = Gate()
        gate.limit(queue.name, bucket=TokenBucket(1, 4), tokens=price, when_limited="retry")
        workers.append(Worker(broker, gate, queue))
    with running(*workers):
        wait_for(lambda: all(worker.consumers for worker in workers))
        broker.send(queues[0], *range(3), exchange=fanout, routing_key="")
        for worker in workers:
            worker.wait_for_runs(3)
        time.sleep(0.5)  # for those that would be too many
    for worker in workers:
        assert sorted(worker.ran) == [0, 1, 2]
    once = {(queue.name, number): 1 for queue in queues for number in range(3)}
    assert (arrivals == once) is (broker.rabbitmq is None)


@pytest.mark.parametrize(
    ("price", "says"),
    [
        (lambda *_: 0, "tokens is 0, expected a number above 0"),
        (lambda *_: -1, "tokens is -1, expected a number above 0"),
        (lambda *_: float("nan"), "tokens is nan"),
        (lambda *_: "many", "tokens is 'many'"),
        (lambda *_: None, "tokens is None"),
        (lambda *_: 11, "tokens is 11, expected at most the capacity 10"),
        (lambda body, _: body["size"], "tokens=… raised TypeError"),
        (lambda *_: sys.exit("no prices"), "tokens=… raised SystemExit('no prices')"),
        (lambda *_: interrupt(), "tokens=… raised KeyboardInterrupt()"),
    ],
)
def test_message_that_cannot_be_priced_fails_alone(rabbitmq_broker, dead_letters, price, says, caplog):
    """It is rejected, with one ERROR line that names queue, limit and value; the others go on."""
    queue, dead = dead_letters
    rabbitmq_broker.send(queue, 1, "bad", 2)
    gate = gate_for(
        queue, TokenBucket(10, 10), tokens=lambda body, m: price(body, m) if body == "bad" else 1
    )
    with running(Worker(rabbitmq_broker, gate, queue)) as worker:
        worker.wait_for_runs(2)
        wait_for(lambda: rabbitmq_broker.waiting(dead) == 1)
    assert worker.ran == [1, 2]
    ((body, error),) = worker.refused
    assert (body, isinstance(error, ValueError)) == ("bad", True)
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert f"queue {queue.name}, limit limit: {says}" in line.getMessage()


def test_bucket_of_a_message(broker):
    """A callable bucket may be chosen by the message, and what is no bucket fails that message alone."""
    queue = broker.queue()
    broker.send(queue, "a", "b", "none", "a", "b")
    buckets = {"a": TokenBucket(1, 0.01), "b": TokenBucket(2, 0.01)}
    gate = gate_for(queue, lambda body, _: buckets.get(body))
    with running(Worker(broker, gate, queue)) as worker:
        worker.wait_for_runs(3)
        wait_for(lambda: worker.gate.held == {"limit": 1})
    assert worker.ran == ["a", "b", "b"]
    assert [body for body, _ in worker.refused] == ["none"]


def test_body_that_cannot_be_decoded_fails_alone(rabbitmq_broker, dead_letters):
    """With on_message a body is decoded to price it; where that fails, the message ends, not the consumer."""
    queue, dead = dead_letters
    rabbitmq_broker.send(queue, b"{no json", content_type="application/json", content_encoding="utf-8")
    rabbitmq_broker.send(queue, 1)
    gate = gate_for(queue, TokenBucket(1, 10), tokens=lambda body, _: body)
    worker = RawWorker(rabbitmq_broker, gate, queue)
    worker.on_refused = lambda _message, error: worker.refused.append(error)
    with running(worker):
        worker.wait_for_runs(1)
        wait_for(lambda: rabbitmq_broker.waiting(dead) == 1)
    assert len(worker.refused) == 1


def test_several_limits(broker):
    """A message with several limits takes from all their buckets or from none."""
    queue = broker.queue()
    broker.send(queue, *range(5))
    second, hour = TokenBucket(5, 1000), TokenBucket(3, 0.001)
    gate = Gate()
    gate.limit(queue.name, bucket=second)
    gate.limit(bucket=hour)
    with running(Worker(broker, gate, queue)) as worker:
        worker.wait_for_runs(3)
        wait_for(lambda: gate.held == {"all queues": 2})
        assert second.tokens > 4.9
    assert worker.ran == [0, 1, 2]


def test_max_wait(broker):
    """A message whose tokens come too late ends at once, as with "raise"; the others are held."""
    queue = broker.queue()
    broker.send(queue, *range(6))
    gate = gate_for(queue, TokenBucket(1, 4), max_wait=0.6)
    with running(Worker(broker, gate, queue)) as worker:
        worker.wait_for_runs(3)
        wait_for(lambda: len(worker.refused) == 3)
    assert worker.ran == [0, 1, 2]
    assert [body for body, _ in worker.refused] == [3, 4, 5]
    assert all(0.6 < error.retry_after < 1.5 for _, error in worker.refused)
    assert broker.waiting(queue) == 0


def test_a_shadow_holds_nobody(broker):
    """With shadow=True all messages run at once."""
    queue = broker.queue()
    broker.send(queue, *range(30))
    gate = gate_for(queue, TokenBucket(1, 0.01), shadow=True)
    with running(Worker(broker, gate, queue)) as worker:
        assert worker.wait_for_runs(30) == list(range(30))
        assert gate.held == {}
    (limit,) = gate.limits
    assert tally_of(limit).snapshot()["shadowed"] == 29
