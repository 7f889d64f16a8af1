"""What both gates decide alike: which limits a job is under, its price, whether it goes, waits or ends.

A gate gives each job to `Engine.offer`, sleeps until `Engine.next_due`, and then calls `Engine.release`.
It runs the jobs that these two let go. The engine decides and tells the observers; what is to be done in
a broker, a worker or a pool it asks of the gate, its `Host`. Its parts: `Holding` keeps the jobs that wait in
order, `Room` counts them for the prefetch count, `Leaving` knows those that leave before their turn.
"""

import contextlib
import heapq
import itertools
import logging
import math
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from time import monotonic, perf_counter
from typing import Any, Final, Generic, Literal, TypeVar
from weakref import WeakValueDictionary

from ..all_of import members
from ..bucket import Bucket, is_in_redis
from . import limit as limits
from .forecast import Forecast, forecasts
from .held import Held
from .holding import Holding
from .host import Host
from .leaving import Leaving
from .limit import Call, Demand, Limit, refuse_to_pay_twice, seconds_until
from .record import listed, record_of
from .room import Room
from .tally import tell

__all__ = ["Decision", "Engine", "Plan", "warn_of_unused"]

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
        self._clock = clock
        #: Celery fires timers from a second thread while a warm shutdown waits for the pool.
        self.lock = threading.RLock()
        self._holding: Holding[Job] = Holding(
            refuse=self._refuse,
            fail=self._fail_held,
            skip=self._skip,
            hold=self._on_hold,
            known=self._tell_held,
            poked=host.wake,
            is_unstarted=self._is_unstarted if host.has_slots else None,
        )
        self._leaving: Leaving[Job] = Leaving(
            self._holding, self._send_back, self._on_leave, self._refuse
        )
        #: What the gate keeps from its broker, and how much of it.
        self.room: Room[Job] = Room(
            host, self._holding, self._leaving, max_held=max_held, clock=clock, lock=self.lock
        )
        self._plans: dict[Hashable, Plan] = {}
        #: The limits that make jobs wait, and since when no job waits any more.
        self._waiting: dict[Limit, float] = {}
        #: When to look next whether one of them has stopped; one entry for each.
        self._checks: list[tuple[float, int, Limit]] = []
        self._count = itertools.count()
        self._has_held = False
        #: For each bucket that speaks to a server: what this gate takes from instead.
        self._buckets: WeakValueDictionary[Bucket, Any] = WeakValueDictionary()

    # -- what is there ----------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many jobs are held."""
        return len(self._holding)

    def jobs(self) -> list[Job]:
        """Return the jobs that are held, and those that the host keeps."""
        with self.lock:
            return [*(held.job for held in self._holding.all()), *self.room.kept()]

    def unstarted(self) -> list[Job]:
        """Return the jobs that were let go and have not started, as far as known."""
        with self.lock:
            return self._holding.unstarted()

    def forecasts(self) -> list[Forecast[Job]]:
        """Return when each held job will go, if nothing changes and no job comes before it."""
        with self.lock:
            held = self._holding.all()
        return list(forecasts(held))

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

    def can_hold(self, limit: Limit, delay: float) -> bool:
        """Tell whether a job that was sent back before may be held for the tokens that it still lacks.

        Args:
            limit: The limit that refuses it.
            delay: The seconds until the tokens are there.

        """
        return limit.max_wait is None and delay <= self.longest_hold and self.room.has_room(limit)

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
            queue: The name of the queue that it came from, if `Room.takes_more_of` is asked of it or it may
                be paused.
            steps_behind: How many steps of priority it stands behind most jobs. Below 0: in front.
            behind: Whether jobs of its kind are parked already: it goes behind them. ``None``: it cannot be
                parked.

        Returns:
            ``"go"``: it has paid; the caller runs it. ``"held"``: `release` returns it later.
            ``"ended"``: the host has ended it. ``"park"``: the caller parks it, and offers it again when
            it comes back. And what it has paid, or is to pay.

        """
        if behind is not None and (behind or self.room.is_for_parking(plan.limits)):
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
            self.room.held_from(queue, plan.limits)
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
        if self.room.paused:
            self.room.resume()

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

    def clear(self) -> list[Job]:
        """Forget every job that is held or kept; return those held. They are the broker's again."""
        with self.lock:
            jobs = [held.job for held in self._holding.clear()]
            self._leaving.clear()
            self.room.clear()
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

    def _is_unstarted(self, job: Job) -> bool:
        try:
            return self._host.unstarted(job)
        except Exception:
            logger.exception("Could not tell whether %s is still to start", job)
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
        """Tell the host for how many jobs there is to be room, and note which limits make none wait any more."""
        with self.lock:
            changed = self._holding.changed
            while changed:
                limit = changed.pop()
                self.room.count(limit)
                if limit not in self._holding.held_by and self._waiting.get(limit) == math.inf:
                    self._waiting[limit] = self._clock()
            self.room.follow()

    def _due_in(self, demand: Demand) -> float:
        bucket: Any = demand.bucket
        if hasattr(bucket, "jobs_wait"):  # its tokens are on a server
            moment: float = self._holding.due_of(bucket)
            return max(0.0, moment - self._clock())
        return seconds_until(bucket, demand.tokens)


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
