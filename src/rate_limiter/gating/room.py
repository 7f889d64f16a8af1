"""How many jobs a gate keeps from its broker for each limit, and when that is enough.

A job that is held is not acknowledged, so it takes a place of the prefetch count. The gate makes room for other
jobs beside those that are held, as long as no limit holds more than its bound. Of a limit that has reached it,
the broker is to keep the rest: the prefetch count grows no further, or, as its ``overflow`` says, its queues are
not consumed, or its jobs are parked.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from threading import RLock
from typing import Final, Generic, TypeVar

from .holding import Holding
from .host import Host
from .leaving import Leaving
from .limit import Limit

__all__ = ["Room"]

Job = TypeVar("Job")

#: Seconds for which a limit is beyond its bound before the host is told.
_STUCK: Final = 10.0

#: Jobs that have ended and cannot be acknowledged yet take no room from others, as long as they are at most so many.
_MOST_KEPT: Final = 1000


class Room(Generic[Job]):
    """The jobs that the gate of one worker or consumer keeps unacknowledged.

    Args:
        host: The gate.
        holding: What is held.
        leaving: Knows what limits may hold while other workers are to have the rest.
        max_held: The most jobs to hold for a limit that says nothing itself. ``None``: see `Limit.bound`.
        clock: Returns the time in seconds.
        lock: The engine's.

    """

    def __init__(
        self,
        host: Host[Job],
        holding: Holding[Job],
        leaving: Leaving[Job],
        *,
        max_held: int | None,
        clock: Callable[[], float],
        lock: RLock,
    ) -> None:
        self._host = host
        self._holding = holding
        self._leaving = leaving
        self._max_held = max_held
        self._clock = clock
        self._lock = lock
        #: The prefetch count that the consumer of a limit's jobs has without a gate. Set by the host.
        self.window: Callable[[Limit], int] = lambda _limit: 1
        #: The queues that are not consumed now, and because of which limit.
        self.paused: dict[str, Limit] = {}
        #: The jobs that the host keeps unacknowledged besides those held, see `keep`.
        self._kept: dict[Job, Limit | None] = {}
        self._kept_by: Counter[Limit] = Counter()
        #: How many of them no limit holds.
        self._loose = 0
        #: For each limit that keeps jobs: how many of them there is to be room for, and its bound. And the
        #: sums: what a job costs is not to depend on how many limits keep others.
        self._rooms: dict[Limit, tuple[int, int]] = {}
        self._room = self._most = 0
        #: Since when limits are beyond their bounds; infinite: the host was told.
        self._beyond: dict[Limit, float] = {}
        self._parking: frozenset[Limit] = frozenset()
        #: The limits that jobs of a queue were held for.
        self._limits_of: dict[str, set[Limit]] = {}

    @property
    def parking(self) -> frozenset[Limit]:
        """The limits whose jobs can be parked now. Set by the host.

        The jobs that are held for them take no room from others: see `bound`.
        """
        return self._parking

    @parking.setter
    def parking(self, limits: frozenset[Limit]) -> None:
        with self._lock:
            self._holding.changed.update(limits ^ self._parking)
            self._parking = limits

    @property
    def held_by(self) -> Counter[Limit]:
        """How many jobs each limit keeps in this worker or consumer."""
        return self._holding.held_by + self._kept_by if self._kept_by else self._holding.held_by

    def bound(self, limit: Limit) -> int:
        """Return how many jobs are held for a limit before the broker is to keep the rest.

        Of one whose jobs can be parked at most a second's worth, and half of the prefetch count: the other half
        is for other jobs.
        """
        window = self.window(limit)
        bound = limit.bound(window, self._max_held)
        if limit in self._parking:
            bound = min(bound, max(1, min(math.ceil(limit.jobs_per_second), window // 2)))
        return int(min(bound, self._leaving.share_of(limit)))

    def has_room(self, limit: Limit) -> bool:
        """Tell whether one more job may be held for a limit."""
        return self._number(limit) < self.bound(limit)

    def is_for_parking(self, limits: Iterable[Limit]) -> bool:
        """Tell whether a job of these limits is to be parked: one whose jobs can be parked holds enough."""
        with self._lock:
            return any(
                limit in self._parking and not self.has_room(limit)
                for limit in limits  # one behind another makes the job wait for sure
            )

    def takes_more_of(self, queue: str) -> bool:
        """Tell whether more jobs of a queue may come: it is not paused, and no bound is exceeded."""
        with self._lock:
            limits = self._limits_of.get(queue, set()) - self._parking
            over = any(self._number(limit) > self.bound(limit) for limit in limits)
            return not over and queue not in self.paused

    def kept(self) -> list[Job]:
        """Return the jobs that are kept besides those that are held."""
        return list(self._kept)

    def keep(self, job: Job, limit: Limit | None = None) -> None:
        """Count a job that is not held, but takes up the window: it is not acknowledged yet.

        Args:
            job: The job.
            limit: Counts it among those that it holds. ``None``: it has ended but for its
                acknowledgement, so no bound of a limit is for it.

        """
        with self._lock:
            if job not in self._kept:
                self._kept[job] = limit
                if limit is None:
                    self._loose += 1
                else:
                    self._kept_by[limit] += 1
                    self._holding.changed.add(limit)

    def let_go(self, job: Job) -> bool:
        """Count a job no more. Return whether it was kept: `Engine.settle` then makes use of the room."""
        with self._lock:
            kept = job in self._kept
            limit = self._kept.pop(job, None)
            if limit is not None:
                self._kept_by[limit] -= 1
                self._holding.changed.add(limit)
            elif kept:
                self._loose -= 1
        return kept

    def held_from(self, queue: str, limits: Sequence[Limit]) -> None:
        """Take note that a job of a queue is held. Stop consuming it if that is enough for one of its limits.

        Args:
            queue: The queue.
            limits: The job's.

        """
        self._limits_of.setdefault(queue, set()).update(limits)
        with self._lock:
            for limit in limits:
                if limit.overflow == "pause" and queue not in self.paused and not self.has_room(limit):
                    self.paused[queue] = limit
                    self._host.pause(queue, limit)

    def resume(self) -> None:
        """Consume a paused queue again once half of its limit's jobs are gone."""
        with self._lock:
            for queue, limit in list(self.paused.items()):
                if self._number(limit) <= self.bound(limit) // 2:
                    del self.paused[queue]
                    self._host.resume(queue)

    def count(self, limit: Limit) -> None:
        """Count anew what a limit keeps, after that has changed."""
        room, bound = self._rooms.pop(limit, (0, 0))
        self._room -= room
        self._most -= bound
        number, beyond = self._number(limit), False
        if limit not in self._parking and number:
            bound = self.bound(limit)
            room = min(number, bound)
            self._rooms[limit] = room, bound
            self._room += room
            self._most += bound
            beyond = number > bound
        self._note_bound(limit, number, beyond=beyond)

    def follow(self) -> None:
        """Tell the host for how many jobs there is to be room, as counted."""
        loose = min(_MOST_KEPT, self._loose)
        self._host.follow(self._room + loose, self._most + loose)

    def clear(self) -> None:
        """Forget everything: nothing is held any more, and nothing kept."""
        self._kept.clear()
        self._kept_by.clear()
        self._loose = 0
        self.paused.clear()
        self._rooms.clear()
        self._room = self._most = 0
        self._beyond = {limit: since for limit, since in self._beyond.items() if since == math.inf}
        self._limits_of.clear()

    def _note_bound(self, limit: Limit, number: int, *, beyond: bool) -> None:
        """Tell the host once of a limit whose jobs fill the window itself, so that no others come."""
        since = self._beyond.get(limit)
        if not beyond:
            if since is not None and since < math.inf:
                del self._beyond[limit]
        elif since is None:
            self._beyond[limit] = self._clock()
        elif since + _STUCK <= self._clock():
            self._beyond[limit] = math.inf
            self._host.stuck(limit, number)

    def _number(self, limit: Limit) -> int:
        return self._holding.held_by.get(limit, 0) + self._kept_by.get(limit, 0)
