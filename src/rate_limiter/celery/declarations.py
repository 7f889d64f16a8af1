"""Where an app's limits are found, on its tasks and at its gate, and what they are called."""

import inspect
from typing import Any, Final
from weakref import WeakKeyDictionary

from celery import Celery, Task
from celery.exceptions import ImproperlyConfigured

from ..gating.declared import Names
from ..gating.limit import Limit
from ..gating.parameters import Parameters

__all__ = [
    "LIMITS",
    "adopt_gate",
    "at_gate",
    "attributes_of",
    "check_task",
    "gates",
    "held_at_gate",
    "limits_of",
    "name_limits",
    "names_of",
    "parameters_of",
    "refuse_async",
]

#: The attribute of a decorated function that holds its limits.
LIMITS: Final = "__rate_limits__"

#: The attribute of a task that declares a limit, and how attributes begin that are this library's.
ATTRIBUTE: Final = "rate_limiter_limit"
_PREFIX: Final = "rate_limiter_"

#: The gate of each app that has one.
gates: WeakKeyDictionary[Celery, Any] = WeakKeyDictionary()

#: The limits that the gate of this worker enforces for a task from whatever queue, and no decorator.
at_gate: WeakKeyDictionary[Task, tuple[Limit, ...]] = WeakKeyDictionary()

_names: WeakKeyDictionary[Celery, Names] = WeakKeyDictionary()
_parameters: WeakKeyDictionary[Task, Parameters] = WeakKeyDictionary()


def adopt_gate(app: Celery) -> Any:
    """Return the gate of a spawned pool process, if it has one.

    Args:
        app: The app of its tasks. Celery has sent it there, so it is a copy of the one that the user's
            modules make there once more, with the gate.

    """
    for original, gate in list(gates.items()):
        if original.main == app.main:
            _names[app] = names_of(original)
            gates[app], gate.app = gate, app
    return gates.get(app)


def limits_of(task: Task) -> tuple[Limit, ...]:
    """Return the limits that ``@throttle`` declared on a task."""
    return getattr(task.run, LIMITS, ())


def held_at_gate(limit: Limit) -> bool:
    """Tell whether a gate enforces the limit, rather than the decorator."""
    return limit.timeout is None


def names_of(app: Celery) -> Names:
    """Return the names of an app's limits."""
    return _names.setdefault(app, Names())


def name_limits(task: Task) -> None:
    """Name what ``@throttle`` declared on a task, after the task where the user gave no name.

    Raises:
        ImproperlyConfigured: Two limits of the app were given one name.

    """
    try:
        for limit in limits_of(task):
            names_of(task.app).add(limit, task.name)
    except ValueError as error:
        raise ImproperlyConfigured(f"`{task.name}`: {error}") from error


def parameters_of(task: Task) -> Parameters:
    """Return the parameters of a task's function, without ``self``."""
    parameters = _parameters.get(task)
    if parameters is None:
        parameters = _parameters[task] = Parameters(task.run)
    return parameters


def refuse_async(function: Any, name: str) -> None:
    """Refuse to limit a coroutine function.

    Raises:
        TypeError: It is one.

    """
    function = inspect.unwrap(function)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{name} is async; Celery does not await tasks, so it would never run")


def attributes_of(task: Task) -> list[str]:
    """Return the attributes of a task that are this library's, spelled right or wrong."""
    # Celery's own classes have none; they are the most of it.
    owners = [kind for kind in type(task).__mro__ if not kind.__module__.startswith("celery.")]
    found = [name for owner in (task, *owners) for name in vars(owner) if name.startswith(_PREFIX)]
    return list(dict.fromkeys(found))


def check_task(task: Task) -> None:
    """Refuse a task with a misspelled attribute, which would run without its limit.

    Raises:
        ImproperlyConfigured: It has one.

    """
    for attribute in attributes_of(task):
        if attribute != ATTRIBUTE:
            raise ImproperlyConfigured(
                f"{attribute} of {task.name}: unknown attribute; expected {ATTRIBUTE}"
            )
