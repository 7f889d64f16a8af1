"""The engine of the gates: which jobs wait, in what order, and when the next one may go.

It knows no Celery, kombu, timer or thread. A gate offers it each job, sleeps until `next_due`, and
asks it for the jobs that may go then.

Jobs wait first come, first served per bucket. A job with several limits takes from all their buckets
or from none, and waits in the queue of the one that refused, at the place of its arrival: it stands in
nobody's way at the others.
"""

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from .bucket import Bucket, take_all_or_delay
from .limit import Demand, Limit

__all__ = ["Holding"]

Job = TypeVar("Job")


class _Held(Generic[Job]):
    __slots__ = ("arrival", "demands", "job", "limit")

    def __init__(self, arrival: int, job: Job, demands: Sequence[Demand], limit: Limit) -> None:
        self.arrival = arrival
        self.job = job
        self.demands = demands
        #: The one that makes it wait now.
        self.limit = limit


class _Queue(Generic[Job]):
    """The jobs that one bucket makes wait, by arrival."""

    __slots__ = ("bucket", "due", "jobs")

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.jobs: deque[_Held[Job]] = deque()
        self.due = 0.0

    def insert(self, held: _Held[Job]) -> None:
        later = []
        while self.jobs and self.jobs[-1].arrival > held.arrival:
            later.append(self.jobs.pop())
        self.jobs.append(held)
        self.jobs.extend(reversed(later))


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
        while due and due[0][2].due != due[0][0]:
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
            queue = self._queues.get(demand[0])
            if queue is not None:  # behind those who came before
                self._hold_or_refuse(job, demands, demand, now, max(0.0, queue.due - now))
                return False
        delay, refused = take_all_or_delay(demands)
        if not delay:
            return True
        self._hold_or_refuse(job, demands, demands[refused], now, delay)
        return False

    def release(self, now: float) -> list[Job]:
        """Return the jobs that may go now, in order. They have taken their tokens."""
        released: list[Job] = []
        while (due := self.next_due) is not None and due <= now:
            queue = heapq.heappop(self._due)[2]
            while queue.jobs:
                held = queue.jobs[0]
                delay, refused = 0.0, 0
                if not self._skip(held.job):
                    try:
                        delay, refused = take_all_or_delay(held.demands)
                    except Exception as error:  # noqa: BLE001 - whatever it is, it is that job's
                        self._fail(held.job, error)
                    else:
                        if not delay:
                            released.append(held.job)
                demand = held.demands[refused]
                if delay and demand[0] is queue.bucket:
                    # later than now, also where the delay vanishes in rounding
                    self._schedule(queue, max(now + delay, math.nextafter(now, math.inf)))
                    break
                queue.jobs.popleft()
                self._uncount(held.limit)
                if delay:
                    self._hold_or_refuse(
                        held.job, held.demands, demand, now, delay, arrival=held.arrival
                    )
            else:
                del self._queues[queue.bucket]
        return released

    def clear(self) -> list[Job]:
        """Forget every job, and return them."""
        jobs = self.jobs()
        self._queues.clear()
        self._due.clear()
        self.held_by.clear()
        return jobs

    def _hold_or_refuse(
        self,
        job: Job,
        demands: Sequence[Demand],
        demand: Demand,
        now: float,
        delay: float,
        arrival: int | None = None,
    ) -> None:
        bucket, _, limit = demand
        if limit.when_limited != "wait" and self._refuse(job, demand, delay):
            return
        held = _Held(next(self._count) if arrival is None else arrival, job, demands, limit)
        queue = self._queues.get(bucket)
        if queue is None:
            queue = self._queues[bucket] = _Queue(bucket)
            self._schedule(queue, now + delay)
        queue.insert(held)
        self.held_by[limit] += 1

    def _uncount(self, limit: Limit) -> None:
        self.held_by[limit] -= 1
        if not self.held_by[limit]:
            del self.held_by[limit]

    def _schedule(self, queue: _Queue[Job], due: float) -> None:
        queue.due = due
        heapq.heappush(self._due, (due, next(self._count), queue))
