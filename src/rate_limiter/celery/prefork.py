"""Prefork pools: the buckets that tasks take from become shared before the pool forks.

Tasks run in the pool's processes there. A bucket in plain memory would be one per process: a limit of
1/s would run at 1/s in each of them.
"""

import logging
from collections.abc import Iterable
from typing import Any

from celery.concurrency.prefork import TaskPool
from celery.exceptions import ImproperlyConfigured

from ..all_of import members
from ..bucket import Bucket
from ..gating.limit import Limit
from ..gating.record import record_of
from ..gating.tally import share_tallies
from ..shared_bucket import is_shared, share
from ..token_bucket import TokenBucket
from . import charge
from .declarations import gates, held_at_gate, limits_of

__all__ = ["is_spawned", "share_all", "share_before_fork"]

logger = logging.getLogger("rate_limiter")


def share_before_fork(worker: Any) -> None:
    """Share what the tasks of a worker's prefork pool take from.

    Raises:
        ImproperlyConfigured: A limit would run at a multiple of its rate.

    """
    if not issubclass(worker.pool_cls, TaskPool):
        return
    app = worker.app
    children = max(worker.concurrency, worker.max_concurrency or 0)
    # A child that takes another's place starts anew: with a full bucket.
    replaced = bool(worker.max_tasks_per_child or worker.max_memory_per_child or worker.time_limit)
    spawned = is_spawned(worker)
    for task in app.tasks.values():
        for limit in limits_of(task):
            if (app in gates and held_at_gate(limit)) or (children == 1 and not replaced):
                continue
            reason = "spawned processes share no memory" if spawned else _not_to_be_shared(limit)
            if reason:
                rate = ""
                if isinstance(limit.bucket, TokenBucket):
                    rate = f" ({children} × {limit.bucket.tokens_per_second:g}/s)"
                cure = "use the threads pool, or `-c 1`" + (
                    " without replacing children" if replaced else ""
                )
                if held_at_gate(limit):
                    cure = f"add `Gate(app)` from rate_limiter.celery, or {cure}"
                raise ImproperlyConfigured(
                    f"`{task.name}`: this bucket would be one per pool process{rate}, for {reason}; "
                    f"{cure}"
                )
    if not spawned:
        share_all(limit for task in app.tasks.values() for limit in limits_of(task))


def is_spawned(worker: Any) -> bool:
    """Whether the worker's pool processes start from nothing (Celery 5.7: worker_pool_start_method)."""
    return getattr(worker, "pool_start_method", "fork") == "spawn"


def share_all(limits: Iterable[Limit]) -> None:
    """Share the buckets of limits, and what is counted, with the processes that will be forked."""
    limits = list(limits)
    charge.confine(limits)
    share_tallies(limits)
    for limit in limits:
        buckets = [limit.bucket] if isinstance(limit.bucket, Bucket) else limit.buckets
        for bucket in buckets:
            for member in members(bucket):
                if isinstance(member, TokenBucket) and not is_shared(member):
                    share(member)
                    logger.info(
                        "Shared with all pool processes: %r of limit %s", member, record_of(limit).name
                    )


def _not_to_be_shared(limit: Limit) -> str:
    if limit.key is not None:
        return "a BucketPerKey cannot be shared between processes"
    if isinstance(limit.bucket, Bucket) or limit.buckets:
        return ""
    return "what a callable returns cannot be shared unless buckets=[…] names it"
