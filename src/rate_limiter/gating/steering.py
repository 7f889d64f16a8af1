"""What an operator sees of a limit, and changes in it while jobs run.

Both gates and the decorator take tokens from the same buckets that are shown and changed here, so a change
counts at once, also for jobs that wait already.
"""

import contextlib
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

from ..all_of import AllOf, members
from ..bucket import is_in_redis
from ..bucket_per_key import BucketPerKey
from ..checks import positive, zero_or_more
from .declared import UNITS, parse_rate
from .limit import Limit
from .record import record_of
from .tally import tally_of, tell

__all__ = ["Order", "buckets_of", "carry_out", "seconds_of", "shown"]


class Order(NamedTuple):
    """What is to change in a limit. ``None`` leaves a thing as it is."""

    #: Tokens per second, or a rate in text: ``"10/m"``.
    rate: float | str | None = None
    #: The most tokens that the bucket can hold.
    capacity: float | str | None = None
    #: Grant nothing for so long: seconds, or text: ``"30s"``, ``"5m"``.
    pause: float | str | None = None
    #: End a pause.
    resume: bool = False
    #: The key whose bucket is meant, in a limit with keys. ``None``: all keys.
    key: str | None = None
    #: Let the numbers of the code count again, where others are stored in Redis.
    restore: bool = False
    #: Why, and who says so. It is shown with the limit.
    reason: str = ""
    who: str = ""


def shown(limit: Limit) -> dict[str, Any]:
    """Return what there is to see of a limit: its buckets, what has happened under it, and its last change.

    All of it can be written as JSON. ``buckets`` has a mapping for each bucket: ``kind``, ``capacity`` and
    ``rate`` (tokens per second); for a `BucketPerKey` the number of its ``keys``; for all others ``tokens``,
    and ``paused``, the seconds until the end of a pause. A worker's share of a rate has ``share_of``, the number
    of workers, and ``whole``, the ``capacity`` and ``rate`` of them all. Of a bucket in Redis it is what this
    process knows: no server is asked. There ``declared`` has the numbers of the code, ``stored`` those that an
    operator has set and that count instead, or ``None``, and ``outage`` whether the server does not answer.
    ``buckets`` is empty where a callable returns the bucket and ``buckets=…`` does not name what it may return.
    """
    return {
        "buckets": [_shown(bucket) for bucket in buckets_of(limit)],
        "when_limited": limit.policy,
        "shadow": limit.shadow,
        **tally_of(limit).snapshot(),
        "changed": record_of(limit).changed,
    }


def carry_out(order: Order, limit: Limit, limits: Iterable[Limit]) -> str:
    """Change a limit.

    Args:
        order: What is to change.
        limit: The limit.
        limits: All limits of the app. Some may take tokens from the same bucket.

    Returns:
        What was changed, in words.

    Raises:
        ValueError: The order cannot be carried out. The message names the argument and the value. Nothing
            was changed.
        TypeError: An argument has the wrong type. Nothing was changed.

    """
    rate = None if order.rate is None else parse_rate(order.rate)
    capacity = None if order.capacity is None else positive("capacity", _capacity(order.capacity))
    pause = None if order.pause is None else seconds_of("pause", order.pause)
    if rate is capacity is pause is None and not order.resume and not order.restore:
        raise ValueError("nothing is to change: give rate, capacity, pause, resume or restore")
    if order.restore and (rate is not None or capacity is not None):
        raise ValueError("restore excludes rate and capacity: it lets the numbers of the code count")
    if pause is not None and order.resume:
        raise ValueError("pause and resume exclude each other")
    meant = _meant(limit, order)
    done = []
    if rate is not None or capacity is not None:
        _check_change(limit, meant, capacity, limits)
        before = _numbers(meant[0])
        for bucket in meant:
            stored = {"reason": order.reason} if is_in_redis(bucket) else {}
            if stored and order.who:
                stored["who"] = order.who
            _do(bucket, "configure", capacity=capacity, tokens_per_second=rate, **stored)
        if rate is not None:
            done.append(f"{rate:g} tokens_per_second (was {before[1]:g})")
        if capacity is not None:
            done.append(f"capacity {capacity:g} (was {before[0]:g})")
        if (share_of := getattr(meant[0], "share_of", 1)) > 1:
            done.append(f"divided by {share_of} workers")
    if order.restore:
        for bucket in meant:
            _do(bucket, "restore")
        numbers = meant[0].capacity, meant[0].tokens_per_second
        done.append("as in the code: {1:g} tokens_per_second, capacity {0:g}".format(*numbers))
    if pause is not None:
        for bucket in meant:
            bucket.pause(pause)
        left = max(getattr(each, "pause_left", pause) for bucket in meant for each in _parts(bucket))
        longer = f" (an earlier pause ends in {left:.3g} s)" if left > pause else ""
        done.append(f"paused for {pause:g} s{longer}")
    if order.resume:
        for bucket in meant:
            for member in _parts(bucket):
                member.resume()
        done.append("resumed")
    what = ", ".join(done) + ("" if order.key is None else f", for key {order.key}")
    at = datetime.now(UTC).isoformat(timespec="seconds")
    record_of(limit).changed = {"at": at, "what": what, "reason": order.reason, "who": order.who}
    tell("changed", limit, what, order.reason)
    return what


def seconds_of(argument: str, value: float | str) -> float:
    """Return the seconds that a number, or text such as ``"30"``, ``"30s"``, ``"5m"``, ``"2h"`` says.

    Raises:
        ValueError: It says no number of seconds of 0 or more. The message names the argument.
        TypeError: It is neither a number nor text.

    """
    if not isinstance(value, str):
        return zero_or_more(argument, value)
    text = value.strip()
    number, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = math.nan
    if not 0.0 <= seconds < math.inf:
        raise ValueError(f"{argument} must be seconds, or text as '30s', '5m', '2h', not {value!r}")
    return seconds


def buckets_of(limit: Limit) -> Sequence[Any]:
    """Return the buckets that a limit takes from, as far as known without a job; of an `AllOf` each."""
    if limit.has_bucket or isinstance(limit.bucket, BucketPerKey):
        return _parts(limit.bucket)
    return limit.buckets


def _parts(bucket: Any) -> list[Any]:
    """Return the buckets of an `AllOf`, however nested, or the bucket itself."""
    return list(members(bucket))


def _shown(bucket: Any) -> dict[str, Any]:
    numbers = {
        "kind": type(bucket).__name__,
        "capacity": bucket.capacity,
        "rate": bucket.tokens_per_second,
    }
    of_all = getattr(bucket, "of_all", bucket)
    if is_in_redis(bucket):
        known = of_all.known
        declared = dict(zip(("capacity", "rate"), known.declared, strict=True))
        stored = None
        if set_by := known.stored:
            stored = {"capacity": set_by.capacity, "rate": set_by.tokens_per_second, "at": set_by.at}
            stored |= {"reason": set_by.reason, "who": set_by.who}
        numbers |= {"declared": declared, "stored": stored, "outage": known.is_outage}
        if of_all is bucket:
            return numbers | {"tokens": known.tokens, "paused": known.pause_left}
    if isinstance(bucket, BucketPerKey):
        return numbers | {"keys": len(bucket)}
    if share_of := getattr(bucket, "share_of", None):
        capacity, rate = _numbers(bucket)
        numbers |= {"share_of": share_of, "whole": {"capacity": capacity, "rate": rate}}
    return numbers | {"tokens": bucket.tokens, "paused": getattr(bucket, "pause_left", 0.0)}


def _numbers(bucket: Any) -> tuple[float, float]:
    """Return the capacity and the rate as an order changes them: for all workers, of one that is divided."""
    whole: tuple[float, float] = getattr(bucket, "whole", (bucket.capacity, bucket.tokens_per_second))
    return whole


def _meant(limit: Limit, order: Order) -> list[Any]:
    """Return what an order is for: the bucket, the `AllOf`, the `BucketPerKey`, or the buckets of a key."""
    whose = f"limit {record_of(limit).name}"
    bucket: Any = limit.bucket
    if order.restore and not is_in_redis(bucket):
        raise ValueError(f"{whose} has no stored numbers: {bucket!r} is not in Redis")
    if isinstance(bucket, BucketPerKey):
        if order.key is not None:
            return _of_key(bucket, order.key, whose)
        if order.pause is not None or order.resume:
            raise ValueError(f"{whose} has a bucket for each key: give the key to pause or to resume")
        return [bucket]
    if order.key is not None:
        raise ValueError(f"{whose} has no keys, so key={order.key!r} means nothing")
    if not limit.has_bucket:
        if len(limit.buckets) != 1:
            raise ValueError(f"{whose} has no bucket of its own: a callable picks one for each job")
        bucket = limit.buckets[0]
    if order.resume and not all(hasattr(member, "resume") for member in _parts(bucket)):
        raise ValueError(f"{whose}: a pause of {bucket!r} cannot be ended")
    return [bucket]


def _of_key(buckets: BucketPerKey, text: str, whose: str) -> list[Any]:
    """Return the buckets of the key that is meant: here it is text, but it may be a number or a UUID.

    A key that came up before may have no bucket now: full buckets are forgotten. So all keys that are
    written like this get one.
    """
    keys: list[Any] = [key for key in buckets if str(key) == text]
    if not keys:
        keys = [text]
        for kind in int, UUID:
            with contextlib.suppress(ValueError):
                if str(key := kind(text)) == text:
                    keys.append(key)
    try:
        found = [buckets[key] for key in keys]
    except Exception as error:
        raise ValueError(f"{whose}, key {text!r}: {error!r}") from error
    if not all(buckets.is_alone(key) for key in keys):
        raise ValueError(f"{whose} has no bucket for key {text!r} alone: it is at max_keys")
    return found


def _check_change(
    limit: Limit, meant: list[Any], capacity: float | None, limits: Iterable[Limit]
) -> None:
    """Refuse what no bucket could do, and a capacity below what a job is declared to cost."""
    name = record_of(limit).name
    if isinstance(meant[0], AllOf):
        raise ValueError(
            f"limit {name} takes from several buckets at once: rate and capacity are those of one bucket, "
            "so change a limit that has that bucket alone"
        )
    for each in limits:
        shares = any(one is other for one in buckets_of(each) for other in buckets_of(limit))
        if shares and capacity is not None and each.cost is not None and each.cost > capacity:
            raise ValueError(
                f"capacity {capacity:g} is below the {each.cost:g} tokens that a job of limit "
                f"{record_of(each).name} costs"
            )


def _do(bucket: Any, what: str, **arguments: Any) -> None:
    """Have a bucket do something that may fail."""
    try:
        getattr(bucket, what)(**arguments)
    except Exception as error:  # a server that does not answer; or of a bucket of the user's
        raise ValueError(f"{bucket!r} could not be changed: {error!r}") from error


def _capacity(value: float | str) -> float:
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"capacity must be a number of tokens, not {value!r}") from None
