"""Several buckets taken as one: the one place that takes from several, all or nothing."""

import math
from collections.abc import Iterable, Iterator, Sequence
from time import monotonic
from typing import Any

from .bucket import Bucket
from .checks import not_negative

__all__ = ["AllOf", "charge_refilled", "members", "take_all_or_delay"]


class AllOf:
    """Several buckets as one: takes the tokens from all of them, or from none.

    Ten a second and at most a thousand a day: ``AllOf(TokenBucket(10, 10), TokenBucket(1000, 1000 /
    86400))``. What one refuses costs the others nothing. It is itself a `Bucket`.

    Args:
        buckets: At least one.

    Raises:
        TypeError: One of them is no bucket.
        ValueError: There is none, or the same one twice.

    """

    def __init__(self, *buckets: Bucket) -> None:
        for bucket in buckets:
            if isinstance(bucket, type) or not isinstance(bucket, Bucket):
                raise TypeError(f"AllOf takes buckets, not {bucket!r}")
        if not buckets:
            raise ValueError("AllOf needs at least one bucket")
        self.buckets = buckets
        single = list(map(id, members(self)))
        if len(set(single)) < len(single):
            raise ValueError("AllOf was given the same bucket twice; it would pay twice")

    def __repr__(self) -> str:
        return f"AllOf({', '.join(map(repr, self.buckets))})"

    @property
    def capacity(self) -> float:
        """The smallest capacity."""
        return min(bucket.capacity for bucket in self.buckets)

    @property
    def tokens_per_second(self) -> float:
        """The lowest rate."""
        return min(bucket.tokens_per_second for bucket in self.buckets)

    @property
    def tokens(self) -> float:
        """The tokens that are there in all of them."""
        return min(bucket.tokens for bucket in self.buckets)

    def allow(self, tokens: float = 1) -> bool:
        """Take from all buckets now, or from none. See `TokenBucket.allow`."""
        taken: list[Bucket] = []
        try:
            for bucket in self.buckets:
                if not bucket.allow(tokens):
                    return False
                taken.append(bucket)
        finally:
            if len(taken) < len(self.buckets):
                for bucket in taken:
                    bucket.refund(tokens)
        return True

    try_consume = allow

    def wait(self, tokens: float = 1, *, timeout: float | None = None) -> None:
        """Block until all buckets have granted the tokens. See `TokenBucket.wait`.

        It stands in the queue of one bucket after the other, the slowest first, and keeps what it has:
        first come, first served at each, and no two that wait can stop each other. So each bucket holds
        its rate by what it grants; but if a later one stalls, several threads that have the others'
        tokens already may return at once. ``timeout`` counts by the real clock, also where a bucket has
        another one; after it everything is given back.
        """
        deadline = math.inf if timeout is None else monotonic() + not_negative(timeout)
        delay, slowest = self._take(tokens)
        if not delay:
            return
        taken: list[Bucket] = []
        try:
            for bucket in sorted(self.buckets, key=lambda bucket: bucket is not slowest):
                left = None if timeout is None else max(0.0, deadline - monotonic())
                bucket.wait(tokens, timeout=left)
                taken.append(bucket)
        except BaseException:
            for bucket in taken:
                bucket.refund(tokens)
            raise
        charge_refilled([(bucket, tokens) for bucket in taken[:-1]])

    def take_or_delay(self, tokens: float = 1) -> float:
        """Take from all buckets, or return the delay of the slowest. See `TokenBucket.take_or_delay`."""
        return self._take(tokens)[0]

    def _take(self, tokens: float) -> tuple[float, Bucket]:
        """Take from all, or return the longest delay, and whose that is."""
        delay, refused = take_all_or_delay([(bucket, tokens) for bucket in self.buckets])
        slowest = self.buckets[refused]
        if delay:
            for bucket in self.buckets[refused + 1 :]:
                other = bucket.take_or_delay(tokens)
                if not other:
                    bucket.refund(tokens)
                elif other > delay:
                    delay, slowest = other, bucket
        return delay, slowest

    def refund(self, tokens: float) -> None:
        """Give back to all of them."""
        for bucket in self.buckets:
            bucket.refund(tokens)

    def charge(self, tokens: float) -> None:
        """Take from all of them without asking."""
        for bucket in self.buckets:
            bucket.charge(tokens)

    def pause(self, seconds: float) -> None:
        """Pause all of them."""
        for bucket in self.buckets:
            bucket.pause(seconds)

    def configure(
        self, *, capacity: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Raise ``TypeError``: the numbers are those of its buckets, so configure these."""
        raise TypeError("AllOf has no capacity and no rate of its own: configure one of its buckets")


def members(bucket: Bucket) -> Iterator[Bucket]:
    """Yield the buckets that a bucket is made of: itself, or what an `AllOf` stands for."""
    if isinstance(bucket, AllOf):
        for each in bucket.buckets:
            yield from members(each)
    else:
        yield bucket


def charge_refilled(taken: Iterable[tuple[Any, ...]]) -> None:
    """Charge buckets as if tokens that were taken a while ago were taken only now.

    Args:
        taken: Tuples that begin with a bucket and the tokens that were taken from it.

    """
    for bucket, tokens, *_ in taken:
        refilled = min(tokens, bucket.tokens + tokens - bucket.capacity)
        if refilled > 0.0:  # it has been full since, for all that
            bucket.charge(refilled)


def take_all_or_delay(demands: Sequence[tuple[Any, ...]]) -> tuple[float, int]:
    """Take from several buckets, from all or from none.

    Args:
        demands: Tuples that begin with a bucket and the tokens to take from it.

    Returns:
        ``0.0`` when all was taken. Otherwise nothing was, and it is the seconds until it makes sense
        to ask again the bucket at the position that is returned with it.

    Raises:
        ValueError: As `TokenBucket.take_or_delay`.

    """
    taken = 0
    try:
        for demand in demands:
            delay = demand[0].take_or_delay(demand[1])
            if delay:
                return delay, taken
            taken += 1
    finally:
        if taken < len(demands):
            for demand in demands[:taken]:
                demand[0].refund(demand[1])
    return 0.0, 0
