"""One bucket per tenant, account or whatever a key stands for."""

import logging
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

from .checks import positive, whole
from .token_bucket import TokenBucket

__all__ = ["BucketPerKey", "Key"]

#: What may stand for a tenant.
Key = str | int | tuple[Any, ...]

logger = logging.getLogger("rate_limiter")

_LONGEST_KEY: Final = 200

#: How many buckets are looked at when a new one is made: so many may be forgotten, oldest first.
_LOOKS: Final = 2
#: And when there is no room.
_LOOKS_FOR_ROOM: Final = 64

#: How many hold an object. Other Pythons than CPython cannot tell: there nothing is forgotten.
_holders: Final[Callable[[object], float]] = getattr(sys, "getrefcount", lambda _: math.inf)


class BucketPerKey:
    """One `TokenBucket` per key, made when the key first comes up.

        per_tenant = BucketPerKey(capacity=10, tokens_per_second=5)
        per_tenant["acme"].allow()

    It forgets full buckets, for a full bucket is a new bucket: little by little, when new ones are
    made. One that is not full, that anybody still holds, or that was configured, is never forgotten, so
    nobody gets more tokens by cycling through keys.

    Args:
        capacity: The capacity of each bucket. Above 0.
        tokens_per_second: The rate of each bucket. Above 0.
        max_keys: The most buckets that are kept. Beyond it, new keys share one bucket more, at the
            rate above, until others are full. Told once, by a warning.
        limits: Called with a key when its bucket is made; returns ``(capacity, tokens_per_second)``
            for it (premium, standard, free), or ``None``: as above. It may be called again for the
            same key.
        clock: As in `TokenBucket`.

    Raises:
        ValueError: A number is not above 0, or is not finite.
        TypeError: An argument has the wrong type.

    A key is a ``str``, an ``int``, or a tuple of them, of at most 200 characters. A forked child counts
    on its own from the parent's levels on; buckets per key cannot be shared between processes.

    """

    def __init__(
        self,
        capacity: float,
        tokens_per_second: float,
        *,
        max_keys: int = 100_000,
        limits: Callable[[Any], tuple[float, float] | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.capacity = positive("capacity", capacity)
        self.tokens_per_second = positive("tokens_per_second", tokens_per_second)
        if limits is not None and not callable(limits):
            raise TypeError(f"limits must be a callable that is given a key, or None, not {limits!r}")
        self.max_keys = whole("max_keys", max_keys)
        self.limits = limits
        self._clock = clock
        #: By key; those that were looked at longest ago come first.
        self._buckets: dict[Key, TokenBucket] = {}
        self._overflow: TokenBucket | None = None
        self._lock = threading.RLock()
        _all.add(self)

    def __getitem__(self, key: Key) -> TokenBucket:
        """Return the bucket of a key.

        Raises:
            TypeError: The key is neither ``str`` nor ``int`` nor a tuple of them.
            ValueError: It has more than 200 characters.

        """
        try:
            bucket = self._buckets.get(key)
        except TypeError:  # it cannot be hashed
            bucket = None
        return self._make(key) if bucket is None else bucket

    def __len__(self) -> int:
        """How many buckets there are."""
        return len(self._buckets)

    def __bool__(self) -> bool:
        """Whether it is one: it is, without any key too."""
        return True

    def __iter__(self) -> Iterator[Key]:
        """Return the keys that have a bucket now."""
        return iter(list(self._buckets))

    def __repr__(self) -> str:
        return (
            f"<BucketPerKey {self.capacity:g} tokens, {self.tokens_per_second:g} tokens_per_second, "
            f"{len(self)} keys>"
        )

    def buckets(self) -> list[TokenBucket]:
        """Return the buckets that there are now."""
        return [*self._buckets.values(), *([self._overflow] if self._overflow is not None else [])]

    def _make(self, key: Key) -> TokenBucket:
        _check(key)
        capacity, rate = self._limits_of(key)
        with self._lock:
            bucket = self._buckets.get(key)
            if bucket is not None:  # another thread was faster
                return bucket
            self._forget_full(_LOOKS if len(self) < self.max_keys else _LOOKS_FOR_ROOM)
            if len(self) >= self.max_keys:
                return self._shared_by_the_rest()
            bucket = self._buckets[key] = TokenBucket(capacity, rate, clock=self._clock)
            return bucket

    def _limits_of(self, key: Key) -> tuple[float, float]:
        own = None if self.limits is None else self.limits(key)
        if own is None:
            return self.capacity, self.tokens_per_second
        try:
            capacity, rate = own
        except (TypeError, ValueError):
            raise TypeError(
                f"limits must return (capacity, tokens_per_second) or None, not {own!r}"
            ) from None
        return capacity, rate

    def _forget_full(self, looks: int) -> None:
        for _ in range(min(looks, len(self._buckets))):
            key = next(iter(self._buckets))
            bucket = self._buckets.pop(key)
            # Out of reach now: whoever holds it besides this variable had it before.
            if (
                _holders(bucket) > _ALONE
                or bucket.tokens < bucket.capacity
                or self._is_own(key, bucket)
            ):
                self._buckets[key] = bucket  # as the last one
            del bucket

    def _is_own(self, key: Key, bucket: TokenBucket) -> bool:
        """Whether a bucket was configured: made anew it would be another."""
        try:
            return (bucket.capacity, bucket.tokens_per_second) != self._limits_of(key)
        except Exception:  # noqa: BLE001 - limits=… cannot tell now
            return True

    def _shared_by_the_rest(self) -> TokenBucket:
        if self._overflow is None:
            self._overflow = TokenBucket(self.capacity, self.tokens_per_second, clock=self._clock)
            logger.warning("%r is at max_keys: new keys share one bucket until others are full", self)
        return self._overflow


def _check(key: Any) -> None:
    parts = key if isinstance(key, tuple) else (key,)
    for part in parts:
        if not isinstance(part, str | int):
            raise TypeError(f"key must be a str, an int or a tuple of them, not {key!r:.200}")
    if sum(len(part) if isinstance(part, str) else part.bit_length() / 3.3 for part in parts) > (
        _LONGEST_KEY
    ):
        raise ValueError(f"key must have at most {_LONGEST_KEY} characters, not {key!r:.50}…")


def _held_by_a_variable() -> float:
    held = {"key": object()}.pop("key")
    return min(_holders(held), 9.0)


_ALONE: Final = _held_by_a_variable()

_all: "weakref.WeakSet[BucketPerKey]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Of all threads only the forking one lives on: a lock another held would never be released."""
    for buckets in list(_all):
        buckets._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
