"""Prefork pools: before the pool forks, the buckets that its tasks take from move to shared memory.

Tasks run in the processes of the pool. In plain memory each process would have a bucket of its own, and a
limit of 1/s would run at 1/s in each process.
"""

import gc
import logging
from collections.abc import Iterable
from typing import Any, Final

from celery.concurrency.prefork import TaskPool
from celery.exceptions import ImproperlyConfigured

from ..all_of import members
from ..bucket import Bucket, is_in_redis
from ..bucket_per_key import BucketPerKey
from ..gating.limit import Limit
from ..gating.record import record_of
from ..gating.tally import share_tallies
from ..shared_bucket import is_shared, share
from ..token_bucket import TokenBucket
from . import charge
from .declarations import gates, held_at_gate, limits_of

__all__ = ["is_spawned", "share_all", "share_before_fork", "share_the_rest", "why_not_shared"]

logger = logging.getLogger("rate_limiter")

#: The most buckets that are shared because they exist. Each takes a file descriptor and 8 kB.
_MOST: Final = 200


def share_before_fork(worker: Any) -> None:
    """Share the buckets from which the tasks of a worker's prefork pool take tokens.

    Raises:
        ImproperlyConfigured: A limit would run at a multiple of its rate.

    """
    if not issubclass(worker.pool_cls, TaskPool):
        return
    app = worker.app
    children = _children(worker)
    replaced = _are_replaced(worker)
    spawned = is_spawned(worker)
    for task in app.tasks.values():
        for limit in limits_of(task):
            if (app in gates and held_at_gate(limit)) or (children == 1 and not replaced):
                continue
            reason = "spawned processes share no memory" if spawned else why_not_shared(limit)
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
    if app not in gates:  # else the gate's step does it, which knows all limits
        share_the_rest(worker, [limit for task in app.tasks.values() for limit in limits_of(task)])


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


def share_the_rest(worker: Any, limits: Iterable[Limit]) -> None:
    """Share the buckets that no limit of a task names, or warn where that cannot be.

    A task may call ``bucket.wait()``, or a function that is throttled and no task.

    Args:
        worker: Celery's worker, with a prefork pool that has not forked.
        limits: All limits of its tasks and its gate.

    """
    if _children(worker) == 1 and not _are_replaced(worker):
        return
    named: list[Any] = []
    calls = False  # whether a callable may return a bucket that nothing else names
    for limit in limits:
        named += limit.buckets or [limit.bucket]
        calls = calls or not (limit.buckets or isinstance(limit.bucket, Bucket | BucketPerKey))
    per_key, rest = _existing_buckets()
    known = {id(member) for bucket in named for member in members(bucket)}
    per_key = [each for each in per_key if id(each) not in known]
    rest = [bucket for bucket in rest if id(bucket) not in known and not is_shared(bucket)]
    alone: list[Any] = [] if calls else list(per_key)
    if is_spawned(worker) or len(rest) > _MOST:
        alone += [] if calls else rest
    else:
        for bucket in rest:
            share(bucket)
        if rest:
            logger.info(
                "Shared with all pool processes: %d buckets that no limit of a task names", len(rest)
            )
    if alone:
        logger.warning(
            "No limit of a task names %r%s, so each of the %d pool processes has its own, with the whole "
            "rate: throttle the tasks themselves, or use the threads pool",
            alone[0],
            f" and {len(alone) - 1} other buckets" if len(alone) > 1 else "",
            _children(worker),
        )


def _existing_buckets() -> tuple[list[BucketPerKey], list[TokenBucket]]:
    """Return the buckets of this process: those per key, and those that are not one of these's."""
    per_key, single = [], []
    gc.collect()  # what nothing refers to is no bucket of a task
    for each in gc.get_objects():
        kind = type(each)  # isinstance would wake Celery's proxies
        if issubclass(kind, TokenBucket):
            single.append(each)
        elif issubclass(kind, BucketPerKey) and not each.in_redis:
            per_key.append(each)
    of_keys = {id(bucket) for each in per_key for bucket in each.buckets()}
    return per_key, [bucket for bucket in single if id(bucket) not in of_keys]


def _children(worker: Any) -> int:
    """Return how many pool processes a worker has at most."""
    return int(max(worker.concurrency, worker.max_concurrency or 0))


def _are_replaced(worker: Any) -> bool:
    """Tell whether pool processes take another's place.

    What the other one took is forgotten: a forked process starts with the level of the main process, a
    spawned one with a new bucket.
    """
    return bool(worker.max_tasks_per_child or worker.max_memory_per_child or worker.time_limit)


def why_not_shared(limit: Limit) -> str:
    """Return why the bucket of a limit cannot be shared between processes, or ``""`` if it can."""
    if is_in_redis(limit.bucket):
        return ""
    if limit.key is not None:
        return "a BucketPerKey cannot be shared between processes"
    if isinstance(limit.bucket, Bucket) or limit.buckets:
        return ""
    return "what a callable returns cannot be shared unless buckets=[…] names it"
