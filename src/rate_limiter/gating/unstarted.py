"""Which jobs were let go and have not started yet, by bucket.

A job that was let go while all slots of the pool are busy waits there for a slot. What a remote sees is
when jobs start. So a bucket lets no more jobs go than may start at once: as long as it has let jobs go
that have not started, their tokens and those of the next job are at most its capacity together.

While jobs wait for a slot, their bucket refills. If they had paid only when they start, it would hold at
most its capacity less what they are to pay. So when one of several starts, what the bucket holds beyond
that is charged. Nothing is charged when the last one starts: the tokens that came back meanwhile make up
for the time that it waited, and are what lets a limit keep its rate in a busy pool. In any span of ``t``
seconds jobs for at most ``capacity + rate * t`` tokens start, and one job more.
"""

from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from ..all_of import charge_refilled
from ..bucket import Bucket
from .limit import Demand

__all__ = ["Unstarted"]

Job = TypeVar("Job")

#: The number of buckets from which on all jobs are asked for, now and then, whether they have ended.
_MANY: Final = 64


class _Group(Generic[Job]):
    """The unstarted jobs of one bucket."""

    __slots__ = ("jobs", "kept_at", "tokens")

    def __init__(self, now: float) -> None:
        #: The tokens of each job.
        self.jobs: dict[Job, float] = {}
        #: The sum of these.
        self.tokens = 0.0
        #: When the bucket's tokens and those of the jobs were last at most the capacity together.
        self.kept_at = now


class Unstarted(Generic[Job]):
    """Jobs that were let go and have not started yet.

    Args:
        is_unstarted: Tells of a job whether it is still to start. Asked for a job that was let go a while
            ago, because not every end is told: a job may be revoked, or its process may die.

    """

    def __init__(self, is_unstarted: Callable[[Job], bool]) -> None:
        self._is_unstarted = is_unstarted
        self._groups: dict[Bucket, _Group[Job]] = {}
        self._sweep_at = _MANY

    def jobs(self) -> list[Job]:
        """Return the jobs."""
        return list(dict.fromkeys(job for group in self._groups.values() for job in group.jobs))

    def stops(self, demand: Demand) -> bool:
        """Tell whether a job is to wait until one that its bucket has let go has started."""
        group = self._groups.get(demand.bucket)
        return group is not None and group.tokens + demand.tokens > demand.bucket.capacity

    def add(self, job: Job, demands: Sequence[Demand], now: float) -> None:
        """Note a job that is let go now."""
        for bucket, tokens, _ in demands:
            group = self._groups.get(bucket)
            if group is None:
                group = self._groups[bucket] = _Group(now)
            group.jobs[job] = tokens
            group.tokens += tokens
        if len(self._groups) >= self._sweep_at:
            for bucket in list(self._groups):
                self.forget_ended(bucket)
            self._sweep_at = max(_MANY, 2 * len(self._groups))

    def started(self, job: Job, demands: Sequence[Demand], now: float) -> None:
        """Note that a job starts now. One that is not there is passed over."""
        for bucket, tokens, limit in demands:
            group = self._groups.get(bucket)
            if group is None or job not in group.jobs:
                continue
            # Up to the job's own tokens is less than what is not charged when it is the last one.
            if len(group.jobs) > 1 and (now - group.kept_at) * bucket.tokens_per_second > tokens:
                charge_refilled([Demand(bucket, group.tokens, limit)])
                group.kept_at = now
            self._remove(job, bucket, group)

    def forget_ended(self, bucket: Bucket) -> None:
        """Forget the jobs of a bucket that have ended, or have started without being told of."""
        group = self._groups.get(bucket)
        if group is not None:
            for job in list(group.jobs):
                # The answer may come with a start that is told of meanwhile.
                if not self._is_unstarted(job) and job in group.jobs:
                    self._remove(job, bucket, group)

    def clear(self) -> None:
        """Forget all jobs."""
        self._groups.clear()

    def _remove(self, job: Job, bucket: Bucket, group: _Group[Job]) -> None:
        group.tokens -= group.jobs.pop(job)
        if not group.jobs:  # also for the rounding of the sum
            del self._groups[bucket]
