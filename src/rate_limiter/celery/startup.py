"""The start of a worker, with a gate or without: checks, log lines, shared buckets.

Importing ``rate_limiter.celery`` connects the receivers here, so that the worker also warns of limits that
nothing enforces.
"""

import logging
from typing import Any, Final
from weakref import WeakSet

from celery import Celery, bootsteps, current_app, signals

from ..gating.limit import Limit
from ..gating.record import listed, record_of
from . import receipt
from .declarations import (
    adopt_gate,
    attributes_of,
    gates,
    held_at_gate,
    limits_of,
    name_limits,
    own_tasks,
)
from .prefork import share_before_fork
from .settings import check_switches, enabled, settings_of
from .throttle import renew_tracer, watch, watch_all

__all__ = ["connect", "has_started", "without_gate"]

logger = logging.getLogger("rate_limiter")

#: The workers of this process, or of the process that it was forked from.
_workers: Final[WeakSet[Any]] = WeakSet()

#: Whether this is a spawned pool process that has imported its tasks.
_spawned = False


def connect() -> None:
    """Connect the receivers for the start of a worker, and of a pool process."""
    for signal, receiver in (
        (signals.worker_init, _on_worker_init),
        (signals.worker_process_init, _on_pool_process),
    ):
        signal.connect(receiver, weak=False, dispatch_uid=f"rate_limiter: {receiver.__name__}")


def has_started(app: Celery) -> bool:
    """Tell whether a worker of an app runs here, or this is one of its pool processes."""
    running = (worker.app is app and worker.blueprint.state == bootsteps.RUN for worker in _workers)
    return _spawned or any(running)


def _on_worker_init(sender: Any, **_: Any) -> None:
    # A receiver cannot stop a worker: Signal.send catches its exceptions. A step can.
    sender.app.steps["worker"].add(_Startup)


class _Startup(bootsteps.Step):
    """Looks at every limit before the pool forks."""

    label = "Limits"

    def create(self, worker: Any) -> None:
        """Name, check, share and announce the limits.

        Raises:
            ImproperlyConfigured: Two limits have one name, one would run at a multiple of its rate, or a switch is
                neither on nor off.

        """
        _workers.add(worker)
        app = worker.app
        check_switches(app)
        if not enabled(app):
            return
        tasks_of: dict[Limit, list[str]] = {}
        for name, task in sorted(app.tasks.items()):
            name_limits(task)
            for limit in limits_of(task):
                tasks_of.setdefault(limit, []).append(name)
        share_before_fork(worker)
        for limit, names in tasks_of.items():
            if app not in gates or not held_at_gate(limit):
                logger.info(
                    "Limit %s: %r for %s, enforced in the task",
                    record_of(limit).name,
                    limit.bucket,
                    ", ".join(names),
                )
        if app not in gates:
            _warn_without_gate(app)


def without_gate(app: Celery) -> list[str]:
    """Return the settings and task attributes that only a gate reads."""
    places = [
        key
        for key, name in settings_of(app).items()
        if name not in ("rate_limiter_enabled", "rate_limiter_control") and app.conf[key]
    ]
    for name, task in sorted(app.tasks.items()):
        places += [f"{attribute} of {name}" for attribute in attributes_of(task)]
    return places


def _warn_without_gate(app: Celery) -> None:
    if places := without_gate(app):
        logger.warning(
            "This app has no gate, so nothing obeys %s: add Gate(app) from rate_limiter.celery where the "
            "app is made",
            listed(places),
        )


def _on_pool_process(sender: Any, **_: Any) -> None:
    """Wrap the tasks of a spawned pool process, as the gate does in the main process."""
    global _spawned  # noqa: PLW0603 - one per process
    if not receipt.is_spawned():
        return
    _spawned = True
    app = current_app._get_current_object()
    if not enabled(app):
        return
    gate = adopt_gate(app)
    if gate is None:
        logger.error(
            "The gate of %r is not known in this pool process: chunks, map, starmap and inline calls do not "
            "pay its limits. Construct it in a module that pool processes import, too",
            app,
        )
        tasks = list(own_tasks(app).values())
        for task in tasks:
            watch(task)
    else:
        tasks = watch_all(gate, gate.tasks_of())
    # Celery has already made the tracers, from the tasks without the wrapper (process_initializer).
    for task in tasks:
        renew_tracer(task, sender)
