"""Which held jobs go back to their queues before their turn.

*Those that are held for too long.* RabbitMQ closes a channel, and Celery then ends the worker, if a message
of it is not acknowledged for ``consumer_timeout`` (30 minutes by default). A job that is held for
`Leaving.longest_hold` goes to the end of its queue, unless its turn comes within half of that time more.

*Those that another worker is to have.* A worker that was alone may hold all jobs of a queue when another
one starts. It then keeps its share of what each limit holds, and holds no more than that for some seconds,
so that the other worker gets the rest.
"""

import math
from collections.abc import Callable, Iterable
from typing import Final, Generic, TypeVar

from .holding import Held, Holding
from .limit import Limit

__all__ = ["LONGEST_HOLD", "Leaving"]

Job = TypeVar("Job")

#: For how many seconds a message of RabbitMQ is held, unless the user says otherwise.
LONGEST_HOLD: Final = 600.0

#: A job may be held for so many times ``longest_hold`` if its turn comes by then.
_AT_MOST: Final = 1.5

#: Jobs that are held for too long are looked for once in this part of ``longest_hold``.
_LOOK: Final = 1 / 20

#: Seconds between two looks while more is held than the worker's share.
_LOOK_AT_SHARE: Final = 0.1


class Leaving(Generic[Job]):
    """Lets held jobs go back.

    Args:
        holding: What is held.
        send_back: Sends a job to the end of its queue. ``False``: that cannot be done, at least not now.
        left: Called with each job that was sent back.

    """

    def __init__(
        self,
        holding: Holding[Job],
        send_back: Callable[[Job], bool],
        left: Callable[[Held[Job]], None],
    ) -> None:
        self._holding = holding
        self._send_back = send_back
        self._left = left
        #: For how many seconds a job is held. Infinite: for as long as it takes.
        self.longest_hold = math.inf
        self._look_at = math.inf
        #: The most that each limit holds until a moment, and whether what it held before that leaves.
        self._most: dict[Limit, int] = {}
        self._until = math.inf
        self._shared_at = -math.inf

    @property
    def next_due(self) -> float:
        """The moment at which `work` is to be called."""
        return min(self._look_at, self._until)

    def begin(self, held: Held[Job]) -> None:
        """Take note of a job that begins to wait."""
        self._look_at = min(self._look_at, held.since + self.longest_hold)

    def most(self, limit: Limit) -> float:
        """Return the most jobs that a limit may hold now."""
        return self._most.get(limit, math.inf)

    def share(self, part: float, now: float, seconds: float, *, send_back: bool) -> list[Held[Job]]:
        """Keep a part of what each limit holds, and hold no more than that for some seconds.

        Args:
            part: The part that is kept, from 0 to 1. Of any number of jobs it is 1 at least.
            now: The caller's clock.
            seconds: How long no more is held.
            send_back: Whether `work` sends the jobs beyond that to the end of their queues.

        Returns:
            If it does not: these jobs, the latest first. They are held no more, and the caller gives them
            back to the broker.

        """
        self._most = {
            limit: math.ceil(number * part) for limit, number in self._holding.held_by.items()
        }
        self._until = now + seconds
        self._holding.changed.update(self._most)
        if send_back:
            self._shared_at = self._look_at = now
            return []
        leaving = self._beyond(now)
        for held in reversed(leaving):
            self._holding.take_out(held, now)
        return leaving[::-1]

    def work(self, now: float) -> None:
        """Send back what is to go, if it is time to look."""
        if now >= self._until:
            self._holding.changed.update(self._most)
            self._most, self._until, self._shared_at = {}, math.inf, -math.inf
        if now < self._look_at:
            return
        self._look_at = math.inf
        if self._shared_at > -math.inf and self._go(self._beyond(self._shared_at), now):
            self._look_at = now + _LOOK_AT_SHARE
        if self.longest_hold == math.inf:
            return
        oldest = now - self.longest_hold
        self._go(self._holding.late(oldest, oldest + self.longest_hold * _AT_MOST, now), now)
        since = min((held.since for held in self._holding.first()), default=math.inf)
        look = max(since + self.longest_hold, now + self.longest_hold * _LOOK)
        self._look_at = min(self._look_at, look)

    def clear(self) -> None:
        """Forget everything: nothing is held any more."""
        self._look_at = self._until = math.inf
        self._most, self._shared_at = {}, -math.inf

    def _go(self, leaving: Iterable[Held[Job]], now: float) -> bool:
        """Send jobs back. Return whether any of them could not go."""
        stays = False
        for held in leaving:
            if self._send_back(held.job):
                self._holding.take_out(held, now)
                self._left(held)
            else:
                stays = True
        return stays

    def _beyond(self, since: float) -> list[Held[Job]]:
        """Return the jobs, in order, that limits hold beyond what they may, and held at a moment."""
        room = dict(self._most)
        beyond = []
        for held in sorted(self._holding.all(), key=lambda held: held.arrival):
            room[held.limit] = room.get(held.limit, 0) - 1
            if room[held.limit] < 0 and held.since <= since:
                beyond.append(held)
        return beyond
