"""What the gate does to one channel of a kombu consumer.

It sees that the messages behind held ones arrive: it raises the prefetch count by the number of held
messages, or consumes a queue again, where that count is static. It renews the leases of held messages on
Redis, and lets them go back to the broker in order.
"""

import logging
import math
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any, Final

from kombu.common import QoS

from ..broker.lease import Lease
from ..broker.prefetch import HIGHEST_COUNT, STATIC_QUEUE_TYPES, Prefetch
from ..broker.redis_channel import read_what_comes
from ..broker.restore import give_back, restore_in_order
from ..broker.static import StaticCounts

__all__ = ["DEFAULT_COUNT", "Window"]

logger = logging.getLogger("rate_limiter")

#: The prefetch count of a consumer that sets none: without one nothing would bound what is held.
DEFAULT_COUNT: Final = 20


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
        self._static_counts: StaticCounts | None = None
        self._lease = Lease(channel)
        #: The moment, by the monotonic clock, for the next `renew`. Infinite: there are no leases.
        self.renewal = math.inf if self._lease.interval is None else 0.0
        restore_in_order(channel)
        read_what_comes(channel)

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
                "The consumer of %s sets no prefetch_count: it gets %d, because without one any number of messages "
                "would be held",
                ", ".join(sorted(queue.name for queue in consumer.queues)),
                DEFAULT_COUNT,
            )
        count = count or next(reversed(self._counts.values()), DEFAULT_COUNT)
        for queue in consumer.queues:
            self._counts[queue.name] = count
            if (queue.queue_arguments or {}).get("x-queue-type") in STATIC_QUEUE_TYPES:
                self._static = self.is_amqp
        if self._static:
            self._prefetch = None
            if self._static_counts is None:
                self._static_counts = StaticCounts(self.channel)
            self._static_counts.add(consumer)
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
        if self._static_counts is not None:
            self._static_counts.keep(message)

    def hand_on(self, message: Any) -> None:
        """Take note that a message is not kept any more."""
        self.held -= 1
        if self._static_counts is not None:
            self._static_counts.hand_on(message)

    def can_cancel(self, queue: str) -> bool:
        """Tell whether a queue can be cancelled now: what is on its way might go behind all others."""
        return self._static_counts is None or self._static_counts.full(queue)

    def follow(self, held: int, most: int, takes_more_of: Callable[[str], bool]) -> None:
        """Make room for other messages beside the held ones.

        Args:
            held: The number of held messages that take up a part of the prefetch count.
            most: The highest number of messages that may be held.
            takes_more_of: Tells whether more messages of a queue may come.

        """
        if self._prefetch is not None and self._prefetch.follow(held, most):
            self._prefetch.update()
        if self._static_counts is not None:
            for queue in filter(takes_more_of, self._static_counts.wanted()):
                self._static_counts.consume_again(queue)

    @property
    def lease_is_due(self) -> bool:
        """Whether it is time for `renew`."""
        return self.held > 0 and monotonic() >= self.renewal

    def renew(self, tags: Iterable[str]) -> None:
        """Renew the leases of held messages, which are given by their delivery tags."""
        if self._lease.interval is not None:
            self.renewal = monotonic() + self._lease.interval
            self._lease.renew(tags)

    def give_back(self, messages: Iterable[Any]) -> None:
        """Let held messages go back to the broker: the channel is about to be closed."""
        give_back(self.channel, messages)

    def _set_count(self, prefetch_count: int) -> None:
        self.channel.basic_qos(0, prefetch_count, self.is_amqp)
