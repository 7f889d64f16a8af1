"""Which queues a consumer stops consuming for a while (``overflow="pause"``), and which cannot be limited."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ..gating.limit import Limit
from ..gating.record import record_of

__all__ = ["Pausing", "check_queue"]

logger = logging.getLogger("rate_limiter")


class _Paused(NamedTuple):
    consumer: Any
    queue: Any


class Pausing:
    """The queues of one loop's consumers."""

    def __init__(self) -> None:
        self._consumers: dict[str, Any] = {}
        self._paused: dict[str, _Paused] = {}

    def add(self, consumer: Any) -> None:
        """Take note of a consumer that is about to consume its queues."""
        for queue in consumer.queues:
            self._consumers[queue.name] = consumer
            self._paused.pop(queue.name, None)

    def follow(self, paused: Mapping[str, Limit], can_cancel: Callable[[Any, str], bool]) -> None:
        """Stop consuming the queues that are paused, and take up those that are not any more.

        What was delivered already still arrives.

        Args:
            paused: The queues that are to be paused, and because of which limit.
            can_cancel: Tells of a consumer and a queue whether that can be done now, or is to wait.

        """
        for name in [name for name in self._paused if name not in paused]:
            consumer, queue = self._paused.pop(name)
            consumer.add_queue(queue)
            consumer.consume()
            logger.info("Resumed queue %s", name)
        for name, limit in list(paused.items()):
            consumer = self._consumers.get(name)
            if consumer is None or name in self._paused or not consumer.consuming_from(name):
                continue
            if can_cancel(consumer, name):
                queue = next(queue for queue in consumer.queues if queue.name == name)
                consumer.cancel_by_queue(name)
                self._paused[name] = _Paused(consumer, queue)
                logger.info("Paused queue %s: enough of %s is held", name, record_of(limit).name)

    def forget(self) -> None:
        """Forget all consumers, with their connection."""
        self._consumers.clear()
        self._paused.clear()


def check_queue(queue: Any, consumer: Any, limits: Iterable[Limit]) -> None:
    """Refuse a limited queue whose messages cannot be held, or that has to be paused and cannot be.

    Raises:
        ValueError: The queue is consumed with ``no_ack``, or is ``auto_delete`` under ``overflow="pause"``.

    """
    for limit in limits:
        if consumer.no_ack or queue.no_ack:
            raise ValueError(
                f"queue {queue.name} is consumed with no_ack, and limited by {record_of(limit).name}: the broker "
                "would forget the held messages; consume it with acknowledgements"
            )
        if limit.overflow == "pause" and queue.auto_delete:
            raise ValueError(
                f"queue {queue.name} is auto_delete, so overflow='pause' of {record_of(limit).name} would delete "
                "it: use overflow='hold'"
            )
