"""A limit: which bucket a job draws on, what it costs, and what happens when the tokens are not there.

The decorator and the gates share this: it prices a job from its arguments. `declared` makes limits, and
checks them; `tally` has what happens to them. It knows neither Celery nor kombu.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final, NamedTuple

from ..all_of import members
from ..bucket import Bucket
from ..bucket_per_key import BucketPerKey
from ..checks import positive
from ..token_bucket import TokenBucket
from .parameters import Parameters, field_of_body
from .record import record_of

__all__ = ["AnyBucket", "AnyCost", "AnyKey", "Demand", "Limit", "refuse_to_pay_twice"]

#: What a limit takes tokens from. A callable is given the job's arguments.
AnyBucket = Bucket | BucketPerKey | Callable[..., Bucket | BucketPerKey]

#: What a job costs: a number, the name of a parameter, or a callable that is given the job's arguments.
AnyCost = float | str | Callable[..., float]

#: How a job's key is found: by the name of a parameter, or by a callable given the job's arguments.
AnyKey = str | Callable[..., Any]

#: How many jobs a gate holds at most for a limit with a bucket per key: enough that the backlog of one
#: key does not keep the jobs of others from the worker.
_HOLD_PER_KEY: Final = 1000

#: How many seconds' worth of a limit a gate holds, unless the user says otherwise.
_HOLD_SECONDS: Final = 4.0


class Demand(NamedTuple):
    """What a job is to take: so many tokens from this bucket, because of this limit."""

    bucket: Bucket
    tokens: float
    limit: "Limit"


@dataclass(frozen=True, eq=False, repr=False, slots=True, weakref_slot=True)
class Limit:
    """One limit, as it was declared. `declared.new_limit` makes and checks it.

    Args:
        bucket: A `Bucket` or a `BucketPerKey`, or a callable that is given the job's arguments and
            returns one.
        tokens: The cost of a job: a number, the name of a parameter, or a callable that is given the
            job's arguments.
        key: The name of a parameter, or such a callable: the job's key in a `BucketPerKey`.
        buckets: All that a callable for ``bucket`` may return.
        when_limited: One of ``"wait"``, ``"retry"``, ``"drop"``, ``"raise"``, or a callable that is
            called instead.
        timeout: The most seconds that ``"wait"`` waits in the decorator.
        name: The name that the user gave it, or ``""``. Messages and logs use the name in
            `record.record_of`.
        max_held: The most jobs that a gate holds because of it; ``None``: as the gate says.
        overflow: What a gate does beyond that: ``"hold"`` or ``"pause"``.

    """

    bucket: AnyBucket
    _: KW_ONLY
    tokens: AnyCost = 1
    key: AnyKey | None = None
    buckets: tuple[Bucket, ...] = ()
    when_limited: str | Callable[..., Any] = "wait"
    timeout: float | None = None
    name: str = ""
    max_held: int | None = None
    overflow: str = "hold"
    #: The demands of every job, where they are the same for all. A capacity that is configured below
    #: the cost later is found by the bucket, which raises.
    fixed: tuple[Demand, ...] = field(init=False, default=())
    #: The bucket of every job, where that is the same for all. (To ask whether something is a `Bucket` takes
    #: 25 µs, too long to do it for each job.)
    _only: Bucket | None = field(init=False, default=None)
    _cost: float | None = field(init=False, default=None)
    _calls_for_bucket: bool = field(init=False, default=False)
    _wants_headers: tuple[Callable[..., Any], ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        is_bucket = isinstance(self.bucket, Bucket)
        calls = not is_bucket and not isinstance(self.bucket, BucketPerKey)
        asking = [f for f in (self.bucket, self.tokens, self.key) if callable(f) and _wants_headers(f)]
        object.__setattr__(self, "_only", self.bucket if is_bucket else None)
        object.__setattr__(self, "_calls_for_bucket", calls)
        object.__setattr__(self, "_wants_headers", tuple(asking))
        if not isinstance(self.tokens, str) and not callable(self.tokens):
            cost = float(self.tokens)
            object.__setattr__(self, "_cost", cost)
            if is_bucket:
                fixed = tuple(Demand(member, cost, self) for member in members(self.bucket))  # type: ignore[arg-type]
                object.__setattr__(self, "fixed", fixed)
        record_of(self)  # numbered before the worker's pool forks

    def __repr__(self) -> str:
        return f"<Limit {record_of(self).name or '(unnamed)'}: {self.bucket!r}>"

    @property
    def asks_headers(self) -> bool:
        """Whether one of its callables has a keyword-only parameter ``headers``."""
        return bool(self._wants_headers)

    @property
    def parameter_names(self) -> list[tuple[str, str]]:
        """The arguments that are names of parameters, each with the name."""
        arguments = ("key", self.key), ("tokens", self.tokens)
        return [(argument, name) for argument, name in arguments if isinstance(name, str)]

    def demands(
        self,
        job: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        headers: Mapping[str, Any] | None = None,
        parameters: Parameters | None = None,
    ) -> tuple[Demand, ...]:
        """Return what a job is to take: from one bucket, or from each that an `AllOf` stands for.

        Args:
            job: What to call it in errors: ``"task upload"``, ``"queue emails"``.
            args: The positional arguments that the producer sent.
            kwargs: The keyword arguments that the producer sent.
            headers: The headers that the producer sent, for callables that ask for them.
            parameters: Those of the task's function. ``None``: a name is a field of the first argument,
                which is the body of a message.

        Raises:
            ValueError: The price cannot be computed, or is one that can never be paid. The message
                names the job, the limit and the value; the job is to fail with it.

        """
        if self.fixed:
            return self.fixed
        bucket = self._bucket(job, args, kwargs, headers, parameters)
        cost, tokens = self._cost, self.tokens
        if cost is None:
            tokens = self._of_job("tokens", self.tokens, job, args, kwargs, headers, parameters)
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
        parameters: Parameters | None = None,
    ) -> tuple[Bucket, ...]:
        """Return the buckets that a job draws on, whatever it costs. See `demands`."""
        return tuple(members(self._bucket(job, args, kwargs, headers, parameters)))

    def bound(self, window: int, default: int | None = None) -> int:
        """Return how many jobs a gate holds because of it before the broker is to keep the rest.

        Args:
            window: The prefetch count that the consumer has without a gate.
            default: What the gate says, for limits that say nothing.

        """
        bound = self.max_held or default
        if bound is None:
            rate = 0.0 if self._only is None else self._only.tokens_per_second
            least = 0 if self.key is None else _HOLD_PER_KEY
            bound = max(window, least, math.ceil(_HOLD_SECONDS * rate))
        return bound

    def _bucket(
        self,
        job: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        headers: Mapping[str, Any] | None,
        parameters: Parameters | None,
    ) -> Bucket:
        bucket: Any = self.bucket
        if self._calls_for_bucket:
            bucket = self._of_job("bucket", bucket, job, args, kwargs, headers, parameters)
        if isinstance(bucket, BucketPerKey) and self.key is not None:
            key = self._of_job("key", self.key, job, args, kwargs, headers, parameters)
            try:
                return bucket[key]
            except Exception as error:  # a bad key, or its limits cannot be told
                raise ValueError(f"{self._blamed(job)}: {error}") from error
        if not self._calls_for_bucket:
            return bucket  # type: ignore[no-any-return]
        if not isinstance(bucket, TokenBucket) and not isinstance(bucket, Bucket):  # the first is quick
            raise ValueError(self._complaint("bucket", job, bucket, "a bucket"))
        if self.buckets and not all(
            any(member is each for each in self.buckets) for member in members(bucket)
        ):
            raise ValueError(self._complaint("bucket", job, bucket, "one of buckets=…"))
        return bucket

    def _of_job(
        self,
        argument: str,
        source: Any,
        job: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        headers: Mapping[str, Any] | None,
        parameters: Parameters | None,
    ) -> Any:
        """Return what the name or the callable that was declared gives for one job."""
        if isinstance(source, str):
            try:
                if parameters is None:
                    return field_of_body(source, args[0])
                return parameters.argument(source, args, kwargs)
            except LookupError as error:
                raise ValueError(f"{self._blamed(job)}: {argument}={source!r}: {error}") from None
        extra = {"headers": headers or {}} if source in self._wants_headers else {}
        try:
            return source(*args, **kwargs, **extra)
        except Exception as error:
            # Only the text of the error: its object may not survive the result backend.
            raise ValueError(f"{self._blamed(job)}: {argument}=… raised {error!r}") from error

    def _complaint(self, argument: str, job: str, value: Any, expected: str) -> str:
        return f"{self._blamed(job)}: {argument} is {value!r}, expected {expected}"

    def _blamed(self, job: str) -> str:
        return f"{job}, limit {record_of(self).name or job.partition(' ')[2]}"


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
