"""Prefork pools: before the pool forks, the buckets that its tasks take from move to shared memory.

Tasks run in the processes of the pool. In plain memory each process would have a bucket of its own, and a
limit of 1/s would run at 1/s in each process.
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
    """Share the buckets from which the tasks of a worker's prefork pool take tokens.

    Raises:
        ImproperlyConfigured: A limit would run at a multiple of its rate.

    """
    if not issubclass(worker.pool_cls, TaskPool):
        return
    app = worker.app
    children = max(worker.concurrency, worker.max_concurrency or 0)
    # A pool process that replaces another one would start with a full bucket.
    replaced = bool(worker.max_tasks_per_child or worker.max_memory_per_child or worker.time_limit)
    spawned = is_spawned(worker)
    for task in app.tasks.values():
        for limit in limits_of(task):
            if (app in gates and held_at_gate(limit)) or (children == 1 and not replaced):
                continue
            reason = "spawned processes share no memory" if spawned else _why_not_shared(limit)
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
    """Whether the worker's pool processes are spawned, not forked (Celery 5.7: worker_pool_start_method)."""
    return getattr(worker, "pool_start_method", "fork") == "spawn"


def share_all(limits: Iterable[Limit]) -> None:
    """Share the buckets of limits, and their tallies, with processes that are forked later."""
    limits = list(limits)
    charge.note_pool_processes(limits)
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


def _why_not_shared(limit: Limit) -> str:
    """Return why the bucket of a limit cannot be shared between processes, or ``""`` if it can."""
    if limit.key is not None:
        return "a BucketPerKey cannot be shared between processes"
    if isinstance(limit.bucket, Bucket) or limit.buckets:
        return ""
    return "what a callable returns cannot be shared unless buckets=[…] names it"
