"""The gate in a worker's consumer: where limited jobs are held and let go.

Every way a job takes to the pool (a message, an ETA that has come, Celery's own rate limit) ends in
``consumer.on_task_request``. This bootstep puts itself in front of it. A held job stays
unacknowledged: whatever happens to the worker, the broker has it still.
"""

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from celery import Task, bootsteps
from celery.concurrency.prefork import TaskPool
from celery.exceptions import ImproperlyConfigured
from celery.worker import state

from ..broker.lease import Lease
from ..gating.holding import Holding
from ..gating.limit import Demand, Limit, price
from . import receipt
from .ending import fail, refuse_at_gate
from .pausing import Queues
from .prefork import is_spawned, share_all
from .returning import Returning
from .settings import enabled
from .throttle import watch
from .window import Window

if TYPE_CHECKING:
    from .gate import Gate

__all__ = ["GateStep"]

logger = logging.getLogger("rate_limiter")

#: Seconds until what could not be ended is tried again.
_END_AGAIN: Final = 1.0

#: While a job with an ETA is about, the consumer of a worker without event loop looks up this often:
#: the timer thread that brings the job cannot wake it.
_ETA_POLL: Final = 0.1


class GateStep(bootsteps.StartStopStep):
    """The gate in one worker's consumer."""

    label = "Gate"
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, gate: "Gate", **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self.gate = gate
        self.enabled = enabled(gate.app)
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
        self.held: Holding[Any] = Holding(refuse=self._refuse, fail=self._fail, skip=self._skip)
        self.plans = _Plans(gate)
        #: What jobs are to take whose price depends on their arguments, until they go.
        self.priced: WeakKeyDictionary[Any, Sequence[Demand]] = WeakKeyDictionary()
        self.bounds: dict[Limit, int] = {}
        # Celery fires timers from a second thread while a warm shutdown waits for the pool.
        self.lock = threading.RLock()
        self.open = False
        #: What could not be ended, and when that is tried again.
        self.unended: list[Callable[[], Any]] = []
        self.end_again_at = 0.0
        self.wake_up: Any = None
        self.wake_up_at = 0.0
        tasks_of = self._check_and_announce()
        limits = list(tasks_of)
        _refuse_prefetch_without_bound(consumer, limits)
        self.by_queue = any(limit.overflow == "pause" for limit in limits) or any(
            declared.queue for declared in gate.declared
        )
        consumer.on_task_request = self.on_task_request
        gate.consumers.add(consumer)
        spawned = is_spawned(consumer.controller)
        receipt.open_office(spawned=spawned)
        if isinstance(consumer.pool, TaskPool):
            share_all(limit for limit, tasks in tasks_of.items() if tasks and not spawned)

    # -- life cycle: started anew with every connection -------------------------------------------

    def start(self, consumer: Any) -> None:
        """Begin with nothing held: the broker delivers again what an earlier connection held."""
        self.thread = threading.get_ident()
        # The other timers are threads: what they release would run beside the consumer's own thread.
        self.has_timer = consumer.hub is not None or getattr(consumer.pool, "is_green", False)
        self.window = Window(consumer)
        self.queues = Queues(consumer, self.by_queue)
        self.bounds.clear()
        self.lease = Lease(consumer, self._held_now)
        self.returning = Returning(consumer, self.lock, self.has_timer, self._end_later)
        self.open = True
        if consumer.hub is None:
            self._work_between_messages(consumer)

    def stop(self, consumer: Any) -> None:
        """Forget what is held. It was never acknowledged, so the broker gives it out again."""
        with self.lock:
            was_open, self.open = self.open, False
            self._cancel_wake_up()
            self.unended.clear()
            forgotten = self.held.clear()
            for request in forgotten:  # else `inspect reserved` goes on showing it
                state.reserved_requests.discard(request)
                state.requests.pop(request.id, None)
        if was_open:
            self.returning.stop()
            self.lease.stop()
            self.queues.stop()
            self.window.stop()
        if forgotten:
            logger.info("Gave %d held jobs back to the broker", len(forgotten))

    terminate = stop

    def shutdown(self, consumer: Any) -> None:
        """Let limits be declared again, for another worker of this process."""
        self.gate.consumers.discard(consumer)

    def info(self, consumer: Any) -> dict[str, Any]:
        """Return what ``celery inspect stats`` shows of the gate."""
        with self.lock:
            held: Counter[str] = Counter()
            for limit, count in self.held.held_by.items():
                held[limit.name] += count
            return {"rate_limiter": {"held": dict(held), "paused": sorted(self.queues.paused)}}

    def _held_now(self) -> list[Any]:
        with self.lock:
            return self.held.jobs()

    def _check_and_announce(self) -> dict[Limit, list[str]]:
        tasks_of: dict[Limit, list[str]] = {declared.limit: [] for declared in self.gate.declared}
        for name, task in sorted(self.gate.app.tasks.items()):
            queues = {None, *(declared.queue for declared in self.gate.declared)}
            limits = {limit for queue in queues for limit in self.gate.limits_for(task, queue)}
            for limit in limits:
                limit.name = limit.name or name
                tasks_of.setdefault(limit, []).append(name)
            if limits:
                watch(task)
            if limits and task.rate_limit and not self.gate.app.conf.worker_disable_rate_limits:
                logger.warning(
                    "%s also has Celery's rate_limit=%r, which blocks its whole queue while it "
                    "throttles; both apply",
                    name,
                    task.rate_limit,
                )
        for limit, names in tasks_of.items():
            if names:
                tasks = ", ".join(names)
                logger.info(
                    "Limit %s: %r for %s, enforced at the gate", limit.name, limit.bucket, tasks
                )
            else:
                logger.warning("Limit %s matches no registered task", limit.name)
        return tasks_of

    # -- the way of a job -------------------------------------------------------------------------

    def on_task_request(self, request: Any) -> None:
        """Let a job go, or hold it. Stands in for ``consumer.on_task_request``."""
        receipt.strip(request.request_dict)
        plan = self._plan(request)
        if not plan.limits:
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
            demands = plan.demands or self._demands(request, plan.limits)
            if not plan.demands:
                self.priced[request] = demands
            with self.lock:
                goes = self.held.offer(request, demands, monotonic())
        except Exception as error:  # noqa: BLE001 - a callable of the user's, or its result
            self._fail(request, error)
            return
        if goes:
            self._let_go(request, plan)
            return
        self._after_change()
        if self.by_queue:
            self._pause_or_resume(request)

    def _plan(self, request: Any) -> "_Plan":
        return self.plans[request.task, self.queues.of(request) if self.by_queue else None]

    def _demands(self, request: Any, limits: Sequence[Limit]) -> Sequence[Demand]:
        headers = None
        if any(limit.asks_headers for limit in limits):
            headers = receipt.headers_of(request.request_dict)
        return price(limits, f"task {request.type}", request.args, request.kwargs, headers)

    def _refuse(self, request: Any, demand: Demand, delay: float) -> bool:
        limit = demand.limit
        room = self.held.held_by[limit] < self._bound(limit)
        if limit.when_limited == "retry" and request.eta and room:
            return False  # it comes when its turn is due, and waits for what little is missing
        if limit.when_limited == "retry" and not self.returning.takes(request):
            return False
        self._end(request, partial(refuse_at_gate, request, demand, delay, self.returning.send))
        return True

    def _fail(self, request: Any, error: Exception) -> None:
        self._end(request, partial(fail, request, error))

    def _skip(self, request: Any) -> bool:
        """Whether a held job was revoked or has expired; then it is announced and acknowledged here."""
        return bool(self._end(request, request.revoked))

    def _let_go(self, request: Any, plan: "_Plan") -> None:
        paid = plan.paid or receipt.paid(request.task, self.priced.pop(request))
        receipt.issue(request.request_dict, paid)
        self.forward(request)

    def release(self) -> None:
        """Let all jobs go whose moment has come."""
        with self.lock:
            due = self.held.next_due
            if not self.open or due is None or due > monotonic():
                return
            released = self.held.release(monotonic())
        for request in released:
            try:
                self._let_go(request, self._plan(request))
            except Exception:  # it stays unacknowledged; the others are to go on
                logger.exception("Could not hand %s[%s] to the pool", request.name, request.id)
        self._after_change()
        if self.queues.paused:
            self._pause_or_resume()

    # -- what ends here ---------------------------------------------------------------------------

    def _end(self, request: Any, end: Callable[[], Any]) -> Any:
        """End a job; or go on, and try again later, where the result backend or the broker is down.

        Until then it stays unacknowledged, so the broker has it still.
        """
        try:
            return end()
        except Exception:
            logger.exception("Could not end %s[%s] yet", request.name, request.id)
            self._end_later(end)
            return True

    def _end_later(self, end: Callable[[], Any]) -> None:
        with self.lock:
            self.unended.append(end)
            if len(self.unended) == 1:
                self.end_again_at = monotonic() + _END_AGAIN
                if self.has_timer:
                    self.consumer.timer.call_after(_END_AGAIN, self._end_again)

    def _end_again(self) -> None:
        with self.lock:
            unended, self.unended = self.unended, []
        for end in unended:
            try:
                end()
            except Exception:  # noqa: BLE001 - it has been logged
                self._end_later(end)

    # -- when to look again -----------------------------------------------------------------------

    def _after_change(self) -> None:
        """Follow what is held: with the prefetch window, and with the one timer."""
        with self.lock:
            if not self.open:
                return
            held = most = 0
            for limit, count in self.held.held_by.items():
                bound = self._bound(limit)
                most += bound
                held += min(count, bound)
            self.window.follow(held, most)
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
            due = self.held.next_due
        if due is not None and due > monotonic():
            self._after_change()  # it came early
        else:
            self.release()

    def _cancel_wake_up(self) -> None:
        if self.wake_up is not None:
            self.consumer.timer.cancel(self.wake_up)
        self.wake_up, self.wake_up_at = None, 0.0

    def _bound(self, limit: Limit) -> int:
        bound = self.bounds.get(limit)
        if bound is None:
            window = int(self.consumer.initial_prefetch_count)
            bound = self.bounds[limit] = limit.bound(window, self.gate.max_held)
        return bound

    def _pause_or_resume(self, request: Any = None) -> None:
        """Stop consuming a queue whose limit holds enough; take it up again at half of that."""
        with self.lock:
            held_by = self.held.held_by
            if request is not None and (queue := self.queues.of(request)):
                for limit in self.plans[request.task, queue].limits:
                    if limit.overflow == "pause" and held_by[limit] >= self._bound(limit):
                        self.queues.pause(queue, limit)
            for queue, limit in list(self.queues.paused.items()):
                if held_by[limit] <= self._bound(limit) // 2:
                    self.queues.resume(queue)

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
                self.window.update()
                due = self.held.next_due
                at = end if due is None else min(end, due)
                if self.unended:
                    at = min(at, self.end_again_at)
                    if at <= monotonic():
                        self._end_again()
                left = max(0.001, at - monotonic())
                if getattr(state, "scheduled_requests", True):  # Celery 5.5 does not tell
                    left = min(left, _ETA_POLL)
                try:
                    drain(timeout=None if left == math.inf else left)
                except TimeoutError:
                    if monotonic() >= end:
                        raise
                state.maybe_shutdown()
                consumer.perform_pending_operations()

        consumer.connection.drain_events = drain_events


class _Plan(NamedTuple):
    """What the gate does with the jobs of one task from one queue."""

    limits: tuple[Limit, ...]
    #: What each of them is to take, where that is the same for all.
    demands: tuple[Demand, ...]
    #: And what their receipts say then.
    paid: list[Any]


class _Plans(dict[tuple[Task, str | None], _Plan]):
    """Made at a task's first job, so that tasks imported late are found too."""

    def __init__(self, gate: "Gate") -> None:
        self._gate = gate

    def __missing__(self, job: tuple[Task, str | None]) -> _Plan:
        limits = self._gate.limits_for(*job)
        if limits:
            watch(job[0])
        fixed = all(limit.fixed for limit in limits)
        demands = tuple(demand for limit in limits for demand in limit.fixed) if fixed else ()
        plan = self[job] = _Plan(limits, demands, receipt.paid(job[0], demands))
        return plan


def _refuse_prefetch_without_bound(consumer: Any, limits: list[Limit]) -> None:
    if not any(limit.when_limited == "wait" for limit in limits):
        return
    if not consumer.initial_prefetch_count:
        raise ImproperlyConfigured(
            "worker_prefetch_multiplier is 0: the broker would send the worker everything at once, and "
            "no max_held could bound what the gate holds; set it to 1 or more"
        )
    redis = consumer.conninfo.transport.driver_type == "redis"
    if consumer.app.conf.get("worker_disable_prefetch") and redis:
        raise ImproperlyConfigured(
            "worker_disable_prefetch is set: a worker with as many jobs in hand as it has slots then "
            "stops consuming, and the jobs that the gate holds count; unset it, or remove the gate"
        )
