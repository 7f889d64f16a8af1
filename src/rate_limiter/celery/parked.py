"""What a worker knows of one lane, see `parking`: whose jobs it is for, how many are there, how it is consumed."""

from typing import Any, Final

from ..broker.lane import Lane
from ..gating.engine import Plan
from ..gating.limit import Limit
from ..gating.tally import tell

__all__ = ["Parked"]

#: Seconds without a job from a lane after which it counts as empty.
_QUIET: Final = 0.25

#: How many messages Redis looks at, at least and at most, when it moves jobs to a lane itself: more, if it has moved many
#: of those that it has looked at before.
_SWEEP_LEAST: Final = 50
_SWEEP_MOST: Final = 400

#: Seconds until Redis looks again, if it has moved few of them.
_SWEEP_AGAIN: Final = 0.1


class Parked:
    """The parked jobs of one queue and one set of limits.

    Args:
        plan: What is done with the jobs. Plans with the same limits have a lane in common.
        entity: The lane, as ``kombu.Queue``.
        queue: The name of the queue that the jobs come from.

    """

    def __init__(self, plan: Plan, entity: Any, queue: str) -> None:
        self.plan = plan
        self.entity = entity
        self.name: str = entity.name
        self.queue = queue
        #: How this connection consumes the lane. ``None``: it does not yet.
        self.lane: Lane | None = None
        #: Whether the lane is not consumed for a while.
        self.rests = False
        #: The requests that have come back from the lane, and have not been let go.
        self.waiting: set[Any] = set()
        #: How many jobs are on their way to the lane.
        self.leaving = 0
        #: Until when there may be jobs in the lane that have not come.
        self.quiet_at = 0.0
        #: The tasks whose jobs go to the lane, whatever their arguments.
        self.tasks: set[str] = set()
        #: How many messages of the queue Redis looks at, the next time that it moves jobs itself, and when that may be.
        self.sweep = _SWEEP_LEAST
        self.sweep_at = 0.0
        #: Since when there are jobs in the lane. ``None``: there are none.
        self.since: float | None = None
        #: Until when nothing is sent to the lane: the broker has refused it.
        self.broken_until = 0.0
        #: Whether the log says so, and does not say yet that jobs are parked again.
        self.said = False

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits of the jobs."""
        return self.plan.limits

    def in_use(self, now: float) -> bool:
        """Tell whether there may be jobs in the lane, or on their way to it."""
        full = self.lane is not None and self.lane.full
        if self.waiting or self.leaving or self.rests or full:
            self.quiet_at = now + _QUIET
        return now < self.quiet_at

    def saw_job(self, now: float) -> None:
        """Take note that a job has gone to the lane, or has come from it: there may be more."""
        self.quiet_at = now + _QUIET
        self.since = self.since or now

    def count(self, jobs: int) -> None:
        """Count jobs that were moved to the lane."""
        for limit in self.limits:
            if jobs and not limit.shadow:
                tell("parked", limit, jobs)

    def swept(self, jobs: int, now: float) -> None:
        """Count jobs that Redis has moved itself, and decide how many messages it looks at next, and when."""
        self.count(jobs)
        if jobs >= self.sweep // 2:
            self.sweep = min(2 * self.sweep, _SWEEP_MOST)
        else:
            self.sweep, self.sweep_at = _SWEEP_LEAST, now + _SWEEP_AGAIN
