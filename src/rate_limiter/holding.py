"""The engine of the gates: which jobs wait, in what order, and when the next one may go.

It knows no Celery, kombu, timer or thread. A gate offers it each job, sleeps until `next_due`, and
asks it for the jobs that may go then.

Jobs wait first come, first served per bucket. A job that is to draw on several buckets takes from all
of them or from none, and waits in the queue of the one that refused, at the place of its arrival: it
stands in nobody's way at the others.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from .bucket import Bucket, take_all_or_delay
from .limit import Price

__all__ = ["Holding"]

Job = TypeVar("Job")


class _Held(Generic[Job]):
    __slots__ = ("arrival", "job", "prices")

    def __init__(self, arrival: int, job: Job, prices: Sequence[Price]) -> None:
        self.arrival = arrival
        self.job = job
        self.prices = prices


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
        skip: Called with a held job when its turn has come, before it takes tokens; ``True``: it is
            gone (revoked, expired) and costs nothing.
        fail: Called with a held job and the error when its turn has come and the bucket raises, say
            because the job now costs more than the capacity. That job is gone; the others go on.

    """

    def __init__(
        self,
        *,
        skip: Callable[[Job], bool] = lambda _job: False,
        fail: Callable[[Job, Exception], None],
    ) -> None:
        self._skip = skip
        self._fail = fail
        self._arrivals = itertools.count()
        self._queues: dict[Bucket, _Queue[Job]] = {}
        self._due: list[tuple[float, int, _Queue[Job]]] = []
        self._held = 0

    def __len__(self) -> int:
        return self._held

    @property
    def next_due(self) -> float | None:
        """The moment, by the caller's clock, at which `release` is to be called next."""
        due = self._due
        while due and due[0][2].due != due[0][0]:
            heapq.heappop(due)  # made obsolete by an earlier or a later moment
        return due[0][0] if due else None

    def offer(self, job: Job, prices: Sequence[Price], now: float) -> bool:
        """Let a job go at once, or hold it.

        Args:
            job: Anything.
            prices: The buckets it draws on and what it costs at each.
            now: The caller's clock, in seconds.

        Returns:
            ``True``: it has taken its tokens and may go. ``False``: it is held.

        Raises:
            ValueError: It can never be granted.

        """
        for bucket, _tokens in prices:
            queue = self._queues.get(bucket)
            if queue is not None:  # behind those who came before
                queue.jobs.append(_Held(next(self._arrivals), job, prices))
                self._held += 1
                return False
        delay, bucket = take_all_or_delay(prices)
        if not delay:
            return True
        self._hold(_Held(next(self._arrivals), job, prices), bucket, now + delay)
        self._held += 1
        return False

    def release(self, now: float) -> list[Job]:
        """Return the jobs that may go now, in order. They have taken their tokens."""
        released: list[Job] = []
        while (due := self.next_due) is not None and due <= now:
            queue = heapq.heappop(self._due)[2]
            while queue.jobs:
                held = queue.jobs[0]
                if self._skip(held.job):
                    delay, bucket = 0.0, queue.bucket
                else:
                    try:
                        delay, bucket = take_all_or_delay(held.prices)
                    except Exception as error:  # noqa: BLE001 - whatever it is, it is that job's
                        delay, bucket = 0.0, queue.bucket
                        self._fail(held.job, error)
                    else:
                        if not delay:
                            released.append(held.job)
                if delay and bucket is queue.bucket:
                    self._schedule(queue, now + delay)
                    break
                queue.jobs.popleft()
                if delay:
                    self._hold(held, bucket, now + delay)
                else:
                    self._held -= 1
            else:
                del self._queues[queue.bucket]
        return released

    def clear(self) -> list[Job]:
        """Forget every job, and return them."""
        jobs = [held.job for queue in self._queues.values() for held in queue.jobs]
        self._queues.clear()
        self._due.clear()
        self._held = 0
        return jobs

    def _hold(self, held: _Held[Job], bucket: Bucket, due: float) -> None:
        queue = self._queues.get(bucket)
        if queue is None:
            queue = self._queues[bucket] = _Queue(bucket)
            self._schedule(queue, due)
        queue.insert(held)

    def _schedule(self, queue: _Queue[Job], due: float) -> None:
        queue.due = due
        heapq.heappush(self._due, (due, next(self._arrivals), queue))
