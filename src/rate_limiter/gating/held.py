"""A job that waits, and the jobs that one bucket makes wait."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from ..bucket import Bucket
from ..shared_bucket import is_shared
from .limit import Demand, Limit

__all__ = ["Arrival", "Held", "Queue", "changes_of"]

Job = TypeVar("Job")

#: The moment at which a job counts as come, and a number that orders jobs of the same moment.
Arrival = tuple[float, int]


class Held(Generic[Job]):
    """A job that waits."""

    __slots__ = (
        *("arrival", "asked", "claims", "demands", "job"),
        *("left", "limit", "queue", "since", "told"),
    )

    queue: "Queue[Job]"

    def __init__(self, arrival: Arrival, job: Job, demands: Sequence[Demand], since: float) -> None:
        #: Jobs wait in the order of their arrivals.
        self.arrival = arrival
        self.job = job
        self.demands = demands
        #: When it came, by the caller's clock.
        self.since = since
        #: The queues that it has claimed.
        self.claims: list[Queue[Job]] = []
        #: The limit that makes it wait now.
        self.limit: Limit = demands[0].limit
        #: Whether a bucket was asked for it. If not, it is refused in its turn, as ``when_limited`` says.
        self.asked = True
        #: Whether it waits no more.
        self.left = False
        #: Whether the delay was known when ``hold`` or ``known`` was called for it. See `Holding`.
        self.told = True


class Queue(Generic[Job]):
    """The jobs that one bucket makes wait, by arrival."""

    __slots__ = (
        "asks",
        "bucket",
        "changes",
        "claimant",
        "due",
        "jobs",
        "look",
        "sees_all",
        "shared",
        "stopped",
        "tells",
        "tokens",
    )

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.jobs: deque[Held[Job]] = deque()
        #: What its jobs take from the bucket.
        self.tokens = 0.0
        #: When its first job may go, as the bucket has forecast, and when to look at it.
        self.due = self.look = 0.0
        #: The job, in another queue, that has claimed this bucket.
        self.claimant: Held[Job] | None = None
        self.shared = is_shared(bucket)
        #: Whether the bucket tells this process of every change.
        self.sees_all = hasattr(bucket, "subscribe") and not self.shared
        #: What the bucket wants to be told of: how many tokens all its jobs take, and what the first one
        #: takes from all buckets.
        self.tells: Callable[[float, Sequence[Demand]], None] | None
        self.tells = getattr(bucket, "jobs_wait", None)
        #: Whether it is told of them. Not while the first one waits for a start: tokens would be fetched in vain.
        self.asks = True
        #: Whether its first job waits for the start of one that was let go. Then ``due`` is when to ask
        #: whether that has ended; minus infinity: it has started.
        self.stopped = False
        #: The bucket's counter of changes just before it gave the forecast.
        self.changes = math.nan

    def insert(self, held: Held[Job]) -> None:
        """Let a job wait, at the place of its arrival."""
        later = []
        while self.jobs and self.jobs[-1].arrival > held.arrival:
            later.append(self.jobs.pop())
        self.jobs.append(held)
        self.jobs.extend(reversed(later))
        self.tokens += self.takes(held)
        held.queue, held.left = self, False
        self._tell()

    def remove(self, held: Held[Job]) -> None:
        """Take out a job that waits here."""
        if self.jobs[0] is held:
            self.jobs.popleft()
        else:
            self.jobs.remove(held)
        self.tokens = self.tokens - self.takes(held) if self.jobs else 0.0
        held.left = True
        self._tell()

    def ask(self, asks: bool) -> None:
        """Have the bucket fetch tokens for the jobs, or none."""
        if asks is not self.asks:
            self.asks = asks
            self._tell()

    def _tell(self) -> None:
        if self.tells is not None:
            waiting = self.jobs if self.asks else ()
            self.tells(self.tokens if waiting else 0.0, waiting[0].demands if waiting else ())

    def takes(self, held: Held[Job]) -> float:
        """Return the tokens that a job takes from the bucket."""
        if len(held.demands) == 1:
            return held.demands[0].tokens
        return sum(demand.tokens for demand in held.demands if demand.bucket is self.bucket)

    def turn(self, tokens: float, arrival: Arrival) -> float:
        """Return the moment at which a job goes that comes now, if no other job comes before it."""
        before = self.tokens - self.takes(self.jobs[0]) if self.jobs else 0.0
        for held in reversed(self.jobs):
            if held.arrival < arrival:
                break
            before -= self.takes(held)
        return self.forecast() + (max(0.0, before) + tokens) / self.bucket.tokens_per_second

    def serves(self, arrival: Arrival, held: Held[Job] | None = None) -> bool:
        """Tell whether a job may ask the bucket: no other job has claimed it, or came before.

        Args:
            arrival: When the job came.
            held: The job, if it is held.

        """
        if self.claimant is not None and self.claimant is not held:
            return False
        return not self.jobs or self.jobs[0].arrival >= arrival

    def forecast(self) -> float:
        """Return the moment at which the bucket serves again."""
        return self.due if self.claimant is None else self.claimant.queue.due

    def has_changed(self) -> bool:
        """Tell whether another process may have changed the bucket since it was asked."""
        return not self.shared or changes_of(self.bucket) != self.changes


def changes_of(bucket: Bucket) -> float:
    """Return how often a bucket was changed. Not a number, and so never the same, where it does not say."""
    changes: float = getattr(bucket, "changes", math.nan)
    return changes
