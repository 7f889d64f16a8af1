"""What both gates decide alike: which limits a job is under, its price, whether it goes, waits or ends.

A gate gives each job to `Engine.offer`, sleeps until `Engine.next_due`, and then calls `Engine.release`.
It runs the jobs that these two let go. The engine decides and tells the observers; what is to be done in
a broker, a worker or a pool it asks of the gate, its `Host`.
"""

import contextlib
import heapq
import itertools
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from time import monotonic, perf_counter
from typing import Any, Final, Generic, Literal, TypeVar
from weakref import WeakValueDictionary

from ..all_of import members
from ..bucket import Bucket, is_in_redis
from . import limit as limits
from .forecast import Forecast, forecasts
from .holding import Held, Holding
from .leaving import Leaving
from .limit import Call, Demand, Limit, refuse_to_pay_twice, seconds_until
from .record import listed, record_of
from .tally import tell

__all__ = ["Decision", "Engine", "Host", "Plan", "warn_of_unused"]

logger = logging.getLogger("rate_limiter")

Job = TypeVar("Job")

#: What the engine says of a job: it may run, it is held, it has ended without running, or it is to wait in the
#: broker, aside.
Decision = Literal["go", "held", "ended", "park"]

#: A callable of the user's that takes longer, in seconds, is logged: it holds up the gate's loop.
_SLOW: Final = 0.05

#: How many kinds of jobs are remembered. The name of a queue may be a routing key, of which there may be
#: any number.
_MOST_PLANS: Final = 10_000

#: Seconds without a job that waits, after which a limit has stopped to make jobs wait.
_QUIET: Final = 10.0

#: Seconds for which a limit is beyond its bound before the host is told.
_STUCK: Final = 10.0

#: Jobs that have ended and cannot be acknowledged yet take no room from others, as long as they are at most so many.
_MOST_KEPT: Final = 1000


class Plan:
    """What a gate does with the jobs of one task from one queue."""

    __slots__ = ("asks_headers", "demands", "limits")

    def __init__(
        self, limits: Sequence[Limit], for_gate: Callable[[Sequence[Demand]], Sequence[Demand]]
    ) -> None:
        # A shadow comes last: it counts a job when all others let it go, and not each time one is asked.
        self.limits = tuple(sorted(limits, key=lambda limit: limit.shadow))
        #: Whether the price of its jobs may depend on their headers.
        self.asks_headers = any(limit.asks_headers for limit in limits)
        #: What each job is to take, where that is the same for all.
        self.demands: tuple[Demand, ...] = ()
        if all(limit.fixed for limit in limits):
            demands = [demand for limit in self.limits for demand in limit.fixed]
            self.demands = tuple(for_gate(demands))


class Host(Generic[Job]):
    """What a gate does for its engine. A gate may leave out the methods that raise nothing here."""

    #: Whether jobs that were let go may have to wait for a slot of a pool before they start. Then the host
    #: tells of each start by `Engine.started`, and `unstarted` is asked.
    has_slots = False

    def call_of(self, job: Job, asks_headers: bool) -> Call:
        """Return the arguments that a job was sent with. Headers that nobody asks for may be left out."""
        raise NotImplementedError

    def refuse(self, job: Job, demand: Demand, delay: float) -> bool:
        """End a job as ``when_limited`` says. ``False``: that cannot be done, so hold it."""
        raise NotImplementedError

    def fail(self, job: Job, error: Exception) -> None:
        """End a job with an error as its result."""
        raise NotImplementedError

    def gone(self, job: Job) -> bool:
        """Tell whether a held job was revoked, has expired, or is the broker's again; end it then."""
        return False

    def send_back(self, job: Job) -> bool:
        """Send a held job to the end of its queue, unchanged. ``False``: that cannot be done now."""
        return False

    def unstarted(self, job: Job) -> bool:
        """Tell whether a job that was let go is still to start."""
        return False

    def follow(self, held: int, most: int) -> None:
        """Make room for other jobs beside the held ones.

        Args:
            held: How many jobs are held now.
            most: How many may be held at most.

        """

    def pause(self, queue: str, limit: Limit) -> None:
        """Stop consuming a queue: enough of its jobs are held for the limit."""

    def resume(self, queue: str) -> None:
        """Consume a paused queue again."""

    def stuck(self, limit: Limit, held: int) -> None:
        """Take note of a limit beyond its bound for 10 s: jobs behind its jobs wait too. Called once a limit.

        Args:
            limit: The limit.
            held: How many jobs it holds.

        """

    def wake(self) -> None:
        """Call `Engine.release` soon: a bucket has changed. It may be called from any thread."""


class Engine(Generic[Job]):
    """The decisions of one gate in one worker or consumer.

    Args:
        host: The gate.
        limits_for: Returns the limits of a job, given what the gate tells kinds of jobs apart by.
        max_held: The most jobs to hold for a limit that says nothing itself. ``None``: see `Limit.bound`.
        clock: Returns the time in seconds.

    """

    def __init__(
        self,
        host: Host[Job],
        limits_for: Callable[..., tuple[Limit, ...]],
        *,
        max_held: int | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._host = host
        self._limits_for = limits_for
        self._max_held = max_held
        self._clock = clock
        self._holding: Holding[Job] = Holding(
            refuse=self._refuse,
            fail=self._fail_held,
            skip=self._skip,
            hold=self._on_hold,
            known=self._tell_held,
            poked=host.wake,
            is_unstarted=host.unstarted if host.has_slots else None,
        )
        self._leaving: Leaving[Job] = Leaving(
            self._holding, self._send_back, self._on_leave, self._refuse
        )
        self._plans: dict[Hashable, Plan] = {}
        #: The prefetch count that the consumer of a limit's jobs has without a gate.
        self.window: Callable[[Limit], int] = lambda _limit: 1
        #: The jobs that the host keeps unacknowledged besides those held, see `keep`.
        self._kept: dict[Job, Limit | None] = {}
        self._kept_by: Counter[Limit] = Counter()
        #: How many of them no limit holds.
        self._loose = 0
        #: The queues that are not consumed now, and because of which limit.
        self.paused: dict[str, Limit] = {}
        #: For each limit that keeps jobs: how many of them there is to be room for, and its bound. And the
        #: sums: what a job costs is not to depend on how many limits keep others.
        self._rooms: dict[Limit, tuple[int, int]] = {}
        self._room = self._most = 0
        #: Since when limits are beyond their bounds; infinite: the host was told.
        self._beyond: dict[Limit, float] = {}
        #: The limits whose jobs wait in the broker where there are many. Those held take no room from others:
        #: see `bound`.
        self._parking: frozenset[Limit] = frozenset()
        #: The limits that jobs of a queue were held for.
        self._limits_of: dict[str, set[Limit]] = {}
        #: The limits that make jobs wait, and since when no job waits any more.
        self._waiting: dict[Limit, float] = {}
        #: When to look next whether one of them has stopped; one entry for each.
        self._checks: list[tuple[float, int, Limit]] = []
        self._count = itertools.count()
        self._has_held = False
        #: For each bucket that speaks to a server: what this gate takes from instead.
        self._buckets: WeakValueDictionary[Bucket, Any] = WeakValueDictionary()
        #: Celery fires timers from a second thread while a warm shutdown waits for the pool.
        self.lock = threading.RLock()

    # -- what is there ----------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many jobs are held."""
        return len(self._holding)

    def jobs(self) -> list[Job]:
        """Return the jobs that are held, and those that the host keeps."""
        with self.lock:
            return [*(held.job for held in self._holding.all()), *self._kept]

    def unstarted(self) -> list[Job]:
        """Return the jobs that were let go and have not started, as far as known."""
        with self.lock:
            return self._holding.unstarted()

    @property
    def held_by(self) -> Counter[Limit]:
        """How many jobs each limit keeps in this worker or consumer."""
        return self._holding.held_by + self._kept_by if self._kept_by else self._holding.held_by

    def forecasts(self) -> list[Forecast[Job]]:
        """Return when each held job will go, if nothing changes and no job comes before it."""
        with self.lock:
            held = self._holding.all()
        return list(forecasts(held))

    @property
    def parking(self) -> frozenset[Limit]:
        """The limits whose jobs can be parked now. Set by the host."""
        return self._parking

    @parking.setter
    def parking(self, limits: frozenset[Limit]) -> None:
        with self.lock:
            self._holding.changed.update(limits ^ self._parking)
            self._parking = limits

    def due_in(self, plan: Plan) -> float:
        """Return the seconds until each bucket of a plan has the tokens of one job. 0.0 also if not known."""
        with self.lock:
            return max((self._due_in(demand) for demand in plan.demands), default=0.0)

    @property
    def longest_hold(self) -> float:
        """For how many seconds a job is held before `Host.send_back` is asked for it. By default for ever."""
        return self._leaving.longest_hold

    @longest_hold.setter
    def longest_hold(self, seconds: float) -> None:
        self._leaving.longest_hold = seconds

    @property
    def next_due(self) -> float:
        """The moment, by the clock, at which `release` is to be called next. It may be infinite."""
        with self.lock:  # without min(): it is asked several times for each job
            due = self._holding.next_due
            look = self._leaving.next_due
            if self._checks and self._checks[0][0] < look:
                look = self._checks[0][0]
        return look if due is None or look < due else due

    def look(self, limits: Iterable[Limit]) -> None:
        """Have the buckets that speak to a server learn what it knows of them, before the first job comes."""
        for limit in limits:
            bucket: Any = getattr(limit.bucket, "of_all", limit.bucket)
            for each in members(bucket):
                if is_in_redis(each):
                    self._bucket_for_gate(each).look()

    def plan(self, *kind: Hashable) -> Plan:
        """Return what is done with the jobs of a kind. Worked out at the first of them."""
        plan = self._plans.get(kind)
        if plan is None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            plan = self._plans[kind] = Plan(self._limits_for(*kind), self._for_gate)
        return plan

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

    def can_hold(self, limit: Limit, delay: float) -> bool:
        """Tell whether a job that was sent back before may be held for the tokens that it still lacks.

        Args:
            limit: The limit that refuses it.
            delay: The seconds until the tokens are there.

        """
        return limit.max_wait is None and delay <= self.longest_hold and self.has_room(limit)

    def takes_more_of(self, queue: str) -> bool:
        """Tell whether more jobs of a queue may come: it is not paused, and no bound is exceeded."""
        with self.lock:
            limits = self._limits_of.get(queue, set()) - self._parking
            over = any(self._number(limit) > self.bound(limit) for limit in limits)
            return not over and queue not in self.paused

    # -- the way of a job -------------------------------------------------------------------------

    def offer(
        self,
        job: Job,
        plan: Plan,
        queue: str | None = None,
        steps_behind: int = 0,
        *,
        behind: bool | None = None,
    ) -> tuple[Decision, Sequence[Demand]]:
        """Decide about a job that has come.

        Args:
            job: The job.
            plan: What `plan` returned for its kind. It has limits.
            queue: The name of the queue that it came from, if `takes_more_of` is asked of it or it may
                be paused.
            steps_behind: How many steps of priority it stands behind most jobs. Below 0: in front.
            behind: Whether jobs of its kind are parked already: it goes behind them. ``None``: it cannot be
                parked.

        Returns:
            ``"go"``: it has paid; the caller runs it. ``"held"``: `release` returns it later.
            ``"ended"``: the host has ended it. ``"park"``: the caller parks it, and offers it again when
            it comes back. And what it has paid, or is to pay.

        """
        if behind is not None and (behind or self._is_at_bound(plan)):
            return "park", ()
        demands: Sequence[Demand] = plan.demands if limits.stand_in is None else ()
        limit = plan.limits[0]
        try:
            if not demands:
                call = self._host.call_of(job, plan.asks_headers)
                for limit in plan.limits:
                    demands = [*demands, *self._price(call, limit)]
                refuse_to_pay_twice([demand.bucket for demand in demands], call.job)
                demands = self._for_gate(demands)
            with self.lock:
                self._has_held = False
                goes = self._holding.offer(job, demands, self._clock(), steps_behind)
                held = self._has_held
        except Exception as error:  # noqa: BLE001 - of a callable or a bucket of the user's
            self._fail(job, _blamed(demands, limit), error)
            return "ended", demands
        if goes:
            tell("admitted", job, demands, 0.0, None)
            return "go", demands
        self._follow()
        if not held:
            return "ended", demands
        if queue is not None:
            self._limits_of.setdefault(queue, set()).update(plan.limits)
            self._pause(queue, plan)
        return "held", demands

    def release(self, most: float = math.inf, now: float | None = None) -> list[Held[Job]]:
        """Return the jobs whose moment has come, in order. They have paid; the caller runs them.

        Args:
            most: How many at most.
            now: The moment, by the clock, up to which jobs are due. By default it is asked.

        """
        with self.lock:
            if now is None:
                now = self._clock()
            if self.next_due > now:
                return []
            released = self._holding.release(now, most)
            self._leaving.work(now)
            self._note_quiet(now)
        for held in released:
            tell("admitted", held.job, held.demands, max(0.0, now - held.since), held.limit)
        return released

    def started(self, job: Job, demands: Sequence[Demand]) -> None:
        """Take note that a job that was let go starts now, or never will. For any thread.

        Args:
            job: The job.
            demands: What it has paid.

        """
        with self.lock:
            due = self._holding.started(job, demands, self._clock())
        if due:
            self._host.wake()

    def settle(self) -> None:
        """Follow what `release` has changed: make room for as many as are held, and resume queues."""
        self._follow()
        if self.paused:
            self._resume()

    def share(self, most: Mapping[Limit, int], seconds: float, *, send_back: bool) -> list[Job]:
        """Let limits hold no more than so many jobs for some seconds; those beyond that leave.

        Args:
            most: The limits, and how many jobs each may hold.
            seconds: How long no more is held.
            send_back: Whether `Host.send_back` is asked for the other jobs, by `release`.

        Returns:
            If it is not: the other jobs, the latest first. The caller gives them back to the broker.

        """
        with self.lock:
            leaving = self._leaving.share(most, self._clock(), seconds, send_back=send_back)
        return self._returned(leaving)

    def withdraw(self, jobs: Collection[Job], keep: int) -> list[Job]:
        """Hold some jobs no longer, but for the first ones. The caller gives them back to the broker.

        Args:
            jobs: The jobs. Those that are not held do not matter.
            keep: How many of them are held on.

        Returns:
            The jobs that are held no longer, the latest first.

        """
        with self.lock:
            found = [held for held in self._holding.all() if held.job in jobs]
            leaving = sorted(found, key=lambda held: held.arrival)[keep:][::-1]
            for held in leaving:
                self._holding.take_out(held, self._clock())
        return self._returned(leaving)

    @staticmethod
    def _returned(leaving: Sequence[Held[Job]]) -> list[Job]:
        """Tell of jobs that go back to the broker, and return them."""
        for held in leaving:
            tell("returned", held.job, held.limit)
        return [held.job for held in leaving]

    def keep(self, job: Job, limit: Limit | None = None) -> None:
        """Count a job that is not held, but takes up the window: it is not acknowledged yet.

        Args:
            job: The job.
            limit: Counts it among those that it holds. ``None``: it has ended but for its
                acknowledgement, so no bound of a limit is for it.

        """
        with self.lock:
            if job not in self._kept:
                self._kept[job] = limit
                if limit is None:
                    self._loose += 1
                else:
                    self._kept_by[limit] += 1
                    self._holding.changed.add(limit)

    def let_go(self, job: Job) -> bool:
        """Count a job no more. Return whether it was kept: `settle` then makes use of the room."""
        with self.lock:
            kept = job in self._kept
            limit = self._kept.pop(job, None)
            if limit is not None:
                self._kept_by[limit] -= 1
                self._holding.changed.add(limit)
            elif kept:
                self._loose -= 1
        return kept

    def clear(self) -> list[Job]:
        """Forget every job that is held or kept; return those held. They are the broker's again."""
        with self.lock:
            jobs = [held.job for held in self._holding.clear()]
            self._leaving.clear()
            self._kept.clear()
            self._kept_by.clear()
            self._loose = 0
            self.paused.clear()
            self._rooms.clear()
            self._room = self._most = 0
            self._beyond = {
                limit: moment for limit, moment in self._beyond.items() if moment == math.inf
            }
            self._limits_of.clear()
            self._waiting.clear()
            self._checks.clear()
        if jobs:
            tell("forgotten", jobs)
        return jobs

    def _price(self, call: Call, limit: Limit) -> Sequence[Demand]:
        """Return what a job is to take under a limit. A slow callable is logged, once a limit."""
        began = perf_counter()
        demands = limit.demands(call)
        took = perf_counter() - began
        if took > _SLOW and not (record := record_of(limit)).slow:
            record.slow = True
            logger.warning(
                "Limit %s: its callable took %.0f ms for one job. It runs in the loop of the worker, "
                "and holds up all jobs",
                record.name,
                took * 1000,
            )
        return demands

    def _for_gate(self, demands: Sequence[Demand]) -> Sequence[Demand]:
        """Return demands of the same tokens from buckets that never wait for a server.

        Those of this process come first: what they grant in vain goes back at no cost. Shadows stay last.
        """
        if not any(is_in_redis(demand.bucket) for demand in demands):
            return demands
        ordered = sorted(demands, key=lambda each: (each.limit.shadow, is_in_redis(each.bucket)))
        return [demand._replace(bucket=self._bucket_for_gate(demand.bucket)) for demand in ordered]

    def _bucket_for_gate(self, bucket: Any) -> Any:
        if not is_in_redis(bucket):
            return bucket
        with self.lock:
            own = self._buckets.get(bucket)
            if own is None:
                own = self._buckets[bucket] = bucket.for_gate()
        return own

    # What a host raises is logged and ends here: one job is not to take others with it.

    def _refuse(self, job: Job, demand: Demand, delay: float) -> bool:
        try:
            if not self._host.refuse(job, demand, delay):
                return False
        except Exception:
            logger.exception("Could not refuse %s; it is held", job)
            return False
        how = demand.limit.policy
        tell("refused", job, demand, delay, "timeout" if how == "wait" else how)
        return True

    def _fail(self, job: Job, limit: Limit, error: Exception) -> None:
        tell("failed", job, limit, error)
        try:
            self._host.fail(job, error)
        except Exception:
            logger.exception("Could not end %s, which failed with %r", job, error)

    def _fail_held(self, held: Held[Job], error: Exception) -> None:
        self._fail(held.job, _blamed(held.demands, held.limit), error)

    def _skip(self, held: Held[Job]) -> bool:
        try:
            if not self._host.gone(held.job):
                return False
        except Exception:
            logger.exception("Could not tell whether %s is still to run", held.job)
            return False
        tell("skipped", held.job, held.limit)
        return True

    def _send_back(self, job: Job) -> bool:
        try:
            return self._host.send_back(job)
        except Exception:
            logger.exception("Could not send %s back; it is held", job)
            return False

    def _on_leave(self, held: Held[Job]) -> None:
        name = record_of(held.limit).name
        logger.debug("Sent back %s, which limit %s has held", held.job, name)
        tell("returned", held.job, held.limit)

    # -- what follows from a change ---------------------------------------------------------------

    def _on_hold(self, held: Held[Job], demand: Demand, delay: float) -> None:
        self._has_held = True
        self._leaving.begin(held)
        if not math.isnan(delay):
            self._tell_held(held, demand, delay)

    def _tell_held(self, held: Held[Job], demand: Demand, delay: float) -> None:
        limit = demand.limit
        name = record_of(limit).name
        if limit not in self._waiting:
            self._check_at(held.since + _QUIET, limit)
            first = f"for {delay:.3g} s" if delay else "for a free slot of the pool"
            logger.info("Limit %s: jobs begin to wait, the first %s", name, first)
        self._waiting[limit] = math.inf
        if logger.isEnabledFor(logging.DEBUG):
            if delay:
                logger.debug("Held %s: limit %s has tokens for it in %.3g s", held.job, name, delay)
            else:
                logger.debug("Held %s: jobs of limit %s wait for a free slot", held.job, name)
        tell("held", held.job, demand, delay)

    def _check_at(self, moment: float, limit: Limit) -> None:
        heapq.heappush(self._checks, (moment, next(self._count), limit))

    def _note_quiet(self, now: float) -> None:
        """Tell once of each limit that has stopped to make jobs wait."""
        while self._checks and self._checks[0][0] <= now:
            limit = heapq.heappop(self._checks)[2]
            since = self._waiting[limit]
            if since + _QUIET <= now:
                del self._waiting[limit]
                logger.info("Limit %s: no job has waited for %g s", record_of(limit).name, _QUIET)
            else:
                self._check_at(_QUIET + min(since, now), limit)

    def _follow(self) -> None:
        """Tell the host for how many jobs there is to be room."""
        with self.lock:
            changed = self._holding.changed
            while changed:
                self._count_room(changed.pop())
            loose = min(_MOST_KEPT, self._loose)
            self._host.follow(self._room + loose, self._most + loose)

    def _due_in(self, demand: Demand) -> float:
        bucket: Any = demand.bucket
        if hasattr(bucket, "jobs_wait"):  # its tokens are on a server
            moment: float = self._holding.due_of(bucket)
            return max(0.0, moment - self._clock())
        return seconds_until(bucket, demand.tokens)

    def _is_at_bound(self, plan: Plan) -> bool:
        with self.lock:
            return any(
                limit in self._parking and not self.has_room(limit)
                for limit in plan.limits  # one behind another makes the job wait for sure
            )

    def _count_room(self, limit: Limit) -> None:
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
        if limit not in self._holding.held_by and self._waiting.get(limit) == math.inf:
            self._waiting[limit] = self._clock()

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

    def _pause(self, queue: str, plan: Plan) -> None:
        """Stop consuming a queue that has brought enough for one of its limits."""
        with self.lock:
            for limit in plan.limits:
                if limit.overflow == "pause" and queue not in self.paused and not self.has_room(limit):
                    self.paused[queue] = limit
                    self._host.pause(queue, limit)

    def _resume(self) -> None:
        """Consume a paused queue again once half of its limit's jobs are gone."""
        with self.lock:
            for queue, limit in list(self.paused.items()):
                if self._number(limit) <= self.bound(limit) // 2:
                    del self.paused[queue]
                    self._host.resume(queue)


def _blamed(demands: Sequence[Demand], limit: Limit) -> Limit:
    """Return the limit because of which a job can never be granted; if none is found, the one given."""
    with contextlib.suppress(Exception):  # of a bucket of the user's
        return next((each.limit for each in demands if each.tokens > each.bucket.capacity), limit)
    return limit


def warn_of_unused(limit: Limit, what: str, there: Iterable[str]) -> None:
    """Tell of a limit that covers nothing.

    Args:
        limit: The limit.
        what: What it would have to match: ``"queue that is consumed"``.
        there: The names of what there is of that kind.

    """
    logger.warning(
        "Limit %s matches no %s, so it limits nothing; there are: %s",
        record_of(limit).name,
        what,
        listed(there),
    )
