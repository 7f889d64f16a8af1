"""What every bucket can do, whatever it is one rate for."""

from typing import Protocol, runtime_checkable

__all__ = ["Bucket"]


@runtime_checkable
class Bucket(Protocol):
    """The contract of all buckets: may these tokens go now?

    Enforcement (`rate_limiter.celery`, `rate_limiter.kombu`) uses nothing else, so an own class with
    these members works there like the ones that come with the library. ``isinstance(x, Bucket)`` asks
    whether the members are there. What each does in detail stands at `TokenBucket`.
    """

    @property
    def capacity(self) -> float:
        """The most tokens the bucket can hold: the largest burst, and the largest cost."""

    @property
    def tokens_per_second(self) -> float:
        """The rate at which tokens come back."""

    @property
    def tokens(self) -> float:
        """The tokens that are there now."""

    def allow(self, tokens: float = 1) -> bool:
        """Take all or nothing, at once. More than ``capacity``: ``False``. Waiters come first."""

    def try_consume(self, tokens: float = 1) -> bool:
        """`allow` under another name."""

    def wait(self, tokens: float = 1, *, timeout: float | None = None) -> None:
        """Block until the tokens are taken: first come, first served."""

    def take_or_delay(self, tokens: float = 1) -> float:
        """Exactly ``0.0``: taken. Otherwise nothing is, and it is the seconds until asking again."""

    def refund(self, tokens: float) -> None:
        """Give back what was taken and not used; never above ``capacity``."""

    def charge(self, tokens: float) -> None:
        """Take without asking, into debt if need be."""

    def pause(self, seconds: float) -> None:
        """Grant nothing for that long, then start from empty. Only ever extends."""

    def configure(
        self, *, capacity: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Change at run time, keeping the level; it reaches whoever already waits."""
