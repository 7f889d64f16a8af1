"""The engine of the gates: which jobs wait, in what order, and when the next one may go.

It knows no Celery, kombu, timer or thread. A gate offers it each job, sleeps until `next_due`, and
asks it for the jobs that may go then.

Jobs wait first come, first served per bucket. A job with several limits takes from all their buckets
or from none, and waits in the queue of the one that refused, at the place of its arrival: it stands in
nobody's way at the others, and nobody who came later overtakes it there for ever. If its turn has come
at one bucket, and another refuses for no longer than the first needs to make up for it, it claims the
first: that one then serves nobody else until the job has gone.
"""

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from ..all_of import take_all_or_delay
from ..bucket import Bucket
from .limit import Demand, Limit

__all__ = ["Holding"]

Job = TypeVar("Job")


#: What is held is looked at again after so many seconds at the latest: a bucket may have been
#: configured, refunded or emptied meanwhile, by another process too.
_LOOK_AGAIN: Final = 0.5


#: So much that rounding does not tell one from the other.
_EVEN: Final = 1.000001


class _Held(Generic[Job]):
    __slots__ = ("arrival", "claims", "demands", "job", "limit", "queue")

    queue: "_Queue[Job]"

    def __init__(self, arrival: int, job: Job, demands: Sequence[Demand]) -> None:
        self.arrival = arrival
        self.job = job
        self.demands = demands
        #: The queues that serve nobody else until this job has gone.
        self.claims: list[_Queue[Job]] = []
        #: The limit that makes it wait now, and the queue of its bucket.
        self.limit: Limit | None = None


class _Queue(Generic[Job]):
    """The jobs that one bucket makes wait, by arrival."""

    __slots__ = ("bucket", "claimant", "due", "jobs", "look")

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.jobs: deque[_Held[Job]] = deque()
        #: When its head may go, as far as can be foreseen, and when to look.
        self.due = self.look = 0.0
        #: The job, in another queue, for which this one waits.
        self.claimant: _Held[Job] | None = None

    def insert(self, held: _Held[Job]) -> None:
        later = []
        while self.jobs and self.jobs[-1].arrival > held.arrival:
            later.append(self.jobs.pop())
        self.jobs.append(held)
        self.jobs.extend(reversed(later))
        held.queue = self

    def serves(self, held: _Held[Job]) -> bool:
        """Whether the job may ask the bucket: nobody has claimed it, or came before."""
        if self.claimant is not None and self.claimant is not held:
            return False
        return not self.jobs or self.jobs[0].arrival >= held.arrival

    def forecast(self) -> float:
        """When the bucket serves again."""
        return self.due if self.claimant is None else self.claimant.queue.due


class Holding(Generic[Job]):
    """Jobs that wait for tokens.

    Args:
        refuse: Called with a job, the demand and the delay, when a limit that does not let jobs wait
            (``when_limited`` other than ``"wait"``) has no tokens for it. ``True``: that job is gone.
            ``False``: it is to be held all the same.
        fail: Called with a held job and the error when its turn has come and a bucket raises, say
            because the job now costs more than the capacity. That job is gone.
        skip: Called with a held job when its turn has come, before it takes tokens; ``True``: it is
            gone (revoked, expired) and costs nothing.

    """

    def __init__(
        self,
        *,
        refuse: Callable[[Job, Demand, float], bool],
        fail: Callable[[Job, Exception], None],
        skip: Callable[[Job], bool] = lambda _job: False,
    ) -> None:
        self._refuse = refuse
        self._fail = fail
        self._skip = skip
        self._count = itertools.count()
        self._queues: dict[Bucket, _Queue[Job]] = {}
        self._due: list[tuple[float, int, _Queue[Job]]] = []
        #: How many jobs each limit makes wait.
        self.held_by: Counter[Limit] = Counter()

    def __len__(self) -> int:
        return sum(len(queue.jobs) for queue in self._queues.values())

    def jobs(self) -> list[Job]:
        """Return the jobs that are held."""
        return [held.job for queue in self._queues.values() for held in queue.jobs]

    @property
    def next_due(self) -> float | None:
        """The moment, by the caller's clock, at which `release` is to be called next."""
        due = self._due
        while due and due[0][2].look != due[0][0]:
            heapq.heappop(due)  # its queue was given another moment
        return due[0][0] if due else None

    def offer(self, job: Job, demands: Sequence[Demand], now: float) -> bool:
        """Let a job go at once, or hold or refuse it.

        Args:
            job: Anything.
            demands: What it is to take, and under which limits.
            now: The caller's clock, in seconds.

        Returns:
            ``True``: it has taken its tokens and may go. ``False``: it is held, or was refused.

        Raises:
            ValueError: It can never be granted.

        """
        for demand in demands:
            queue = self._queues.get(demand.bucket)
            if queue is not None:  # behind those who came before
                self._hold(job, demands, demand, now, max(math.ulp(now), queue.forecast() - now))
                return False
        delay, refused = take_all_or_delay(demands)
        if not delay:
            return True
        self._hold(job, demands, demands[refused], now, delay)
        return False

    def release(self, now: float, most: float = math.inf) -> list[Job]:
        """Return the jobs that may go now, in order. They have taken their tokens.

        Args:
            now: The caller's clock, in seconds.
            most: How many at most, for callers that run each job before they ask for the next.

        """
        released: list[Job] = []
        while len(released) < most and (look := self.next_due) is not None and look <= now:
            queue = heapq.heappop(self._due)[2]
            queue.look = math.nan  # no moment is set
            while queue.jobs and queue.serves(queue.jobs[0]):
                if len(released) >= most:
                    self._schedule(queue, now, 0.0)
                    break
                held = queue.jobs[0]
                if self._skip(held.job):
                    self._leave(held, now)
                    continue
                try:
                    delay, demand = self._take(held, now)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is that job's
                    self._leave(held, now)
                    self._fail(held.job, error)
                    continue
                if not delay:
                    self._leave(held, now)
                    released.append(held.job)
                elif demand.bucket is queue.bucket:
                    self._schedule(queue, now, delay)
                    self._give_up_claims(held, now, delay)
                    break
                else:
                    self._move(held, demand, now, delay)
            self._drop_if_empty(queue)
        return released

    def clear(self) -> list[Job]:
        """Forget every job, and return them."""
        jobs = self.jobs()
        self._queues.clear()
        self._due.clear()
        self.held_by.clear()
        return jobs

    def _hold(
        self, job: Job, demands: Sequence[Demand], demand: Demand, now: float, delay: float
    ) -> None:
        """Hold a job that has just come, or refuse it."""
        if demand.limit.when_limited == "wait" or not self._refuse(job, demand, delay):
            self._enqueue(_Held(next(self._count), job, demands), demand, now, delay)

    def _take(self, held: _Held[Job], now: float) -> tuple[float, Demand]:
        """Take the tokens of a job whose turn has come; or return the delay, and who refused."""
        first = held.demands[0]
        if len(held.demands) == 1:
            return first.bucket.take_or_delay(first.tokens), first
        for demand in held.demands:
            queue = self._queues.get(demand.bucket)
            if queue is not None and queue is not held.queue and not queue.serves(held):
                return max(math.ulp(now), queue.forecast() - now), demand
        delay, refused = take_all_or_delay(held.demands)
        return delay, held.demands[refused]

    def _move(self, held: _Held[Job], demand: Demand, now: float, delay: float) -> None:
        """Let a job whose turn has come wait at another bucket, which has refused it."""
        left = held.queue
        if demand.limit.when_limited != "wait" and self._refuse(held.job, demand, delay):
            self._leave(held, now)
            return
        self._unlink(held)
        first = self._enqueue(held, demand, now, delay)
        self._give_up_claims(held, now, delay)
        if first and left.claimant is None and _worth_it(held, left, delay):
            left.claimant = held
            held.claims.append(left)

    def _give_up_claims(self, held: _Held[Job], now: float, delay: float) -> None:
        """Open what a job has claimed, where it has come to wait for longer than that is worth."""
        for queue in list(held.claims):
            if not _worth_it(held, queue, delay):
                held.claims.remove(queue)
                queue.claimant = None
                if queue.jobs:
                    self._schedule(queue, now, 0.0)
                self._drop_if_empty(queue)

    def _enqueue(self, held: _Held[Job], demand: Demand, now: float, delay: float) -> bool:
        """Put a job into a bucket's queue; whether it is the next one there."""
        bucket, _, held.limit = demand
        self.held_by[held.limit] += 1
        queue = self._queues.get(bucket)
        if queue is None:
            queue = self._queues[bucket] = _Queue(bucket)
        queue.insert(held)
        claimant = queue.claimant
        if claimant is not None and claimant.arrival > held.arrival:
            claimant.claims.remove(queue)
            claimant = queue.claimant = None
        first = claimant in (None, held) and queue.jobs[0] is held
        if first:  # the moment of the one that was first before may be too late
            self._schedule(queue, now, delay)
        return first

    def _leave(self, held: _Held[Job], now: float) -> None:
        """Take a job out, and open what it has claimed."""
        self._unlink(held)
        for queue in held.claims:
            queue.claimant = None
            if queue.jobs:
                self._schedule(queue, now, 0.0)
            self._drop_if_empty(queue)

    def _unlink(self, held: _Held[Job]) -> None:
        jobs = held.queue.jobs
        assert jobs[0] is held  # noqa: S101 - only the one whose turn has come leaves
        jobs.popleft()
        assert held.limit is not None  # noqa: S101 - for mypy
        self.held_by[held.limit] -= 1
        if not self.held_by[held.limit]:
            del self.held_by[held.limit]

    def _drop_if_empty(self, queue: _Queue[Job]) -> None:
        if not queue.jobs and queue.claimant is None and self._queues.get(queue.bucket) is queue:
            del self._queues[queue.bucket]

    def _schedule(self, queue: _Queue[Job], now: float, delay: float) -> None:
        # later than now, also where the delay vanishes in rounding
        queue.due = max(now + delay, math.nextafter(now, math.inf)) if delay else now
        queue.look = min(queue.due, now + _LOOK_AGAIN)
        heapq.heappush(self._due, (queue.look, next(self._count), queue))


def _worth_it(held: _Held[Any], queue: _Queue[Any], delay: float) -> bool:
    """Whether a bucket that waits for a job loses no more than the job takes from it."""
    takes = sum(tokens for bucket, tokens, _ in held.demands if bucket is queue.bucket)
    return delay * queue.bucket.tokens_per_second <= takes * _EVEN
