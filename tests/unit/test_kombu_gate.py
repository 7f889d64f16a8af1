"""Declaring limits at the gate for kombu: what is refused, where it is written, and what is found."""

import subprocess
import sys

import pytest
from kombu import Connection, Exchange, Queue
from kombu.mixins import ConsumerMixin, ConsumerProducerMixin

from rate_limiter import AllOf, TokenBucket
from rate_limiter.gating.record import record_of
from rate_limiter.kombu import Gate, GateMixin

bucket = TokenBucket(10, 1)


def test_queues_are_names():
    """Queues are given by name or pattern, and not as kombu's own."""
    with pytest.raises(TypeError, match="queues must be names or patterns, not"):
        Gate().limit(Queue("q"), bucket=bucket)


@pytest.mark.parametrize(
    ("arguments", "error"), [({"max_held": 0}, ValueError), ({"on_refused": "log"}, TypeError)]
)
def test_gate_refuses_wrong_arguments(arguments, error):
    """So does the gate."""
    with pytest.raises(
        error, match=f"{next(iter(arguments))} must be .*{next(iter(arguments.values()))}"
    ):
        Gate(**arguments)


def test_limits_are_found_by_queue():
    """A limit is for the queues it names, by pattern too, or for all; it is named after them."""
    gate = Gate()
    gate.limit("emails", "sms", bucket=TokenBucket(1, 1))
    gate.limit("mail.*", bucket=TokenBucket(1, 1), name="mails")
    gate.limit(bucket=TokenBucket(1, 1))
    named = {
        queue: [record_of(limit).name for limit in gate.limits_for(queue)]
        for queue in ("sms", "mail.x", "z")
    }
    assert named == {
        "sms": ["emails, sms", "all queues"],
        "mail.x": ["mails", "all queues"],
        "z": ["all queues"],
    }


def test_one_bucket_is_not_paid_twice():
    """The same bucket twice for one queue is refused, also inside of AllOf."""
    gate = Gate()
    gate.limit("emails", bucket=bucket)
    gate.limit("e*", bucket=AllOf(TokenBucket(1, 1), bucket))
    assert len(gate.limits_for("export")) == 1
    with pytest.raises(ValueError, match="queue emails: the same bucket limits it twice"):
        gate.limits_for("emails")


def test_a_rate_and_the_fields_of_a_body(caplog):
    """Fields say key and cost by name; a message without them is rejected alone, and its error says so."""
    refused, ran = [], []
    gate = Gate(on_refused=lambda message, error: refused.append(str(error)))
    gate.limit("uploads", bucket="1/h", burst=5, key="tenant", tokens="size")
    with Connection("memory://", transport_options={"polling_interval": 0}) as connection:
        queue = Queue(f"uploads-{id(gate)}")
        consumer = connection.Consumer([queue], callbacks=[], accept=["json"])
        consumer.callbacks.append(
            gate.wrap(lambda body, message: ran.append(body) or message.ack(), "uploads")
        )
        bodies = [
            {"tenant": "acme", "size": 5},
            {"tenant": "acme"},
            "text",
            {"tenant": "beta", "size": 2},
        ]
        with consumer, connection.Producer() as producer:
            for body in bodies:
                producer.publish(body, routing_key=queue.name, declare=[queue], serializer="json")
            for _ in bodies:
                connection.drain_events(timeout=1)
    assert ran == [bodies[0], bodies[3]]
    assert refused == [
        "queue uploads, limit uploads: tokens='size': the body has no such field",
        "queue uploads, limit uploads: key='tenant': the body is not a mapping",
    ]


def test_routing_keys_do_not_pile_up():
    """The name of a queue that nobody knows is a routing key, of which there is no end: none is kept."""
    gate = Gate()
    gate.limit(bucket=TokenBucket(1, 1e-6))
    with Connection("memory://", transport_options={"polling_interval": 0}) as connection:
        exchange = Exchange("users", "topic")
        queue = Queue("users", exchange, routing_key="#")
        consumer = connection.Consumer([queue], callbacks=[gate.wrap(lambda _, message: message.ack())])
        with consumer, connection.Producer() as producer:
            for number in range(5):
                producer.publish(number, exchange=exchange, routing_key=f"user.{number}")
                connection.drain_events(timeout=1)
    (session,) = gate.sessions
    assert sum(gate.held.values()) == 4
    assert not session._engine.room._limits_of


def test_limits_come_before_the_start():
    """A limit that is declared when a consumer has begun would not reach all its messages."""
    gate = Gate()
    with Connection("memory://") as connection:
        gate.attach(connection.Consumer([Queue("emails")], callbacks=[print]))
    with pytest.raises(RuntimeError, match="before the consumer starts"):
        gate.limit("emails", bucket=bucket)


def test_wrong_consumers_and_callbacks_are_refused():
    """attach() takes consumers, and wrap() callables."""
    with pytest.raises(TypeError, match="kombu.Consumer, not <built-in function print>"):
        Gate().attach(print)
    with pytest.raises(TypeError, match="callback must be callable, not 'log'"):
        Gate().wrap("log")
    with pytest.raises(TypeError, match="queue must be the name of a queue, not 7"):
        Gate().wrap(print, 7)


@pytest.mark.parametrize(
    ("queue", "consumer", "overflow", "says"),
    [
        ({"no_ack": True}, {}, "hold", "queue emails is consumed with no_ack"),
        ({}, {"no_ack": True}, "hold", "queue emails is consumed with no_ack"),
        ({"auto_delete": True}, {}, "pause", "emails is auto_delete, so overflow='pause'"),
    ],
)
def test_what_cannot_be_held_is_refused(queue, consumer, overflow, says):
    """A queue without acknowledgements cannot be limited, and one that ends by itself not be paused."""
    gate = Gate()
    gate.limit("emails", bucket=bucket, overflow=overflow)
    with Connection("memory://") as connection:
        consumer = connection.Consumer([Queue("emails", **queue)], callbacks=[print], **consumer)
        with pytest.raises(ValueError, match=says):
            gate.attach(consumer)


@pytest.mark.parametrize("kind", [ConsumerMixin, ConsumerProducerMixin])
def test_mixin_cannot_be_left_out(kind):
    """Behind ConsumerMixin it would have no effect, and without a gate no limits: both are refused."""
    with pytest.raises(TypeError, match="resolution"):
        type("Worker", (ConsumerMixin, GateMixin), {})

    class Worker(GateMixin, kind):
        connection = Connection("memory://")

        def get_consumers(self, consumer, channel):
            return [consumer([Queue("emails")], callbacks=[print])]

    with pytest.raises(TypeError, match="Worker needs an attribute gate = Gate()"):
        Worker().run()


@pytest.mark.parametrize(("imported", "other"), [("kombu", "celery"), ("celery", "kombu")])
def test_the_gates_do_not_know_each_other(imported, other):
    """Celery's gate and kombu's share the core, and neither imports the other."""
    code = (
        f"import sys, rate_limiter.{imported}\n"
        f"print([name for name in sys.modules if name.startswith('rate_limiter.{other}')],"
        f" 'celery' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert printed.split() == ["[]", str(imported == "celery")]
