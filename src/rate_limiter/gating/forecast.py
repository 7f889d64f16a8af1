"""The forecast: when each held job will go, if nothing changes and no job comes before it."""

from collections.abc import Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from .held import Held
from .limit import Limit, rate_here, seconds_until

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
    them then. The rate of a bucket in Redis is divided by the number of workers, as if all of them had jobs. That a
    job may have to wait for a slot of the pool too is not in it.

    Args:
        jobs: All jobs that are held.

    """
    full_at: dict[Any, float] = {}  # in how many seconds each bucket is full
    before: dict[Any, int] = {}
    for held in sorted(jobs, key=lambda held: held.arrival):
        moment, last, number = 0.0, held.limit, 0
        demands = [demand for demand in held.demands if not demand.limit.shadow]
        for bucket, tokens, limit in demands:
            rate = rate_here(bucket)
            if bucket not in full_at:
                full_at[bucket] = seconds_until(bucket, bucket.capacity)
            spare = (bucket.capacity - tokens) / rate
            if full_at[bucket] - spare > moment:
                moment, last = full_at[bucket] - spare, limit
            number = max(number, before.get(bucket, 0))
        for bucket, tokens, _ in demands:
            full_at[bucket] = max(full_at[bucket], moment) + tokens / rate_here(bucket)
            before[bucket] = before.get(bucket, 0) + 1
        yield Forecast(held, number, last, moment)
