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
- ``initial``: the tokens that the bucket starts with, from 0 to ``burst``. By default it starts full. With 0 a
  worker that starts brings no burst. With ``key``: as in `BucketPerKey`.
- ``tokens``: what a job costs: a number, the name of a parameter of the task, or ``"module:callable"``.
- ``key``: the name of a parameter, or ``"module:callable"``. Each value has a bucket of its own.
- ``limits``: other rates for some keys: a mapping from a key to its rate, or to a mapping with ``rate`` and
  ``burst``. Or ``"module:callable"``, which is called with a key, as in `BucketPerKey`.
- ``when_limited``, ``max_wait``, ``shadow``, ``name``, ``max_held``, ``overflow``: as in ``Gate.limit``.
- ``queue``: as in ``Gate.limit``; in the settings only.
- ``per``: ``"worker"``, or ``"cluster"``: one rate for all workers, in a `RedisTokenBucket` of the Redis at
  ``app.conf.rate_limiter_redis``. By default that is the broker or the result backend, if it is a Redis. Without a
  Redis each worker has an equal share of the rate.
  ``celery report`` shows settings: name an environment variable instead of a URL with a password.
  ``app.conf.rate_limiter_per`` is the default for all limits of the settings and of task attributes.
- ``on_outage``: with ``per="cluster"`` and a Redis: as in `RedisTokenBucket`.

A callable for ``tokens`` or ``key`` is given the arguments that the producer sent.
"""

import math
import os
from collections.abc import Mapping
from typing import Any, Final

from celery import Celery
from celery.exceptions import ImproperlyConfigured
from celery.utils.imports import symbol_by_name

from ..bucket import Bucket
from ..bucket_per_key import BucketPerKey
from ..checks import positive
from ..gating.declared import Declarations, check_options, new_limit
from ..gating.leaving import LONGEST_HOLD
from ..gating.limit import Limit
from .division import DividedBucket

__all__ = [
    "check_switches",
    "controlled",
    "declare_settings",
    "enabled",
    "limit_from",
    "longest_hold",
    "parks_all",
    "settings_of",
]

_ENABLED: Final = "rate_limiter_enabled"
_LIMITS: Final = "rate_limiter_limits"
_LONGEST_HOLD: Final = "rate_limiter_longest_hold"
_CONTROL: Final = "rate_limiter_control"
_PER: Final = "rate_limiter_per"
_REDIS: Final = "rate_limiter_redis"
_OVERFLOW: Final = "rate_limiter_overflow"
_SETTINGS: Final = frozenset({_ENABLED, _LIMITS, _LONGEST_HOLD, _CONTROL, _PER, _REDIS, _OVERFLOW})

#: The options that may name a callable, as ``"module:callable"``.
_CALLABLES: Final = ("tokens", "key", "limits")
_OPTIONS: Final = (
    "rate",
    "burst",
    "initial",
    *_CALLABLES,
    "when_limited",
    "max_wait",
    "shadow",
    "name",
    "max_held",
    "overflow",
    "per",
    "on_outage",
)

_SCOPES: Final = ("worker", "cluster")


def enabled(app: Celery) -> bool:
    """Return whether limits are in force: ``app.conf.rate_limiter_enabled``, true by default."""
    return bool(app.conf.get(_ENABLED, True))


def controlled(app: Celery) -> bool:
    """Whether remote control may show and change limits: ``app.conf.rate_limiter_control``."""
    return bool(app.conf.get(_CONTROL, True))


def check_switches(app: Celery) -> None:
    """Refuse a switch that is neither on nor off: the text "false", say, would count as on.

    Raises:
        ImproperlyConfigured: ``rate_limiter_enabled`` or ``rate_limiter_control`` is no ``bool``.

    """
    for setting in (_ENABLED, _CONTROL):
        value = app.conf.get(setting, True)
        if not isinstance(value, bool):
            raise ImproperlyConfigured(f"{setting} must be True or False, not {value!r}")


def longest_hold(app: Celery) -> float:
    """Return for how many seconds a job from RabbitMQ is held: ``app.conf.rate_limiter_longest_hold``.

    Raises:
        ImproperlyConfigured: It is no number of seconds above 0.

    """
    try:
        return positive(_LONGEST_HOLD, app.conf.get(_LONGEST_HOLD, LONGEST_HOLD))
    except (ValueError, TypeError) as error:
        raise ImproperlyConfigured(str(error)) from error


def parks_all(app: Celery) -> bool:
    """Return whether limits that do not say otherwise are parked: ``app.conf.rate_limiter_overflow``.

    Raises:
        ImproperlyConfigured: It is neither ``"hold"`` nor ``"park"``.

    """
    overflow = app.conf.get(_OVERFLOW) or "hold"
    if overflow not in ("hold", "park"):
        raise ImproperlyConfigured(f"{_OVERFLOW} must be 'hold' or 'park', not {overflow!r}")
    return bool(overflow == "park")


def settings_of(app: Celery) -> dict[str, str]:
    """Return the names of an app's settings that begin with ``rate_limiter_``, by their keys with a namespace.

    Misspelled ones are among them.
    """
    prefix = (app.namespace or "").lower() + "_"
    names = {str(key): str(key).lower().removeprefix(prefix) for key in app.conf}
    return {key: name for key, name in names.items() if name.startswith("rate_limiter_")}


def declare_settings(app: Celery, declarations: Declarations) -> None:
    """Declare the limits that are in an app's settings.

    Raises:
        ImproperlyConfigured: A setting is unknown or wrong. The message names it.

    """
    for key, setting in settings_of(app).items():
        if setting not in _SETTINGS:
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
        limit = limit_from(app, setting, pattern, options, ("queue",))
        try:
            declarations.add((pattern,), limit, queue)
        except (ValueError, TypeError) as error:
            raise ImproperlyConfigured(f"{setting}: {error}") from error


def limit_from(app: Celery, setting: str, what: str, value: Any, others: tuple[str, ...] = ()) -> Limit:
    """Make the limit that a setting describes.

    Args:
        app: The app.
        setting: What to call it in errors.
        what: The task or pattern that it is for.
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
        per = options.pop("per", app.conf.get(_PER) or "worker")
        if per not in _SCOPES:
            raise ValueError(f"per must be one of {', '.join(map(repr, _SCOPES))}, not {per!r}")
        if per == "cluster":
            return _for_cluster(app, what, options)
        if "on_outage" in options:
            raise ValueError("on_outage goes with per='cluster': other buckets ask no server")
        return new_limit(**options)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise ImproperlyConfigured(f"{setting}: {error}") from error


def _for_cluster(app: Celery, what: str, options: dict[str, Any]) -> Limit:
    """Make a limit whose buckets are in Redis, or whose bucket is this worker's share."""
    on_outage = options.pop("on_outage", None)
    limit = new_limit(**options)
    local: Any = limit.bucket
    name, url = f"{app.main}:{options.get('name') or what}", _redis_url(app)
    bucket: Bucket | BucketPerKey
    numbers = local.capacity, local.tokens_per_second
    initial = options.get("initial")
    if url is not None:
        from ..redis_bucket import RedisTokenBucket  # noqa: PLC0415 - it needs the package redis

        policy: Any = on_outage or "local"
        if isinstance(local, BucketPerKey):
            bucket = BucketPerKey(
                *numbers,
                initial=initial,
                limits=local.limits,
                redis=url,
                name=name,
                on_outage=policy,
            )
        else:
            bucket = RedisTokenBucket(name, *numbers, url=url, on_outage=policy, initial=initial)
    elif isinstance(local, BucketPerKey) or on_outage is not None:
        option = "key" if isinstance(local, BucketPerKey) else "on_outage"
        raise ValueError(
            f"per='cluster' with {option} needs a Redis: set {_REDIS}, for neither the broker nor the result "
            "backend is one"
        )
    else:
        least = math.inf if limit.cost is None else limit.cost
        bucket = DividedBucket(*numbers, least=least, initial=initial)
    of_bucket = ("rate", "burst", "initial", "limits")
    return new_limit(
        bucket, **{each: value for each, value in options.items() if each not in of_bucket}
    )


def _redis_url(app: Celery) -> str | None:
    if value := app.conf.get(_REDIS):
        url = str(value) if "://" in str(value) else os.environ.get(str(value))
        if url is None:  # a value that is no name is not shown: it may have a password
            unset = f", and {value} is not set" if str(value).isidentifier() else ""
            raise ValueError(
                f"{_REDIS} must be a URL such as 'redis://localhost/1', or the name of an environment "
                f"variable that has it{unset}"
            )
        return url
    for url in app.conf.broker_url, app.conf.result_backend:
        if isinstance(url, str) and url.startswith(("redis://", "rediss://")):
            if ";" in url or "?" in url:
                raise ValueError(
                    f"per='cluster' needs {_REDIS}: the URL of the broker or of the result backend has several "
                    "servers, or options of Celery"
                )
            return url
    return None
