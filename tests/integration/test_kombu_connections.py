"""Connections: heartbeats while messages are held, loss, and Redis's leases."""

import gc
import logging
import time
from weakref import ref

import pytest
from harness import wait_for
from kombu_lab import ProducingWorker, Worker, gate_for, running

from rate_limiter import TokenBucket


@pytest.mark.parametrize("kind", [Worker, ProducingWorker])
def test_heartbeats_go_on_while_messages_are_held(rabbitmq_broker, kind):
    """Held for longer than RabbitMQ waits for a heartbeat, each runs once, on the first connection."""
    queue, results = rabbitmq_broker.queue(), rabbitmq_broker.queue("results")
    rabbitmq_broker.declare(results)
    rabbitmq_broker.send(queue, *range(3))
    worker = kind(rabbitmq_broker, gate_for(queue, TokenBucket(1, 1 / 5)), queue, heartbeat=1)
    producers = set()

    def publish(body, _message):
        if kind is ProducingWorker:
            worker.producer.publish(body, routing_key=results.name)
            producers.add(worker.producer_connection)

    worker.job = publish
    with running(worker):
        assert worker.wait_for_runs(3) == [0, 1, 2]
    assert worker.connects == 1
    assert not any(message.delivery_info["redelivered"] for message in worker.messages)
    if kind is ProducingWorker:
        assert len(producers) == 1
        assert rabbitmq_broker.waiting(results) == 3


def test_lost_producer_connection_is_replaced(rabbitmq_broker):
    """A second connection that was lost between messages does not take the consumer down."""
    queue, results = rabbitmq_broker.queue(), rabbitmq_broker.queue("results")
    rabbitmq_broker.declare(results)
    rabbitmq_broker.send(queue, *range(3))
    worker = ProducingWorker(rabbitmq_broker, gate_for(queue, TokenBucket(1, 1)), queue, heartbeat=1)

    def publish(body, _message):
        worker.producer.publish(body, routing_key=results.name)
        worker.producer_connection.connection.transport.sock.shutdown(2)

    worker.job = publish
    with running(worker):
        assert worker.wait_for_runs(3) == [0, 1, 2]
        wait_for(lambda: rabbitmq_broker.waiting(results) == 3)
    assert worker.connects == 1


def test_nothing_of_lost_connections_is_kept(broker, monkeypatch):
    """However many are lost while messages are held, what is in memory is of the last one."""
    # pytest keeps what is logged of a lost connection: the error, and all that its traceback leads to.
    monkeypatch.setattr(logging.getLogger("kombu.mixins"), "disabled", True)
    queue, seen = broker.queue(), []
    broker.send(queue, *range(6))
    gate = gate_for(queue, TokenBucket(1, 1e-6))
    with running(Worker(broker, gate, queue)) as worker:
        for count in range(1, 5):
            wait_for(lambda: worker.connects == count and sum(gate.held.values()) == 5)  # noqa: B023
            worker.messages.clear()
            seen += map(ref, (worker.consumers[0], *worker._session._windows.values()))
            if count < 4:
                broker.break_connections()
        gc.collect()
        assert len([each for each in seen if each()]) == 2


def test_lost_connection_forgets_what_is_held(broker):
    """The broker gives it out again: everything runs, and in order where the broker keeps it."""
    queue = broker.queue()
    broker.send(queue, *range(60))
    gate = gate_for(queue, TokenBucket(1, 30), max_held=20)
    with running(Worker(broker, gate, queue)) as worker:
        worker.wait_for_runs(10)
        broker.break_connections()
        wait_for(lambda: set(worker.ran) == set(range(60)))
        wait_for(lambda: gate.held == {})
        # redis-py connects again by itself
        wait_for(lambda: worker.connects >= 2 or broker.rabbitmq is None)
    again = len(worker.ran) - 60
    assert again <= 1  # the one that was running when its connection broke
    if broker.rabbitmq is not None:
        assert list(dict.fromkeys(worker.ran)) == list(range(60))


def test_held_messages_keep_their_lease(redis_broker):
    """Held longer than Redis's visibility_timeout, a message is not given out a second time."""
    queue = redis_broker.queue()
    redis_broker.send(queue, *range(8))
    options = {"visibility_timeout": 2, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    workers = [
        Worker(redis_broker, gate_for(queue, bucket, gate_held=20), queue, transport_options=options)
        for bucket in (TokenBucket(1, 0.7), TokenBucket(1, 0.7))
    ]
    with running(*workers):
        wait_for(lambda: len(workers[0].ran) + len(workers[1].ran) >= 8)
        time.sleep(3)
    assert sorted(workers[0].ran + workers[1].ran) == list(range(8))


def test_turns_keep_their_lease_and_survive_the_connection(broker):
    """Messages that wait to be sent back are not given out a second time, and none is lost."""
    queue = broker.queue()
    broker.send(queue, *range(20))
    gate = gate_for(queue, TokenBucket(1, 10), when_limited="retry", max_held=30)
    with running(Worker(broker, gate, queue)) as worker:
        worker.wait_for_runs(5)
        broker.break_connections()
        wait_for(lambda: set(worker.ran) == set(range(20)))
        wait_for(lambda: gate.held == {})
    assert len(worker.ran) <= 22


def test_two_consumers_share_a_bucket(broker):
    """Consumers in threads of one process keep one rate together, with one gate."""
    queue = broker.queue()
    broker.send(queue, *range(40))
    gate = gate_for(queue, TokenBucket(1, 20))
    workers = [Worker(broker, gate, queue), Worker(broker, gate, queue)]
    with running(*workers):
        wait_for(lambda: len(workers[0].ran) + len(workers[1].ran) == 40)
    at = sorted(workers[0].at + workers[1].at)
    assert at[-1] - at[0] > 39 / 20 - 0.1
    assert sorted(workers[0].ran + workers[1].ran) == list(range(40))
