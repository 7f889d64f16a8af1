"""Parked jobs go back to their queues: from lanes that nobody uses, and with the last worker that stops."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ..broker.lanes import Lanes

__all__ = ["adopt", "put_back"]

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
