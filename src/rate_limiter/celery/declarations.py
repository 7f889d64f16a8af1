"""Where an app's limits are found: on its tasks, and at its gate."""

from typing import Any, Final
from weakref import WeakKeyDictionary

from celery import Celery, Task

from ..gating.limit import Limit

__all__ = ["LIMITS", "at_gate", "gates", "held_at_gate", "limits_of"]

#: The attribute of a decorated function that holds its limits.
LIMITS: Final = "__rate_limits__"

#: The gate of each app that has one.
gates: WeakKeyDictionary[Celery, Any] = WeakKeyDictionary()

#: The limits that the gate of this worker enforces for a task from whatever queue, and no decorator.
at_gate: WeakKeyDictionary[Task, tuple[Limit, ...]] = WeakKeyDictionary()


def limits_of(task: Task) -> tuple[Limit, ...]:
    """Return the limits that ``@throttle`` declared on a task."""
    return getattr(task.run, LIMITS, ())


def held_at_gate(limit: Limit) -> bool:
    """Tell whether a gate enforces the limit, rather than the decorator."""
    return limit.timeout is None
