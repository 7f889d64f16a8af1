"""What becomes of a job that a limit refuses: at the gate, and in the task itself.

At the gate there is a ``celery.worker.request.Request`` in the worker's main process, and Celery's own
code for it ends the job. In the task there is a ``celery.Task`` in the pool, where a job that is not to
run ends with ``Ignore``. That alone stores no result, and ``get()`` and a chord would wait for ever.
"""

import logging
from typing import Any, Final, NoReturn

from celery import Task, signals
from celery.exceptions import Ignore, TaskRevokedError
from celery.worker import state

from ..exceptions import RateLimitExceeded, RetryAfter
from ..gating.limit import Demand
from ..gating.record import record_of

__all__ = ["postpone", "refuse_at_gate", "refuse_in_task"]

#: The header that counts how often a job has been paused, and how often it may be.
_PAUSES: Final = "rate_limiter_pauses"
_MOST_PAUSES: Final = 10

logger = logging.getLogger("rate_limiter")


def refuse_at_gate(request: Any, demand: Demand, delay: float) -> None:
    """End a job as a revoked one (``"drop"``), or send it back (``"retry"``)."""
    bucket, tokens, limit = demand
    reason = f"rate limit exceeded: {record_of(limit).name or request.type}"
    if limit.when_limited == "drop":
        request._announce_revoked(reason, False, None, False)
        logger.info("Dropped %s[%s]: %s", request.name, request.id, reason)
    else:
        _send_back(request, record_of(limit).turn(bucket, tokens, delay))


def refuse_in_task(demand: Demand, delay: float, name: str, job: Task | None) -> NoReturn:
    """End a job, or send it back, from within its task.

    Args:
        demand: What it was refused.
        delay: When the bucket will have as much, in seconds.
        name: What to call the limit.
        job: The task; ``None`` for a nested call, which ends with an exception for its caller.

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
        _publish_again(job, job.request, record_of(limit).turn(bucket, tokens, delay))
    raise Ignore


def postpone(job: Task, pause: RetryAfter, seconds: float) -> NoReturn:
    """Let a job run again after a pause that its remote wants; this is no retry.

    Raises:
        RetryAfter: It has been paused too often.

    """
    request = job.request
    headers = dict(request.headers or {})
    pauses = headers.get(_PAUSES, 0)
    pauses = pauses + 1 if isinstance(pauses, int) else 1
    if pauses > _MOST_PAUSES:
        raise pause
    request.headers = {**headers, _PAUSES: pauses}
    _publish_again(job, request, seconds)
    raise Ignore


def _send_back(request: Any, countdown: float) -> None:
    """Send the same job again, for later, then acknowledge it: in between it is there twice."""
    # Context keeps keys it does not know as headers, and sends those on; hostname is one it knows.
    context = request._context
    context.args, context.kwargs = request.args, request.kwargs
    _publish_again(request.task, context, countdown)
    state.task_ready(request)
    request.acknowledge()


def _publish_again(task: Task, context: Any, countdown: float) -> None:
    # As Task.retry does, but the attempt does not count: `retries` stays what it is.
    signature = task.signature_from_request(context, countdown=countdown, retries=context.retries)
    signature.apply_async()
    logger.info("Sent back %s[%s] for %.3g s", task.name, context.id, countdown)


def _drop(job: Task, reason: str) -> None:
    """Do what Request._announce_revoked does in the main process."""
    request = job.request
    logger.info("Dropped %s[%s]: %s", job.name, request.id, reason)
    job.backend.mark_as_revoked(
        request.id,
        reason,
        request=request,
        store_result=not request.ignore_result or job.store_errors_even_if_ignored,
    )
    signals.task_revoked.send(sender=job, request=request, terminated=False, signum=None, expired=False)
