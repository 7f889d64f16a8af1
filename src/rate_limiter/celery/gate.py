"""The gate: jobs wait for their tokens in the worker's consumer, before they take a pool slot.

Here limits are declared and found; `bootstep` holds the jobs.
"""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from weakref import WeakSet

from celery import Celery, Task
from celery.exceptions import ImproperlyConfigured
from celery.local import Proxy

from ..bucket import Bucket
from ..checks import whole
from ..gating.limit import AnyBucket, Limit, refuse_to_pay_twice
from .bootstep import GateStep
from .declarations import gates, held_at_gate, limits_of
from .settings import limit_from, limits_in_settings

__all__ = ["Gate"]


class _Declared(NamedTuple):
    """A limit, and the jobs it is for."""

    patterns: tuple[str, ...]
    queue: str | None
    limit: Limit

    def covers(self, task: str, queue: str | None) -> bool:
        return (self.queue is None or self.queue == queue) and any(
            fnmatchcase(task, pattern) for pattern in self.patterns
        )


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
        max_held: The most jobs that a worker holds for one limit. By default what runs in four
            seconds, and at least one prefetch window. Beyond it the broker keeps the rest, and jobs
            of other kinds that stand behind them in the queue wait too. With a bucket per key the default
            is at least 1,000, for jobs of other keys are such jobs.

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
        self._declared: list[_Declared] = []
        self._settings: list[_Declared] | None = None
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
        bucket: AnyBucket,
        tokens: float | Callable[..., float] = 1,
        key: Callable[..., Any] | None = None,
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
            tokens: As in `throttle`.
            key: As in `throttle`.
            when_limited: As in `throttle`, without the callable.
            name: What logs call the limit. By default the patterns, or the queue.
            max_held: For this limit, instead of the gate's.
            overflow: What happens beyond ``max_held``. ``"hold"``, the default: the broker keeps the
                rest, and other jobs behind them in the queue too. ``"pause"``: the worker stops
                consuming the queue for a while; for a queue that carries one limit, for quorum
                queues, and so that several workers share a backlog. On Redis it takes up to a second
                to take a queue up again: hold at least two seconds' worth there, as the default does.
            buckets: As in `throttle`. The gate needs it only for tasks in a prefork pool that settle
                their charge or raise `RetryAfter`.

        Raises:
            RuntimeError: The worker's consumer has started.
            TypeError: An argument has the wrong type.
            ValueError: Neither task nor queue is given, a task is one of Celery's own, or the cost
                can never be paid.

        """
        if self.consumers:
            raise RuntimeError("limit() comes before the worker starts: declare it beside the app")
        if not tasks and queue is None:
            raise ValueError("limit() needs the name of a task, a pattern, or queue=…")
        for pattern in tasks:
            if not isinstance(pattern, str):
                raise TypeError(f"tasks must be names or patterns, not {pattern!r}")
            if pattern.startswith("celery."):
                raise ValueError(f"{pattern!r}: Celery's own tasks cannot be limited")
        if queue is not None and not isinstance(queue, str):
            raise TypeError(f"queue must be the name of a queue, not {queue!r}")
        if callable(when_limited):
            raise ValueError("when_limited may be a callable in @throttle only: the gate runs no tasks")
        limit = Limit(
            bucket,
            tokens=tokens,
            key=key,
            when_limited=when_limited,
            buckets=buckets,
            name=name or ", ".join(tasks) or f"queue {queue}",
            max_held=max_held,
            overflow=overflow,
        )
        self._declared.append(_Declared(tasks or ("*",), queue, limit))

    @property
    def declared(self) -> list[_Declared]:
        """What `limit` and the settings declare.

        Raises:
            ImproperlyConfigured: The settings are wrong.

        """
        if self._settings is None:
            self._settings = [
                _Declared((pattern,), queue, limit)
                for pattern, queue, limit in limits_in_settings(self.app)
            ]
        return self._declared + self._settings

    def limits_for(self, task: Task, queue: str | None = None) -> tuple[Limit, ...]:
        """Return the limits that the gate enforces for a job.

        Args:
            task: Its task.
            queue: The queue that it was consumed from.

        Raises:
            ImproperlyConfigured: One bucket limits the task twice, or its attribute is wrong.

        """
        if task.name.startswith("celery."):
            return ()
        limits = [declared.limit for declared in self.declared if declared.covers(task.name, queue)]
        limits += [limit for limit in limits_of(task) if held_at_gate(limit)]
        attribute = getattr(task, "rate_limiter_limit", None)
        if attribute is not None:
            if task.name not in self._attributes:
                self._attributes[task.name] = limit_from(
                    f"rate_limiter_limit of {task.name}", attribute, task.name
                )
            limits.append(self._attributes[task.name])
        try:
            refuse_to_pay_twice([limit.bucket for limit in limits], f"`{task.name}`")
        except ValueError as error:
            raise ImproperlyConfigured(str(error)) from error
        return tuple(limits)
