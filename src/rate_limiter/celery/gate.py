"""The gate: jobs wait for their tokens in the worker's consumer, before they take a pool slot.

This module declares and finds limits; `bootstep` holds the jobs.
"""

from collections.abc import Iterable
from typing import Any

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
    CELERYS,
    check_task,
    gates,
    held_at_gate,
    limits_of,
    name_limits,
    names_of,
    own_tasks,
    parameters_of,
    refuse_async,
)
from .settings import declare_settings, enabled, limit_from
from .startup import has_started
from .unparking import UnparkStep

__all__ = ["Gate"]


class Gate:
    """Holds limited jobs in the worker until their tokens are there, and lets all others pass.

    Construct it where the app is made. Outside of a worker it does nothing::

        app = Celery("shop", broker="redis://")
        gate = Gate(app)
        gate.limit("jobs.send_*", bucket=TokenBucket(capacity=5, tokens_per_second=1))

    It also enforces the limits that are declared with `throttle`, in ``app.conf.rate_limiter_limits``, and
    in a task's attribute ``rate_limiter_limit`` (so in ``task_annotations`` too). A job to which several
    limits apply takes from all of them or from none.

    Args:
        app: The Celery app.
        max_held: The most jobs that a worker holds for one limit. By default the jobs that run in ten
            minutes, but at least one prefetch window and at most 1,000; with a key, or a callable for
            ``bucket``, 1,000. The broker keeps the others, and with them all jobs that stand behind
            them in the queue.

    Raises:
        RuntimeError: The app has a gate already, or a worker of the app runs already.
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
            raise RuntimeError(
                f"{app!r} has a Gate already, and an app has one for all its limits: write gate = Gate(app) "
                "once, and gate.limit(…) for each limit"
            )
        if has_started(app):
            raise RuntimeError(
                f"this Gate comes too late: a worker of {app!r} runs already, without it. Construct the Gate "
                "where the app is made, or in a module that the worker imports as it starts"
            )
        self.app = app
        self.max_held = max_held
        self._declarations = Declarations("tasks", reserved=CELERYS, names=names_of(app))
        self._has_settings = False
        self._attributes: dict[str, Limit] = {}
        gates[app] = gate = self

        class RateLimiter(GateStep):
            def __init__(self, consumer: Any, **kwargs: Any) -> None:
                super().__init__(consumer, gate, **kwargs)

        class Unpark(UnparkStep):
            def include_if(self, parent: Any) -> bool:
                return not enabled(app)

        app.steps["consumer"].update((RateLimiter, Unpark))

    def limit(
        self,
        *tasks: str,
        queue: str | None = None,
        bucket: AnyBucket | str,
        burst: float | None = None,
        initial: float | None = None,
        tokens: AnyCost = 1,
        key: AnyKey | None = None,
        when_limited: str = "wait",
        max_wait: float | None = None,
        shadow: bool = False,
        name: str | None = None,
        max_held: int | None = None,
        overflow: str | None = None,
        buckets: Iterable[Bucket] = (),
    ) -> None:
        """Declare a limit for tasks by their names, for a queue, or for tasks in a queue.

        Args:
            tasks: Names of tasks, or shell patterns for them (``"jobs.send_*"``). Without any: all tasks of the
                queue. A pattern never matches Celery's own tasks (``celery.*``).
            queue: Only jobs that the worker consumes from this queue. Inline calls of a task, and elements of
                ``chunks``, ``map`` and ``starmap``, do not pay such a limit: they come from no queue.
            bucket: As in `throttle`. All the tasks share it.
            burst: As in `throttle`.
            initial: As in `throttle`.
            tokens: As in `throttle`.
            key: As in `throttle`.
            when_limited: As in `throttle`, without the callable.
            max_wait: As in `throttle`.
            shadow: As in `throttle`.
            name: As in `throttle`. By default the names or patterns of the tasks, or the queue.
            max_held: For this limit, instead of the gate's.
            overflow: What happens when ``max_held`` jobs are held. By default
                ``app.conf.rate_limiter_overflow`` decides, which is ``"hold"`` unless you set it.

                - ``"hold"``: the broker keeps the others, and all jobs that stand behind them in the queue.
                - ``"pause"``: the worker stops consuming the queue for a while. This is for a queue whose jobs
                  all have the same limit, and for several workers that share a backlog. On Redis it takes up
                  to a second until the queue is consumed again: hold the jobs of at least two seconds there.
                  Where prefetch counts are static (quorum queues, RabbitMQ 4), up to a prefetch window more is
                  held.
                - ``"park"``: the worker holds the jobs of one second, half a prefetch window at most, and moves
                  the others aside in the broker, to ``<queue>.parked.<name>``, until their tokens come. For
                  Redis and RabbitMQ; read the page on parking for what it does to purging, scaling and
                  permissions. The worker does not start if the limit cannot be parked.
            buckets: As in `throttle`. The gate needs them only if tasks in a prefork pool settle their
                charge or raise `RetryAfter`.

        Raises:
            RuntimeError: A worker of the app runs already.
            TypeError: An argument has the wrong type.
            ValueError: Neither task nor queue is given, a task is one of Celery's own, the cost is above the
                capacity, or another limit has the name.

        If ``key`` or ``tokens`` names a parameter, each of the tasks must have it: else the worker refuses to
        start. With ``queue`` alone the tasks are not known, and a job without that argument fails.

        """
        if has_started(self.app):
            raise RuntimeError("limit() comes before the worker starts: declare it beside the app")
        if not tasks and queue is None:
            raise ValueError("limit() needs the name of a task, a pattern, or queue=…")
        limit = new_limit(
            bucket,
            burst=burst,
            initial=initial,
            tokens=tokens,
            key=key,
            when_limited=when_limited,
            max_wait=max_wait,
            shadow=shadow,
            buckets=buckets,
            name=name,
            max_held=max_held,
            overflow=overflow,
        )
        self._declarations.add(tasks, limit, queue)

    @property
    def declared(self) -> Declarations:
        """The limits that `limit` and the settings declare.

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
        if task.name.startswith(CELERYS):
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

    def tasks_of(self, problems: list[str] | None = None) -> dict[Limit, list[str]]:
        """Check the declarations against the registered tasks.

        Args:
            problems: Gets the errors of tasks, and none of them is raised.

        Returns:
            Each limit that the gate enforces, in the order of declaration, and the names of its tasks. A
            limit that matches no task has none.

        Raises:
            ImproperlyConfigured: As `limits_for`; or a limited task is async, lacks the parameter that a
                limit names, or has a misspelled attribute.

        """
        tasks_of: dict[Limit, list[str]] = {declared.limit: [] for declared in self.declared}
        # The tasks of a queue are not known before its jobs arrive. A job that lacks the argument fails then.
        of_queues = {declared.limit for declared in self.declared if not declared.patterns}
        for name, task in own_tasks(self.app).items():
            try:
                for limit in self._limits_of(task, of_queues):
                    tasks_of.setdefault(limit, []).append(name)
            except ImproperlyConfigured as error:
                if problems is None:
                    raise
                problems.append(str(error))
        return tasks_of

    def _limits_of(self, task: Task, unchecked: set[Limit]) -> Iterable[Limit]:
        """Return the limits of a task, from whatever queue its jobs come, and check its function."""
        check_task(task)
        limits = dict.fromkeys(self.limits_for(task))
        for queue in self.declared.queues_of(task.name):
            limits.update(dict.fromkeys(self.limits_for(task, queue)))
        try:
            for limit in (each for each in limits if each not in unchecked):
                refuse_async(task.run, task.name)
                if limit.parameter_names:
                    check_parameters(limit, parameters_of(task), f"`{task.name}`")
        except (TypeError, ValueError) as error:
            raise ImproperlyConfigured(str(error)) from error
        return limits

    def _of_attribute(self, task: Task, value: Any) -> Limit:
        limit = self._attributes.get(task.name)
        if limit is None:
            setting = f"{ATTRIBUTE} of {task.name}"
            limit = limit_from(self.app, setting, task.name, value)
            try:
                names_of(self.app).add(limit, task.name)
            except ValueError as error:
                raise ImproperlyConfigured(f"{setting}: {error}") from error
            self._attributes[task.name] = limit
        return limit
