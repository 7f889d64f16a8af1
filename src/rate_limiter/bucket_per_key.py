"""One bucket per key: per tenant, per account."""

import json
import logging
import math
import os
import reprlib
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from uuid import UUID

from .checks import initial_tokens, positive, whole
from .outage import Policy, check_policy
from .token_bucket import TokenBucket

if TYPE_CHECKING:
    from .redis_bucket import RedisTokenBucket

__all__ = ["BucketPerKey", "Key"]

#: The types of a key. The parts of a tuple are of the other types.
Key = str | int | UUID | tuple[Any, ...]

#: The bucket of a key.
OfKey: TypeAlias = "TokenBucket | RedisTokenBucket"

logger = logging.getLogger("rate_limiter")

#: The most characters of a key, as text.
_LONGEST_KEY: Final = 200

#: Values of exactly these types are equal only if they are the same key. Others are checked at each
#: look-up: a dict finds the key 1 for 1.0 as well.
_PLAIN: Final = frozenset({str, int, UUID})

#: How many buckets a new key checks, and forgets if they are full.
_CHECKS: Final = 2
#: The same at ``max_keys``.
_CHECKS_AT_MAX_KEYS: Final = 64

#: Returns how many references an object has. Only CPython can tell; elsewhere no bucket is forgotten.
_references: Final[Callable[[object], float]] = getattr(sys, "getrefcount", lambda _: math.inf)


class BucketPerKey:
    """One `TokenBucket` per key, made when the key first comes up.

        per_tenant = BucketPerKey(capacity=10, tokens_per_second=5)
        per_tenant["acme"].allow()

    Each new key makes it check a few buckets and forget those that are full, for a full bucket is the
    same as a new one. It keeps a bucket that is not full, that somebody holds a reference to, or that was
    configured; and, with ``initial``, all buckets as long as a new one would not be full. So nobody gets more
    tokens by using many keys in turn, or fewer by coming back.

    Args:
        capacity: The capacity of each bucket. Above 0.
        tokens_per_second: The rate of each bucket. Above 0.
        initial: The tokens that each key has when this object is made, from 0 to ``capacity``. ``None``: all
            are full. Tokens come from then on, also for keys that have no bucket yet: a bucket is made with
            ``initial`` tokens and those that its rate has brought since, up to the capacity of its key.
        max_keys: The most buckets that are kept. Until one of them is full, all further keys share one
            more bucket of the capacity and rate above. The first time it logs a warning.
        limits: Called with a key when its bucket is made. Returns the key's own ``(capacity,
            tokens_per_second)`` (premium, standard, free), or ``None`` for those above. It may be
            called again for the same key.
        clock: As in `TokenBucket`.
        redis: The URL of a Redis, or a ``redis.Redis``: each key has a `RedisTokenBucket` there, one for all
            processes. Then ``max_keys`` only bounds what this process keeps in memory, ``initial`` is as in
            `RedisTokenBucket`, and ``clock`` is not used.
        name: With ``redis``: names the buckets there. The bucket of a key is named ``<name>:<key>``.
        on_outage: With ``redis``: as in `RedisTokenBucket`.

    Raises:
        ValueError: A number is not above 0, or is not finite; ``initial`` is below 0 or above the capacity; or
            as in `RedisTokenBucket`.
        TypeError: An argument has the wrong type, or ``redis`` and ``name`` are not given together.

    A key is a ``str``, an ``int``, a ``UUID``, or a tuple of these, of at most 200 characters as text.
    Equal keys have the same bucket: ``True`` is the key 1; a ``UUID`` and its text are two keys. Without
    ``redis`` buckets per key cannot be shared between processes: a forked child starts with the parent's
    levels and counts on its own.

    """

    def __init__(
        self,
        capacity: float,
        tokens_per_second: float,
        *,
        initial: float | None = None,
        max_keys: int = 100_000,
        limits: Callable[[Any], tuple[float, float] | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        redis: Any = None,
        name: str | None = None,
        on_outage: Policy = "local",
    ) -> None:
        self.capacity = positive("capacity", capacity)
        self.tokens_per_second = positive("tokens_per_second", tokens_per_second)
        self.initial = None if initial is None else initial_tokens(initial, self.capacity)
        if limits is not None and not callable(limits):
            raise TypeError(f"limits must be a callable that is given a key, or None, not {limits!r}")
        self.max_keys = whole("max_keys", max_keys)
        check_policy(on_outage)
        self.limits = limits
        self._clock = clock
        #: The bucket in Redis whose stored numbers count for all keys without numbers of their own. No job
        #: takes from it. ``None``: the buckets are in this process.
        self.of_all: RedisTokenBucket | None = None
        if (redis is None) is not (name is None):
            raise TypeError("redis and name go together: where the buckets are, and how they are named")
        if redis is not None and name is not None:
            from .redis_bucket import RedisTokenBucket as InRedis  # noqa: PLC0415 - it needs the package redis

            place: Any = {"url" if isinstance(redis, str) else "client": redis}
            self.of_all = InRedis(
                name, *_numbers(self), on_outage=on_outage, initial=self.initial, **place
            )
        # A signal handler may interrupt a thread that holds the lock, and make a key too. So a bucket is
        # at every moment in one of the two dicts.
        self._buckets: dict[Key, OfKey] = {}
        #: The bucket that is about to be forgotten.
        self._leaving: dict[Key, OfKey] = {}
        self._forgetting = False
        #: The keys; those whose buckets were checked longest ago come first. A key may stand here twice.
        self._order: deque[Key] = deque()
        #: The bucket of all keys beyond `max_keys`.
        self._overflow = TokenBucket(
            self.capacity, self.tokens_per_second, initial=self.initial, clock=clock
        )
        self._made_at = clock()
        self._overflowed = False
        self._lock = threading.RLock()
        _all.add(self)

    def __getitem__(self, key: Key) -> OfKey:
        """Return the bucket of a key.

        Raises:
            TypeError: The key is not a ``str``, an ``int``, a ``UUID`` or a tuple of these.
            ValueError: It has more than 200 characters as text.

        """
        if type(key) in _PLAIN or (
            isinstance(key, tuple) and len(key) <= _LONGEST_KEY and _PLAIN.issuperset(map(type, key))
        ):
            bucket = self._buckets.get(key)
            if bucket is not None:
                return bucket
        return self._find_or_make(key)

    def __len__(self) -> int:
        """Return the number of buckets in this process."""
        return len(self._buckets)

    def __bool__(self) -> bool:
        """Return ``True``, also without any key."""
        return True

    def __iter__(self) -> Iterator[Key]:
        """Return the keys that have a bucket now."""
        return iter(list(self._buckets))

    def __repr__(self) -> str:
        return (
            f"<BucketPerKey {self.capacity:g} tokens, {self.tokens_per_second:g} tokens_per_second, "
            f"{len(self)} keys>"
        )

    @property
    def in_redis(self) -> bool:
        """Whether the buckets are in Redis: all processes share them."""
        return self.of_all is not None

    def buckets(self) -> list[OfKey]:
        """Return the buckets that there are now in this process, and the one that keys beyond ``max_keys`` share."""
        kept = list(self._buckets.values())
        return kept if self.in_redis else [*kept, self._overflow]

    def is_alone(self, key: Key) -> bool:
        """Tell whether a key has a bucket of its own. Beyond ``max_keys`` it has none."""
        return self[key] is not self._overflow

    def configure(
        self,
        *,
        capacity: float | None = None,
        tokens_per_second: float | None = None,
        reason: str = "",
        who: str | None = None,
    ) -> None:
        """Change the numbers of all keys, those that have a bucket now too.

        A key with other numbers keeps them: they come from ``limits``, or its bucket was configured.

        Args:
            capacity: The most tokens that each bucket can hold from now on. ``None``: unchanged.
            tokens_per_second: The rate of each bucket from now on. ``None``: unchanged.
            reason: With ``redis``: as in `RedisTokenBucket.configure`. Without it nothing is stored.
            who: As ``reason``.

        Raises:
            ValueError: An argument is not above 0, or is not finite. Nothing is changed.
            TypeError: An argument is not a number. Nothing is changed.
            redis.RedisError: The server does not answer, or refuses. Nothing was changed, as far as known.

        """
        size = self.capacity if capacity is None else positive("capacity", capacity)
        rate = self.tokens_per_second
        if tokens_per_second is not None:
            rate = positive("tokens_per_second", tokens_per_second)
        if self.of_all is not None:
            self.of_all.configure(capacity=size, tokens_per_second=rate, reason=reason, who=who)
        with self._lock:
            before = self.capacity, self.tokens_per_second
            self.capacity, self.tokens_per_second = size, rate
            buckets = [each for each in self.buckets() if _numbers(each) == before]
        for bucket in buckets if self.of_all is None else ():
            bucket.configure(capacity=size, tokens_per_second=rate)

    def restore(self) -> None:
        """With ``redis``: let the numbers of the code count again, see `RedisTokenBucket.restore`.

        Raises:
            TypeError: The buckets are not in Redis.
            redis.RedisError: The server does not answer, or refuses.

        """
        if self.of_all is None:
            raise TypeError(f"{self!r} is not in Redis: it has no stored numbers to clear")
        self.of_all.restore()
        self.capacity, self.tokens_per_second = _numbers(self.of_all)

    def _find_or_make(self, key: Key) -> OfKey:
        _check_key(key)
        bucket = self._buckets.get(key)
        if bucket is not None:
            return bucket
        own = self._own_numbers(key)
        with self._lock:
            # Another thread was faster; or this is a signal handler, and the bucket is to stay now.
            bucket = self._buckets.get(key) or self._leaving.get(key)
            if bucket is not None:
                return self._buckets.setdefault(key, bucket)
            self._forget_full(_CHECKS if len(self) < self.max_keys else _CHECKS_AT_MAX_KEYS)
            if len(self) >= self.max_keys:
                return self._new(key, own) if self.in_redis else self._shared_by_the_rest()
            bucket = self._new(key, own)
            self._order.append(key)
            return self._buckets.setdefault(key, bucket)

    def _new(self, key: Key, own: tuple[float, float] | None) -> OfKey:
        if self.of_all is not None:
            return self.of_all.of_key(_name_of(key), own, self.initial)
        numbers = own or _numbers(self)
        return TokenBucket(*numbers, initial=self._initial_now(*numbers), clock=self._clock)

    def _own_numbers(self, key: Key) -> tuple[float, float] | None:
        own = None if self.limits is None else self.limits(key)
        if own is None:
            return None
        try:
            capacity, rate = own
        except (TypeError, ValueError):
            raise TypeError(
                f"limits must return (capacity, tokens_per_second) or None, not {own!r}"
            ) from None
        return positive("capacity", capacity), positive("tokens_per_second", rate)

    def _initial_now(self, capacity: float, rate: float) -> float:
        """Return the tokens of a bucket that nobody has taken from since this object was made."""
        if self.initial is None:
            return capacity
        return min(capacity, self.initial + max(0.0, self._clock() - self._made_at) * rate)

    def _forget_full(self, checks: int) -> None:
        """Check so many buckets, and forget those that are full."""
        if self._forgetting:  # this is a signal handler
            return
        self._forgetting = True
        try:
            # If an exception, or a fork, interrupted this before, a bucket is left there.
            self._buckets.update(self._leaving)
            for _ in range(min(checks, len(self._order))):
                if self._forget(self._order[0]):
                    self._order.popleft()
                else:
                    self._order.rotate(-1)
        finally:
            self._forgetting = False

    def _forget(self, key: Key) -> bool:
        """Forget the bucket of a key if it is as a new one; return whether the key has no bucket now."""
        bucket = self._buckets.get(key)
        if bucket is None:
            return True
        if _level(bucket) < bucket.capacity:
            return False
        if self.of_all is not None:
            if _references(bucket) <= _UNUSED:
                del self._buckets[key]  # the server knows it
            return key not in self._buckets
        try:
            numbers = self._own_numbers(key) or _numbers(self)
        except Exception:  # noqa: BLE001 - of the user's function: the bucket may have been configured
            return False
        if self._initial_now(*numbers) < numbers[0]:  # the rate was higher before `configure`, say
            return False
        self._leaving[key] = bucket
        del self._buckets[key]
        # No other thread can find the bucket now. One that found it before holds a reference.
        if (
            _references(bucket) > _UNUSED
            or _level(bucket) < bucket.capacity
            or _numbers(bucket) != numbers
        ):
            self._buckets[key] = bucket
        self._leaving.clear()
        return key not in self._buckets

    def _shared_by_the_rest(self) -> TokenBucket:
        if not self._overflowed:
            self._overflowed = True
            logger.warning("%r is at max_keys: new keys share one bucket until others are full", self)
        return self._overflow


def _numbers(bucket: "OfKey | BucketPerKey") -> tuple[float, float]:
    return bucket.capacity, bucket.tokens_per_second


def _level(bucket: OfKey) -> float:
    """Return the tokens in a bucket, as far as known without a server."""
    return bucket.tokens if isinstance(bucket, TokenBucket) else bucket.known.tokens


def _name_of(key: Key) -> str:
    """Return the name of a key in Redis. No two keys have the same."""
    if isinstance(key, str):
        return f"(str){key}" if key.startswith("(") else key
    if isinstance(key, tuple):
        return f"(tuple){json.dumps([_name_of(part) for part in key])}"
    return f"(UUID){key}" if isinstance(key, UUID) else f"(int){int(key)}"


def _check_key(key: Any) -> None:
    parts = key if isinstance(key, tuple) else (key,)
    characters = 0
    for part in parts:
        if isinstance(part, str):
            characters += len(part) or 1
        elif isinstance(part, int):
            characters += len(f"{part:d}") if part.bit_length() < 4 * _LONGEST_KEY else _LONGEST_KEY + 1
        elif isinstance(part, UUID):
            characters += len(str(part))
        else:
            raise TypeError(
                f"key must be a str, an int, a UUID or a tuple of them, not {_shortened(key)}"
            )
        if characters > _LONGEST_KEY:
            raise ValueError(f"key must have at most {_LONGEST_KEY} characters, not {_shortened(key)}")


def _shortened(key: Any) -> str:
    try:
        return reprlib.repr(key)
    except ValueError:  # Python prints no int of over 4,300 digits
        return "one with an int that is too long to print"


def _references_if_unused() -> float:
    """Count the references to a bucket that only a dict and the caller's variable hold."""
    leaving = {"key": object()}
    bucket = leaving["key"]
    return min(_references(bucket), 9.0)  # not infinity: where nobody can tell, no bucket is unused


#: How many references a bucket has at most that nobody uses, as `BucketPerKey._forget` sees it.
_UNUSED: Final = _references_if_unused()

_all: "weakref.WeakSet[BucketPerKey]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Of all threads only the forking one lives on: a lock another held would never be released."""
    for buckets in list(_all):
        buckets._lock = threading.RLock()
        buckets._forgetting = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
