"""The receipt: how a job that has paid at the gate shows that to the decorator of its task.

The gate runs in the worker's main process, the decorator in the pool. The receipt travels with the
request. It is a secret of this worker, made before the pool forks, so no message can forge one, and a
worker without a gate believes none. It is consumed once, before the task's body runs: neither
``retry()`` nor a nested call inherits it.
"""

import secrets
from typing import Any, Final

__all__ = ["consume", "issue", "open_office", "strip"]

#: Where it is kept in the request.
KEY: Final = "rate_limiter_receipt"

_secret: str | None = None


def open_office() -> None:
    """Make receipts of this process and of its future children believed. The gate calls it."""
    global _secret  # noqa: PLW0603 - one per process, by design
    if _secret is None:
        _secret = secrets.token_hex(16)


def strip(request: dict[str, Any]) -> None:
    """Remove a receipt that arrived in a message."""
    request.pop(KEY, None)


def issue(request: dict[str, Any]) -> None:
    """Put a receipt into the request of a job that has paid."""
    request[KEY] = _secret


def consume(request: Any) -> bool:
    """Take the receipt out of a running task's request.

    Args:
        request: ``task.request``, a ``celery.app.task.Context``.

    Returns:
        Whether there was a valid one.

    """
    receipt = request.__dict__.pop(KEY, None)
    # Context copies each key it does not know into `headers`, which retry() sends along.
    if request.headers:
        request.headers.pop(KEY, None)
    return receipt is not None and receipt == _secret
