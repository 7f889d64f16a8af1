"""Limits from ``app.conf.rate_limiter_limits`` and from a task's ``rate_limiter_limit``.

    app.conf.rate_limiter_limits = {
        "jobs.send_*": "100/m",
        "jobs.upload": {"rate": "10/s", "burst": 20, "tokens": "megabytes"},
        "jobs.report": {"rate": "5/s", "key": "tenant", "limits": {"acme": "50/s"}},
    }

A value is a rate, or a mapping with a ``rate`` and any of these:

- ``rate``: a number of tokens per second, or text with a unit: ``"10/s"``, ``"100/m"``, ``"2/h"``, ``"1000/d"``.
- ``burst``: the capacity of the bucket, in tokens. By default a tenth of a second's worth, at least 1, and at
  least what a job costs. There is no default if the cost depends on the job.
- ``tokens``: what a job costs: a number, the name of a parameter of the task, or ``"module:callable"``.
- ``key``: the name of a parameter, or ``"module:callable"``. Each value has a bucket of its own.
- ``limits``: other rates for some keys: a mapping from a key to its rate, or to a mapping with ``rate`` and
  ``burst``. Or ``"module:callable"``, which is called with a key, as in `BucketPerKey`.
- ``when_limited``, ``max_wait``, ``shadow``, ``name``, ``max_held``, ``overflow``: as in ``Gate.limit``.
- ``queue``: as in ``Gate.limit``; in the settings only.

A callable is given the job's arguments.
"""

from collections.abc import Mapping
from typing import Any, Final

from celery import Celery
from celery.exceptions import ImproperlyConfigured
from celery.utils.imports import symbol_by_name

from ..checks import positive
from ..gating.declared import Declarations, check_options, new_limit
from ..gating.leaving import LONGEST_HOLD
from ..gating.limit import Limit

__all__ = ["controlled", "declare_settings", "enabled", "limit_from", "longest_hold"]

_LIMITS: Final = "rate_limiter_limits"
_LONGEST_HOLD: Final = "rate_limiter_longest_hold"
_CONTROL: Final = "rate_limiter_control"
_SETTINGS: Final = frozenset({"rate_limiter_enabled", _LIMITS, _LONGEST_HOLD, _CONTROL})

#: The options that may name a callable, as ``"module:callable"``.
_CALLABLES: Final = ("tokens", "key", "limits")
_OPTIONS: Final = (
    "rate",
    "burst",
    *_CALLABLES,
    "when_limited",
    "max_wait",
    "shadow",
    "name",
    "max_held",
    "overflow",
)


def enabled(app: Celery) -> bool:
    """Return whether limits are in force: ``app.conf.rate_limiter_enabled``, true by default."""
    return bool(app.conf.get("rate_limiter_enabled", True))


def controlled(app: Celery) -> bool:
    """Whether remote control may show and change limits: ``app.conf.rate_limiter_control``."""
    return bool(app.conf.get(_CONTROL, True))


def longest_hold(app: Celery) -> float:
    """Return for how many seconds a job from RabbitMQ is held: ``app.conf.rate_limiter_longest_hold``.

    Raises:
        ImproperlyConfigured: It is no number of seconds above 0.

    """
    try:
        return positive(_LONGEST_HOLD, app.conf.get(_LONGEST_HOLD, LONGEST_HOLD))
    except (ValueError, TypeError) as error:
        raise ImproperlyConfigured(str(error)) from error


def declare_settings(app: Celery, declarations: Declarations) -> None:
    """Declare the limits that are in an app's settings.

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
    for pattern, value in limits.items():
        setting = f"{_LIMITS}[{pattern!r}]"
        options = dict(value) if isinstance(value, Mapping) else {"rate": value}
        queue = options.pop("queue", None)
        limit = limit_from(setting, options, ("queue",))
        try:
            declarations.add((pattern,), limit, queue)
        except (ValueError, TypeError) as error:
            raise ImproperlyConfigured(f"{setting}: {error}") from error


def limit_from(setting: str, value: Any, others: tuple[str, ...] = ()) -> Limit:
    """Make the limit that a setting describes.

    Args:
        setting: What to call it in errors.
        value: A rate, or a mapping of options.
        others: Further known options, for the error about an unknown one.

    Raises:
        ImproperlyConfigured: The value is wrong.

    """
    options = dict(value) if isinstance(value, Mapping) else {"rate": value}
    try:
        check_options(options, (*_OPTIONS, *others))
        for option in _CALLABLES:
            text = options.get(option)
            if isinstance(text, str) and (":" in text or "." in text):
                options[option] = symbol_by_name(text)
        return new_limit(**options)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise ImproperlyConfigured(f"{setting}: {error}") from error
