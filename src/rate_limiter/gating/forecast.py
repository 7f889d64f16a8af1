"""When each held job will go, if nothing changes and no job comes before it."""

from collections.abc import Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from .holding import Held
from .limit import Limit, rate_here

__all__ = ["Forecast", "forecasts"]

Job = TypeVar("Job")


class Forecast(NamedTuple, Generic[Job]):
    """The forecast of one held job."""

    held: Held[Job]
    #: How many held jobs take from the same bucket before it.
    before: int
    #: The limit whose bucket serves it last.
    limit: Limit
    #: The seconds until it goes.
    seconds: float


def forecasts(jobs: Iterable[Held[Job]]) -> Iterator[Forecast[Job]]:
    """Return a forecast for each job.

    It plays the future through: each job, by arrival, goes when all its buckets have its tokens, and takes
    them then. Of a bucket in Redis this process has its share of the rate: the others have jobs too, as far as
    is known here. Slots of the pool that are busy are not in it.

    Args:
        jobs: All jobs that are held.

    """
    full_at: dict[Any, float] = {}  # for each bucket, in so many seconds it is full
    before: dict[Any, int] = {}
    for held in sorted(jobs, key=lambda held: held.arrival):
        moment, last, number = 0.0, held.limit, 0
        demands = [demand for demand in held.demands if not demand.limit.shadow]
        for bucket, tokens, limit in demands:
            rate = rate_here(bucket)
            if bucket not in full_at:
                missing = bucket.capacity - bucket.tokens
                paused = getattr(bucket, "pause_left", 0.0)
                full_at[bucket] = paused + missing / rate
            spare = (bucket.capacity - tokens) / rate
            if full_at[bucket] - spare > moment:
                moment, last = full_at[bucket] - spare, limit
            number = max(number, before.get(bucket, 0))
        for bucket, tokens, _ in demands:
            full_at[bucket] = max(full_at[bucket], moment) + tokens / rate_here(bucket)
            before[bucket] = before.get(bucket, 0) + 1
        yield Forecast(held, number, last, moment)
