"""A limit: the bucket that a job takes from, the cost of the job, and its policy without tokens.

The decorator and both gates use this module to price a job by its arguments. `declared` makes and checks
limits, `tally` counts what happens under them. It imports neither Celery nor kombu.
"""

import inspect
import math
import signal
import threading
import traceback
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final, NamedTuple

from ..all_of import members
from ..bucket import Bucket, is_in_redis
from ..bucket_per_key import BucketPerKey
from ..checks import positive
from ..token_bucket import TokenBucket
from .parameters import Parameters, field_of_body
from .record import record_of

__all__ = [
    "AnyBucket",
    "AnyCost",
    "AnyKey",
    "Call",
    "Demand",
    "Limit",
    "is_of_a_signal",
    "rate_here",
    "refuse_to_pay_twice",
    "seconds_until",
]

#: What a limit takes tokens from. A callable is given the job's arguments.
AnyBucket = Bucket | BucketPerKey | Callable[..., Bucket | BucketPerKey]

#: What a job costs: a number, the name of a parameter, or a callable that is given the job's arguments.
AnyCost = float | str | Callable[..., float]

#: How a job's key is found: by the name of a parameter, or by a callable given the job's arguments.
AnyKey = str | Callable[..., Any]

#: How many seconds' worth of a limit a gate holds, unless the user says otherwise: what runs later than
#: that has no business in a worker.
_HOLD_SECONDS: Final = 600.0

#: How many jobs a gate holds for a limit at most, unless the user says otherwise. One takes some 7 kB.
_HOLD_MOST: Final = 1000

#: Makes the buckets that all limits take from, instead of their own: for tests, see `pytest_plugin`.
stand_in: Callable[[], Bucket] | None = None


class Call(NamedTuple):
    """A job that is to be priced: its name and its arguments."""

    #: What to call the job in errors: ``"task upload"``, ``"queue emails"``.
    job: str
    #: The positional and keyword arguments that the producer sent.
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    #: The headers that the producer sent, for callables that ask for them.
    headers: Mapping[str, Any] | None = None
    #: The parameters of the task's function. ``None``: the job is a message of kombu, and the names in
    #: ``tokens`` and ``key`` are fields of its body, the first argument.
    parameters: Parameters | None = None


class Demand(NamedTuple):
    """The tokens that a job has to take from one bucket, because of one limit."""

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
        buckets: All buckets that a callable for ``bucket`` may return.
        when_limited: One of ``"wait"``, ``"retry"``, ``"drop"``, ``"raise"``, or a callable that is
            called instead of the task.
        timeout: With ``"wait"``, the most seconds that a job waits in the decorator.
        max_wait: The most seconds that a job waits. ``None``: with ``"wait"`` for ever, else not at all.
        shadow: Whether it makes no job wait, and only counts what it would have done.
        name: The name that the user gave it, or ``""``. Messages and logs use the name in
            `record.record_of`.
        max_held: The most jobs that a gate holds because of it; ``None``: see `bound`.
        overflow: What a gate does beyond that: ``"hold"``, ``"pause"`` or ``"park"``. ``None``: nobody has
            said, so it holds unless the app's settings say otherwise.

    """

    bucket: AnyBucket
    _: KW_ONLY
    tokens: AnyCost = 1
    key: AnyKey | None = None
    buckets: tuple[Bucket, ...] = ()
    when_limited: str | Callable[..., Any] = "wait"
    timeout: float | None = None
    max_wait: float | None = None
    shadow: bool = False
    name: str = ""
    max_held: int | None = None
    overflow: str | None = None
    #: The demands of a job, if they are the same for all jobs; else empty. They are not checked again: if
    #: ``configure`` sets a capacity below the cost later, the bucket raises.
    fixed: tuple[Demand, ...] = field(init=False, default=())
    #: The most seconds that a job waits at a gate.
    patience: float = field(init=False, default=0.0)
    #: The tokens of a job, if they are the same for all jobs.
    cost: float | None = field(init=False, default=None)
    #: Whether ``bucket`` is a `Bucket`. On Python 3.11 it takes 20 µs to find that out.
    has_bucket: bool = field(init=False, default=False)
    _calls_for_bucket: bool = field(init=False, default=False)
    _wants_headers: tuple[Callable[..., Any], ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        is_bucket = isinstance(self.bucket, Bucket)
        calls = not is_bucket and not isinstance(self.bucket, BucketPerKey)
        asking = [f for f in (self.bucket, self.tokens, self.key) if callable(f) and _wants_headers(f)]
        patience = self.max_wait
        if patience is None:
            patience = math.inf if self.when_limited == "wait" else 0.0
        object.__setattr__(self, "patience", patience)
        object.__setattr__(self, "has_bucket", is_bucket)
        object.__setattr__(self, "_calls_for_bucket", calls)
        object.__setattr__(self, "_wants_headers", tuple(asking))
        if not isinstance(self.tokens, str) and not callable(self.tokens):
            cost = float(self.tokens)
            object.__setattr__(self, "cost", cost)
            if is_bucket:
                object.__setattr__(self, "fixed", self._demands(self.bucket, cost))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<Limit {record_of(self).name or '(unnamed)'}: {self.bucket!r}>"

    @property
    def policy(self) -> str:
        """What ``when_limited`` is, as text. A callable is a ``"fallback"``."""
        return self.when_limited if isinstance(self.when_limited, str) else "fallback"

    @property
    def asks_headers(self) -> bool:
        """Whether one of its callables has a keyword-only parameter ``headers``."""
        return bool(self._wants_headers)

    @property
    def parameter_names(self) -> list[tuple[str, str]]:
        """Pairs of an argument, ``"key"`` or ``"tokens"``, and the name of the parameter that it names."""
        arguments = ("key", self.key), ("tokens", self.tokens)
        return [(argument, name) for argument, name in arguments if isinstance(name, str)]

    def demands(self, call: Call) -> tuple[Demand, ...]:
        """Return the demands of a job: one for its bucket, or one for each bucket of an `AllOf`.

        Args:
            call: The job's name and arguments.

        Raises:
            ValueError: The bucket, the key or the cost cannot be computed, or the cost is above the
                bucket's capacity. The message names the job, the limit and the value. The job has to
                fail with this error.

        """
        if stand_in is not None and not self.shadow:
            return (Demand(stand_in(), 1.0, self),)
        if self.fixed:
            return self.fixed
        bucket = self._bucket(call)
        cost, tokens = self.cost, self.tokens
        if cost is None:
            tokens = self._of_job("tokens", self.tokens, call)
            try:
                cost = positive("tokens", tokens)
            except (TypeError, ValueError):
                raise ValueError(
                    self._complaint("tokens", call.job, tokens, "a number above 0")
                ) from None
        # The capacity of a bucket on a server may have been raised there: it says so itself.
        if cost > bucket.capacity and not self.shadow:
            sizes = [each.capacity for each in members(bucket) if not is_in_redis(each)]
            if sizes and cost > min(sizes):
                most = f"at most the capacity {min(sizes):g}"
                raise ValueError(self._complaint("tokens", call.job, tokens, most))
        return self._demands(bucket, cost)

    def buckets_of(self, call: Call) -> tuple[Bucket, ...]:
        """Return the buckets that a job takes from, without its cost. See `demands`."""
        return tuple(demand.bucket for demand in self._demands(self._bucket(call), 1.0))

    def bound(self, window: int, default: int | None = None) -> int:
        """Return the most jobs that a gate holds for this limit. The broker keeps the others.

        That is ``max_held``, of the limit or of the gate. Where neither says it: as many as run within
        ten minutes, but at least one prefetch window and at most 1,000. Where the rate depends on the
        job (a `BucketPerKey`, or a callable for ``bucket``): 1,000.

        Args:
            window: The prefetch count that the consumer has without a gate.
            default: The ``max_held`` of the gate, for a limit that has none.

        """
        bound = self.max_held or default
        if bound is None:
            bound = _HOLD_MOST
            if self.has_bucket:
                bound = math.ceil(min(_HOLD_SECONDS * self.jobs_per_second, _HOLD_MOST))
            bound = max(bound, window)
        return bound

    @property
    def jobs_per_second(self) -> float:
        """The jobs per second that go in this worker. 1,000, if the bucket depends on the job."""
        if not self.has_bucket:
            return float(_HOLD_MOST)
        return rate_here(self.bucket) / (self.cost or 1.0)

    def _demands(self, bucket: Bucket, cost: float) -> tuple[Demand, ...]:
        if self.shadow:
            from .shadow import Shadow  # noqa: PLC0415 - it tells observers, which know limits

            return (Demand(Shadow(bucket, self), cost, self),)
        return tuple(Demand(member, cost, self) for member in members(bucket))

    def _bucket(self, call: Call) -> Bucket:
        bucket: Any = self.bucket
        if self._calls_for_bucket:
            bucket = self._of_job("bucket", bucket, call)
        if isinstance(bucket, BucketPerKey) and self.key is not None:
            key = self._of_job("key", self.key, call)
            try:
                return bucket[key]
            except (Exception, SystemExit, KeyboardInterrupt) as error:
                if is_of_a_signal(error):
                    raise
                # The key is wrong, or the callable ``limits`` of the BucketPerKey has failed.
                raise ValueError(f"{self._blamed(call.job)}: {error}") from error
        if not self._calls_for_bucket:
            return bucket  # type: ignore[no-any-return]
        if not isinstance(bucket, TokenBucket) and not isinstance(bucket, Bucket):  # the first is quick
            raise ValueError(self._complaint("bucket", call.job, bucket, "a bucket"))
        if self.buckets and not all(member in self.buckets for member in members(bucket)):
            raise ValueError(self._complaint("bucket", call.job, bucket, "one of buckets=…"))
        if self.shadow and any(map(is_in_redis, members(bucket))):
            expected = "a bucket in this process, for a shadow"
            raise ValueError(self._complaint("bucket", call.job, bucket, expected))
        return bucket

    def _of_job(self, argument: str, source: Any, call: Call) -> Any:
        """Return the value of ``bucket``, ``key`` or ``tokens`` for one job, from a name or a callable."""
        job, args, kwargs, headers, parameters = call
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
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            if is_of_a_signal(error):
                raise
            # Only the text of the error: its object may not survive the result backend.
            raise ValueError(f"{self._blamed(job)}: {argument}=… raised {error!r}") from error

    def _complaint(self, argument: str, job: str, value: Any, expected: str) -> str:
        return f"{self._blamed(job)}: {argument} is {value!r}, expected {expected}"

    def _blamed(self, job: str) -> str:
        return f"{job}, limit {record_of(self).name or job.partition(' ')[2]}"


def rate_here(bucket: Any) -> float:
    """Return the tokens per second that this process may count on: its share, if others take from the bucket."""
    rate: float = bucket.tokens_per_second / getattr(bucket, "workers", 1)
    return rate


def seconds_until(bucket: Any, tokens: float) -> float:
    """Return the seconds until a bucket has so many tokens, if nobody takes any. A pause is counted."""
    paused: float = getattr(bucket, "pause_left", 0.0)
    missing: float = tokens - bucket.tokens
    return paused + max(0.0, missing) / rate_here(bucket)


def is_of_a_signal(error: BaseException) -> bool:
    """Tell whether an exception was raised by a signal handler, not by the code that the signal interrupted.

    When a user's callable raises an exception, only its job fails, even with ``SystemExit`` or
    ``KeyboardInterrupt``. But a signal handler may interrupt the callable: for Ctrl-C, for a soft time
    limit, or for a signal of the user's program. An exception of such a handler must not be caught.
    """
    if threading.current_thread() is not threading.main_thread():
        return False  # Python calls signal handlers in the main thread only
    if isinstance(error, KeyboardInterrupt) and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        return True  # Probably of Ctrl-C: Python's own handler leaves no frame to be certain
    handlers = {getattr(signal.getsignal(each), "__code__", None) for each in signal.valid_signals()}
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))


def refuse_to_pay_twice(buckets: Iterable[Any], whose: str) -> None:
    """Check that no bucket limits a job twice. The buckets inside an `AllOf` count too.

    A job that takes from one bucket twice may need more than the bucket's capacity. It would be held for
    ever.

    Args:
        buckets: The buckets of all limits of the job.
        whose: What to call the job or its task in the error.

    Raises:
        ValueError: A bucket is there twice. The message names it.

    """
    seen: set[Any] = set()
    for bucket in buckets:
        for member in members(bucket):
            key = member if isinstance(member, Hashable) else id(member)  # a callable of the user's
            if key in seen:
                raise ValueError(
                    f"{whose}: the same bucket limits it twice; declare it once: {member!r}"
                )
            seen.add(key)


def _wants_headers(function: Callable[..., Any]) -> bool:
    try:
        parameter = inspect.signature(function).parameters.get("headers")
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    return parameter is not None and parameter.kind is parameter.KEYWORD_ONLY
