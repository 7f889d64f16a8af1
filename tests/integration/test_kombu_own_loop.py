"""A gate in a loop of one's own: attach, wrap, poll, timeout and forget."""

import contextlib
import time

import pytest
from kombu import Connection, Queue

from rate_limiter import TokenBucket
from rate_limiter.kombu import Gate


def drain(connection, gate, done, seconds=20):
    """Be a user's loop."""
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=gate.timeout(0.5))
        gate.poll()
    assert done()


@pytest.mark.parametrize("raw", [False, True])
def test_attach(broker, raw):
    """An attached consumer holds what is limited, whether it has callbacks or on_message."""
    queue, free = broker.queue(), broker.queue("free")
    broker.send(queue, *range(15))
    broker.send(free, *"abc")
    gate = Gate()
    gate.limit(queue.name, bucket=TokenBucket(1, 20), name="limit")
    ran, at = [], []

    def on_task(body, message):
        ran.append(body)
        at.append(time.monotonic())
        message.ack()

    how = {"on_message": lambda m: on_task(m.payload, m)} if raw else {"callbacks": [on_task]}
    with broker.connection() as connection:
        consumer = connection.Consumer([queue, free], prefetch_count=2, **how)
        assert gate.attach(consumer) is consumer
        with consumer:
            drain(connection, gate, lambda: len(ran) == 18)
    assert [body for body in ran if body in range(15)] == list(range(15))
    assert at[-1] - at[0] > 14 / 20 - 0.05
    assert set(ran[:8]) > set("abc")
    assert gate.held == {}


def test_several_callbacks_pay_once(broker):
    """Each of a consumer's callbacks is called, in order, and the message pays once."""
    queue = broker.queue()
    broker.send(queue, 1, 2)
    gate, bucket, ran = Gate(), TokenBucket(10, 0.001), []
    gate.limit(queue.name, bucket=bucket)
    callbacks = [
        lambda body, _: ran.append(body),
        lambda body, message: ran.append(-body) or message.ack(),
    ]
    with (
        broker.connection() as connection,
        gate.attach(connection.Consumer([queue], callbacks=callbacks)),
    ):
        drain(connection, gate, lambda: len(ran) == 4)
    assert ran == [1, -1, 2, -2]
    assert 8 <= bucket.tokens < 8.1


@pytest.mark.parametrize("named", [False, True])
def test_wrap(broker, named):
    """A wrapped callback is called with the same arguments, once the tokens are taken."""
    queue = broker.queue()
    broker.send(queue, *range(10))
    gate, ran = Gate(), []
    gate.limit(queue.name, bucket=TokenBucket(1, 20), name="limit")
    callback = gate.wrap(lambda body, message: ran.append(body) or message.ack(), *[queue.name] * named)
    began = time.monotonic()
    with broker.connection() as connection, connection.Consumer([queue], callbacks=[callback]):
        drain(connection, gate, lambda: len(ran) == 10)
    assert ran == list(range(10))
    assert time.monotonic() - began > 9 / 20 - 0.05


def test_wrap_takes_limits_of_the_queue_it_is_told(broker):
    """The routing key need not be the queue's name: queue= says which limits are meant."""
    queue = broker.queue()
    broker.send(queue, *range(3))
    gate, ran = Gate(), []
    gate.limit("mails", bucket=TokenBucket(1, 0.001), name="limit")
    callback = gate.wrap(lambda body, message: ran.append(body) or message.ack(), "mails")
    with broker.connection() as connection, connection.Consumer([queue], callbacks=[callback]):
        drain(connection, gate, lambda: gate.held == {"limit": 2})
    assert ran == [0]


def test_forget(broker):
    """What is held is forgotten with its connection, runs on the next one, and is not run from the old."""
    queue = broker.queue()
    broker.send(queue, *range(5))
    gate, ran = Gate(), []
    bucket = TokenBucket(5, 0.001)
    bucket.charge(4)
    gate.limit(queue.name, bucket=bucket, name="limit")

    def consumer(connection):
        callbacks = [lambda body, message: ran.append(body) or message.ack()]
        return gate.attach(connection.Consumer([queue], callbacks=callbacks, prefetch_count=10))

    with broker.connection() as connection:
        with consumer(connection):
            drain(connection, gate, lambda: gate.held == {"limit": 4})
        assert gate.forget() == 4
    assert (gate.held, gate.poll(), ran) == ({}, 0, [0])
    bucket.refund(4)
    with broker.connection() as connection, consumer(connection):
        drain(connection, gate, lambda: len(ran) == 5)
    assert sorted(ran) == list(range(5))


def test_messages_of_a_closed_channel_do_not_run(broker):
    """Also without forget(): the broker has given them out again, and they cost nothing."""
    queue = broker.queue()
    broker.send(queue, *range(3))
    gate, ran, bucket = Gate(), [], TokenBucket(2, 0.001)
    bucket.charge(1)
    gate.limit(queue.name, bucket=bucket, name="limit")
    with broker.connection() as connection:
        callbacks = [lambda body, message: ran.append(body) or message.ack()]
        with gate.attach(connection.Consumer([queue], callbacks=callbacks)):
            drain(connection, gate, lambda: gate.held == {"limit": 2})
    bucket.refund(1)
    end = time.monotonic() + 5
    while gate.held and time.monotonic() < end:
        gate.poll()
    assert (gate.held, ran, bucket.tokens > 0.9) == ({}, [0], True)


def test_poll_inside_a_callback_does_nothing():
    """A callback that calls poll() is not entered again."""
    gate, depth, deepest = Gate(), 0, 0
    gate.limit("jobs", bucket=TokenBucket(1, 100))

    def on_task(_body, message):
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)
        time.sleep(0.05)
        gate.poll()
        depth -= 1
        message.ack()

    with Connection("memory://", transport_options={"polling_interval": 0.02}) as connection:
        producer = connection.Producer()
        for number in range(5):
            producer.publish(number, routing_key="jobs", declare=[Queue("jobs")])
        with gate.attach(connection.Consumer([Queue("jobs")], callbacks=[on_task])):
            end = time.monotonic() + 2
            drain(connection, gate, lambda: time.monotonic() > end - 1 and not gate.held)
    assert deepest == 1
