"""Which held jobs leave before their turn.

*Those that are held for too long.* RabbitMQ closes a channel, and Celery then ends the worker, if a message
of it is not acknowledged for ``consumer_timeout`` (30 minutes by default). A job that is held for
`Leaving.longest_hold` goes to the end of its queue, unless its turn comes within half of that time more.

*Those that have waited for too long.* A limit may let jobs wait for ``max_wait`` at most. One whose forecast
was shorter may wait for longer all the same: its bucket was paused, or other jobs came before it at another
bucket. Then it ends as ``when_limited`` says.

*Those that another worker is to have.* A worker that holds more than its share keeps the first ones, and holds
no more than that for some seconds, so that the other workers get the rest.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Generic, TypeVar

from .held import Held
from .holding import Holding
from .limit import Demand, Limit

__all__ = ["LONGEST_HOLD", "Leaving"]

Job = TypeVar("Job")

#: For how many seconds a message of RabbitMQ is held, unless the user says otherwise.
LONGEST_HOLD: Final = 600.0

#: A job may be held for so many times ``longest_hold`` if its turn comes by then.
_AT_MOST: Final = 1.5

#: Jobs that are held for too long are looked for once in this part of ``longest_hold``.
_LOOK: Final = 1 / 20

#: From so many jobs with a ``max_wait`` on, those that wait no more are forgotten now and then.
_MANY: Final = 1000

#: Seconds after which a job that could not end is to end again.
_TRY_AGAIN: Final = 1.0

#: Seconds between two looks while more is held than the worker's share.
_LOOK_AT_SHARE: Final = 0.1


class Leaving(Generic[Job]):
    """Lets held jobs go back.

    Args:
        holding: What is held.
        send_back: Sends a job to the end of its queue. ``False``: that cannot be done, at least not now.
        left: Called with each job that was sent back.
        refuse: Ends a job as ``when_limited`` says. ``False``: that cannot be done, at least not now.

    """

    def __init__(
        self,
        holding: Holding[Job],
        send_back: Callable[[Job], bool],
        left: Callable[[Held[Job]], None],
        refuse: Callable[[Job, Demand, float], bool],
    ) -> None:
        self._holding = holding
        self._send_back = send_back
        self._left = left
        self._refuse = refuse
        #: Jobs by the moment until which their limits let them wait.
        self._ends: list[tuple[float, int, Held[Job]]] = []
        self._sweep_at = _MANY
        self._count = itertools.count()
        #: For how many seconds a job is held. Infinite: for as long as it takes.
        self.longest_hold = math.inf
        self._look_at = math.inf
        #: The most that limits may hold, because other workers are to have the rest, and until when.
        self._shares: dict[Limit, int] = {}
        self._shared_until = math.inf
        #: Jobs beyond that, which came by this moment, are to be sent back.
        self._beyond_came_by = -math.inf

    @property
    def next_due(self) -> float:
        """The moment at which `work` is to be called."""
        due = min(self._look_at, self._shared_until)
        return self._ends[0][0] if self._ends and self._ends[0][0] < due else due

    def begin(self, held: Held[Job]) -> None:
        """Take note of a job that begins to wait."""
        self._look_at = min(self._look_at, held.since + self.longest_hold)
        self._end_after(held.since, held)

    def share_of(self, limit: Limit) -> float:
        """Return the most jobs that a limit may hold now."""
        return self._shares.get(limit, math.inf)

    def share(
        self, most: Mapping[Limit, int], now: float, seconds: float, *, send_back: bool
    ) -> list[Held[Job]]:
        """Let limits hold no more than so many jobs for some seconds; those beyond that leave.

        Args:
            most: The limits, and how many jobs each may hold.
            now: The caller's clock.
            seconds: How long no more is held.
            send_back: Whether `work` sends the jobs beyond that to the end of their queues.

        Returns:
            If it does not: these jobs, the latest first. They are held no more, and the caller gives them
            back to the broker.

        """
        self._shares.update(most)
        self._shared_until = now + seconds
        self._holding.changed.update(self._shares)
        if send_back:
            self._beyond_came_by = self._look_at = now
            return []
        leaving = self._beyond(now)
        for held in reversed(leaving):
            self._holding.take_out(held, now)
        return leaving[::-1]

    def work(self, now: float) -> None:
        """Let those go that are to leave, if it is time to look."""
        while self._ends and self._ends[0][0] <= now:
            held = heapq.heappop(self._ends)[2]
            if not held.left:
                self._end(held, now)
        if now >= self._shared_until:
            self._holding.changed.update(self._shares)
            self._shares, self._shared_until, self._beyond_came_by = {}, math.inf, -math.inf
        if now < self._look_at:
            return
        self._look_at = math.inf
        if self._beyond_came_by > -math.inf and self._go(self._beyond(self._beyond_came_by), now):
            self._look_at = now + _LOOK_AT_SHARE
        if self.longest_hold == math.inf:
            return
        self._go(self._holding.late(self.longest_hold, self.longest_hold * _AT_MOST, now), now)
        since = min((held.since for held in self._holding.all()), default=math.inf)
        look = max(since + self.longest_hold, now + self.longest_hold * _LOOK)
        self._look_at = min(self._look_at, look)

    def clear(self) -> None:
        """Forget everything: nothing is held any more."""
        self._look_at = self._shared_until = math.inf
        self._shares, self._beyond_came_by = {}, -math.inf
        self._ends.clear()
        self._sweep_at = _MANY

    def _end_after(self, moment: float, held: Held[Job]) -> None:
        """Note when, after a moment, a job has waited for as long as one of its limits lets it."""
        if len(held.demands) == 1 and held.limit.patience == math.inf:
            return  # the usual case, quickly
        ends = [held.since + demand.limit.patience for demand in held.demands]
        if (end := min((end for end in ends if end > moment), default=math.inf)) < math.inf:
            self._end_at(end, held)

    def _end_at(self, moment: float, held: Held[Job]) -> None:
        heapq.heappush(self._ends, (moment, next(self._count), held))
        if len(self._ends) >= self._sweep_at:
            self._ends = [entry for entry in self._ends if not entry[2].left]
            heapq.heapify(self._ends)
            self._sweep_at = max(_MANY, 2 * len(self._ends))

    def _end(self, held: Held[Job], now: float) -> None:
        """End a job that has waited for too long for the limit that makes it wait now."""
        if not held.limit.patience or held.since + held.limit.patience > now:
            self._end_after(now, held)  # it was for another of its limits
            return
        delay = max(math.ulp(now), held.queue.forecast() - now)
        if self._refuse(held.job, self._holding.demand_of(held), delay):
            self._holding.take_out(held, now)
        else:
            self._end_at(now + _TRY_AGAIN, held)

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
        room = dict(self._shares)
        beyond = []
        for held in sorted(self._holding.all(), key=lambda held: held.arrival):
            if held.limit in room:
                room[held.limit] -= 1
                if room[held.limit] < 0 and held.since <= since:
                    beyond.append(held)
        return beyond
