"""A limit: which bucket a job draws on, what it costs, and what happens when the tokens are not there.

The decorator and the gates share this: it checks a declaration where it is written, and prices a job
from its arguments. It knows neither Celery nor kombu.
"""

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic, perf_counter
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

from ..all_of import members
from ..bucket import Bucket
from ..bucket_per_key import BucketPerKey
from ..checks import positive, whole

__all__ = ["AnyBucket", "Demand", "Limit", "price", "refuse_to_pay_twice"]

logger = logging.getLogger("rate_limiter")

#: What a limit may be given as its bucket.
AnyBucket = Bucket | BucketPerKey | Callable[..., Bucket | BucketPerKey]

#: How many jobs a gate holds at most for a limit with a bucket per key: enough that the backlog of one
#: key does not keep the jobs of others from the worker.
_HOLD_PER_KEY: Final = 1000

#: How many seconds' worth of a limit a gate holds, unless the user says otherwise.
_HOLD_SECONDS: Final = 4.0

#: A callable of the user's that takes longer, in seconds, holds up the gate and is told of.
_SLOW: Final = 0.05

POLICIES: Final = ("wait", "retry", "drop", "raise")
OVERFLOWS: Final = ("hold", "pause")


class Demand(NamedTuple):
    """What a job is to take: so many tokens from this bucket, because of this limit."""

    bucket: Bucket
    tokens: float
    limit: "Limit"


_numbers = itertools.count()
_limits: "WeakValueDictionary[int, Limit]" = WeakValueDictionary()


class Limit:
    """One declared limit.

    Args:
        bucket: A `Bucket` or a `BucketPerKey`, or a callable that is given the job's arguments and
            returns one.
        tokens: The cost of a job: a number, or a callable that is given the job's arguments.
        key: A callable that is given the job's arguments and returns its key in a `BucketPerKey`.
        buckets: All that a callable for ``bucket`` may return.
        when_limited: One of ``"wait"``, ``"retry"``, ``"drop"``, ``"raise"``, or a callable that is
            called instead.
        timeout: The most seconds that ``"wait"`` waits in the decorator.
        name: What logs and errors call the limit.
        max_held: The most jobs that a gate holds because of it; ``None``: as the gate says.
        overflow: What a gate does beyond that: ``"hold"`` or ``"pause"``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument has an impossible value, for one a cost above the capacity.

    """

    def __init__(
        self,
        bucket: AnyBucket,
        *,
        tokens: float | Callable[..., float] = 1,
        key: Callable[..., Any] | None = None,
        buckets: Iterable[Bucket] = (),
        when_limited: str | Callable[..., Any] = "wait",
        timeout: float | None = None,
        name: str = "",
        max_held: int | None = None,
        overflow: str | None = None,
    ) -> None:
        if isinstance(bucket, type) or not (
            isinstance(bucket, Bucket | BucketPerKey) or callable(bucket)
        ):
            raise TypeError(
                "bucket must be a bucket such as TokenBucket(capacity=10, tokens_per_second=5), "
                f"or a callable that returns one, not {bucket!r}"
            )
        if key is not None and not callable(key):
            raise TypeError(f"key must be a callable that is given the job's arguments, not {key!r}")
        if key is None and isinstance(bucket, BucketPerKey):
            raise ValueError(f"key is missing: it says which bucket of {bucket!r} a job draws on")
        if key is not None and isinstance(bucket, Bucket):
            raise ValueError(f"key goes with a BucketPerKey, not with {bucket!r}")
        buckets = tuple(buckets)
        for each in buckets:
            if isinstance(each, type) or not isinstance(each, Bucket):
                raise TypeError(f"buckets must be buckets, not {each!r}")
        if buckets and isinstance(bucket, Bucket | BucketPerKey):
            raise ValueError("buckets goes with a callable for bucket: it says what that may return")
        if not callable(when_limited) and when_limited not in POLICIES:
            raise ValueError(
                f"when_limited must be one of {', '.join(map(repr, POLICIES))} or a callable, "
                f"not {when_limited!r}"
            )
        if timeout is not None:
            if when_limited != "wait":
                raise ValueError(f"timeout goes with when_limited='wait', not {when_limited!r}")
            if timeout != 0:
                positive("timeout", timeout)
        if max_held is not None:
            whole("max_held", max_held)
        if overflow is not None and overflow not in OVERFLOWS:
            raise ValueError(
                f"overflow must be one of {', '.join(map(repr, OVERFLOWS))}, not {overflow!r}"
            )
        self.bucket = bucket
        self.tokens = tokens
        self.key = key
        self.buckets = buckets
        self.when_limited = when_limited
        self.timeout = timeout
        self.name = name
        self.max_held = max_held
        self.overflow = overflow or "hold"
        #: Whether it has been told that its callables are slow.
        self.slow = False
        #: Tells limits apart across a fork.
        self.number = next(_numbers)
        _limits[self.number] = self
        self._asks_headers = [f for f in (bucket, tokens, key) if callable(f) and _wants_headers(f)]
        self._turns: WeakKeyDictionary[Bucket, float] = WeakKeyDictionary()
        #: The demands of every job, where they are the same for all.
        self.fixed: tuple[Demand, ...] = ()
        if not callable(tokens):
            cost = positive("tokens", tokens)
            most = math.inf
            if isinstance(bucket, Bucket) or (isinstance(bucket, BucketPerKey) and not bucket.limits):
                most = bucket.capacity
            if cost > most:
                raise ValueError(
                    f"tokens must be at most the bucket's capacity {most:g}, not {tokens!r}: "
                    "such a job could never run"
                )
            if isinstance(bucket, Bucket):
                self.fixed = tuple(Demand(member, cost, self) for member in members(bucket))

    def __repr__(self) -> str:
        return f"<Limit {self.name or '(unnamed)'}: {self.bucket!r}>"

    @staticmethod
    def numbered(number: int) -> "Limit | None":
        """Return the limit with a `number`, if there is one in this process."""
        return _limits.get(number)

    @property
    def asks_headers(self) -> bool:
        """Whether one of its callables has a keyword-only parameter ``headers``."""
        return bool(self._asks_headers)

    def demands(
        self,
        job: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        headers: Mapping[str, Any] | None = None,
    ) -> tuple[Demand, ...]:
        """Return what a job is to take: from one bucket, or from each that an `AllOf` stands for.

        Args:
            job: What to call it in errors: ``"task upload"``, ``"queue emails"``.
            args: The positional arguments that the producer sent.
            kwargs: The keyword arguments that the producer sent.
            headers: The headers that the producer sent, for callables that ask for them.

        Raises:
            ValueError: The price cannot be computed, or is one that can never be paid. The message
                names the job, the limit and the value; the job is to fail with it.

        """
        if self.fixed:
            return self.fixed
        bucket = self._bucket(job, args, kwargs, headers)
        tokens: Any = self.tokens
        if callable(tokens):
            tokens = self._ask("tokens", tokens, job, args, kwargs, headers)
        try:
            cost = positive("tokens", tokens)
        except (TypeError, ValueError):
            raise ValueError(self._complaint("tokens", job, tokens, "a number above 0")) from None
        if cost > bucket.capacity:
            most = f"at most the capacity {bucket.capacity:g}"
            raise ValueError(self._complaint("tokens", job, tokens, most))
        return tuple(Demand(member, cost, self) for member in members(bucket))

    def buckets_of(
        self,
        job: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        headers: Mapping[str, Any] | None = None,
    ) -> tuple[Bucket, ...]:
        """Return the buckets that a job draws on, whatever it costs. See `demands`."""
        return tuple(members(self._bucket(job, args, kwargs, headers)))

    def _bucket(
        self,
        job: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        headers: Mapping[str, Any] | None,
    ) -> Bucket:
        bucket: Any = self.bucket
        if callable(bucket) and not isinstance(bucket, Bucket):
            bucket = self._ask("bucket", bucket, job, args, kwargs, headers)
        if isinstance(bucket, BucketPerKey) and self.key is not None:
            key = self._ask("key", self.key, job, args, kwargs, headers)
            try:
                return bucket[key]
            except Exception as error:  # a bad key, or its limits cannot be told
                raise ValueError(f"{self._blamed(job)}: {error}") from error
        if not isinstance(bucket, Bucket):
            raise ValueError(self._complaint("bucket", job, bucket, "a bucket"))
        if self.buckets and not all(
            any(member is each for each in self.buckets) for member in members(bucket)
        ):
            raise ValueError(self._complaint("bucket", job, bucket, "one of buckets=…"))
        return bucket

    def bound(self, window: int, default: int | None = None) -> int:
        """Return how many jobs a gate holds because of it before the broker is to keep the rest.

        Args:
            window: The prefetch count that the consumer has without a gate.
            default: What the gate says, for limits that say nothing.

        """
        bound = self.max_held or default
        if bound is None:
            rate = self.bucket.tokens_per_second if isinstance(self.bucket, Bucket) else 0.0
            least = 0 if self.key is None else _HOLD_PER_KEY
            bound = max(window, least, math.ceil(_HOLD_SECONDS * rate))
        return bound

    def turn(self, bucket: Bucket, tokens: float, delay: float) -> float:
        """Give a job that is sent away a turn of its own.

        Args:
            bucket: The bucket that refused it.
            tokens: What it costs there.
            delay: When the bucket will have as much, in seconds from now.

        Returns:
            Seconds from now, after the turns that were given before: those sent away do not all come
            back at once.

        """
        now = monotonic()
        turn = max(now + delay, self._turns.get(bucket, 0.0) + tokens / bucket.tokens_per_second)
        self._turns[bucket] = turn
        return turn - now

    def _ask(
        self,
        argument: str,
        function: Callable[..., Any],
        job: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        headers: Mapping[str, Any] | None,
    ) -> Any:
        extra = {"headers": headers or {}} if function in self._asks_headers else {}
        try:
            return function(*args, **kwargs, **extra)
        except Exception as error:
            # Only the text of the error: its object may not survive the result backend.
            raise ValueError(f"{self._blamed(job)}: {argument}=… raised {error!r}") from error

    def _complaint(self, argument: str, job: str, value: Any, expected: str) -> str:
        return f"{self._blamed(job)}: {argument} is {value!r}, expected {expected}"

    def _blamed(self, job: str) -> str:
        return f"{job}, limit {self.name or job.partition(' ')[2]}"


def price(
    limits: Iterable[Limit],
    job: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    headers: Mapping[str, Any] | None = None,
) -> list[Demand]:
    """Return what a job is to take under several limits, at a gate.

    The arguments are those of `Limit.demands`. A callable of the user's that holds up the gate is told
    of, once for each limit.

    Raises:
        ValueError: As `Limit.demands`, or a bucket would be paid twice.

    """
    demands: list[Demand] = []
    for limit in limits:
        began = perf_counter()
        demands += limit.demands(job, args, kwargs, headers)
        took = perf_counter() - began
        if took > _SLOW and not limit.slow:
            limit.slow = True
            logger.warning(
                "Limit %s: its callable took %.0f ms for one job; it runs in the loop of the worker, and "
                "holds up all jobs",
                limit.name,
                took * 1000,
            )
    refuse_to_pay_twice([demand.bucket for demand in demands], job)
    return demands


def refuse_to_pay_twice(buckets: Iterable[Any], whose: str) -> None:
    """Check that no bucket stands among the others twice, in an `AllOf` neither.

    A job could never take from a bucket twice that holds enough for once only: it would be held for
    ever.

    Raises:
        ValueError: One does. The message names it, and whose limits these are.

    """
    seen: set[int] = set()
    for bucket in buckets:
        for member in members(bucket):
            if id(member) in seen:
                raise ValueError(
                    f"{whose}: the same bucket limits it twice; declare it once: {member!r}"
                )
            seen.add(id(member))


def _wants_headers(function: Callable[..., Any]) -> bool:
    try:
        parameter = inspect.signature(function).parameters.get("headers")
    except (TypeError, ValueError):  # a builtin that does not tell
        return False
    return parameter is not None and parameter.kind is parameter.KEYWORD_ONLY
