"""Which limits can be parked: checked where a worker starts, and by ``celery limits check``."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Final

from celery.exceptions import ImproperlyConfigured

from ..gating.declared import Declared
from ..gating.limit import Limit
from ..gating.record import record_of

__all__ = ["parked_limits", "why_not"]

logger = logging.getLogger("rate_limiter")

#: A limit of more jobs per second holds: it would run no faster than its jobs are moved.
_MOST_PER_SECOND: Final = 100.0


def why_not(limit: Limit, declared: Declared | None, broker: str) -> str | None:
    """Return why the jobs of a limit cannot be parked. ``None``: they can.

    Args:
        limit: The limit.
        declared: What it is for, if that was declared by name or queue.
        broker: kombu's ``driver_type`` of the broker.

    """
    if broker not in ("redis", "amqp"):
        return f"only Redis and RabbitMQ can park jobs, and the broker is {broker}"
    if not limit.has_bucket:
        return "its bucket depends on the job"
    if limit.shadow:
        return "a shadow makes no job wait"
    if not limit.patience:
        return f"its jobs do not wait: when_limited is {limit.when_limited!r}"
    if limit.patience < math.inf:
        return "max_wait does not count the time in the broker"
    if (rate := limit.jobs_per_second) > _MOST_PER_SECOND:
        return (
            f"it lets {rate:g} jobs go in a second, and more than {_MOST_PER_SECOND:g} cannot be moved"
        )
    if declared is not None and (set(declared.patterns) in (set(), {"*"})):
        return "its queue carries only this limit, so nobody waits behind its jobs: overflow='pause' is for that"
    return None


def parked_limits(
    limits: Iterable[Limit], declared: Mapping[Limit, Declared], broker: str, *, by_default: bool
) -> list[Limit]:
    """Return the limits whose jobs are parked. Log which of the others were meant, and why they are not.

    Args:
        limits: All limits.
        declared: What they are for, of those that were declared by name or queue.
        broker: kombu's ``driver_type`` of the broker.
        by_default: Whether limits without ``overflow`` are meant.

    Raises:
        ImproperlyConfigured: ``overflow="park"`` was written on a limit that cannot.

    """
    found = []
    for limit in limits:
        if limit.overflow != "park" and not (by_default and limit.overflow is None):
            continue
        reason = why_not(limit, declared.get(limit), broker)
        if reason is None:
            found.append(limit)
        elif limit.overflow == "park":
            raise ImproperlyConfigured(
                f"limit {record_of(limit).name}: overflow must be 'hold' or 'pause', not 'park': {reason}"
            )
        else:
            logger.info("Limit %s: its jobs are held, not parked: %s", record_of(limit).name, reason)
    return found
