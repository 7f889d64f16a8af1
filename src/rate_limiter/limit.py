"""A limit: which bucket a job draws on, what it costs, and what happens when the tokens are not there.

The decorator and the gates share this: it checks a declaration where it is written, and prices a job
from its arguments. It knows neither Celery nor kombu.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Final
from weakref import WeakKeyDictionary

from .bucket import Bucket
from .token_bucket import positive

__all__ = ["Demand", "Limit"]

#: What a job is to take: from this bucket, so many tokens, because of this limit.
Demand = tuple[Bucket, float, "Limit"]

#: How many seconds' worth of a limit a gate holds, unless the user says otherwise.
_HOLD_SECONDS: Final = 4.0

POLICIES: Final = ("wait", "retry", "drop", "raise")
OVERFLOWS: Final = ("hold", "pause")


class Limit:
    """One declared limit.

    Args:
        bucket: A `Bucket`, or a callable that is given the job's arguments and returns one.
        tokens: The cost of a job: a number, or a callable that is given the job's arguments.
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
        bucket: Bucket | Callable[..., Bucket],
        *,
        tokens: float | Callable[..., float] = 1,
        when_limited: str | Callable[..., Any] = "wait",
        timeout: float | None = None,
        name: str = "",
        max_held: int | None = None,
        overflow: str | None = None,
    ) -> None:
        if isinstance(bucket, type) or not (isinstance(bucket, Bucket) or callable(bucket)):
            raise TypeError(
                "bucket must be a bucket such as TokenBucket(capacity=10, tokens_per_second=5), "
                f"or a callable that returns one, not {bucket!r}"
            )
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
        self.when_limited = when_limited
        self.timeout = timeout
        self.name = name
        self.max_held = max_held
        self.overflow = overflow or "hold"
        self._asks_headers = [f for f in (bucket, tokens) if callable(f) and _wants_headers(f)]
        self._turns: WeakKeyDictionary[Bucket, float] = WeakKeyDictionary()
        #: The demand of every job, where it is the same for all.
        self.fixed: Demand | None = None
        if not callable(tokens):
            cost = positive("tokens", tokens)
            if isinstance(bucket, Bucket):
                if cost > bucket.capacity:
                    raise ValueError(
                        f"tokens must be at most the bucket's capacity {bucket.capacity:g}, "
                        f"not {tokens!r}: such a job could never run"
                    )
                self.fixed = (bucket, cost, self)

    def __repr__(self) -> str:
        return f"<Limit {self.name or '(unnamed)'}: {self.bucket!r}>"

    @property
    def asks_headers(self) -> bool:
        """Whether one of its callables has a keyword-only parameter ``headers``."""
        return bool(self._asks_headers)

    def demand(
        self,
        task: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        headers: Mapping[str, Any] | None = None,
    ) -> Demand:
        """Return the bucket that a job draws on, and its cost.

        Args:
            task: The task's name, for errors.
            args: The positional arguments that the producer sent.
            kwargs: The keyword arguments that the producer sent.
            headers: The headers that the producer sent, for callables that ask for them.

        Raises:
            ValueError: The price cannot be computed, or is one that can never be paid. The message
                names the task, the limit and the value; the job is to fail with it.

        """
        if self.fixed is not None:
            return self.fixed
        bucket = self.bucket
        if not isinstance(bucket, Bucket):
            bucket = self._ask("bucket", bucket, task, args, kwargs, headers)
            if not isinstance(bucket, Bucket):
                raise ValueError(self._complaint("bucket", task, bucket, "a bucket"))
        tokens: Any = self.tokens
        if callable(tokens):
            tokens = self._ask("tokens", tokens, task, args, kwargs, headers)
        try:
            cost = positive("tokens", tokens)
        except (TypeError, ValueError):
            raise ValueError(self._complaint("tokens", task, tokens, "a number above 0")) from None
        if cost > bucket.capacity:
            most = f"at most the capacity {bucket.capacity:g}"
            raise ValueError(self._complaint("tokens", task, tokens, most))
        return bucket, cost, self

    def bound(self, window: int, default: int | None = None) -> int:
        """Return how many jobs a gate holds because of it before the broker is to keep the rest.

        Args:
            window: The prefetch count that the consumer has without a gate.
            default: What the gate says, for limits that say nothing.

        """
        bound = self.max_held or default
        if bound is None:
            rate = self.bucket.tokens_per_second if isinstance(self.bucket, Bucket) else 0.0
            bound = max(window, math.ceil(_HOLD_SECONDS * rate))
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
        task: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        headers: Mapping[str, Any] | None,
    ) -> Any:
        extra = {"headers": headers or {}} if function in self._asks_headers else {}
        try:
            return function(*args, **kwargs, **extra)
        except Exception as error:
            # Only the text of the error: its object may not survive the result backend.
            raise ValueError(
                f"task {task}, limit {self.name or task}: {argument}=… raised {error!r}"
            ) from error

    def _complaint(self, argument: str, task: str, value: Any, expected: str) -> str:
        return f"task {task}, limit {self.name or task}: {argument} is {value!r}, expected {expected}"


def _wants_headers(function: Callable[..., Any]) -> bool:
    try:
        parameter = inspect.signature(function).parameters.get("headers")
    except (TypeError, ValueError):  # a builtin that does not tell
        return False
    return parameter is not None and parameter.kind is parameter.KEYWORD_ONLY


def whole(name: str, value: int) -> int:
    """Return ``value``, or raise what is wrong with it as a count of jobs."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, not {value!r}")
    return value
