"""What the gates rely on inside kombu and py-amqp, checked on real brokers.

Where one of these fails with a new kombu, `rate_limiter.broker` or `rate_limiter.kombu` needs a change.
"""

import contextlib
import functools
import inspect

import pytest
from harness import wait_for
from kombu import Consumer, Exchange, pools
from kombu.common import Broadcast
from kombu.mixins import ConsumerMixin, ConsumerProducerMixin
from kombu.serialization import registry
from kombu.transport import virtual


@pytest.fixture
def connection(broker):
    """Yield a connection to each broker."""
    with broker.connection(heartbeat=10) as connection:
        yield connection


def receive(connection, queue, count=1):
    """Return messages that a consumer gets."""
    messages = []
    with connection.Consumer([queue], on_message=messages.append, prefetch_count=count):
        wait_for(lambda: drain(connection) or len(messages) >= count)
    return messages


def drain(connection):
    with contextlib.suppress(TimeoutError):
        connection.drain_events(timeout=0.1)


class Mixed(ConsumerMixin):
    """Notes what kombu's mixin calls."""

    def __init__(self, connection, queue):
        self.connection, self.queue, self.given = connection, queue, []

    def get_consumers(self, Consumer, channel):  # noqa: N803, D102
        return [Consumer([self.queue], callbacks=[print])]

    def _consume_from(self, *consumers):
        self.given += consumers
        return super()._consume_from(*consumers)


def test_the_mixin_consumes_through_one_method(broker):
    """ConsumerMixin gives its consumers to _consume_from before they consume; the producer's is lazy."""
    mixed = Mixed(broker.connection(), broker.queue())
    with mixed.consumer_context() as (_connection, _channel, consumers):
        assert mixed.given == consumers
        assert all(isinstance(consumer, Consumer) for consumer in consumers)
    assert ConsumerProducerMixin._producer_connection is None


def test_a_consumer_has_what_is_wrapped(broker, connection):
    """on_message or receive is looked up when a message comes; queues can be cancelled and added."""
    queue, seen = broker.queue(), []
    consumer = connection.Consumer(
        [queue], callbacks=[lambda *_: seen.append("callback")], no_ack=False
    )
    assert (consumer.on_message, consumer.no_ack, consumer.prefetch_count) == (None, False, None)
    consumer.receive = lambda body, message: seen.append((body, message.ack()))
    with consumer:
        assert consumer.consuming_from(queue.name)
        broker.send(queue, 1)
        wait_for(lambda: drain(connection) or seen)
        consumer.cancel_by_queue(queue.name)
        assert not consumer.consuming_from(queue.name)
        consumer.add_queue(queue)
        consumer.consume()
        assert consumer.consuming_from(queue.name)
    assert seen == [(1, None)]


def test_basic_consume_can_be_wrapped(broker, connection):
    """It is called with these names; its callback gets a message with delivery_info."""
    queue, calls, marked = broker.queue(), [], []
    channel = connection.channel()

    def stand_in(consume, queue, no_ack=False, consumer_tag="", callback=None, **kwargs):
        def noting(message):
            message.delivery_info["mark"] = queue
            marked.append(dict(message.headers or {}))
            message.headers.pop("taken")
            return callback(message)

        calls.append((queue, no_ack, consumer_tag))
        return consume(queue=queue, no_ack=no_ack, consumer_tag=consumer_tag, callback=noting, **kwargs)

    channel.basic_consume = functools.partial(stand_in, channel.basic_consume)
    broker.send(queue, 1, headers={"taken": 1, "kept": 2})
    messages = []
    with Consumer(channel, [queue], on_message=messages.append):
        wait_for(lambda: drain(connection) or messages)
        (message,) = messages
        message.ack()
    assert calls[0][:2] == (queue.name, False)
    assert marked[0] == {"taken": 1, "kept": 2}
    assert dict(message.headers) == {"kept": 2}
    assert message.delivery_info["mark"] == queue.name
    assert {"exchange", "routing_key"} <= {*message.delivery_info}


def test_what_a_message_tells(broker, connection):
    """The body is decompressed, the header says how; there are errors, properties, channel and state."""
    queue = broker.queue()
    broker.send(queue, ["text"], compression="zlib", priority=3)
    (message,) = receive(connection, queue)
    assert message.body in ('["text"]', b'["text"]')
    assert message.headers["compression"] == "application/x-gzip"
    assert (message.errors, message.properties["priority"], message.acknowledged) == ([], 3, False)
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    assert message.channel.connection.client.transport.driver_type in ("redis", "amqp")
    channel = message.channel
    connection.collect()
    assert broker.rabbitmq is None or channel.connection is None


def test_a_copy_is_stored_in_the_queue(broker, connection):
    """prepare_message and basic_publish to the default exchange: a new delivery, same everything."""
    queue = broker.queue()
    broker.send(queue, "text", priority=3, correlation_id="c-1", delivery_mode=1)
    (first,) = receive(connection, queue)
    channel = first.channel
    copy = channel.prepare_message(
        first.body,
        priority=3,
        content_type=first.content_type,
        content_encoding=first.content_encoding,
        headers={"header": 1},
        properties={"correlation_id": "c-1", "delivery_mode": 1},
    )
    if isinstance(channel, virtual.Channel):
        channel.basic_publish(copy, "", queue.name)
    else:
        channel.basic_publish(copy, "", queue.name, mandatory=True, timeout=1)
    first.ack()
    (second,) = receive(connection, queue)
    assert second.payload == "text"
    assert second.delivery_tag != first.delivery_tag
    assert dict(second.headers) == {"header": 1}
    assert second.properties["correlation_id"] == "c-1"
    assert (second.properties["priority"], second.properties["delivery_mode"]) == (3, 1)
    assert (second.delivery_info["exchange"], second.delivery_info["routing_key"]) == ("", queue.name)
    second.ack()


def confirmed(events):
    """Return the numbers of the messages that are confirmed."""
    numbers = set()
    for name, args in events:
        if name == "basic_ack":
            number, multiple = args
            numbers.update(range(1, number + 1) if multiple else [number])
    return numbers


def test_confirmations_arrive_as_events(rabbitmq_broker):
    """Publishes are numbered from 1; basic_return comes before basic_ack, which tells the number.

    It may stand for all numbers up to it: then its second argument is true.
    """
    queue, events = rabbitmq_broker.queue(), []
    rabbitmq_broker.declare(queue)
    blocked = {"on_blocked": print, "on_unblocked": print, "confirm_publish": False}
    with rabbitmq_broker.connection(heartbeat=10).clone(transport_options=blocked) as connection:
        assert connection.connect().on_blocked is print
        assert connection.connection.on_unblocked is print
        assert connection.get_heartbeat_interval() == 10
        channel = connection.channel()
        channel.confirm_select()
        for name in "basic_ack", "basic_nack", "basic_return":
            channel.events[name].add(lambda *args, name=name: events.append((name, args)))
        for target in queue.name, "there is no such queue":
            message = channel.prepare_message(b"body", properties={"message_id": target})
            channel.basic_publish(message, "", target, mandatory=True)
        wait_for(lambda: drain(connection) or confirmed(events) == {1, 2})
        connection.heartbeat_check()
    names = [name if name == "basic_return" else args[0] for name, args in events]
    assert names.index("basic_return") < names.index(2)
    (returned,) = [args for name, args in events if name == "basic_return"]
    assert returned[3].properties["message_id"] == "there is no such queue"


def test_the_alarm_blocks_the_connection_that_publishes(rabbitmq_broker):
    """RabbitMQ says so, and on_blocked is called; confirmations come when it is over."""
    queue, told, confirmed = rabbitmq_broker.queue(), [], []
    rabbitmq_broker.declare(queue)
    options = {"on_blocked": told.append, "on_unblocked": lambda: told.append(None)}
    with rabbitmq_broker.connection().clone(transport_options=options) as connection:
        channel = connection.channel()
        channel.confirm_select()
        channel.events["basic_ack"].add(lambda number, _multiple: confirmed.append(number))
        try:
            rabbitmq_broker.rabbitmqctl("set_vm_memory_high_watermark", "0.00001")
            published = 0
            while not told:  # the alarm takes a moment
                channel.basic_publish(channel.prepare_message(b"body"), "", queue.name)
                published += 1
                drain(connection)
            drain(connection)
            assert (len(told), len(confirmed) < published) == (1, True)
        finally:
            rabbitmq_broker.rabbitmqctl("set_vm_memory_high_watermark", "0.9")
        wait_for(lambda: drain(connection) or published in confirmed)
        assert told[1:] == [None]


def test_a_pool_of_producers_that_wait_for_confirmations(broker, connection):
    """kombu.pools knows connections by their options; a publish to no queue raises with mandatory."""
    queue = broker.queue()
    broker.declare(queue)
    confirming = broker.connection(transport_options={"confirm_publish": True})
    with pools.producers[confirming].acquire(block=True) as producer:
        producer.publish("body", exchange="", routing_key=queue.name, mandatory=True, retry=True)
        assert broker.waiting(queue) == 1
        if broker.rabbitmq is not None:
            with pytest.raises(producer.connection.channel_errors, match="NO_ROUTE"):
                producer.publish("body", exchange="", routing_key="no such queue", mandatory=True)
    assert registry.type_to_name["application/json"] == "json"


def test_fanout_on_redis_has_no_queue(broker, connection):
    """Redis notes these in _fanout_queues; on RabbitMQ they are queues."""
    channel = connection.channel()
    (broadcast, plain) = Broadcast(f"{broker.prefix}-all"), broker.queue()
    for queue in broadcast, plain:
        queue(channel).declare()
    named = getattr(channel, "_fanout_queues", ())
    assert (broadcast.name in named, plain.name in named) == (broker.rabbitmq is None, False)


def test_redis_gives_back_by_tag(redis_broker):
    """restore_by_tag puts an unacknowledged message at the head of its queue; times are in a sorted set."""
    queue = redis_broker.queue(exchange=Exchange(f"{redis_broker.prefix}-x"), routing_key="key")
    redis_broker.declare(queue)
    with redis_broker.connection() as connection:
        redis_broker.send(queue, 1, 2, exchange=queue.exchange, routing_key="key")
        messages = receive(connection, queue, 2)
        channel = messages[0].channel
        assert [message.payload for message in messages] == [1, 2]
        with channel.conn_or_acquire() as client:
            assert client.zscore(channel.unacked_index_key, messages[0].delivery_tag) > 0
        for message in reversed(messages):
            channel.qos.restore_by_tag(message.delivery_tag)
        assert redis_broker.unacknowledged() == 0
        with redis_broker.connection() as other:
            assert [message.payload for message in receive(other, queue, 2)] == [1, 2]
        assert channel.visibility_timeout == 3600
        assert channel.qos.prefetch_count in (0, 2)
        assert channel.do_restore


def test_what_is_asked_of_a_channel(connection):
    """basic_qos takes size, count, whole channel; RabbitMQ tells whether it knows the latter."""
    names = [*inspect.signature(connection.channel().basic_qos).parameters]
    assert names[:2] == ["prefetch_size", "prefetch_count"]
    assert names[2] in ("apply_global", "a_global")
    assert connection.qos_semantics_matches_spec in (True, False)


@pytest.mark.parametrize("options", [{"queue_arguments": {"x-queue-type": "quorum"}}, {}])
def test_a_queue_is_consumed_again_on_its_channel(rabbitmq_broker, options):
    """A cancelled consumer's tag is in _active_tags; _basic_consume takes another, with a whole count.

    What the first one has got stays with the channel, and can be acknowledged there.
    """
    queue, messages = rabbitmq_broker.queue(**options), []
    rabbitmq_broker.send(queue, *range(12))
    with rabbitmq_broker.connection() as connection:
        consumer = connection.Consumer([queue], on_message=messages.append, prefetch_count=5)
        consumer.channel.basic_qos(0, 5, False)
        consumer.consume()
        wait_for(lambda: drain(connection) or len(messages) == 5)
        drain(connection)
        assert len(messages) == 5
        tag = consumer._active_tags.pop(queue.name)
        assert {message.delivery_info["consumer_tag"] for message in messages} == {tag}
        consumer.channel.basic_cancel(tag)
        (entity,) = consumer.queues
        assert (entity.name, entity.auto_delete, entity.no_declare) == (queue.name, False, None)
        consumer._basic_consume(entity, no_ack=consumer.no_ack, nowait=False)
        assert consumer._active_tags[queue.name] != tag
        wait_for(lambda: drain(connection) or len(messages) == 10)
        messages[0].ack()  # counts for the consumer that got it
        drain(connection)
        assert [message.payload for message in messages] == list(range(10))
        messages[5].ack()
        wait_for(lambda: drain(connection) or len(messages) == 11)
        assert not any(message.delivery_info["redelivered"] for message in messages)
        for message in messages[1:5] + messages[6:]:
            message.ack()


def test_what_is_counted_of_a_channel(rabbitmq_broker):
    """basic_ack and basic_reject are looked up on the channel, with these arguments; so is basic_qos."""
    queue, calls = rabbitmq_broker.queue(), []
    rabbitmq_broker.send(queue, *range(2))
    with rabbitmq_broker.connection() as connection:
        channel = connection.channel()

        def noting(name, call, *args, **kwargs):
            calls.append((name, args, kwargs))
            return call(*args, **kwargs)

        for name in "basic_qos", "basic_ack", "basic_reject":
            setattr(channel, name, functools.partial(noting, name, getattr(channel, name)))
        messages = []
        consumer = Consumer(channel, [queue], on_message=messages.append)
        consumer.qos(prefetch_count=7, apply_global=False)
        with consumer:
            wait_for(lambda: drain(connection) or len(messages) == 2)
            messages[0].ack()
            messages[1].reject()
    assert calls == [
        ("basic_qos", (0, 7, False), {}),
        ("basic_ack", (messages[0].delivery_tag,), {"multiple": False}),
        ("basic_reject", (messages[1].delivery_tag,), {"requeue": False}),
    ]
