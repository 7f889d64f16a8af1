"""Finding the limits of an app, on its tasks and at its gate, and their names."""

import inspect
from typing import Any, Final
from weakref import WeakKeyDictionary

from celery import Celery, Task
from celery.exceptions import ImproperlyConfigured

from ..gating.declared import Names
from ..gating.limit import Limit
from ..gating.parameters import Parameters

__all__ = [
    "CELERYS",
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
    "own_tasks",
    "parameters_of",
    "refuse_async",
]

#: The prefix of the names of Celery's own tasks, which cannot be limited.
CELERYS: Final = "celery."

#: The attribute of a decorated function that holds its limits.
LIMITS: Final = "__rate_limits__"

#: The attribute of a task that declares a limit, and the prefix of this library's attributes.
ATTRIBUTE: Final = "rate_limiter_limit"
_PREFIX: Final = "rate_limiter_"

#: The gate of each app that has one.
gates: WeakKeyDictionary[Celery, Any] = WeakKeyDictionary()

#: For each task: the limits that this worker's gate enforces from any queue, without those of decorators.
at_gate: WeakKeyDictionary[Task, tuple[Limit, ...]] = WeakKeyDictionary()

_names: WeakKeyDictionary[Celery, Names] = WeakKeyDictionary()
_parameters: WeakKeyDictionary[Task, Parameters] = WeakKeyDictionary()


def own_tasks(app: Celery) -> dict[str, Task]:
    """Return the tasks of an app by name, in order, without those of Celery itself."""
    return {name: task for name, task in sorted(app.tasks.items()) if not name.startswith(CELERYS)}


def adopt_gate(app: Celery) -> Any:
    """Return the gate of a spawned pool process, if it has one.

    Args:
        app: The app of the tasks in this process, a copy that Celery has sent here. The user's modules are
            imported here too and make an app of the same name, with a gate. The copy gets that gate.

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
    """Tell whether a gate enforces the limit of a decorator. With a timeout the decorator does."""
    return limit.timeout is None


def names_of(app: Celery) -> Names:
    """Return the names of an app's limits."""
    return _names.setdefault(app, Names())


def name_limits(task: Task) -> None:
    """Name the limits that ``@throttle`` declared on a task: after the task, if they have no ``name=``.

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
        TypeError: The function is one.

    """
    function = inspect.unwrap(function)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{name} is async; Celery does not await tasks, so it would never run")


def attributes_of(task: Task) -> list[str]:
    """Return the names of a task's attributes that begin with ``rate_limiter_``, misspelled ones too."""
    # Celery's own classes have no such attribute, and most others: they are skipped to save time.
    owners = [kind for kind in type(task).__mro__ if not kind.__module__.startswith("celery.")]
    found = [name for owner in (task, *owners) for name in vars(owner) if name.startswith(_PREFIX)]
    return list(dict.fromkeys(found))


def check_task(task: Task) -> None:
    """Refuse a task with a misspelled attribute, which would run without its limit.

    Raises:
        ImproperlyConfigured: The task has one.

    """
    for attribute in attributes_of(task):
        if attribute != ATTRIBUTE:
            raise ImproperlyConfigured(
                f"{attribute} of {task.name}: unknown attribute; expected {ATTRIBUTE}"
            )
