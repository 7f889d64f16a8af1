"""The contract that all buckets share."""

from abc import ABCMeta
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

__all__ = ["Bucket", "is_in_redis"]

if TYPE_CHECKING:
    _ProtocolMeta = ABCMeta
else:
    _ProtocolMeta = type(Protocol)


class _BucketMeta(_ProtocolMeta):
    """Answers ``isinstance(x, Bucket)`` without reading a property of ``x``.

    Python 3.11 reads each one, and the level of a bucket may be a round trip over a network.
    """

    def __instancecheck__(cls, instance: Any) -> bool:  # noqa: N805 - of a metaclass
        if not cls.__dict__.get("_is_protocol"):  # a subclass of Bucket
            return super().__instancecheck__(instance)
        kind = type(instance)
        return not isinstance(instance, type) and all(
            hasattr(kind, name) or name in getattr(instance, "__dict__", ()) for name in _MEMBERS
        )


@runtime_checkable
class Bucket(Protocol, metaclass=_BucketMeta):
    """The contract of all buckets: may these tokens go now?

    Enforcement (`rate_limiter.celery`, `rate_limiter.kombu`) uses only these members, so a class of
    your own that has them works there too. ``isinstance(x, Bucket)`` tests whether the members exist.
    `TokenBucket` describes each of them in detail.

    Buckets are hashable. Two buckets that are equal are the same bucket.
    """

    @property
    def capacity(self) -> float:
        """The most tokens the bucket can hold: the largest burst, and the largest cost."""

    @property
    def tokens_per_second(self) -> float:
        """The rate at which tokens come back."""

    @property
    def tokens(self) -> float:
        """The tokens in the bucket now."""

    def allow(self, tokens: float = 1) -> bool:
        """Take all of the tokens or none, at once. ``False`` for more than ``capacity``.

        Callers of `wait` come first.
        """

    def wait(self, tokens: float = 1, *, timeout: float | None = None) -> None:
        """Block until the tokens are taken: first come, first served."""

    def take_or_delay(self, tokens: float = 1) -> float:
        """Take the tokens and return ``0.0``, or take nothing and return the seconds to wait."""

    def refund(self, tokens: float) -> None:
        """Give back tokens that were taken and not used, up to ``capacity``."""

    def charge(self, tokens: float) -> None:
        """Take the tokens even if they are not there: the level may fall below 0."""

    def pause(self, seconds: float) -> None:
        """Grant nothing for this time, then start from empty. A pause is never shortened."""

    def configure(
        self, *, capacity: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Change the capacity or the rate at run time, for callers of `wait` as well. The level stays."""


_MEMBERS: Final = tuple(name for name in vars(Bucket) if not name.startswith("_"))


def is_in_redis(bucket: object) -> bool:
    """Tell whether a bucket, or those of a `BucketPerKey`, are in Redis. It imports nothing for that."""
    return hasattr(getattr(bucket, "of_all", bucket), "take_together")
