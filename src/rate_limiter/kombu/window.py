"""What the gate does to one channel of a kombu consumer.

It sees that the messages behind held ones arrive: it raises the prefetch count by the number of held
messages, or consumes a queue again, where that count is static. It renews the leases of held messages on
Redis, and lets them go back to the broker in order.
"""

import logging
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any, Final

from kombu.common import QoS

from ..broker.lease import Lease
from ..broker.prefetch import HIGHEST_COUNT, STATIC_QUEUE_TYPES, Prefetch
from ..broker.restore import give_back, restore_in_order
from ..broker.static import StaticCounts

__all__ = ["DEFAULT", "Window"]

logger = logging.getLogger("rate_limiter")

#: The prefetch count of a consumer that sets none: without one nothing would bound what is held.
DEFAULT: Final = 20


class Window:
    """The prefetch window of one channel.

    Args:
        channel: A kombu channel.
        static: Whether the broker has refused a prefetch count for a whole channel before.

    On RabbitMQ a count that can be changed is one for the whole channel. So the counts of its consumers
    are removed, and the channel gets their sum. Where there is no such count, each consumer keeps its own.

    """

    def __init__(self, channel: Any, static: bool) -> None:
        client = channel.connection.client
        self.channel = channel
        #: How many messages of this channel are held.
        self.held = 0
        #: Whether the broker is one that closes a channel whose message is unacknowledged for too long.
        self.is_amqp = client.transport.driver_type == "amqp"
        self._static = self.is_amqp and (static or client.qos_semantics_matches_spec)
        #: The prefetch count of each queue, without a gate.
        self._counts: dict[str, int] = {}
        self._prefetch: Prefetch | None = None
        self._consumers: StaticCounts | None = None
        self._lease = Lease(channel)
        self._renewal = 0.0
        restore_in_order(channel)

    def add(self, consumer: Any) -> int:
        """Take over the prefetch count of a consumer that is about to consume.

        Args:
            consumer: A ``kombu.Consumer`` of this channel.

        Returns:
            The prefetch count that the consumer has without a gate.

        """
        count: int = consumer.prefetch_count or 0
        if not self.is_amqp:
            count = count or self.channel.qos.prefetch_count  # it may have been set on the channel
        if not count and not self._counts:
            logger.info(
                "The consumer of %s sets no prefetch_count: it gets %d, or nothing would bound what is "
                "held",
                ", ".join(sorted(queue.name for queue in consumer.queues)),
                DEFAULT,
            )
        count = count or next(reversed(self._counts.values()), DEFAULT)
        for queue in consumer.queues:
            self._counts[queue.name] = count
            if (queue.queue_arguments or {}).get("x-queue-type") in STATIC_QUEUE_TYPES:
                self._static = self.is_amqp
        if self._static:
            self._prefetch = None
            if self._consumers is None:
                self._consumers = StaticCounts(self.channel)
            self._consumers.add(consumer)
            self.channel.basic_qos(0, count, False)
            return count
        total = count
        if self.is_amqp:
            self.channel.basic_qos(0, 0, False)
            total = sum(self._counts.values())  # the other transports have one for the whole channel
        # `follow` raises this count again by what is held.
        qos = QoS(self._set_count, min(total, HIGHEST_COUNT))  # type: ignore[no-untyped-call]
        self._prefetch = Prefetch(qos)
        self._prefetch.update()
        return count

    def keep(self, message: Any) -> None:
        """Take note of a message that is held, or waits to be sent back."""
        self.held += 1
        if self._consumers is not None:
            self._consumers.keep(message)

    def hand_on(self, message: Any) -> None:
        """Take note that a message is not kept any more."""
        self.held -= 1
        if self._consumers is not None:
            self._consumers.hand_on(message)

    def can_cancel(self, queue: str) -> bool:
        """Tell whether a queue can be cancelled now: what is on its way might go behind all others."""
        return self._consumers is None or self._consumers.full(queue)

    def follow(self, held: int, most: int, takes_more_of: Callable[[str], bool]) -> None:
        """Make room for other messages beside the held ones.

        Args:
            held: The number of held messages that take up a part of the prefetch count.
            most: The highest number of messages that may be held.
            takes_more_of: Tells whether more messages of a queue may come.

        """
        if self._prefetch is not None and self._prefetch.follow(held, most):
            self._prefetch.update()
        if self._consumers is not None:
            for queue in filter(takes_more_of, self._consumers.wanted()):
                self._consumers.consume_again(queue)

    @property
    def renewal(self) -> float | None:
        """The moment of the monotonic clock for the next `renew`; ``None`` if there are no leases."""
        return None if self._lease.interval is None else self._renewal

    @property
    def lease_is_due(self) -> bool:
        """Whether it is time for `renew`."""
        return self._lease.interval is not None and self.held > 0 and monotonic() >= self._renewal

    def renew(self, tags: Iterable[str]) -> None:
        """Renew the leases of held messages, which are given by their delivery tags."""
        assert self._lease.interval is not None  # noqa: S101 - for mypy
        self._renewal = monotonic() + self._lease.interval
        self._lease.renew(tags)

    def give_back(self, messages: Iterable[Any]) -> None:
        """Let held messages go back to the broker: the channel is about to be closed."""
        give_back(self.channel, messages)

    def _set_count(self, prefetch_count: int) -> None:
        self.channel.basic_qos(0, prefetch_count, self.is_amqp)
