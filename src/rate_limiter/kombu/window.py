"""What a gate does to one channel: its prefetch count, kept above what is held, and its leases on Redis.

A held message stays in the prefetch window. Were the window not raised, a few held ones would fill it,
and nothing behind them in the queue would arrive.
"""

import logging
from collections.abc import Iterable, Sequence
from time import monotonic, time
from typing import Any, Final

__all__ = ["Window"]

logger = logging.getLogger("rate_limiter")

#: What a consumer gets that sets no ``prefetch_count``: without one nothing would bound what is held.
DEFAULT: Final = 20

#: The protocol has 16 bits for it.
_MOST: Final = 0xFFFF

#: Their consumers have a count each, which cannot be changed. RabbitMQ 4 knows no other.
_STATIC_TYPES: Final = ("quorum", "stream")


class Window:
    """The prefetch window of one channel.

    Args:
        channel: A kombu channel.
        static: Whether the broker has refused a count for the whole channel before.

    On RabbitMQ a count that can change is one for the whole channel, so the consumers' own are lifted.
    Each change is a round trip: it moves in chunks, of the consumers' own count or half of what is held.

    """

    def __init__(self, channel: Any, static: bool) -> None:
        client = channel.connection.client
        self.channel = channel
        #: How many messages of this channel are held.
        self.held = 0
        self._amqp = client.transport.driver_type == "amqp"
        self._static = self._amqp and (static or client.qos_semantics_matches_spec)
        self._queues: set[str] = set()
        self._own = 0
        self._base = 0
        self._raised = 0
        self._renewal = 0.0
        #: Seconds until Redis gives out again what is not acknowledged.
        self._lease: float | None = None
        if hasattr(channel, "unacked_index_key"):
            self._lease = channel.visibility_timeout

    def add(self, consumer: Any, room: int) -> int:
        """Take over the count of a consumer that is about to consume.

        Args:
            consumer: A ``kombu.Consumer`` of this channel.
            room: How many messages its limits may hold, for brokers that keep to the first count.

        Returns:
            The count that it has without a gate.

        """
        for queue in consumer.queues:
            self._queues.add(queue.name)
            if (queue.queue_arguments or {}).get("x-queue-type") in _STATIC_TYPES:
                self._static = self._amqp
        own = consumer.prefetch_count
        if not self._amqp:
            own = own or self.channel.qos.prefetch_count  # it may have been set on the channel
        if not own and not self._own:
            logger.info(
                "The consumer of %s sets no prefetch_count: it gets %d, or nothing would bound what is "
                "held",
                ", ".join(sorted(queue.name for queue in consumer.queues)),
                DEFAULT,
            )
        self._own = own or self._own or DEFAULT
        # RabbitMQ counts for each queue, the others for the channel
        self._base = self._own * len(self._queues) if self._amqp else self._own
        if self._static:
            self._tell(self._own + room, whole_channel=False)
        else:
            if self._amqp:
                self.channel.basic_qos(0, 0, False)
            self._tell(self._base + self._raised, whole_channel=self._amqp)
        return self._own

    def follow(self, held: int, most: int) -> None:
        """Raise or lower the count for ``held`` messages, of at most so many that may be held."""
        chunk = max(self._base, held // 2)
        spare = self._raised - held
        if self._static or not self._base or (0 <= spare <= 2 * chunk and (held or not self._raised)):
            return
        raised = min(held + chunk, most) if held else 0
        if raised != self._raised:
            self._raised = raised
            self._tell(self._base + raised, whole_channel=self._amqp)

    @property
    def renewal(self) -> float | None:
        """The moment, by the monotonic clock, at which leases are to be renewed."""
        return None if self._lease is None else self._renewal

    @property
    def lease_is_due(self) -> bool:
        """Whether `renew` is to be called."""
        return self._lease is not None and self.held > 0 and monotonic() >= self._renewal

    def renew(self, tags: Iterable[str]) -> None:
        """Redis gives what is not acknowledged to others in time: move that moment, well before."""
        assert self._lease is not None  # noqa: S101 - for mypy
        self._renewal = monotonic() + self._lease / 3
        # what kombu writes there (kombu/transport/redis.py, QoS.append)
        leases = dict.fromkeys(tags, time())
        if leases:
            with self.channel.conn_or_acquire() as client:
                client.zadd(self.channel.unacked_index_key, leases, xx=True)

    def give_back(self, messages: Sequence[Any]) -> None:
        """Put back, in order, what was held of an open channel that is about to be closed.

        RabbitMQ does that itself. kombu does it for Redis, and so that the last comes first; and not at
        all for ``memory://``.
        """
        if self._lease is not None:
            for message in reversed(messages):  # each goes to the head of its queue
                self.channel.qos.restore_by_tag(message.delivery_tag)
        elif not getattr(self.channel, "do_restore", True):
            for message in messages:
                message.requeue()

    def _tell(self, count: int, *, whole_channel: bool) -> None:
        self.channel.basic_qos(0, min(count, _MOST), whole_channel)
