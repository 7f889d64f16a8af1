"""The gate: jobs wait for their tokens in the worker's consumer, before they take a pool slot.

Here limits are declared and found; `bootstep` holds the jobs.
"""

from collections.abc import Iterable
from typing import Any, Final
from weakref import WeakSet

from celery import Celery, Task
from celery.exceptions import ImproperlyConfigured
from celery.local import Proxy

from ..bucket import Bucket
from ..checks import whole
from ..gating.declared import Declarations, check_parameters, new_limit
from ..gating.limit import AnyBucket, AnyCost, AnyKey, Limit, refuse_to_pay_twice
from .bootstep import GateStep
from .declarations import (
    ATTRIBUTE,
    check_task,
    gates,
    held_at_gate,
    limits_of,
    name_limits,
    names_of,
    parameters_of,
    refuse_async,
)
from .settings import declare_settings, limit_from

__all__ = ["Gate"]

#: How the names of Celery's own tasks begin, which cannot be limited.
_CELERYS: Final = "celery."


class Gate:
    """Holds limited jobs in the worker until their tokens are there, and lets all others pass.

    Construct it where the app is made. It does nothing in a process that is no worker::

        app = Celery("shop", broker="redis://")
        gate = Gate(app)
        gate.limit("jobs.send_*", bucket=TokenBucket(capacity=5, tokens_per_second=1))

    It finds by itself what is declared with `throttle`, in ``app.conf.rate_limiter_limits``, and as a
    task's attribute ``rate_limiter_limit`` (so in ``task_annotations`` too). A job to which several
    limits apply takes from all of them or from none.

    Args:
        app: The Celery app.
        max_held: The most jobs that a worker holds for one limit. By default what runs within ten
            minutes, but at least one prefetch window and at most 1,000; with a bucket per key, or a
            callable for ``bucket``, 1,000. Beyond it the broker keeps the rest, and jobs of other kinds
            that stand behind them in the queue wait too.

    Raises:
        RuntimeError: The app has a gate already.
        TypeError: ``app`` is not a Celery app, or ``max_held`` not a whole number.
        ValueError: ``max_held`` is below 1.

    A bucket in the worker's memory is one rate per worker: two workers run at twice the rate.

    """

    def __init__(self, app: Celery, *, max_held: int | None = None) -> None:
        if not isinstance(app, Celery):
            raise TypeError(f"app must be a Celery app, not {app!r}")
        if isinstance(app, Proxy):  # celery.current_app
            app = app._get_current_object()
        if max_held is not None:
            whole("max_held", max_held)
        if app in gates:
            raise RuntimeError(f"{app!r} has a Gate already: an app has one, for all its limits")
        self.app = app
        self.max_held = max_held
        self._declarations = Declarations("tasks", reserved=_CELERYS, names=names_of(app))
        self._has_settings = False
        self._attributes: dict[str, Limit] = {}
        #: The consumers that run with it in this process, or ran when the process was forked.
        self.consumers: WeakSet[Any] = WeakSet()
        gates[app] = gate = self

        class RateLimiter(GateStep):
            def __init__(self, consumer: Any, **kwargs: Any) -> None:
                super().__init__(consumer, gate, **kwargs)

        app.steps["consumer"].add(RateLimiter)

    def limit(
        self,
        *tasks: str,
        queue: str | None = None,
        bucket: AnyBucket | str,
        burst: float | None = None,
        tokens: AnyCost = 1,
        key: AnyKey | None = None,
        when_limited: str = "wait",
        name: str | None = None,
        max_held: int | None = None,
        overflow: str | None = None,
        buckets: Iterable[Bucket] = (),
    ) -> None:
        """Declare a limit for tasks by their names, for a queue, or for tasks in a queue.

        Args:
            tasks: Names of tasks, or shell patterns for them (``"jobs.send_*"``). None: all tasks. A
                pattern never matches Celery's own tasks (``celery.*``).
            queue: Only jobs that the worker consumes from this queue.
            bucket: As in `throttle`. All the tasks share it.
            burst: As in `throttle`.
            tokens: As in `throttle`.
            key: As in `throttle`.
            when_limited: As in `throttle`, without the callable.
            name: As in `throttle`. By default the patterns, or the queue.
            max_held: For this limit, instead of the gate's.
            overflow: What happens beyond ``max_held``. ``"hold"``, the default: the broker keeps the
                rest, and other jobs behind them in the queue too. ``"pause"``: the worker stops
                consuming the queue for a while; for a queue that carries one limit, and so that
                several workers share a backlog. On Redis it takes up to a second to take a queue up
                again: hold at least two seconds' worth there. Where prefetch counts are static
                (quorum queues, RabbitMQ 4) up to a prefetch window more is held before it stops.
            buckets: As in `throttle`. The gate needs it only for tasks in a prefork pool that settle
                their charge or raise `RetryAfter`.

        Raises:
            RuntimeError: The worker's consumer has started.
            TypeError: An argument has the wrong type.
            ValueError: Neither task nor queue is given, a task is one of Celery's own, the cost can
                never be paid, or another limit has the name.

        A parameter that ``key`` or ``tokens`` names is looked for in each of the tasks as the worker
        starts: a task without it stops the worker. With ``queue`` alone, a job without it fails.

        """
        if self.consumers:
            raise RuntimeError("limit() comes before the worker starts: declare it beside the app")
        if not tasks and queue is None:
            raise ValueError("limit() needs the name of a task, a pattern, or queue=…")
        limit = new_limit(
            bucket,
            burst=burst,
            tokens=tokens,
            key=key,
            when_limited=when_limited,
            buckets=buckets,
            name=name,
            max_held=max_held,
            overflow=overflow,
        )
        self._declarations.add(tasks, limit, queue)

    @property
    def declared(self) -> Declarations:
        """What `limit` and the settings declare.

        Raises:
            ImproperlyConfigured: The settings are wrong.

        """
        if not self._has_settings:
            declare_settings(self.app, self._declarations)
            self._has_settings = True
        return self._declarations

    def limits_for(self, task: Task, queue: str | None = None) -> tuple[Limit, ...]:
        """Return the limits that the gate enforces for a job.

        Args:
            task: Its task.
            queue: The queue that it was consumed from.

        Raises:
            ImproperlyConfigured: One bucket limits the task twice, two limits have one name, or the
                task's attribute is wrong.

        """
        if task.name.startswith(_CELERYS):
            return ()
        name_limits(task)
        limits = self.declared.of(task.name, queue)
        limits += [limit for limit in limits_of(task) if held_at_gate(limit)]
        attribute = getattr(task, ATTRIBUTE, None)
        if attribute is not None:
            limits.append(self._of_attribute(task, attribute))
        try:
            refuse_to_pay_twice([limit.bucket for limit in limits], f"`{task.name}`")
        except ValueError as error:
            raise ImproperlyConfigured(str(error)) from error
        return tuple(limits)

    def tasks_of(self) -> dict[Limit, list[str]]:
        """Check what is declared against the tasks that are registered.

        Returns:
            Each limit that the gate enforces, in order, and the names of its tasks; none for a limit that
            matches no task.

        Raises:
            ImproperlyConfigured: As `limits_for`; or a limited task is async, has no parameter of the
                name that a limit was given, or has a misspelled attribute.

        """
        tasks_of: dict[Limit, list[str]] = {declared.limit: [] for declared in self.declared}
        # Nobody knows which tasks come from a queue; one that does not fit fails as its job comes.
        of_queues = {declared.limit for declared in self.declared if not declared.patterns}
        for name, task in sorted(self.app.tasks.items()):
            if name.startswith(_CELERYS):
                continue
            check_task(task)
            limits = dict.fromkeys(self.limits_for(task))
            for queue in self.declared.queues_of(name):
                limits.update(dict.fromkeys(self.limits_for(task, queue)))
            try:
                for limit in (each for each in limits if each not in of_queues):
                    refuse_async(task.run, name)
                    if limit.parameter_names:
                        check_parameters(limit, parameters_of(task), f"`{name}`")
            except (TypeError, ValueError) as error:
                raise ImproperlyConfigured(str(error)) from error
            for limit in limits:
                tasks_of.setdefault(limit, []).append(name)
        return tasks_of

    def _of_attribute(self, task: Task, value: Any) -> Limit:
        limit = self._attributes.get(task.name)
        if limit is None:
            setting = f"{ATTRIBUTE} of {task.name}"
            limit = limit_from(setting, value)
            try:
                names_of(self.app).add(limit, task.name)
            except ValueError as error:
                raise ImproperlyConfigured(f"{setting}: {error}") from error
            self._attributes[task.name] = limit
        return limit
