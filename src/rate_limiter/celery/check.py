"""``celery limits check``: looks at all declarations of an app, without a broker or a worker."""

from celery import Celery, Task
from celery.exceptions import ImproperlyConfigured

from ..gating.record import listed, record_of
from .declarations import gates, limits_of, name_limits, own_tasks
from .division import DividedBucket, why_no_share
from .parkable import parked_limits
from .prefork import why_not_shared
from .settings import check_switches, longest_hold, parks_all
from .startup import without_gate

__all__ = ["count", "problems"]


def problems(app: Celery) -> list[str]:
    """Return a line for each thing that is wrong with an app's limits, and for each that limits nothing.

    It imports the app's modules, as a worker does.
    """
    app.loader.import_default_modules()
    app.finalize()
    gate = gates.get(app)
    found: list[str] = []
    for check in (check_switches, longest_hold):
        try:
            check(app)
        except ImproperlyConfigured as error:
            found.append(str(error))
    if gate is None:
        for task in app.tasks.values():
            try:
                name_limits(task)
            except ImproperlyConfigured as error:
                found.append(str(error))
            found += _one_per_process(task)
        if unread := without_gate(app):
            found.append(f"This app has no gate, so nothing obeys {listed(unread)}: add Gate(app)")
        return found
    try:
        tasks_of = gate.tasks_of(found)
    except ImproperlyConfigured as error:  # the settings
        return [str(error)]
    with app.connection_for_read() as connection:  # it is not opened
        broker = connection.transport.driver_type
    declared = {each.limit: each for each in gate.declared}
    there = list(own_tasks(app))
    for limit, tasks in tasks_of.items():
        # A task that has a problem of its own is not among them.
        if not tasks and not any(declared[limit].covers(name) for name in there):
            found.append(
                f"Limit {record_of(limit).name} matches no registered task; there are: {listed(there)}"
            )
        if isinstance(limit.bucket, DividedBucket) and (reason := why_no_share(broker)):
            found.append(f"Limit {record_of(limit).name}: {reason}")
    try:
        parked_limits(tasks_of, declared, broker, by_default=parks_all(app))
    except ImproperlyConfigured as error:
        found.append(str(error))
    limited = sorted({name for names in tasks_of.values() for name in names})
    found += [
        f"`{name}` also has Celery's rate_limit={app.tasks[name].rate_limit!r}; both apply"
        for name in limited
        if app.tasks[name].rate_limit
    ]
    return found


def count(app: Celery) -> int:
    """Return how many limits an app without `problems` has."""
    if gate := gates.get(app):
        return len(gate.tasks_of())
    return len({limit for task in app.tasks.values() for limit in limits_of(task)})


def _one_per_process(task: Task) -> list[str]:
    """Return what a worker with several pool processes would refuse to start for."""
    conf = task.app.conf
    if conf.worker_pool != "prefork" or conf.worker_concurrency == 1:
        return []
    return [
        f"`{task.name}`: with several pool processes each would have a bucket of its own, for {reason}: "
        "add Gate(app)"
        for limit in limits_of(task)
        if (reason := why_not_shared(limit))
    ]
