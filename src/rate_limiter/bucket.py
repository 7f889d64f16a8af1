"""What every bucket can do, whatever it is one rate for."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

__all__ = ["Bucket", "take_all_or_delay"]


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


def take_all_or_delay(prices: Sequence[tuple[Bucket, float]]) -> tuple[float, Bucket]:
    """Take from all buckets or from none.

    Args:
        prices: The buckets, and how many tokens to take from each. At least one.

    Returns:
        The delay, and the bucket that it stems from. ``0.0``: all was taken. Otherwise nothing was,
        and it is the seconds until that bucket is worth asking again.

    Raises:
        ValueError: As `Bucket.take_or_delay`.

    """
    for position, (bucket, tokens) in enumerate(prices):
        try:
            delay = bucket.take_or_delay(tokens)
        except BaseException:
            _refund(prices[:position])
            raise
        if delay:
            _refund(prices[:position])
            return delay, bucket
    return 0.0, prices[0][0]


def _refund(prices: Sequence[tuple[Bucket, float]]) -> None:
    for bucket, tokens in prices:
        bucket.refund(tokens)
