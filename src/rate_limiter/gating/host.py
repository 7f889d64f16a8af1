"""What a gate does for its engine: in the broker, the worker and the pool."""

from typing import Generic, TypeVar

from .limit import Call, Demand, Limit

__all__ = ["Host"]

Job = TypeVar("Job")


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
