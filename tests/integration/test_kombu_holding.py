"""The gate in plain kombu consumers: what is held, what passes by, and what becomes of the window."""

import itertools
import logging
import time

import pytest
from harness import wait_for
from kombu import Exchange
from kombu_lab import Broker, ProducingWorker, RawWorker, Worker, gate_for, running

from rate_limiter import BucketPerKey, TokenBucket

FREE = TokenBucket(1e9, 1e9)

QUORUM = {"x-queue-type": "quorum"}


@pytest.mark.parametrize("kind", [Worker, RawWorker, ProducingWorker])
def test_holds_the_rate_in_order(broker, kind):
    """Messages run in order and never faster than the bucket allows, with callbacks and on_message."""
    queue = broker.queue()
    broker.send(queue, *range(15))
    with running(kind(broker, gate_for(queue), queue)) as worker:
        assert worker.wait_for_runs(15) == list(range(15))
    for (i, early), (j, late) in itertools.combinations(enumerate(worker.at), 2):
        assert j - i + 1 <= 1 + 20 * (late - early + 0.05)
    assert worker.at[-1] - worker.at[0] < 5
    assert worker.gate.held == {}
    assert broker.waiting(queue) == 0


def test_messages_behind_the_limited_ones_pass(broker):
    """Fifty messages behind 200 limited ones of the same queue run at once, and those without a limit."""
    queue, other = broker.queue(), broker.queue("other")
    broker.send(queue, *["slow"] * 200)
    broker.send(queue, *range(50))
    broker.send(other, "other")
    slow = TokenBucket(1, 1)
    gate = gate_for(queue, lambda body, _: slow if body == "slow" else FREE, gate_held=1000)
    with running(Worker(broker, gate, queue, other)) as worker:
        wait_for(lambda: {*range(50), "other"} <= set(worker.ran))
        assert worker.at[-1] - worker.at[0] < 10
        assert worker.ran.count("slow") < 20
    assert [body for body in worker.ran if body not in ("slow", "other")] == list(range(50))


@pytest.mark.parametrize(
    "price",
    [
        lambda body, message: body["size"],
        lambda body, message: message.headers["size"],
        lambda body, message: int(message.delivery_info["routing_key"].rpartition(".")[2]),
    ],
)
@pytest.mark.parametrize("kind", [Worker, RawWorker])
def test_prices_by_body_header_and_routing_key(rabbitmq_broker, price, kind):
    """A price is computed from what the message carries, wherever it stands."""
    broker = rabbitmq_broker
    queue = broker.queue("jobs", Exchange(f"{broker.prefix}-x", "topic"), routing_key="size.*")
    bucket = TokenBucket(10, 0.001)
    for size in (5, 3, 2, 1):
        broker.send(
            queue,
            {"size": size},
            headers={"size": size},
            routing_key=f"size.{size}",
            exchange=queue.exchange,
        )
    with running(kind(broker, gate_for(queue, bucket, tokens=price), queue)) as worker:
        worker.wait_for_runs(3)
        wait_for(lambda: worker.gate.held == {"limit": 1})
    assert [body["size"] for body in worker.ran] == [5, 3, 2]
    assert bucket.tokens < 0.1


def test_callables_that_are_slow_are_told_of(redis_broker, caplog):
    """A price that takes long holds up the loop: it is logged, once."""
    caplog.set_level(logging.WARNING, "rate_limiter")
    queue = redis_broker.queue()
    redis_broker.send(queue, *range(3))
    with running(
        Worker(redis_broker, gate_for(queue, tokens=lambda *_: time.sleep(0.06) or 1), queue)
    ) as w:
        w.wait_for_runs(3)
    told = [record for record in caplog.records if "its callable took" in record.getMessage()]
    assert len(told) == 1


def test_holds_no_more_than_max_held(broker):
    """Beyond max_held and the consumer's own window the broker keeps the messages."""
    queue = broker.queue()
    broker.send(queue, *range(60))
    bucket = TokenBucket(1, 0.01)
    with running(Worker(broker, gate_for(queue, bucket, max_held=10), queue)) as worker:
        wait_for(lambda: worker.gate.held.get("limit", 0) >= 10)
        time.sleep(0.5)
        assert worker.gate.held["limit"] <= 10 + 2 * worker.prefetch_count
        assert broker.waiting(queue) >= 60 - 1 - 10 - 2 * worker.prefetch_count


def test_window_is_restored_on_redis(redis_broker):
    """The prefetch count rises above what is held, and ends where it began."""
    queue = redis_broker.queue()
    redis_broker.send(queue, *range(60))
    with running(Worker(redis_broker, gate_for(queue, rate=20, max_held=40), queue)) as worker:
        wait_for(lambda: worker.consumers)
        qos = worker.consumers[0].channel.qos
        highest = 0

        def watch():
            nonlocal highest
            highest = max(highest, qos.prefetch_count)
            return len(worker.ran) == 60

        wait_for(watch)
        assert 40 <= highest <= 44
        wait_for(lambda: qos.prefetch_count == 4)


def test_window_is_restored_on_rabbitmq(rabbitmq_broker):
    """The count is one for the channel, above what is held; the consumers have none of their own."""
    broker, queue = rabbitmq_broker, rabbitmq_broker.queue()
    broker.send(queue, *range(100))  # 20 are held for 10 s: each look at the broker takes seconds

    def counts():
        rows = broker.rabbitmqctl("list_channels", "prefetch_count", "global_prefetch_count")
        return [(int(own), int(channel)) for own, channel in rows]

    with running(Worker(broker, gate_for(queue, rate=8, max_held=20), queue)) as worker:
        wait_for(lambda: (0, 24) in counts())
        worker.wait_for_runs(100)
        wait_for(lambda: (0, 4) in counts())
    assert worker.ran == list(range(100))


def slow_ones(worker):
    return [body for body in worker.ran if isinstance(body, int)]


def is_slow(slow):
    return lambda body, _message: slow if isinstance(body, int) else FREE


@pytest.mark.parametrize("hidden", [False, True])
def test_quorum_queues(rabbitmq_broker, hidden):
    """Their count is static, whoever declared them: messages behind 60 held ones run all the same."""
    broker = rabbitmq_broker
    queue = broker.queue(queue_arguments=QUORUM)
    broker.send(queue, *range(60), *"abcdefghij")
    if hidden:
        queue = broker.queue(no_declare=True)
    gate = gate_for(queue, is_slow(TokenBucket(1, 10)))
    with running(Worker(broker, gate, queue)) as worker:
        wait_for(lambda: set("abcdefghij") <= set(worker.ran))
        assert len(worker.ran) < 60
        wait_for(lambda: len(slow_ones(worker)) >= 10)
    assert slow_ones(worker) == list(range(len(slow_ones(worker))))
    assert worker.connects == 1 + hidden


def test_no_more_than_max_held_of_a_quorum_queue(rabbitmq_broker):
    """Beyond max_held and one prefetch count the broker keeps the messages."""
    broker, queue = rabbitmq_broker, rabbitmq_broker.queue(queue_arguments=QUORUM)
    broker.send(queue, *range(60))
    gate = gate_for(queue, TokenBucket(1, 0.01), max_held=10)
    with running(Worker(broker, gate, queue)) as worker:
        wait_for(lambda: worker.gate.held.get("limit", 0) >= 10)
        time.sleep(0.5)
        assert worker.gate.held["limit"] <= 10 + worker.prefetch_count
        assert broker.waiting(queue) >= 60 - 1 - 10 - worker.prefetch_count


def test_messages_of_cancelled_consumers_come_back(rabbitmq_broker):
    """A connection is lost that has many cancelled consumers: each message comes back and runs once."""
    broker, queue = rabbitmq_broker, rabbitmq_broker.queue(queue_arguments=QUORUM)
    broker.send(queue, *range(60))
    with running(Worker(broker, gate_for(queue, rate=30), queue)) as worker:
        wait_for(lambda: worker.gate.held.get("limit", 0) > 30)
        broker.break_connections()
        worker.wait_for_runs(60)
        wait_for(lambda: worker.gate.held == {})
        wait_for(lambda: worker.connects == 2)
    # The acknowledgement of the last one that ran before may have been under way.
    assert set(worker.ran) == set(range(60))
    assert len(worker.ran) <= 61


def test_a_single_active_consumer_is_left_alone(rabbitmq_broker, caplog):
    """Another process would become it: one line says that messages wait, and all run in order."""
    broker = rabbitmq_broker
    queue = broker.queue(queue_arguments={**QUORUM, "x-single-active-consumer": True})
    broker.send(queue, *range(20), "a")
    gates = [gate_for(queue, is_slow(TokenBucket(1, 10))) for _ in range(2)]
    one, two = (Worker(broker, gate, queue) for gate in gates)
    with running(one):
        one.wait_for_runs(1)
        with running(two):
            one.wait_for_runs(21)
    assert slow_ones(one) == list(range(20))
    assert two.ran == []
    told = [record for record in caplog.records if "is not consumed anew" in record.getMessage()]
    assert len(told) == 1


def test_auto_delete_queues_survive_beside_a_quorum_queue(rabbitmq_broker):
    """A queue that goes with its last consumer is consumed by the next before that is cancelled."""
    broker, quorum = rabbitmq_broker, rabbitmq_broker.queue("quorum", queue_arguments=QUORUM)
    queue = broker.queue("passing", auto_delete=True)
    broker.send(queue, *range(40), *"abc")
    gate = gate_for(queue, is_slow(TokenBucket(1, 20)))
    gate.limit(quorum.name, bucket=TokenBucket(1, 1), name="other")
    with running(Worker(broker, gate, quorum, queue)) as worker:
        wait_for(lambda: set("abc") <= set(worker.ran))
        assert len(worker.ran) < 40
        worker.wait_for_runs(43)
    assert slow_ones(worker) == list(range(40))
    assert worker.connects == 1


def test_consumer_without_prefetch_count(broker, caplog):
    """It gets a count, or the broker would send everything at once; one line says so."""
    caplog.set_level(logging.INFO, "rate_limiter")
    queue = broker.queue()
    broker.send(queue, *range(100))
    worker = Worker(broker, gate_for(queue, rate=0.01), queue)
    worker.prefetch_count = None
    with running(worker):
        wait_for(lambda: worker.gate.held.get("limit", 0) >= 20)
        time.sleep(0.3)
        assert worker.gate.held["limit"] <= 40
        assert broker.waiting(queue) >= 59
    assert sum("sets no prefetch_count: it gets 20" in r.getMessage() for r in caplog.records) == 1


def test_a_pause_keeps_the_order_of_a_quorum_queue(rabbitmq_broker, caplog):
    """overflow="pause" cancels a consumer only when nothing is on its way to it."""
    caplog.set_level(logging.INFO, "rate_limiter")
    broker, queue = rabbitmq_broker, rabbitmq_broker.queue(queue_arguments=QUORUM)
    broker.send(queue, *range(300))
    gate = gate_for(queue, rate=200, capacity=5, max_held=5, overflow="pause")
    worker = Worker(broker, gate, queue)
    worker.prefetch_count = 20
    with running(worker):
        assert worker.wait_for_runs(300) == list(range(300))
    assert caplog.text.count("Resumed queue") >= 3


def test_pause_stops_consuming_the_queue(broker, caplog):
    """With overflow="pause" the broker keeps what is beyond max_held, the queue is taken up again."""
    caplog.set_level(logging.INFO, "rate_limiter")
    queue, other = broker.queue(), broker.queue("other")
    broker.send(queue, *range(40))
    broker.declare(other)
    gate = gate_for(queue, rate=20, max_held=10, overflow="pause")
    with running(Worker(broker, gate, queue, other)) as worker:
        wait_for(lambda: "Paused queue" in caplog.text)
        broker.send(other, "passes")
        wait_for(lambda: "passes" in worker.ran)
        assert worker.ran.count("passes") == 1
        assert len(worker.ran) < 40
        worker.wait_for_runs(41)
    assert [body for body in worker.ran if body != "passes"] == list(range(40))
    assert "Resumed queue" in caplog.text


def test_order_is_kept_while_callbacks_publish(rabbitmq_broker):
    """A callback that publishes on the consumer's own connection reads messages that come next."""
    broker, queue, results = rabbitmq_broker, rabbitmq_broker.queue(), rabbitmq_broker.queue("results")
    broker.declare(results)
    broker.send(queue, *range(30))
    worker = Worker(broker, gate_for(queue, rate=200, capacity=30), queue)
    published = []

    def publish(body, message):
        producer = message.channel.connection.client.Producer(message.channel)
        producer.publish(body, routing_key=results.name)
        published.append(body)

    worker.job = publish
    with running(worker):
        assert worker.wait_for_runs(30) == list(range(30))
    assert published == list(range(30))
    assert broker.waiting(results) == 30


def test_stops_within_a_second_and_gives_back(broker):
    """should_stop is obeyed while messages are held; they go back, and nothing was run or lost."""
    queue = broker.queue()
    broker.send(queue, *range(10))
    with running(Worker(broker, gate_for(queue, rate=0.01, max_held=20), queue)) as worker:
        wait_for(lambda: worker.gate.held.get("limit", 0) == 9)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert worker.ran == [0]
    assert worker.gate.held == {}
    wait_for(lambda: broker.waiting(queue) == 9)
    with running(Worker(broker, gate_for(queue, rate=1000, capacity=20), queue)) as worker:
        worker.wait_for_runs(9)
    assert worker.ran == list(range(1, 10))
    assert broker.waiting(queue) == 0


@pytest.mark.parametrize("debt", [1, 500])
def test_nothing_runs_after_should_stop(broker, debt):
    """A callback that sets should_stop is the last one, also when more messages are due, or arrive."""
    queue = broker.queue()
    broker.send(queue, *range(20))
    bucket = TokenBucket(20, 1000)
    bucket.charge(debt)
    worker = Worker(broker, gate_for(queue, bucket), queue)

    def stop(_body, _message):
        time.sleep(0.1)
        worker.should_stop = True

    worker.job = stop
    with running(worker):
        worker.wait_for_runs(1)
        wait_for(lambda: worker.gate.held == {})
    assert worker.ran == [0]
    wait_for(lambda: broker.waiting(queue) == 19)


def test_callback_that_fails_ends_the_consumer(broker):
    """An exception of the user's own goes where it goes without a gate; no message is lost."""
    queue = broker.queue()
    broker.send(queue, *range(5))
    worker = Worker(broker, gate_for(queue), queue)
    worker.job = lambda body, _: 1 / (2 - body)
    with pytest.raises(ZeroDivisionError):
        worker.run()
    assert worker.gate.held == {}
    assert worker.ran == [0, 1, 2]
    wait_for(lambda: broker.waiting(queue) == 3)


def test_a_tenants_backlog_stands_before_nobody(broker):
    """One FIFO per key: another tenant's messages pass a backlog, and a key that is none ends its own."""
    queue = broker.queue()
    tenants = BucketPerKey(1, 4)
    gate = gate_for(queue, tenants, key=lambda body, message: message.headers["tenant"])
    for number in range(60):
        broker.send(queue, number, headers={"tenant": "big"})
    broker.send(queue, "lost", headers={"tenant": 1.5})
    for number in range(100, 103):
        broker.send(queue, number, headers={"tenant": "small"})
    with running(Worker(broker, gate, queue)) as worker:
        wait_for(lambda: 102 in worker.ran)
    small = [body for body in worker.ran if body >= 100]
    assert small == [100, 101, 102]
    big = [body for body in worker.ran if body < 100]
    assert big == list(range(len(big)))
    assert len(big) < 20
    ((body, error),) = worker.refused
    assert body == "lost"
    assert "key must be a str, an int, a UUID or a tuple of them, not 1.5" in str(error)


def test_limits_are_announced_once(broker, caplog):
    """One INFO line for each limit at the start, and a warning for one that is for no queue."""
    caplog.set_level(logging.INFO, "rate_limiter")
    queue = broker.queue()
    broker.send(queue, 1, 2)
    gate = gate_for(queue)
    gate.limit("typo", bucket=TokenBucket(1, 1))
    with running(Worker(broker, gate, queue)) as worker:
        worker.wait_for_runs(2)
    messages = [record.getMessage() for record in caplog.records]
    lines = [line for line in messages if line.startswith("Limit") and "jobs begin to wait" not in line]
    assert len(lines) == 2
    assert lines[0].startswith("Limit limit: <TokenBucket")
    assert lines[0].endswith(f"for queue {queue.name}, enforced at the gate")
    assert lines[1] == (
        "Limit typo matches no queue that is consumed, so it limits nothing; there are: " + queue.name
    )


def test_memory_transport_gives_back():
    """Kombu forgets what a closed channel of memory:// has not acknowledged; what is held is put back."""
    options = {"transport_options": {"polling_interval": 0.02}}
    broker = Broker("memory://")
    queue = broker.queue()
    broker.send(queue, *range(5))
    with running(Worker(broker, gate_for(queue, rate=0.01), queue, **options)) as worker:
        wait_for(lambda: worker.gate.held == {"limit": 4})
    with running(Worker(broker, gate_for(queue, rate=1000), queue, **options)) as worker:
        assert worker.wait_for_runs(4) == [1, 2, 3, 4]
    broker.close()
