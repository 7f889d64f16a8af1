"""The receipt: it tells a task in the pool what the gate has decided about its job.

The gate runs in the worker's main process, the task in the pool. The receipt travels in the request and
says what was paid, or why the job must not run. It contains a secret that this worker makes before the
pool starts, so no message can forge a receipt, and a worker without a gate accepts none. It is removed
from the request before the task's body runs, so neither ``retry()`` nor a nested call inherits it.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from celery import Task
from celery.app.task import Context

from ..gating.limit import Demand, Limit
from ..gating.record import record_of
from .declarations import limits_of, names_of

__all__ = [
    "Receipt",
    "consume",
    "fail",
    "headers_of",
    "is_spawned",
    "issue",
    "make_secret",
    "refuse",
    "strip",
]

#: The key of the receipt in the request.
KEY: Final = "rate_limiter_receipt"

#: The environment variable with the secret, for spawned pool processes, which inherit no memory.
_VARIABLE: Final = "RATE_LIMITER_RECEIPT"

_secret: str | None = None

#: How a receipt refers to a limit: its index among the limits of the task's decorators, or its name.
_Reference = int | str


class Receipt(NamedTuple):
    """What the gate has decided about a job."""

    #: The limits that the job has paid, each with the tokens.
    paid: list[tuple[Limit, float]]
    #: The name of the limit that refused the job, the seconds until it has the tokens, and the fallback
    #: that is called instead of the task, if there is one.
    refused: tuple[str, float, Callable[..., Any] | None] | None = None
    #: The error because of which the job cannot pay.
    error: Exception | None = None


def make_secret(*, spawned: bool = False) -> None:
    """Create this worker's secret. Called before the pool starts, whose processes inherit it."""
    global _secret  # noqa: PLW0603 - one per process, by design
    if _secret is None:
        _secret = secrets.token_hex(16)
    if spawned:
        os.environ[_VARIABLE] = _secret


def strip(request: dict[str, Any]) -> None:
    """Remove a receipt that arrived in a message."""
    request.pop(KEY, None)


def issue(task: Task, request: dict[str, Any], demands: Iterable[Demand]) -> None:
    """Put a receipt into a job's request: the job has paid."""
    paid = {demand.limit: demand.tokens for demand in demands}
    request[KEY] = (_secret, [(_refer(task, limit), tokens) for limit, tokens in paid.items()])


def refuse(task: Task, request: dict[str, Any], limit: Limit, delay: float) -> None:
    """Put a receipt into a job's request: a limit has refused it."""
    request[KEY] = (_secret, [], (_refer(task, limit), delay))


def fail(request: dict[str, Any], error: Exception) -> None:
    """Put a receipt into a job's request: it cannot pay."""
    # The receipt may go to another process: only a built-in error with one text surely arrives unchanged.
    plain = error if type(error) in (ValueError, TypeError) else ValueError(f"{error!r}")
    request[KEY] = (_secret, [], None, type(plain)(str(plain)))


def consume(task: Task, request: Any) -> Receipt:
    """Take the receipt out of a running task's request.

    Args:
        task: The task.
        request: ``task.request``, a ``celery.app.task.Context``.

    Returns:
        What the gate has decided. Nothing was paid without a valid receipt.

    """
    receipt = request.__dict__.pop(KEY, None)
    # Context copies each key it does not know into `headers`, which retry() sends along.
    if request.headers:
        if not isinstance(request.headers, dict):
            request.headers = headers_of(vars(request))
        request.headers.pop(KEY, None)
    secret = _secret or os.environ.get(_VARIABLE)
    if not secret or not isinstance(receipt, tuple | list) or receipt[:1] not in ((secret,), [secret]):
        return Receipt([])
    _, payments, *verdict = receipt
    paid = []
    for reference, tokens in payments:
        limit = _find(task, reference)
        if limit is not None:
            paid.append((limit, tokens))
    if not verdict:
        return Receipt(paid)
    refused, *error = verdict
    if error:
        return Receipt(paid, error=error[0])
    reference, delay = refused
    if isinstance(reference, str):
        return Receipt(paid, refused=(reference, delay, None))
    limit = limits_of(task)[reference]
    fallback = limit.when_limited if callable(limit.when_limited) else None
    return Receipt(paid, refused=(record_of(limit).name, delay, fallback))


def headers_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers that the producer of a job has added to those of Celery.

    Args:
        request: ``Request.request_dict``, or ``vars(task.request)``.

    Celery's ``Context`` takes a header with the name ``headers`` for all headers. Here it is one of them.

    """
    named = request.get("headers")
    if named is None or isinstance(named, dict):
        return Context(request).headers or {}
    others = {name: value for name, value in request.items() if name != "headers"}
    return {**(Context(others).headers or {}), "headers": named}


def is_spawned() -> bool:
    """Tell whether this is a spawned pool process: it shares no memory with the gate."""
    return _secret is None and _VARIABLE in os.environ


def _refer(task: Task, limit: Limit) -> _Reference:
    declared = limits_of(task)
    return declared.index(limit) if limit in declared else record_of(limit).name


def _find(task: Task, reference: _Reference) -> Limit | None:
    if isinstance(reference, int):
        return limits_of(task)[reference]
    return names_of(task.app).get(reference)
