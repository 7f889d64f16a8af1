"""The gate in a worker's consumer: where limited jobs are held and let go.

Every way a job takes to the pool (a message, an ETA that has come, Celery's own rate limit) ends in
``consumer.on_task_request``. This bootstep puts itself in front of it. A held job stays
unacknowledged: whatever happens to the worker, the broker has it still.
"""

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from celery.concurrency.prefork import TaskPool
from celery.exceptions import ImproperlyConfigured
from celery.worker import state

from ..broker.origin import mark_messages
from ..broker.priority import Priorities
from ..broker.restore import Leftovers
from ..gating.engine import Engine, Plan
from ..gating.host import Host
from ..gating.limit import Call, Demand, Limit
from ..gating.record import record_of
from ..gating.tally import tally_of
from . import receipt
from .announcements import Announcements
from .declarations import check_task, parameters_of
from .division import Division
from .ending import refuse_at_gate
from .events import send_together
from .loop import Loop, forget_lost_reads
from .parkable import parked_limits, why_not
from .parking import Parking
from .prefork import is_spawned, share_all, share_the_rest
from .returning import Returning
from .settings import enabled, longest_hold, parks_all
from .sharing import SHARE_SECONDS, Sharing
from .slots import Slots, scale_without
from .throttle import watch_all, watch_late
from .unended import Unended
from .window import Window, refuse_prefetch_without_bound, running

if TYPE_CHECKING:
    from .gate import Gate

__all__ = ["GateStep"]

logger = logging.getLogger("rate_limiter")


class GateStep(bootsteps.StartStopStep, Host[Any]):
    """The gate in one worker's consumer. Jobs are Celery's requests."""

    label = "Gate"
    requires = ("celery.worker.consumer.tasks:Tasks", "celery.worker.consumer.gossip:Gossip")
    has_slots = True

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
        self.longest_hold = longest_hold(gate.app)
        self.consumer = consumer
        self.to_pool: Callable[[Any], None] = consumer.on_task_request
        self.engine: Engine[Any] = Engine(self, self._limits_for, max_held=gate.max_held)
        self.slots = Slots(consumer, self.forward, self.engine.started)
        self.autoscale = scale_without(consumer.controller, self._held)
        #: Jobs that are to go to the pool to end there. Not from within the engine, which is locked.
        self.refused: deque[Any] = deque()
        self.open = False
        self.unended = Unended(self.engine, lambda: self.loop.look())  # noqa: PLW0108 - it is made later
        #: The limits, and the names of their tasks.
        self.tasks_of = tasks_of = gate.tasks_of()
        limits = list(tasks_of)
        self.declared = {declared.limit: declared for declared in gate.declared}
        self.leftovers = Leftovers()
        refuse_prefetch_without_bound(consumer, limits)
        self.division = Division(consumer, **kwargs)
        self.division.add(limits)
        broker = consumer.conninfo.transport.driver_type
        by_default = parks_all(gate.app)
        self.parked_limits = parked_limits(limits, self.declared, broker, by_default=by_default)
        self.by_queue = (
            bool(self.parked_limits)
            or any(limit.overflow == "pause" for limit in limits)
            or any(declared.queue for declared in self.declared.values())
        )
        consumer.on_task_request = self.on_task_request
        watch_all(gate, tasks_of)
        spawned = is_spawned(consumer.controller)
        receipt.make_secret(spawned=spawned)
        if isinstance(consumer.pool, TaskPool):
            share_all(limit for limit, tasks in tasks_of.items() if tasks and not spawned)
            share_the_rest(consumer.controller, limits)
        self.announcements = Announcements(gate.app, tasks_of, self.declared)
        self.announcements.start()

    # -- life cycle: started anew with every connection -------------------------------------------

    def start(self, consumer: Any) -> None:
        """Begin with nothing held: the broker delivers again what an earlier connection held."""
        forget_lost_reads(consumer.hub)
        self.leftovers.put_back(consumer.task_consumer.channel, running())
        # The first is lower for a while after a connection loss, the second on the solo pool.
        self.engine.room.window = lambda _limit: max(
            consumer.initial_prefetch_count, consumer.max_prefetch_count
        )
        # RabbitMQ ends a channel whose message is unacknowledged for too long. Redis has leases.
        amqp = consumer.connection.transport.driver_type == "amqp"
        self.engine.longest_hold = self.longest_hold if amqp else math.inf
        self.window = Window(consumer, self.engine.jobs, self.engine.room.takes_more_of)
        self.queues = self.window.queues
        self.priorities = Priorities(lambda: consumer.task_consumer.queues)
        self.by_queue = self.by_queue or self.window.is_static
        if self.by_queue:  # for the queues that `celery control add_consumer` brings
            mark_messages(consumer.task_consumer.channel, on_consume=self.announcements.consumes)
        self.loop = Loop(consumer, self._next_due, self._work, self.window.update)
        self.returning = Returning(
            consumer,
            self.engine.lock,
            self.loop.has_timer,
            self.unended.acknowledged,
            self.unended.later,
        )
        self.parking = Parking(
            consumer,
            self.engine,
            self.parked_limits,
            offer=self.on_task_request,
            lost=lambda channel: self.leftovers.put_back(channel, running()),
            acknowledged=self.window.restore_one,
        )
        self.parking.start(self._kinds() if self.parked_limits else ())
        send_together(consumer.event_dispatcher)
        self.sharing = Sharing(consumer, self._counts, self._share)
        self.division.start()
        self.engine.look(self.tasks_of)
        self.open = True

    def stop(self, consumer: Any) -> None:
        """Forget what is held. It was never acknowledged, so the broker gives it out again."""
        with self.engine.lock:
            was_open, self.open = self.open, False
            self.unended.clear()
            self.refused.clear()
            self.slots.cancel(self.engine.unstarted())
            forgotten = self.engine.clear()
            for request in forgotten:  # else `inspect reserved` goes on showing it
                state.reserved_requests.discard(request)
                state.requests.pop(request.id, None)
        if was_open:
            self.sharing.stop()
            self.division.stop()
            self.loop.stop()
            self.returning.stop()
            warm = _ends_warm(consumer)
            self.parking.stop(forgotten, warm=warm)
            self.window.stop(forgotten, warm=warm)
        if left := self.leftovers.collect(running()):
            logger.info("%d jobs go back to their queues when Redis is there again", left)
        elif forgotten:
            logger.info("Gave %d held jobs back to the broker", len(forgotten))

    terminate = stop

    def shutdown(self, consumer: Any) -> None:
        """Leave nothing parked, when the last jobs have ended, before the connection is closed."""
        if self.enabled and hasattr(self, "parking"):
            self.parking.close(warm=_ends_warm(consumer))

    def info(self, consumer: Any) -> dict[str, Any]:
        """Return what ``celery inspect stats`` shows of the gate."""
        with self.engine.lock:
            held: Counter[str] = Counter()
            for limit, count in self.engine.room.held_by.items():
                held[record_of(limit).name] += count
            paused = sorted(self.engine.room.paused)
        limits = {record_of(limit).name: tally_of(limit).snapshot() for limit in self.tasks_of}
        return {"rate_limiter": {"held": dict(held), "paused": paused, "limits": limits}}

    def lanes_of(self, limit: Limit) -> dict[str, dict[str, Any]]:
        """Return where jobs of a limit are parked. See `Parking.lanes_of`."""
        if limit not in self.parked_limits or not self.open:
            return {}
        try:
            return self.parking.lanes_of(limit)
        except Exception:  # of the broker; the rest is to be shown all the same
            logger.warning(
                "Could not count the parked jobs of %s", record_of(limit).name, exc_info=True
            )
            return {}

    def where(self, task_id: str) -> str | None:
        """Return the lane that this worker has moved a job to."""
        return self.parking.where(task_id) if self.parked_limits and self.open else None

    # -- the way of a job -------------------------------------------------------------------------

    def on_task_request(self, request: Any) -> None:
        """Let a job go, or hold it. Stands in for ``consumer.on_task_request``."""
        if not self.consumer._maximum_prefetch_restored:
            self.window.restore_with(request)
        receipt.strip(request.request_dict)
        queue = self.queues.of(request) if self.by_queue else None
        try:
            plan = self.engine.plan(request.task, queue)
        except ImproperlyConfigured as error:  # of a task that was not known as the worker started
            watch_late(request.task, (), self.consumer.hostname)
            self.fail(request, error)
            self._forward_refused()
            return
        if not plan.limits:
            self.forward(request)
            if self.autoscale is not None:
                self.autoscale()
            return
        if not self.open or state.should_terminate:
            # The consumer is stopping, and the broker has the job. Celery's cold shutdown speaks to RabbitMQ in a
            # signal handler, while the loop may read a message: that may come with the body of the next one.
            return
        if not self.loop.is_own_thread:
            # Celery's timer thread brings a job whose ETA has come. On the solo pool it would run
            # here, beside the job that the consumer runs.
            self.consumer.call_soon(self.on_task_request, request)
            return
        steps = self.priorities.steps_behind(request.message, self.queues.of(request))
        parked = self.parking.of(plan, queue, request.name) if self.parked_limits else None
        behind = None if parked is None else self.parking.behind(parked, request)
        decision, demands = self.engine.offer(request, plan, queue, steps, behind=behind)
        if parked is not None:
            if decision == "park":
                self.parking.park(parked, request)
                return
            self.parking.note(request, decision)
        if decision == "go":
            receipt.issue(request.task, request.request_dict, demands)
            self.slots.forward(request, demands)
            if self.autoscale is not None:
                self.autoscale()
            return
        self.window.keep(request)
        self._forward_refused()
        self.loop.look()

    def release(self) -> None:
        """Let the jobs go whose moment has come."""
        if not self.open or self.engine.next_due > monotonic():
            return
        released = self.engine.release()
        self._forward_refused()
        for held in released:
            request = held.job
            if self.parked_limits:
                self.parking.note(request, "go")
            receipt.issue(request.task, request.request_dict, held.demands)
            self._forward(request, held.demands)
        self.engine.settle()
        if released and self.autoscale is not None:
            self.autoscale()

    def forward(self, request: Any) -> None:
        """Hand a job to the pool."""
        self.window.hand_on(request)
        self.to_pool(request)

    def _forward_refused(self) -> None:
        """Hand over what a limit has refused: the tasks end by themselves, each in its own way."""
        while self.refused:
            self._forward(self.refused.popleft())

    def _forward(self, request: Any, paid: Sequence[Demand] = ()) -> None:
        try:
            if paid:
                self.slots.forward(request, paid, first=True)
            else:
                self.forward(request)
        except Exception:  # it stays unacknowledged; the others are to go on
            logger.exception("Could not hand %s[%s] to the pool", request.name, request.id)

    def _limits_for(self, task: Any, queue: str | None) -> tuple[Limit, ...]:
        """Return the limits of a task's jobs. Asked at its first job: a task may be imported late."""
        check_task(task)
        limits = self.gate.limits_for(task, queue)
        self.division.add(limits)
        if limits:
            watch_late(task, self.gate.limits_for(task), self.consumer.hostname)
        self.announcements.found(task.name, limits)
        return limits

    def _kinds(self) -> Iterator[tuple[Plan, str, str]]:
        """Yield what is done with the jobs of each limited task from each queue."""
        app = self.gate.app
        for queue in app.amqp.queues.consume_from:
            for name in dict.fromkeys(name for names in self.tasks_of.values() for name in names):
                yield self.engine.plan(app.tasks[name], queue), queue, name

    def _counts(self) -> dict[str, int]:
        """Return how many jobs each limit holds, by its name."""
        with self.engine.lock:
            held_by = self.engine.room.held_by
        # Those that are parked are shared already: each worker has a few of them in hand.
        limits = set(self.tasks_of).difference(self.parked_limits)
        return {record_of(limit).name: held_by[limit] for limit in limits}

    def _share(self, shares: dict[str, int]) -> None:
        """Hold no more than these shares for a while: other workers are to have the rest."""
        if not self.open:
            return
        before = self._counts()
        most = {
            limit: shares[name] for limit in self.tasks_of if (name := record_of(limit).name) in shares
        }
        jobs = self.engine.share(most, SHARE_SECONDS, send_back=self.window.is_static)
        self.window.lower_now()
        self.engine.settle()
        self.window.give_back(jobs)
        self.loop.look()
        for name, share in shares.items():
            logger.info(
                "Limit %s: %d of %d held jobs stay here, other workers get the rest",
                name,
                share,
                before[name],
            )

    def _held(self) -> int:
        """Return how many of the reserved requests are not for the pool yet."""
        with self.engine.lock:
            return self.engine.room.held_by.total()

    def _next_due(self) -> float:
        # Asked several times for each job, so without min() in the usual case.
        due = self.engine.next_due
        return min(due, self.unended.due) if self.unended else due

    def _work(self) -> None:
        self.release()
        if self.unended:
            self.unended.work()

    # -- what the engine asks for -----------------------------------------------------------------

    def call_of(self, request: Any, asks_headers: bool) -> Call:
        """Return the arguments that a job was sent with."""
        headers = receipt.headers_of(request.request_dict) if asks_headers else None
        name = f"task {request.type}"
        return Call(name, request.args, request.kwargs, headers, parameters_of(request.task))

    def refuse(self, request: Any, demand: Demand, delay: float) -> bool:
        """End a job, or send it back, as ``when_limited`` says."""
        limit = demand.limit
        how = limit.when_limited
        if how == "retry" and request.eta and self.engine.can_hold(limit, delay):
            return False  # it was sent back before and comes at its turn: a few tokens are missing
        if how == "retry" and not self.returning.takes(request):
            return False
        if how in ("retry", "drop"):
            longest = self.engine.longest_hold  # it is unacknowledged while it waits for its ETA
            end = partial(refuse_at_gate, request, demand, delay, self.returning.send, longest)
            # A result backend that is down need not be asked for each job.
            self.unended.end(request, end, later=how == "drop" and bool(self.unended))
        else:
            receipt.refuse(request.task, request.request_dict, demand.limit, delay)
            self.refused.append(request)
        return True

    def fail(self, request: Any, error: Exception) -> None:
        """End a job with an error as its result: its task raises it."""
        receipt.fail(request.request_dict, error)
        self.refused.append(request)

    def gone(self, request: Any) -> bool:
        """Tell whether a held job was revoked or has expired; it is announced and acknowledged here."""
        return self.unended.end(request, request.revoked)

    def send_back(self, request: Any) -> bool:
        """Send a held job to the end of its queue."""
        if self.parked_limits and self.parking.give_back(request):
            return True
        if not self.returning.takes(request, unchanged=True):
            return False
        return self.unended.end(request, partial(self.returning.send, request))

    def unstarted(self, request: Any) -> bool:
        """Tell whether a job that went to the pool is still to start."""
        return self.slots.unstarted(request)

    def follow(self, held: int, most: int) -> None:
        """See that other jobs arrive beside the held ones."""
        if self.open:
            self.window.follow(held, most)

    def pause(self, queue: str, limit: Limit) -> None:
        """Stop consuming a queue."""
        self.queues.pause(queue, limit)

    def resume(self, queue: str) -> None:
        """Consume a queue again."""
        self.queues.resume(queue)

    def stuck(self, limit: Limit, held: int) -> None:
        """Tell that parking would let other jobs pass, where the user has not chosen."""
        broker = self.consumer.conninfo.transport.driver_type
        if limit.overflow is None and why_not(limit, self.declared.get(limit), broker) is None:
            logger.warning(
                "Limit %s: %d jobs are held, more wait in the queue, and the jobs behind them wait too. "
                "overflow='park' would let these pass; overflow='hold' says that it is meant so",
                record_of(limit).name,
                held,
            )

    def wake(self) -> None:
        """See that what is due goes soon."""
        if self.open:
            self.loop.wake()


def _ends_warm(consumer: Any) -> bool:
    """Tell whether the worker ends, not only its connection, and has the time to do it in order."""
    return consumer.blueprint.state != bootsteps.RUN and not state.should_terminate
