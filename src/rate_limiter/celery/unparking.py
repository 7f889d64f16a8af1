"""Parked jobs go back to their queues: from lanes that nobody uses, and with the last worker that stops."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from celery import bootsteps

from ..broker.lanes import Lanes, lanes_on
from .loop import while_in_use

__all__ = ["UnparkStep", "adopt", "put_back"]

logger = logging.getLogger("rate_limiter")

#: Seconds until lanes are looked at again that another worker uses, or did until it was killed.
_IN_USE: Final = 5.0

#: The same, if nobody uses them, but a killed worker had jobs of them. Redis puts these back into the lane after
#: ``visibility_timeout``.
_LEFT: Final = 60.0


def adopt(broker: Lanes, queues: Iterable[str], mine: Mapping[str, Iterable[str]]) -> float:
    """Put back the jobs of lanes that nobody uses: their limits are gone, or have other names.

    Args:
        broker: The lanes on the broker.
        queues: The queues that this worker consumes.
        mine: The lanes of each queue that this worker uses.

    Returns:
        In how many seconds this is to be done again. Infinite: there are no lanes but those of this worker.

    """
    again = math.inf
    for queue in queues:
        lanes = [lane for lane in broker.there(queue) if lane not in mine.get(queue, ())]
        unused = broker.unused(queue, lanes)
        if len(unused) < len(lanes):
            again = _IN_USE
        for lane in unused:
            count = broker.put_back(lane, queue)
            if broker.alone(queue):
                broker.remove(queue, [lane])
            if count:
                logger.info("Put %d jobs back into queue %s: no limit parks in %s", count, queue, lane)
        if unused and not set(unused).isdisjoint(broker.there(queue)):
            again = min(again, _LEFT)
    return again


def put_back(
    broker: Lanes,
    queue: str,
    lanes: Iterable[str],
    in_hand: Mapping[str, Sequence[Any]],
    *,
    remove: bool,
) -> None:
    """Put back the jobs of all lanes of a queue that no other worker uses.

    Args:
        broker: The lanes on the broker.
        queue: The queue.
        lanes: The lanes that this worker uses. The others that are there are put back too.
        in_hand: The messages of each lane that this worker has in hand, the oldest first.
        remove: Whether the lanes are deleted too.

    """
    lanes = list({**dict.fromkeys(lanes), **dict.fromkeys(broker.there(queue))})
    count = sum(broker.put_back(lane, queue, in_hand.get(lane, ())) for lane in lanes)
    if remove:
        broker.remove(queue, lanes)
    if count:
        logger.info("Put %d parked jobs back into queue %s: no other worker is there", count, queue)


class UnparkStep(bootsteps.StartStopStep):
    """Puts parked jobs back in a worker whose limits are lifted: it has no gate that would take them back."""

    label = "Unpark"
    requires = ("celery.worker.consumer.tasks:Tasks",)

    _consumer: Any = None
    _timer: Any = None

    def start(self, consumer: Any) -> None:
        """Look for lanes, as soon as the worker consumes."""
        self._consumer = consumer
        consumer.call_soon(self._look)

    def stop(self, consumer: Any) -> None:
        """Look no more."""
        self._consumer = None
        if self._timer is not None:
            consumer.timer.cancel(self._timer)

    terminate = stop

    def _look(self) -> None:
        consumer = self._consumer
        if consumer is None or not consumer.connection:
            return
        again = _LEFT
        try:
            lanes = lanes_on(consumer.connection, consumer.hostname)
            queues = [entity.name for entity in consumer.task_consumer.queues]
            again = math.inf if lanes is None else adopt(lanes, queues, {})
        except Exception:  # no right to, or no further connection, say: the worker goes on
            logger.debug("Could not look for parked jobs", exc_info=True)
        if again < math.inf:
            look = while_in_use(self._look)
            self._timer = consumer.timer.call_after(again, consumer.call_soon, (look,))
