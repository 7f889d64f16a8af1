"""Prefetch counts that cannot be changed, and how a consumer gets more messages all the same.

On quorum queues, and on all queues of RabbitMQ 4, a prefetch count belongs to one consumer and stays what
it is while that consumes. Held messages would use it up. So the consumer is cancelled, and another one
consumes the queue on the same channel: it has a whole count. What the first one has got stays with the
channel, where it can be acknowledged, and goes back to the queue when the channel closes.

Only a consumer that has its whole count is cancelled. To any other one messages may be on their way, and
a quorum queue takes those back behind all others. So the messages are counted here, by consumer.
"""

import logging
from collections.abc import Callable
from typing import Any, Final

from .origin import mark_messages

__all__ = ["StaticCounts"]

logger = logging.getLogger("rate_limiter")

#: What the gates use of a ``kombu.Consumer`` that is not documented.
_PRIVATE: Final = ("_active_tags", "_basic_consume")


class _Queue:
    """The messages of one queue that are not acknowledged, by their delivery tags."""

    __slots__ = ("kept", "last", "unacknowledged")

    def __init__(self) -> None:
        self.unacknowledged: set[int] = set()
        #: Those of them that wait for something else than a free slot.
        self.kept: set[int] = set()
        #: The consumer that has the queue now, or had it last.
        self.last: _Consumer

    @property
    def in_hand(self) -> int:
        return len(self.unacknowledged) - len(self.kept)


class _Consumer:
    """What one consumer tag has got and is not acknowledged."""

    __slots__ = ("count", "queue", "tag", "unacknowledged")

    def __init__(self, queue: _Queue, tag: str, count: int) -> None:
        self.queue = queue
        self.tag = tag
        self.count = count
        self.unacknowledged: set[int] = set()

    @property
    def full(self) -> bool:
        return 0 < self.count <= len(self.unacknowledged)


class StaticCounts:
    """The consumers of one channel of RabbitMQ, each with a prefetch count of its own.

    Args:
        channel: A kombu channel, before anything is consumed on it.
        count: Returns the prefetch count for new consumers. ``None``: each gets that of the one before it.
        changed: Called when a message has been handled, acknowledged or rejected, if a consumer has its
            whole count then. It may be in the middle of a command to RabbitMQ.
        waits: Tells of a message that has come whether it is kept from the start, as one with an ETA is.

    """

    def __init__(
        self,
        channel: Any,
        *,
        count: Callable[[], int] | None = None,
        changed: Callable[[], None] = lambda: None,
        waits: Callable[[Any], bool] = lambda _message: False,
    ) -> None:
        self._channel = channel
        self._count_of = count
        self._changed = changed
        self._waits = waits
        self._consumers: list[Any] = []
        self._queues: dict[str, _Queue] = {}
        self._consumer_of: dict[int, _Consumer] = {}
        self._left_alone: set[str] = set()
        #: The count that RabbitMQ gives the next consumer of the channel.
        self._count = 0 if count is None else count()
        mark_messages(channel, around=self._around)
        self._basic_qos, channel.basic_qos = channel.basic_qos, self._on_qos
        self._basic_ack, channel.basic_ack = channel.basic_ack, self._on_ack
        self._basic_reject, channel.basic_reject = channel.basic_reject, self._on_reject

    def __len__(self) -> int:
        """How many messages of the channel are not acknowledged."""
        return len(self._consumer_of)

    def add(self, consumer: Any) -> None:
        """Take note of a ``kombu.Consumer`` of the channel.

        Raises:
            RuntimeError: It has not what is needed to consume a queue again.

        """
        for name in _PRIVATE:
            if not hasattr(consumer, name):
                raise RuntimeError(
                    f"this kombu's Consumer has no {name}: the gate cannot consume a queue again, and "
                    "jobs would wait behind those that it holds"
                )
        self._consumers.append(consumer)

    def keep(self, message: Any) -> None:
        """Take note that a message is held, or waits for something else than a free slot."""
        if (consumer := self._consumer_of.get(message.delivery_tag)) is not None:
            consumer.queue.kept.add(message.delivery_tag)

    def hand_on(self, message: Any) -> None:
        """Take note that a message is not kept any more."""
        if (consumer := self._consumer_of.get(message.delivery_tag)) is not None:
            consumer.queue.kept.discard(message.delivery_tag)

    def full(self, name: str) -> bool:
        """Tell whether a queue is consumed, by a consumer that has its whole count."""
        queue = self._queues.get(name)
        return queue is not None and queue.last.full and self._holder_of(name) is not None

    def wanted(self) -> list[str]:
        """Return the queues that are to be consumed again: hardly more than kept messages are there.

        At most half a count of other messages may be there: the new consumer brings a whole one.
        """
        return [
            name
            for name, queue in self._queues.items()
            if queue.last.full
            and queue.in_hand <= queue.last.count // 2
            and (consumer := self._holder_of(name)) is not None
            and not self._is_left_alone(_entity(consumer, name))
        ]

    def consume_again(self, name: str) -> None:
        """Cancel the consumer of a queue that has its whole count, and consume the queue anew.

        Messages may arrive meanwhile, of any queue.

        Raises:
            Exception: What the connection or RabbitMQ says.

        """
        count = self._queues[name].last.count if self._count_of is None else self._count_of()
        if count != self._count:  # Celery raises it for each job with an ETA
            self._channel.basic_qos(0, count, False)
        consumer = self._holder_of(name)
        if consumer is None or not self.full(name):  # on green pools jobs are acknowledged meanwhile
            return
        entity = _entity(consumer, name)
        tag = consumer._active_tags.pop(name)
        if entity.auto_delete or entity.no_declare:
            # Without a consumer RabbitMQ would delete the queue; or nobody knows whether it would. There
            # is no answer to wait for in between: the old consumer is to have its whole count still.
            consumer._basic_consume(entity, no_ack=consumer.no_ack, nowait=True)
            self._channel.basic_cancel(tag)
        else:
            self._channel.basic_cancel(tag)
            consumer._basic_consume(entity, no_ack=consumer.no_ack, nowait=False)

    def _holder_of(self, name: str) -> Any:
        """Return the ``kombu.Consumer`` that consumes a queue, by the last consumer tag known of it."""
        tag = self._queues[name].last.tag
        return next((each for each in self._consumers if each._active_tags.get(name) == tag), None)

    def _is_left_alone(self, entity: Any) -> bool:
        arguments = entity.queue_arguments or {}
        if arguments.get("x-single-active-consumer"):
            why = "another worker would become its single active consumer"
        elif arguments.get("x-queue-type") == "stream":
            why = "it would be read from another place"
        else:
            return False
        if entity.name not in self._left_alone:
            self._left_alone.add(entity.name)
            logger.warning(
                "Queue %s is not consumed anew, for %s: while %d jobs of it are held, the others in it wait",
                entity.name,
                why,
                self._queues[entity.name].last.count,
            )
        return True

    # -- what it is put in front of ---------------------------------------------------------------

    def _around(self, name: str, tag: str, callback: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Count what a consumer to come gets."""
        queue = self._queues.setdefault(name, _Queue())
        queue.last = consumer = _Consumer(queue, tag, self._count)

        def counted(message: Any) -> Any:
            number = message.delivery_tag
            self._consumer_of[number] = consumer
            consumer.unacknowledged.add(number)
            queue.unacknowledged.add(number)
            if self._waits(message):
                queue.kept.add(number)
            try:
                return callback(message)
            finally:
                self._tell()

        return counted

    def _on_qos(self, prefetch_size: int, prefetch_count: int, a_global: bool, **kwargs: Any) -> Any:
        if not a_global:
            self._count = prefetch_count
        return self._basic_qos(prefetch_size, prefetch_count, a_global, **kwargs)

    def _on_ack(self, delivery_tag: int, multiple: bool = False, **kwargs: Any) -> None:
        self._forget(delivery_tag, multiple)
        self._basic_ack(delivery_tag, multiple=multiple, **kwargs)
        self._tell()

    def _on_reject(self, delivery_tag: int, requeue: bool, **kwargs: Any) -> None:
        self._forget(delivery_tag)
        self._basic_reject(delivery_tag, requeue, **kwargs)
        self._tell()

    def _forget(self, number: int, multiple: bool = False) -> None:
        """Count a message no more. Before RabbitMQ is told: it sends the next one at once."""
        numbers = [number]
        if multiple:  # they are numbered from 1; 0 stands for all
            numbers = [each for each in list(self._consumer_of) if each <= number or not number]
        for each in numbers:
            if (consumer := self._consumer_of.pop(each, None)) is not None:
                queue = consumer.queue
                for tags in consumer.unacknowledged, queue.unacknowledged, queue.kept:
                    tags.discard(each)

    def _tell(self) -> None:
        if any(queue.last.full for queue in self._queues.values()):
            self._changed()


def _entity(consumer: Any, name: str) -> Any:
    return next(queue for queue in consumer.queues if queue.name == name)
