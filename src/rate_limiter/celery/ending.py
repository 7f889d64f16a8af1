"""How a refused job ends, at the gate and in the task.

At the gate the job is a ``celery.worker.request.Request`` in the worker's main process, and Celery's own
methods end it. In the task the job is a ``celery.Task`` in the pool and ends with ``Ignore``, which stores
no result. So the result is stored here first: without it ``get()`` and a chord would wait for ever.
"""

import logging
from collections.abc import Callable
from typing import Any, Final, NoReturn

from celery import Task, signals
from celery.exceptions import Ignore, TaskRevokedError

from ..exceptions import RateLimitExceeded, RetryAfter
from ..gating.limit import Demand
from ..gating.record import record_of
from .returning import has_queue, publish_again

__all__ = ["postpone", "refuse_at_gate", "refuse_in_task"]

#: The header that counts how often `RetryAfter` has paused a job, and the most often that it may.
_PAUSES: Final = "rate_limiter_pauses"
_MOST_PAUSES: Final = 10

logger = logging.getLogger("rate_limiter")


def refuse_at_gate(
    request: Any,
    demand: Demand,
    delay: float,
    send_back: Callable[[Any, float], None],
    longest: float,
) -> None:
    """End a job as revoked (``"drop"``), or send it back to the broker (``"retry"``).

    Args:
        request: The ``celery.worker.request.Request``.
        demand: The bucket that has too few tokens, the tokens that the job costs, and the limit.
        delay: The seconds until the bucket has them.
        send_back: It is called with the request and the seconds until the job comes again.
        longest: The most seconds until then.

    """
    bucket, tokens, limit = demand
    reason = f"rate limit exceeded: {record_of(limit).name or request.type}"
    if limit.when_limited == "drop":
        request._announce_revoked(reason, False, None, False)
        logger.info("Dropped %s[%s]: %s", request.name, request.id, reason)
    else:
        send_back(request, record_of(limit).next_return(bucket, tokens, delay, longest))


def refuse_in_task(demand: Demand, delay: float, name: str, job: Task | None) -> NoReturn:
    """End a job within its task, or send it back to the broker, as the limit's ``when_limited`` says.

    Args:
        demand: The bucket that has too few tokens, the tokens that the job costs, and the limit.
        delay: The seconds until the bucket has them.
        name: The name of the limit, for the error and the log.
        job: The task; ``None`` for a nested call, which ends with an exception for its caller.

    Raises:
        RateLimitExceeded: Under ``"raise"``; under ``"retry"`` in a nested or eager call.
        TaskRevokedError: Under ``"drop"`` in a nested or eager call.
        Ignore: In all other cases: the job has ended, or was sent back.

    """
    bucket, tokens, limit = demand
    reason = f"rate limit exceeded: {name}"
    if limit.when_limited == "raise":
        raise RateLimitExceeded(reason, delay)
    if limit.when_limited == "drop":
        if job is None or job.request.is_eager:
            raise TaskRevokedError(reason)
        _drop(job, reason)
    else:
        if job is None or job.request.is_eager:
            raise RateLimitExceeded(reason, delay)
        publish_again(job, job.request, record_of(limit).next_return(bucket, tokens, delay))
    raise Ignore


def postpone(job: Task, pause: RetryAfter, seconds: float) -> None:
    """Send a job back to the broker, to run again after a pause. This does not count as a retry.

    Returns only if the job has no queue to go back to: the caller then runs it again.

    Raises:
        Ignore: It was sent back.
        RetryAfter: The job has been paused ten times already.

    """
    request = job.request
    headers = dict(request.headers or {})
    pauses = headers.get(_PAUSES, 0)
    pauses = pauses + 1 if isinstance(pauses, int) else 1
    if pauses > _MOST_PAUSES:
        raise pause
    request.headers = {**headers, _PAUSES: pauses}
    if has_queue(job, request):
        publish_again(job, request, seconds)
        raise Ignore


def _drop(job: Task, reason: str) -> None:
    """End a job as revoked, as ``Request._announce_revoked`` does in the main process."""
    request = job.request
    logger.info("Dropped %s[%s]: %s", job.name, request.id, reason)
    job.backend.mark_as_revoked(
        request.id,
        reason,
        request=request,
        store_result=not request.ignore_result or job.store_errors_even_if_ignored,
    )
    signals.task_revoked.send(sender=job, request=request, terminated=False, signum=None, expired=False)
