"""Limits from ``app.conf.rate_limiter_limits`` and from a task's ``rate_limiter_limit``.

    app.conf.rate_limiter_limits = {
        "jobs.send_*": "100/m",
        "jobs.upload": {"rate": "10/s", "burst": 20, "tokens": "jobs.costs:megabytes"},
    }

A value is a rate as Celery writes it, or a mapping with a ``rate`` and any of ``burst``, ``tokens``,
``when_limited``, ``queue``, ``name``, ``max_held`` and ``overflow``.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from celery import Celery
from celery.exceptions import ImproperlyConfigured
from celery.utils.imports import symbol_by_name
from celery.utils.time import rate as parse_rate

from ..checks import positive
from ..gating.limit import Limit
from ..token_bucket import TokenBucket

__all__ = ["enabled", "limit_from", "limits_in_settings"]

_LIMITS: Final = "rate_limiter_limits"
_SETTINGS: Final = frozenset({"rate_limiter_enabled", _LIMITS})
_OPTIONS: Final = frozenset(
    {"rate", "burst", "tokens", "when_limited", "queue", "name", "max_held", "overflow"}
)


def enabled(app: Celery) -> bool:
    """Return whether limits are in force: ``app.conf.rate_limiter_enabled``, true by default."""
    return bool(app.conf.get("rate_limiter_enabled", True))


def limits_in_settings(app: Celery) -> list[tuple[str, str | None, Limit]]:
    """Return the pattern, the queue and the limit of each entry.

    Raises:
        ImproperlyConfigured: A setting is unknown or wrong. The message names it.

    """
    prefix = (app.namespace or "").lower() + "_"
    for key in app.conf:
        setting = str(key).lower().removeprefix(prefix)
        if setting.startswith("rate_limiter_") and setting not in _SETTINGS:
            raise ImproperlyConfigured(
                f"{key}: unknown setting; expected one of {', '.join(sorted(_SETTINGS))}"
            )
    limits = app.conf.get(_LIMITS) or {}
    if not isinstance(limits, Mapping):
        raise ImproperlyConfigured(f"{_LIMITS} must map tasks to limits, not be {limits!r}")
    found = []
    for pattern, value in limits.items():
        setting = f"{_LIMITS}[{pattern!r}]"
        if not isinstance(pattern, str) or not pattern or pattern.startswith("celery."):
            raise ImproperlyConfigured(
                f"{setting}: expected the name of a task, or a pattern, and none of Celery's own"
            )
        queue = value.get("queue") if isinstance(value, Mapping) else None
        found.append((pattern, queue, limit_from(setting, value, pattern)))
    return found


def limit_from(setting: str, value: Any, name: str) -> Limit:
    """Build the limit that a setting describes.

    Args:
        setting: What to call it in errors.
        value: A rate, or a mapping of options.
        name: What to call the limit, unless the options say.

    Raises:
        ImproperlyConfigured: The value is wrong.

    """
    options = dict(value) if isinstance(value, Mapping) else {"rate": value}
    try:
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise ValueError(f"unknown {unknown[0]!r}; expected {', '.join(sorted(_OPTIONS))}")
        tokens = options.get("tokens", 1)
        if isinstance(tokens, str):
            tokens = symbol_by_name(tokens)
        rate = _rate(options.get("rate"))
        burst = options.get("burst")
        if burst is None:
            burst = _default_burst(rate, tokens)
        return Limit(
            TokenBucket(positive("burst", burst), rate),
            tokens=tokens,
            when_limited=options.get("when_limited", "wait"),
            name=options.get("name") or name,
            max_held=options.get("max_held"),
            overflow=options.get("overflow"),
        )
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise ImproperlyConfigured(f"{setting}: {error}") from error


def _rate(value: Any) -> float:
    expected = f"rate must be a number a second or a string such as '100/m', not {value!r}"
    try:
        number = float(parse_rate(value))
    except (KeyError, TypeError, ValueError):  # KeyError: a unit other than s, m and h
        raise ValueError(expected) from None
    if not 0 < number < math.inf:
        raise ValueError(expected)
    return number


def _default_burst(rate: float, tokens: float | Callable[..., float]) -> float:
    """Return a tenth of a second's worth, which a worker that wakes up late needs to keep its rate."""
    if callable(tokens):
        raise ValueError("burst is missing: with tokens from a callable it says how large a job may be")
    return max(1.0, rate / 10, positive("tokens", tokens))
