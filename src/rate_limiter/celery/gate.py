"""The gate: jobs wait for their tokens in the worker's consumer, before they take a pool slot.

Every way a job takes to the pool (a message, an ETA that has come, Celery's own rate limit) ends in
``consumer.on_task_request``. The gate is a consumer bootstep that puts itself in front of it. A held
job stays unacknowledged: whatever happens to the worker, the broker has it still.
"""

import logging
import math
import threading
from collections.abc import Callable
from fnmatch import fnmatchcase
from time import monotonic
from typing import Any, Final

from billiard.einfo import ExceptionInfo
from celery import Celery, Task, bootsteps
from celery.exceptions import ImproperlyConfigured
from celery.local import Proxy
from celery.worker import state

from ..bucket import Bucket
from ..holding import Holding
from ..limit import Limit, Price
from . import receipt
from .prefetch import Prefetch
from .throttle import gated_apps, held_at_gate, limits_of

__all__ = ["Gate"]

logger = logging.getLogger("rate_limiter")

#: How many jobs a worker holds, unless the user says otherwise.
_MAX_HELD: Final = 1000

#: While a job with an ETA is about, the consumer of a worker without event loop looks up this often:
#: the timer thread that brings the job cannot wake it.
_ETA_POLL: Final = 0.1


class Gate:
    """Holds limited jobs in the worker until their tokens are there, and lets all others pass.

    Construct it where the app is made. It does nothing in a process that is no worker::

        app = Celery("shop", broker="redis://")
        gate = Gate(app)
        gate.limit("jobs.send_*", bucket=TokenBucket(capacity=5, tokens_per_second=1))

    It finds the limits declared by `throttle` by itself.

    Args:
        app: The Celery app.
        max_held: The most jobs a worker holds, 1000 by default. Beyond it the broker keeps the rest,
            and jobs of other kinds that stand behind them in the queue wait too.

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
        if max_held is None:
            max_held = _MAX_HELD
        if not isinstance(max_held, int) or isinstance(max_held, bool):
            raise TypeError(f"max_held must be a whole number, not {max_held!r}")
        if max_held < 1:
            raise ValueError(f"max_held must be 1 or more, not {max_held!r}")
        if app in gated_apps:
            raise RuntimeError(f"{app!r} has a Gate already: an app has one, for all its limits")
        self.app = app
        self.max_held = max_held
        self._declared: list[tuple[tuple[str, ...], Limit]] = []
        self._consumer_started = False
        gated_apps.add(app)
        gate = self

        class RateLimiter(_GateStep):
            def __init__(self, consumer: Any, **kwargs: Any) -> None:
                super().__init__(consumer, gate, **kwargs)

        app.steps["consumer"].add(RateLimiter)

    def limit(
        self,
        *tasks: str,
        bucket: Bucket | Callable[..., Bucket],
        tokens: float | Callable[..., float] = 1,
        name: str | None = None,
    ) -> None:
        """Declare a limit for tasks by their names.

        Args:
            tasks: Names of tasks, or shell patterns for them (``"jobs.send_*"``). A pattern never
                matches Celery's own tasks (``celery.*``).
            bucket: As in `throttle`. All the tasks share it.
            tokens: As in `throttle`.
            name: What logs call the limit. By default the patterns.

        Raises:
            RuntimeError: The worker's consumer has started.
            TypeError: An argument has the wrong type.
            ValueError: No task is given, or one of Celery's own, or the cost can never be paid.

        """
        if self._consumer_started:
            raise RuntimeError("limit() comes before the worker starts: declare it beside the app")
        if not tasks:
            raise ValueError("limit() needs the name of a task, or a pattern such as 'jobs.send_*'")
        for pattern in tasks:
            if not isinstance(pattern, str):
                raise TypeError(f"tasks must be names or patterns, not {pattern!r}")
            if pattern.startswith("celery."):
                raise ValueError(f"{pattern!r}: Celery's own tasks cannot be limited")
        limit = Limit(bucket, tokens=tokens, name=name or ", ".join(tasks))
        self._declared.append((tasks, limit))

    def limits_for(self, task: Task) -> tuple[Limit, ...]:
        """Return the limits that the gate enforces for a task.

        Raises:
            ImproperlyConfigured: One bucket limits the task twice.

        """
        if task.name.startswith("celery."):
            return ()
        limits = [
            limit
            for patterns, limit in self._declared
            if any(fnmatchcase(task.name, pattern) for pattern in patterns)
        ]
        limits += [limit for limit in limits_of(task) if held_at_gate(limit)]
        buckets = [id(limit.bucket) for limit in limits]
        if len(set(buckets)) < len(buckets):
            raise ImproperlyConfigured(
                f"`{task.name}`: the same bucket limits it twice; declare it once: {limits}"
            )
        return tuple(limits)


class _GateStep(bootsteps.StartStopStep):
    """The gate in one worker's consumer."""

    label = "Gate"
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, gate: Gate, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self.gate = gate
        self.enabled = bool(gate.app.conf.get("rate_limiter_enabled", True))
        if not self.enabled:
            logger.info("Rate limits are lifted: rate_limiter_enabled is false")
            return
        # Runs in Consumer.__init__: before the pool forks, and before any task's strategy picks up
        # on_task_request (celery/worker/strategy.py).
        if not callable(getattr(consumer, "on_task_request", None)):
            raise ImproperlyConfigured(
                "this Celery has no consumer.on_task_request: the gate cannot attach, and the "
                "worker will not run without its limits"
            )
        self.consumer = consumer
        self.forward: Callable[[Any], None] = consumer.on_task_request
        self.held: Holding[Any] = Holding(skip=_revoked, fail=_fail)
        self.limits = _LimitsByTask(gate)
        # Celery fires timers from a second thread while a warm shutdown waits for the pool.
        self.lock = threading.RLock()
        self.open = False
        self.wake_up: Any = None
        self.wake_up_at = 0.0
        self._announce()
        consumer.on_task_request = self.on_task_request
        gate._consumer_started = True
        receipt.open_office()

    # -- life cycle: started anew with every connection -------------------------------------------

    def start(self, consumer: Any) -> None:
        """Begin with nothing held: the broker delivers again what an earlier connection held."""
        self.thread = threading.get_ident()
        self.prefetch = Prefetch(consumer, self.gate.max_held)
        # The other timers are threads: what they release would run beside the consumer's own thread.
        self.has_timer = consumer.hub is not None or getattr(consumer.pool, "is_green", False)
        self.open = True
        if consumer.hub is None:
            self._work_between_messages(consumer)

    def stop(self, consumer: Any) -> None:
        """Forget what is held. It was never acknowledged, so the broker gives it out again."""
        with self.lock:
            self.open = False
            self._cancel_wake_up()
            forgotten = self.held.clear()
            for request in forgotten:  # else `inspect reserved` goes on showing it
                state.reserved_requests.discard(request)
                state.requests.pop(request.id, None)
        if forgotten:
            logger.info("Gave %d held jobs back to the broker", len(forgotten))

    terminate = stop

    def shutdown(self, consumer: Any) -> None:
        """Let limits be declared again, for another worker of this process."""
        self.gate._consumer_started = False

    def info(self, consumer: Any) -> dict[str, Any]:
        """Return what ``celery inspect stats`` shows of the gate."""
        return {"rate_limiter": {"held": len(self.held)}} if self.enabled else {}

    def _announce(self) -> None:
        tasks_of: dict[Limit, list[str]] = {limit: [] for _, limit in self.gate._declared}
        for name, task in sorted(self.gate.app.tasks.items()):
            for limit in self.gate.limits_for(task):
                tasks_of.setdefault(limit, []).append(name)
                if task.rate_limit and not self.gate.app.conf.worker_disable_rate_limits:
                    logger.warning(
                        "%s also has Celery's rate_limit=%r, which blocks its whole queue while it "
                        "throttles; both apply", name, task.rate_limit,
                    )  # fmt: skip
        for limit, names in tasks_of.items():
            if names:
                logger.info(
                    "Limit %s: %r for %s, enforced at the gate",
                    limit.name or names[0], limit.bucket, ", ".join(names),
                )  # fmt: skip
            else:
                logger.warning("Limit %s matches no registered task", limit.name)

    # -- the way of a job -------------------------------------------------------------------------

    def on_task_request(self, request: Any) -> None:
        """Let a job go, or hold it. Stands in for ``consumer.on_task_request``."""
        receipt.strip(request.request_dict)
        limits = self.limits[request.task]
        if not limits:
            self.forward(request)
            return
        if not self.open:
            return  # the consumer is stopping; the broker has the job
        if not self.has_timer and threading.get_ident() != self.thread:
            # Celery's timer thread brings a job whose ETA has come. On the solo pool it would run
            # here, beside the job that the consumer runs.
            self.consumer.call_soon(self.on_task_request, request)
            return
        try:
            prices = self._prices(request, limits)
            with self.lock:
                goes = self.held.offer(request, prices, monotonic())
        except Exception as error:  # noqa: BLE001 - a callable of the user's, or its result
            _fail(request, error)
            return
        if goes:
            self._let_go(request)
        else:
            self._after_change()

    def _prices(self, request: Any, limits: tuple[Limit, ...]) -> list[Price]:
        return [limit.price(request.type, request.args, request.kwargs) for limit in limits]

    def _let_go(self, request: Any) -> None:
        if any(map(held_at_gate, limits_of(request.task))):
            receipt.issue(request.request_dict)
        self.forward(request)

    def release(self) -> None:
        """Let all jobs go whose moment has come."""
        with self.lock:
            if not self.open:
                return
            due = self.held.next_due
            if due is None or due > monotonic():
                return
            released = self.held.release(monotonic())
        for request in released:
            self._let_go(request)
        self._after_change()

    # -- when to look again -----------------------------------------------------------------------

    def _after_change(self) -> None:
        """Follow what is held: with the prefetch count, and with the one timer."""
        with self.lock:
            if not self.open:
                return
            self.prefetch.follow(len(self.held))
            due = self.held.next_due
            if not self.has_timer or due == self.wake_up_at:
                return
            self._cancel_wake_up()
            if due is not None:
                self.wake_up_at = due
                self.wake_up = self.consumer.timer.call_at(due, self._on_wake_up)

    def _on_wake_up(self) -> None:
        with self.lock:
            self.wake_up, self.wake_up_at = None, 0.0
        self.release()
        self._after_change()

    def _cancel_wake_up(self) -> None:
        if self.wake_up is not None:
            self.consumer.timer.cancel(self.wake_up)
        self.wake_up, self.wake_up_at = None, 0.0

    def _work_between_messages(self, consumer: Any) -> None:
        """Without an event loop, do what is due around the consumer's own wait for messages.

        Celery's loop there (celery.worker.loops.synloop) blocks in ``drain_events`` until a message
        has come, for up to two seconds. On green pools each of its turns costs another 0.1 s, so this
        stays in for the two seconds, and does in between what a turn of that loop does.
        """
        drain = consumer.connection.drain_events

        def drain_events(timeout: float | None = None) -> None:
            end = math.inf if timeout is None else monotonic() + timeout
            while consumer.connection and consumer.blueprint.state == bootsteps.RUN:
                self.release()
                self.prefetch.update()
                due = self.held.next_due
                at = end if due is None else min(end, due)
                left = max(0.001, at - monotonic())
                if state.scheduled_requests:
                    left = min(left, _ETA_POLL)
                try:
                    drain(timeout=None if left == math.inf else left)
                except TimeoutError:
                    if monotonic() >= end:
                        raise
                state.maybe_shutdown()
                consumer.perform_pending_operations()

        consumer.connection.drain_events = drain_events


class _LimitsByTask(dict[Task, tuple[Limit, ...]]):
    """Resolved at a task's first job, so that tasks imported late are found too."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __missing__(self, task: Task) -> tuple[Limit, ...]:
        limits = self[task] = self._gate.limits_for(task)
        return limits


def _revoked(request: Any) -> bool:
    """Whether a held job was revoked or has expired; then it is announced and acknowledged here."""
    try:
        return bool(request.revoked())
    except Exception:
        # The result backend is down. The job stays unacknowledged, so the broker has it still.
        logger.exception("Could not announce that %s[%s] was revoked", request.name, request.id)
        return True


def _fail(request: Any, error: Exception) -> None:
    """End a job with an error as its result, as the worker ends one whose process was lost."""
    try:
        raise error
    except Exception:  # noqa: BLE001 - caught at once, for its traceback
        einfo = ExceptionInfo(internal=True)
    try:
        request.on_failure(einfo)
        request.acknowledge()
    except Exception:
        logger.exception("Could not store that %s[%s] failed: %r", request.name, request.id, error)
