"""The receipt: how a job that has paid at the gate shows that in the pool, to its task.

The gate runs in the worker's main process, the task in the pool. The receipt travels with the request.
It carries a secret of this worker, made before the pool starts, so no message can forge one, and a
worker without a gate believes none. It is consumed once, before the task's body runs: neither
``retry()`` nor a nested call inherits it.
"""

import os
import secrets
from collections.abc import Iterable, Mapping
from typing import Any, Final

from celery import Task
from celery.app.task import Context

from ..gating.limit import Demand, Limit
from .declarations import limits_of

__all__ = ["consume", "headers_of", "is_spawned", "issue", "open_office", "paid", "strip"]

#: Where it is kept in the request.
KEY: Final = "rate_limiter_receipt"

#: How spawned pool processes, which inherit no memory, learn the secret.
_VARIABLE: Final = "RATE_LIMITER_RECEIPT"

#: The place of a limit among those of the task's decorator, its number, and the tokens.
_Paid = tuple[int | None, int, float]

_secret: str | None = None


def open_office(*, spawned: bool = False) -> None:
    """Make receipts of this process and of its future children believed. The gate calls it."""
    global _secret  # noqa: PLW0603 - one per process, by design
    if _secret is None:
        _secret = secrets.token_hex(16)
    if spawned:
        os.environ[_VARIABLE] = _secret


def strip(request: dict[str, Any]) -> None:
    """Remove a receipt that arrived in a message."""
    request.pop(KEY, None)


def paid(task: Task, demands: Iterable[Demand]) -> list[_Paid]:
    """Return what a receipt says of a job that has paid."""
    # What the decorator declared goes by its place: a spawned process numbers limits anew.
    declared = {limit: place for place, limit in enumerate(limits_of(task))}
    tokens_of = {limit: tokens for _, tokens, limit in demands}
    return [(declared.get(limit), limit.number, tokens) for limit, tokens in tokens_of.items()]


def issue(request: dict[str, Any], what: list[_Paid]) -> None:
    """Put a receipt into the request of a job that has `paid`."""
    request[KEY] = (_secret, what)


def consume(task: Task, request: Any) -> list[tuple[Limit, float]]:
    """Take the receipt out of a running task's request.

    Args:
        task: The task.
        request: ``task.request``, a ``celery.app.task.Context``.

    Returns:
        The limits that were paid, and how much; none without a valid receipt.

    """
    receipt = request.__dict__.pop(KEY, None)
    # Context copies each key it does not know into `headers`, which retry() sends along.
    if request.headers:
        if not isinstance(request.headers, dict):
            request.headers = headers_of(vars(request))
        request.headers.pop(KEY, None)
    secret = _secret or os.environ.get(_VARIABLE)
    if not secret or not isinstance(receipt, tuple | list) or receipt[:1] not in ((secret,), [secret]):
        return []
    found = []
    for place, number, tokens in receipt[1]:
        limit = Limit.numbered(number) if place is None else limits_of(task)[place]
        if limit is not None:
            found.append((limit, tokens))
    return found


def headers_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers that the producer of a job has added to those of Celery.

    Args:
        request: ``Request.request_dict``, or what ``task.request`` contains.

    A header that is named ``headers`` takes their place in Celery's ``Context``. Here it is one of them.

    """
    named = request.get("headers")
    if named is None or isinstance(named, dict):
        return Context(request).headers or {}
    others = {name: value for name, value in request.items() if name != "headers"}
    return {**(Context(others).headers or {}), "headers": named}


def is_spawned() -> bool:
    """Whether this is a spawned pool process: it shares no memory with the gate."""
    return _secret is None and _VARIABLE in os.environ
