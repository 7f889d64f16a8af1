"""A gate in a loop of one's own: attach, wrap, poll, timeout and forget."""

import contextlib
import logging
import signal
import sys
import time
from uuid import uuid4

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
    """What is held is forgotten with its connection, runs on the next one, in order, and is not run from the old."""
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
    assert ran == list(range(5))


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


@pytest.mark.parametrize("raw", [False, True])
def test_a_revived_consumer_pays_once(broker, raw):
    """A consumer that is attached again, on a new connection, takes the tokens of a message once."""
    queue, gate, bucket, ran = broker.queue(), Gate(), TokenBucket(10, 0.001), []
    gate.limit(queue.name, bucket=bucket)
    how = {"callbacks": [lambda body, message: ran.append(body) or message.ack()]}
    if raw:
        how = {"on_message": lambda message: ran.append(message.payload) or message.ack()}
    consumer = None
    for count in 1, 2:
        broker.send(queue, count)
        with broker.connection() as connection:
            if consumer is None:
                consumer = connection.Consumer([queue], **how)
            else:
                consumer.revive(connection.default_channel)
            with gate.attach(consumer):
                drain(connection, gate, lambda count=count: len(ran) == count)
            gate.forget()
        assert round(10 - bucket.tokens, 1) == count


@pytest.mark.parametrize("limited", [False, True], ids=["first limit", "another limit"])
def test_a_queue_that_is_added_later_is_limited(broker, caplog, limited):
    """Its limit is told of as one for nothing, and as enforced when the queue comes; it holds then."""
    caplog.set_level(logging.INFO, "rate_limiter")
    first, late = broker.queue("first"), broker.queue("late")
    broker.declare(late)
    broker.send(first, "first")
    gate, ran, at = Gate(), [], []
    gate.limit(late.name, bucket=TokenBucket(1, 20), name="late")
    if limited:
        gate.limit(first.name, bucket=TokenBucket(1, 20), name="first")

    def on_task(body, message):
        ran.append(body)
        at.append(time.monotonic())
        message.ack()

    with broker.connection() as connection:
        consumer = gate.attach(connection.Consumer([first], callbacks=[on_task], prefetch_count=2))
        with consumer:
            drain(connection, gate, lambda: ran == ["first"])
            consumer.add_queue(late)
            consumer.consume()
            broker.send(late, *range(8))
            drain(connection, gate, lambda: len(ran) == 9)
    assert ran[1:] == list(range(8))
    assert at[-1] - at[1] > 7 / 20 - 0.05
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    lines = [line for line in lines if line[1].startswith("Limit late") and "jobs begin" not in line[1]]
    (warned, warning), (told, line) = lines
    assert (warned, told) == ("WARNING", "INFO")
    assert warning.endswith(
        f"matches no queue that is consumed, so it limits nothing; there are: {first.name}"
    )
    assert line.endswith(f"for queue {late.name}, enforced at the gate")


def test_a_queue_that_is_added_later_is_checked():
    """One that cannot be held is refused as it begins to be consumed."""
    gate = Gate()
    gate.limit("late", bucket=TokenBucket(1, 20))
    with Connection("memory://") as connection:
        consumer = gate.attach(connection.Consumer([Queue("first")], callbacks=[print]))
        with consumer:
            consumer.add_queue(Queue("late", no_ack=True))
            with pytest.raises(ValueError, match="queue late is consumed with no_ack"):
                consumer.consume()


def exit_by_itself():
    sys.exit("no prices")


@pytest.fixture
def stop_on_signals():
    # A background process of a shell is started with SIGINT ignored, and Python then leaves it so.
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: lambda *_: sys.exit("stopped"),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("stop_on_signals")
@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (None, None)],
)
def test_a_signal_gets_through_a_callable(number, error):
    """Ctrl-C or SIGTERM while a callable runs ends the loop, and the message stays the broker's.

    SystemExit of the callable's own ends its message alone.
    """
    queue, refused, ran, done = Queue(uuid4().hex), [], [], []
    gate = Gate(on_refused=lambda _message, error: refused.append(str(error)))
    once = [exit_by_itself if number is None else lambda: signal.raise_signal(number)]

    def price(_body, _message):
        if once:
            once.pop()()
        return 1

    gate.limit(queue.name, bucket=TokenBucket(10, 100), tokens=price, name="limit")

    def on_task(body, message):
        ran.append(body)
        message.ack()

    with Connection("memory://", transport_options={"polling_interval": 0.02}) as connection:
        for body in "ab":
            connection.Producer().publish(body, routing_key=queue.name, declare=[queue])
        consumer = connection.Consumer([queue], callbacks=[on_task])
        with gate.attach(consumer), contextlib.suppress(KeyboardInterrupt, SystemExit):
            drain(connection, gate, lambda: "b" in ran)
            done.append(True)
    assert bool(done) is (error is None)
    if number is None:
        assert refused == [f"queue {queue.name}, limit limit: tokens=… raised SystemExit('no prices')"]
        assert ran == ["b"]
    else:
        assert not refused
        assert not ran


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
