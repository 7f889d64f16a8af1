"""Declaring limits: all checks of a declaration, the jobs that a limit is for, and its name.

A limit is declared with `throttle`, with ``Gate.limit`` of either gate, in the settings, or as an attribute of
a task. All of them come here, so a wrong declaration gets the same error wherever it stands.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

from ..all_of import members
from ..bucket import Bucket, is_in_redis
from ..bucket_per_key import BucketPerKey
from ..checks import positive, whole, zero_or_more
from ..token_bucket import TokenBucket
from .limit import Limit
from .parameters import Parameters
from .record import record_of

__all__ = [
    "UNITS",
    "Declarations",
    "Declared",
    "Names",
    "check_options",
    "check_parameters",
    "new_limit",
    "parse_rate",
]

POLICIES: Final = ("wait", "retry", "drop", "raise")
OVERFLOWS: Final = ("hold", "pause", "park")

#: The units of a rate, in seconds.
UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}

#: The default burst, in seconds: as many tokens as the rate gives in that time. A worker that wakes up late
#: needs them to keep the rate.
_BURST_SECONDS: Final = 0.1

#: The value of ``bucket`` where `new_limit` has to make a bucket for the rate.
_AT_RATE: Final = object()

#: The limits that take from a bucket.
_limits_of: Final[WeakKeyDictionary[Any, WeakSet[Limit]]] = WeakKeyDictionary()


# -- one limit ----------------------------------------------------------------------------------------


def new_limit(
    bucket: Any = _AT_RATE,
    *,
    rate: Any = None,
    burst: Any = None,
    initial: Any = None,
    tokens: Any = 1,
    key: Any = None,
    limits: Any = None,
    buckets: Iterable[Any] = (),
    when_limited: Any = "wait",
    timeout: Any = None,
    max_wait: Any = None,
    shadow: Any = False,
    name: Any = None,
    max_held: Any = None,
    overflow: Any = None,
    fallback: bool = False,
) -> Limit:
    """Check a declaration, and make the limit.

    Args:
        bucket: A `Bucket`, a `BucketPerKey`, a callable that returns one; or a rate in text. Text makes a
            `TokenBucket`, or with ``key`` a `BucketPerKey`.
        rate: A rate instead of a bucket: a number of tokens per second, or text such as ``"100/m"``.
        burst: The capacity, with a rate. By default a tenth of a second's worth, at least 1, and at least
            what a job costs.
        initial: The tokens that the bucket starts with, with a rate. By default it starts full.
        tokens: See `Limit`.
        key: See `Limit`.
        limits: With a rate and a key, other rates for some keys: a mapping from a key to its rate, or to a
            mapping with ``rate`` and ``burst``. Or a callable as in `BucketPerKey`.
        buckets: See `Limit`.
        when_limited: See `Limit`.
        timeout: See `Limit`.
        max_wait: See `Limit`.
        shadow: See `Limit`.
        name: See `Limit`. ``None``: the limit gets a derived name.
        max_held: See `Limit`.
        overflow: See `Limit`.
        fallback: Whether ``when_limited`` may be a callable.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has an impossible value, such as a cost above the capacity.

    """
    _check_text("name", name)
    _check_policy(when_limited, timeout, fallback)
    if not isinstance(shadow, bool):
        raise TypeError(f"shadow must be True or False, not {shadow!r}")
    if max_wait is not None:
        max_wait = zero_or_more("max_wait", max_wait)
        if timeout is not None:
            raise ValueError(
                "timeout and max_wait exclude each other: timeout is for the decorator alone"
            )
    if max_held is not None:
        whole("max_held", max_held)
    if overflow is not None and overflow not in OVERFLOWS:
        raise ValueError(f"overflow must be one of {_quoted(OVERFLOWS)}, not {overflow!r}")
    if not callable(tokens) and not _is_name(tokens):
        if isinstance(tokens, str):
            raise TypeError(
                "tokens must be a number above 0, the name of a parameter, or a callable that is given "
                f"the job's arguments, not {tokens!r}"
            )
        positive("tokens", tokens)
    if key is not None and not callable(key) and not _is_name(key):
        raise TypeError(
            "key must be the name of a parameter, or a callable that is given the job's arguments, not "
            f"{key!r}"
        )
    if isinstance(bucket, str):
        bucket, rate = _AT_RATE, bucket
    if bucket is _AT_RATE:
        bucket = _at_rate(rate, burst, initial, tokens, key, limits)
    elif burst is not None:
        raise ValueError(f"burst goes with a rate such as '100/m': {bucket!r} has its own capacity")
    elif initial is not None:
        raise ValueError(f"initial goes with a rate such as '100/m': {bucket!r} has its own tokens")
    buckets = _check_buckets(bucket, key, buckets)
    if not _depends_on_job(tokens):
        _check_cost(tokens, bucket)
    limit = Limit(
        bucket,
        tokens=tokens,
        key=key,
        buckets=buckets,
        when_limited=when_limited,
        timeout=timeout,
        max_wait=max_wait,
        shadow=shadow,
        name=name or "",
        max_held=max_held,
        overflow=overflow,
    )
    _refuse_shadow_of_others(limit)
    return limit


def check_parameters(limit: Limit, function: Callable[..., Any] | Parameters, whose: str) -> None:
    """Check that a task has the parameters that a limit names.

    Args:
        limit: The limit.
        function: The task's function as its callers see it, so without ``self``; or its parameters.
        whose: What to call the task in errors.

    Raises:
        ValueError: The task has no parameter of that name, and no ``**kwargs``.

    """
    if not limit.parameter_names:
        return
    parameters = function if isinstance(function, Parameters) else Parameters(function)
    for argument, name in limit.parameter_names:
        if name not in parameters.names and not parameters.any_keyword:
            known = ", ".join(parameters.names) or "it has none"
            raise ValueError(
                f"{argument} must be the name of a parameter, not {name!r}: the parameters of {whose} are "
                f"{known}"
            )


def _refuse_shadow_of_others(limit: Limit) -> None:
    """Refuse a shadow's bucket that others take from: its debt would make real jobs wait."""
    for named in (limit.bucket, *limit.buckets):
        for bucket in members(named):  # type: ignore[arg-type] # a callable is its own only member
            if limit.shadow and is_in_redis(bucket):
                raise ValueError(f"shadow is for a bucket in this process, not for {bucket!r}")
            with contextlib.suppress(TypeError):  # it cannot be referenced weakly
                others = _limits_of.setdefault(bucket, WeakSet())
                if any(other.shadow is not limit.shadow for other in others):
                    raise ValueError(
                        f"shadow must be the same for all limits of one bucket: {bucket!r} limits others "
                        f"with shadow={not limit.shadow}; give this limit a bucket of its own"
                    )
                others.add(limit)


def _at_rate(
    rate: Any, burst: Any, initial: Any, tokens: Any, key: Any, limits: Any
) -> TokenBucket | BucketPerKey:
    per_second = parse_rate(rate)
    capacity = _burst(burst, per_second, tokens)
    if key is None:
        if limits is not None:
            raise ValueError("limits goes with key: it lists other rates for some keys")
        return TokenBucket(capacity, per_second, initial=initial)
    if limits is None or callable(limits):
        return BucketPerKey(capacity, per_second, initial=initial, limits=limits)
    if not isinstance(limits, Mapping):
        raise TypeError(f"limits must map keys to rates, not be {limits!r}")
    rates = {each: _capacity_and_rate(each, value, tokens) for each, value in limits.items()}
    return BucketPerKey(capacity, per_second, initial=initial, limits=rates.get)


def _capacity_and_rate(key: Any, value: Any, tokens: Any) -> tuple[float, float]:
    options = value if isinstance(value, Mapping) else {"rate": value}
    try:
        check_options(options, ("rate", "burst"))
        per_second = parse_rate(options.get("rate"))
        capacity = _burst(options.get("burst"), per_second, tokens)
        if not _depends_on_job(tokens):
            _check_cost(tokens, TokenBucket(capacity, per_second))
    except (TypeError, ValueError) as error:
        raise type(error)(f"limits[{key!r}]: {error}") from None
    return capacity, per_second


def parse_rate(rate: Any) -> float:
    """Return the tokens per second of ``"100/m"``, ``"5"`` or 5.

    Raises:
        ValueError: It is no rate, or not above 0.

    """
    number = math.nan
    try:
        if isinstance(rate, str):
            count, slash, unit = rate.partition("/")
            number = float(count) / UNITS[unit.strip() if slash else "s"]
        elif isinstance(rate, Real) and not isinstance(rate, bool):
            number = float(rate)
    except (KeyError, ValueError, OverflowError):
        pass
    if not 0 < number < math.inf:
        raise ValueError(
            "rate must be a number above 0, per second or with a unit (s, m, h or d) as in '100/m', not "
            f"{rate!r}"
        )
    return number


def _burst(burst: Any, per_second: float, tokens: Any) -> float:
    if burst is not None:
        return positive("burst", burst)
    if _depends_on_job(tokens):
        raise ValueError(
            "burst is missing: the cost depends on the job, so burst must say how much a job may cost at most"
        )
    return max(1.0, per_second * _BURST_SECONDS, positive("tokens", tokens))


def _check_buckets(bucket: Any, key: Any, buckets: Iterable[Any]) -> tuple[Bucket, ...]:
    is_bucket = isinstance(bucket, Bucket)
    if isinstance(bucket, type) or not (
        is_bucket or isinstance(bucket, BucketPerKey) or callable(bucket)
    ):
        raise TypeError(
            "bucket must be a bucket such as TokenBucket(capacity=10, tokens_per_second=5), a rate such as "
            f"'100/m', or a callable that returns a bucket, not {bucket!r}"
        )
    if key is None and isinstance(bucket, BucketPerKey):
        raise ValueError(f"key is missing: it says which bucket of {bucket!r} a job takes from")
    if key is not None and is_bucket:
        raise ValueError(f"key goes with a BucketPerKey, not with {bucket!r}")
    buckets = tuple(buckets)
    for each in buckets:
        if not isinstance(each, Bucket):
            raise TypeError(f"buckets must be buckets, not {each!r}")
    if buckets and (is_bucket or isinstance(bucket, BucketPerKey)):
        raise ValueError(
            "buckets goes with a callable for bucket: it lists the buckets that the callable may return"
        )
    return buckets


def _check_cost(tokens: float, bucket: Any) -> None:
    most = math.inf
    if isinstance(bucket, Bucket) or (isinstance(bucket, BucketPerKey) and not bucket.limits):
        most = bucket.capacity
    if positive("tokens", tokens) > most:
        raise ValueError(
            f"tokens must be at most the bucket's capacity {most:g}, not {tokens!r}: "
            "such a job could never run"
        )


def _check_policy(when_limited: Any, timeout: Any, fallback: bool) -> None:
    if callable(when_limited):
        if not fallback:
            raise ValueError(
                f"when_limited may be a callable in @throttle only, not {when_limited!r} here; expected "
                f"one of {_quoted(POLICIES)}"
            )
    elif when_limited not in POLICIES:
        raise ValueError(
            f"when_limited must be one of {_quoted(POLICIES)} or a callable, not {when_limited!r}"
        )
    if timeout is not None:
        if when_limited != "wait":
            raise ValueError(f"timeout goes with when_limited='wait', not {when_limited!r}")
        if timeout != 0:
            positive("timeout", timeout)


def check_options(options: Mapping[Any, Any], known: Iterable[str]) -> None:
    """Refuse an unknown option.

    Raises:
        ValueError: An option is unknown. The message names it, and all known options.

    """
    known = sorted(known)
    unknown = sorted(str(option) for option in options if option not in known)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; expected {', '.join(known)}")


def _check_text(argument: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{argument} must be text, not {value!r}")
    if value == "":
        raise ValueError(f"{argument} must be text, not ''")


def _depends_on_job(tokens: Any) -> bool:
    return callable(tokens) or isinstance(tokens, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(map(repr, words))


# -- their names -------------------------------------------------------------------------------------


class Names:
    """The names of the limits of one app. No two limits have the same name."""

    def __init__(self) -> None:
        self._limits: dict[str, Limit] = {}

    def add(self, limit: Limit, derived: str) -> None:
        """Give a limit its name: the one that the user gave, or else a derived one.

        Args:
            limit: The limit.
            derived: The derived name. If another limit has it already, it gets a number: ``"jobs.* (2)"``.

        Raises:
            ValueError: The user gave another limit the same name.

        """
        record = record_of(limit)
        if self._limits.get(record.name) is limit:
            return
        if not limit.name:
            self._limits[self._free(record.name or derived)] = limit
            record.name = next(reversed(self._limits))
            return
        other = self._limits.get(limit.name)
        if other is not None and other.name:
            raise ValueError(
                f"name must be different for each limit: {limit.name!r} is the name of two, {limit.bucket!r} "
                f"and {other.bucket!r}"
            )
        self._limits[limit.name] = limit
        if other is not None:  # it only has a derived name, so it gets another one
            record_of(other).name = self._free(limit.name)
            self._limits[record_of(other).name] = other

    def get(self, name: str) -> Limit | None:
        """Return the limit of a name, if there is one."""
        return self._limits.get(name)

    def _free(self, name: str) -> str:
        free, count = name, 1
        while free in self._limits:
            count += 1
            free = f"{name} ({count})"
        return free


# -- the jobs that they are for -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Declared:
    """A limit, and the jobs that it is for.

    Args:
        limit: The limit.
        patterns: The names of its tasks, or shell patterns for them; in the gate for kombu, of its queues.
            Empty: all tasks, or all queues.
        queue: The queue that its jobs come from. ``None``: any queue.

    """

    limit: Limit
    patterns: tuple[str, ...] = ()
    queue: str | None = None

    def covers(self, name: str) -> bool:
        """Whether the limit is for tasks of that name, in at least one queue."""
        return not self.patterns or any(fnmatchcase(name, pattern) for pattern in self.patterns)


class Declarations:
    """The limits that are declared by name or queue, in the order of their declaration.

    Args:
        noun: What the patterns name: ``"tasks"`` or ``"queues"``.
        reserved: The prefix of names that cannot be limited.
        names: The names of the limits.

    The time to find the limits of a job does not grow with the number of limits for exact names. It grows
    with the number of patterns, which are tried one by one.

    """

    def __init__(self, noun: str, *, reserved: str | None = None, names: Names | None = None) -> None:
        self._noun = noun
        self._reserved = reserved
        self._names = names if names is not None else Names()
        self._all: list[Declared] = []
        #: Positions in that list: of limits for an exact name, of limits for all tasks of a queue, of others.
        self._by_name: dict[str, list[int]] = {}
        self._by_queue: dict[str, list[int]] = {}
        self._others: list[int] = []

    def __iter__(self) -> Iterator[Declared]:
        return iter(self._all)

    def add(self, patterns: Iterable[Any], limit: Limit, queue: Any = None) -> None:
        """Declare which jobs a limit is for.

        Args:
            patterns: See `Declared`.
            limit: The limit.
            queue: See `Declared`.

        Raises:
            TypeError: A pattern or the queue is no text.
            ValueError: A pattern or the queue is empty, a pattern is reserved, or another limit has the name.

        """
        patterns = tuple(patterns)
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{self._noun} must be names or patterns, not {pattern!r}")
            if not pattern:
                raise ValueError(f"{self._noun} must be names or patterns, not ''")
            if self._reserved and pattern.startswith(self._reserved):
                raise ValueError(f"{self._noun} must not be Celery's own, as {pattern!r} is")
        _check_text("queue", queue)
        derived = ", ".join(patterns)
        if queue:
            derived = f"{derived} in queue {queue}" if derived else f"queue {queue}"
        self._names.add(limit, derived or f"all {self._noun}")
        position = len(self._all)
        self._all.append(Declared(limit, patterns, queue))
        if patterns and not any(set(pattern) & set("*?[") for pattern in patterns):
            for pattern in set(patterns):
                self._by_name.setdefault(pattern, []).append(position)
        elif queue and not patterns:
            self._by_queue.setdefault(queue, []).append(position)
        else:
            self._others.append(position)

    def of(self, name: str, queue: str | None = None) -> list[Limit]:
        """Return the limits of a job.

        Args:
            name: The name of its task; in the gate for kombu, of its queue.
            queue: The queue that it came from.

        """
        found = self._for_name(name)
        if queue is not None:
            found += self._by_queue.get(queue, ())
        declared = [self._all[position] for position in sorted(found)]
        return [each.limit for each in declared if each.queue in (None, queue)]

    def queues_of(self, name: str) -> set[str]:
        """Return the queues in which tasks of that name have further limits."""
        found = {self._all[position].queue for position in self._for_name(name)}
        return {queue for queue in found if queue is not None} | set(self._by_queue)

    def _for_name(self, name: str) -> list[int]:
        others = [position for position in self._others if self._all[position].covers(name)]
        return [*self._by_name.get(name, ()), *others]
