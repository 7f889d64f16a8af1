"""Parking: jobs of limits with ``overflow="park"`` wait in the broker, aside, in lanes (`broker.parking`).

The gate holds a few jobs of such a limit. The next ones are moved to the lane of their queue and their limits, and
come back through a channel and a prefetch window of their own. While there are jobs in a lane, new ones go there
too: first parked, first run. Whether there are any needs no question: a lane that is consumed, has room in
its window, and has brought nothing for a moment, is empty.

What the broker refuses (permissions, a full lane, no memory) is held, and said once. It is tried again later.
"""

import contextlib
import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import monotonic
from typing import Any, Final

from celery.worker import state

from ..broker.parking import Lane, Lanes, lane_entity, lane_name, lanes_of
from ..broker.relay import Relay
from ..gating.engine import Decision, Engine, Plan
from ..gating.limit import Limit
from ..gating.record import listed, record_of
from .parkable import why_not

__all__ = ["Parking"]

logger = logging.getLogger("rate_limiter")

#: A lane is consumed only while its next token is due in so many seconds.
_SOON: Final = 60.0

#: Seconds without a job from a lane after which it counts as empty; and at the start of a worker, where there are jobs.
_QUIET: Final = 0.25
_QUIET_AT_START: Final = 5.0

#: Seconds between two looks at the lanes, and at what other workers leave.
_TICK: Final = 1.0
_LOOK_FOR_LANES: Final = 60.0
#: The same, while there are some that another worker uses, or did until it was killed.
_LOOK_AGAIN: Final = 5.0

#: Seconds after which a lane that the broker has refused is tried again.
_TRY_AGAIN: Final = 10.0

#: How many messages are looked at when Redis moves jobs: the more of them are moved, the more; and seconds until the
#: next time if they are few.
_SWEEP_LEAST: Final = 50
_SWEEP_MOST: Final = 400
_SWEEP_AGAIN: Final = 0.1

#: Of so many jobs a worker remembers where it has parked them.
_REMEMBERED: Final = 10_000

#: Seconds to wait, when the connection ends, for the last confirmations: without them jobs run twice.
_FAREWELL: Final = 0.5


class _Parked:
    """The jobs of one queue and one set of limits."""

    def __init__(self, plan: Plan, entity: Any, queue: str) -> None:
        self.plan = plan
        self.entity = entity
        self.name: str = entity.name
        #: The queue that they come from.
        self.queue = queue
        #: How this connection consumes them. ``None``: it does not yet.
        self.lane: Lane | None = None
        #: Whether it is not consumed for a while.
        self.rests = False
        #: Those that have come back, and have not been let go.
        self.waiting: set[Any] = set()
        #: How many are on their way there.
        self.leaving = 0
        #: Until when there may be jobs in the lane that have not come.
        self.quiet_at = 0.0
        #: The tasks whose jobs go there, whatever their arguments.
        self.tasks: set[str] = set()
        #: How many messages of the queue are looked at, the next time that they are moved there inside the server, and
        #: when that may be.
        self.sweep = _SWEEP_LEAST
        self.sweep_at = 0.0
        #: Since when there are some. ``None``: there are none.
        self.since: float | None = None
        #: Until when nothing is sent there: the broker has refused it.
        self.broken_until = 0.0
        self.said = False

    @property
    def limits(self) -> tuple[Limit, ...]:
        """Their limits."""
        return self.plan.limits


class Parking:
    """The lanes of one connection of a worker.

    Args:
        consumer: Celery's consumer, connected.
        engine: The gate's engine.
        limits: The limits whose jobs are parked.
        offer: Takes a job that was to be parked and cannot be: it is held.
        lost: Called with a channel whose unacknowledged jobs are to be put back if it is lost.
        acknowledged: Called when a job was parked, and is acknowledged.

    """

    def __init__(
        self,
        consumer: Any,
        engine: Engine[Any],
        limits: Iterable[Limit],
        offer: Callable[[Any], None],
        lost: Callable[[Any], None],
        acknowledged: Callable[[], None],
    ) -> None:
        self._consumer = consumer
        self._engine = engine
        self._limits = frozenset(limits)
        self._offer = offer
        self._lost = lost
        self._acknowledged = acknowledged
        self._is_green = consumer.hub is None
        self._is_redis = consumer.connection.transport.driver_type == "redis"
        self._relay = Relay(self._moved, self._failed, consumer.hub)
        #: Jobs that are to be parked, as soon as the relay takes them.
        self._outbox: deque[tuple[_Parked, Any]] = deque()
        #: The lanes of the last jobs that were parked, by their ids.
        self._moved_to: OrderedDict[str, str] = OrderedDict()
        self._parked: dict[tuple[Plan, str], _Parked | None] = {}
        self._by_channel: dict[Any, _Parked] = {}
        self._broker: Lanes | None = None
        self._ticker: Any = None
        self._look_at = 0.0
        self._stopping = False
        self._has_failed = False
        engine.parking = self._limits

    # -- life cycle -------------------------------------------------------------------------------

    def start(self, kinds: Iterable[tuple[Plan, str, str]]) -> None:
        """Begin, before the worker consumes.

        Args:
            kinds: The plans that jobs may have, as far as known now, each with the names of its queue and task.

        """
        for plan, queue, task in kinds:
            self.of(plan, queue, task)
        self._handle = self._consumer.create_task_handler()
        try:
            self._broker = lanes_of(self._consumer.connection, self._consumer.hostname)
            for queue in self._by_queue():
                self._open([parked for parked in self._all() if parked.queue == queue])
        except self._consumer.connection_errors:
            raise
        except Exception:
            logger.exception("No job is parked")
            self._engine.parking = frozenset()
        # Not now: a job that comes before the worker's loop runs would find no pool.
        self._consumer.call_soon(self._begin)

    def stop(self, forgotten: Sequence[Any], *, warm: bool) -> None:
        """End, with the connection or the worker.

        Args:
            forgotten: The requests that were held, the oldest first.
            warm: The worker ends, and the connection is there: jobs go back to their queues if this is the
                last worker that would read them.

        """
        self._stopping = True
        if self._ticker is not None:
            self._consumer.timer.cancel(self._ticker)
        self._outbox.clear()
        self._relay.wait(_FAREWELL)
        self._relay.close()
        if not warm:
            return
        for parked in self._all():
            if parked.lane is not None:
                with contextlib.suppress(Exception):  # then nothing of it can be put back either
                    parked.lane.rest()
        if self._broker is not None and self._by_channel:
            with contextlib.suppress(Exception):
                self._broker.calm([*self._by_channel, self._consumer.task_consumer.channel])
        self._put_back_all([request.message for request in forgotten])

    def close(self, *, warm: bool) -> None:
        """Close the channels, when the last jobs that run have been acknowledged."""
        for parked in self._all():
            if parked.lane is not None:
                parked.lane.close()
        if warm:
            self._put_back_all([], remove=True)
        self._by_channel.clear()

    # -- what is there ----------------------------------------------------------------------------

    def lanes_of(self, limit: Limit) -> dict[str, dict[str, Any]]:
        """Return the lanes for jobs of a limit: how many jobs each has now, and for how long it has had some.

        The seconds are those since this worker has found the lane empty, or has begun.
        """
        if self._broker is None:
            return {}
        now, found = monotonic(), {}
        for parked in self._all():
            if limit in parked.limits and limit in self._limits:
                count = self._broker.count(parked.name)
                seconds = round(now - parked.since, 3) if count and parked.since is not None else 0.0
                found[parked.name] = {"jobs": count, "seconds": seconds}
        return found

    def where(self, task_id: str) -> str | None:
        """Return the lane that this worker has moved a job to, one of the last 10,000, if it has not come back."""
        return self._moved_to.get(task_id)

    # -- the way of a job -------------------------------------------------------------------------

    def of(self, plan: Plan, queue: str | None, task: str) -> _Parked | None:
        """Return where jobs of a plan and a task from a queue are parked. ``None``: they are not."""
        if queue is None:
            return None
        try:
            return self._parked[plan, queue]
        except KeyError:
            found = self._parked[plan, queue] = self._new(plan, queue)
            if (
                found is not None and plan.demands
            ):  # what its jobs take does not depend on their arguments
                found.tasks.add(task)
            if found is not None and found.lane is None and self._broker is not None:
                self._consumer.call_soon(self._open, [found])
            return found

    def behind(self, parked: _Parked, request: Any) -> bool | None:
        """Tell whether jobs are parked that a job is to go behind. ``None``: it cannot be parked."""
        now = monotonic()
        if request.message.channel in self._by_channel or now < parked.broken_until:
            return None
        return None if parked.lane is None else self._in_use(parked, now)

    @staticmethod
    def _in_use(parked: _Parked, now: float) -> bool:
        """Tell whether there may be jobs in a lane, or on their way there."""
        full = parked.lane is not None and parked.lane.full
        if parked.waiting or parked.leaving or parked.rests or full:
            parked.quiet_at = now + _QUIET
        return now < parked.quiet_at

    def park(self, parked: _Parked, request: Any) -> None:
        """Move a job aside."""
        self._rest_if_late(parked)  # it would come back at once
        state.task_ready(request)
        parked.leaving += 1
        if self._outbox or self._relay.full:
            self._outbox.append((parked, request))
            if self._relay.blocked:
                self._hold_outbox("the broker is short of memory or disk space")
        else:
            self._send(parked, request)
            self._sweep(parked)

    def _sweep(self, parked: _Parked) -> None:
        """Let the broker itself move the next jobs aside, if it can.

        On Redis no message is on its way while one is handled, so the order stays.
        """
        now = monotonic()
        if self._broker is None or not parked.tasks or now < max(parked.sweep_at, parked.broken_until):
            return
        try:
            count = self._broker.sweep(parked.queue, parked.name, parked.tasks, parked.sweep)
        except self._consumer.connection_errors:
            raise
        except Exception as error:  # noqa: BLE001 - a lane that Redis does not let us write to
            self._break(parked, repr(error))
            return
        if count >= parked.sweep // 2:
            parked.sweep = min(2 * parked.sweep, _SWEEP_MOST)
        else:
            parked.sweep, parked.sweep_at = _SWEEP_LEAST, now + _SWEEP_AGAIN

    def note(self, request: Any, decision: Decision) -> None:
        """Take note of a job that is held now, or was let go."""
        parked = self._by_channel.get(request.message.channel)
        if parked is None:
            return
        if decision == "held":
            parked.waiting.add(request)
        elif decision == "go":
            parked.waiting.discard(request)
            # Before it is acknowledged, and the next one comes, which would be in hand for long.
            self._rest_if_late(parked)

    def give_back(self, request: Any) -> bool:
        """Let a job wait in its lane again that was held for too long. ``False``: it is of no lane."""
        parked = self._by_channel.get(request.message.channel)
        if parked is None or parked.lane is None:
            return False
        parked.waiting.discard(request)
        parked.lane.give_back([request.message])
        request.acknowledged = True
        state.task_ready(request)
        return True

    def _send(self, parked: _Parked, request: Any) -> None:
        try:
            self._relay.send((parked, request), request.message, parked.name, as_it_came=True)
        except Exception as error:
            if self._is_redis and isinstance(error, self._consumer.connection_errors):
                raise  # it may have been moved; the next connection knows
            self._refused(parked, request, repr(error))
            return
        if self._is_green:
            # Nobody tells of confirmations there.
            self._relay.wait(_FAREWELL)

    def _moved(self, job: tuple[_Parked, Any]) -> None:
        parked, request = job
        parked.leaving -= 1
        now = monotonic()
        parked.quiet_at = now + _QUIET
        parked.since = parked.since or now
        self._moved_to[request.id] = parked.name
        if len(self._moved_to) > _REMEMBERED:
            self._moved_to.popitem(last=False)
        message = request.message
        if not message.acknowledged and message.channel.connection is not None:
            message.ack_log_error(logger, self._consumer.connection_errors)
        request.acknowledged = True
        if not self._stopping:
            self._acknowledged()
            self._flush()

    def _failed(self, job: tuple[_Parked, Any]) -> None:
        if not self._stopping:
            self._refused(*job, "it was not confirmed")

    def _flush(self) -> None:
        while self._outbox and not self._relay.full:
            self._send(*self._outbox.popleft())

    def _hold_outbox(self, why: str) -> None:
        outbox, self._outbox = list(self._outbox), deque()
        for parked, request in outbox:
            self._refused(parked, request, why)

    def _refused(self, parked: _Parked, request: Any, why: str) -> None:
        """Hold a job that the broker does not take."""
        parked.leaving -= 1
        self._break(parked, why)
        state.task_reserved(request)
        self._offer(request)

    def _break(self, parked: _Parked, why: str) -> None:
        parked.broken_until = monotonic() + _TRY_AGAIN
        self._engine.parking = self._engine.parking.difference(parked.limits)
        if not parked.said:
            parked.said = True
            logger.warning(
                "Jobs for %s are held: the broker does not take them there (%s). This is tried again",
                parked.name,
                why,
            )

    def _came_back(self, parked: _Parked, message: Any) -> None:
        now = monotonic()
        parked.quiet_at = now + _QUIET
        parked.since = parked.since or now
        if self._moved_to:
            self._moved_to.pop((message.headers or {}).get("id", ""), None)
        self._handle(message)

    # -- the lanes --------------------------------------------------------------------------------

    def _new(self, plan: Plan, queue: str) -> _Parked | None:
        limits = [limit for limit in plan.limits if not limit.shadow]
        if self._limits.isdisjoint(limits):
            return None
        broker = "redis"  # any that can: this is about the limits
        others = [limit for limit in limits if limit not in self._limits]
        if any(not limit.has_bucket or limit.patience < math.inf for limit in others):
            logger.info(
                "Jobs of queue %s with the limits %s are held, not parked, because of %s",
                queue,
                listed(record_of(limit).name for limit in limits),
                listed(record_of(limit).name for limit in others if why_not(limit, None, broker)),
            )
            return None
        entity = self._entity(queue)
        if entity is None or entity.exclusive or entity.exchange.type == "fanout":
            return None
        name = lane_name(queue, (record_of(limit).name for limit in limits))
        # The tasks of a limit have a plan each, and the lane in common.
        there = next((parked for parked in self._all() if parked.name == name), None)
        return there or _Parked(plan, lane_entity(entity, name), queue)

    def _entity(self, name: str) -> Any:
        queues = self._consumer.task_consumer.queues
        return next((queue for queue in queues if queue.name == name), None)

    def _all(self) -> list[_Parked]:
        every = dict.fromkeys(
            self._parked.values()
        )  # the plans of several tasks may have one in common
        return [parked for parked in every if parked is not None]

    def _by_queue(self) -> dict[str, dict[str, list[str]]]:
        """Return the lanes of each queue, and the names of the limits that they are for."""
        found: dict[str, dict[str, list[str]]] = {}
        for parked in self._all():
            names = [record_of(limit).name for limit in parked.limits]
            found.setdefault(parked.queue, {})[parked.name] = names
        return found

    def _begin(self) -> None:
        if self._stopping or self._broker is None:
            return
        every = partial(self._consumer.call_soon, self._tick) if self._is_green else self._tick
        self._ticker = self._consumer.timer.call_repeatedly(_TICK, every)
        self._tick()

    def _open(self, of_one_queue: Sequence[_Parked]) -> None:
        """Begin to use lanes."""
        if self._stopping or self._broker is None or not of_one_queue:
            return
        queue = of_one_queue[0].queue
        try:
            self._broker.join(queue, self._by_queue()[queue])
            counts = self._broker.declare(parked.entity for parked in of_one_queue)
        except self._consumer.connection_errors:
            raise
        except Exception as error:  # noqa: BLE001 - permissions
            counts = {parked.name: error for parked in of_one_queue}
        for parked in of_one_queue:
            count = counts[parked.name]
            if isinstance(count, Exception):
                self._break(parked, repr(count))
            else:
                self._use(parked, count)

    def _use(self, parked: _Parked, count: int) -> None:
        consumer = self._consumer
        if parked.lane is None:
            parked.lane = lane = Lane(
                consumer.connection,
                parked.entity,
                parked.queue,
                partial(self._came_back, parked),
                on_decode_error=consumer.on_decode_error,
                accept=consumer.app.conf.accept_content,
            )
            self._by_channel[lane.channel] = parked
            self._lost(lane.channel)
            parked.quiet_at = monotonic() + (_QUIET_AT_START if count else 0.0)
        if parked.said:
            parked.said = False
            logger.info("Jobs are parked in %s again", parked.name)
        parked.broken_until = 0.0
        self._engine.parking = self._engine.parking.union(self._limits.intersection(parked.limits))

    def _follow_tokens(self, parked: _Parked) -> None:
        """Consume a lane while its next token is due soon."""
        lane = parked.lane
        if lane is None or self._stopping or self._rest_if_late(parked):
            return
        parked.rests = False
        if not lane.consumes:
            lane.consume(self._window(parked))

    def _rest_if_late(self, parked: _Parked) -> bool:
        """Consume a lane no more if its next token is not due soon. Return whether that is so."""
        late = self._engine.due_in(parked.plan) > _SOON
        if late and parked.lane is not None:
            parked.rests = True
            if parked.lane.consumes:
                parked.lane.rest()
        return late

    def _window(self, parked: _Parked) -> int:
        """Return how many jobs of a lane are in hand: those that go within a minute, and those that run."""
        consumer = self._consumer
        most = int(max(consumer.initial_prefetch_count, consumer.max_prefetch_count))
        slowest = min(limit.jobs_per_second for limit in parked.limits if not limit.shadow)
        running = consumer.pool.num_processes if consumer.app.conf.task_acks_late else 0
        return max(1, min(most, math.ceil(slowest * _SOON) + running))

    def _tick(self) -> None:
        """Look at the lanes; put back what others have left."""
        if self._stopping or not self._consumer.connection:
            return
        now = monotonic()
        if self._outbox and self._relay.blocked:
            self._hold_outbox("the broker is short of memory or disk space")
        self._relay.tend()
        self._flush()
        held = set(self._engine.jobs())
        for parked in self._all():
            parked.waiting &= held
            if not self._in_use(parked, now):
                parked.since = None
            self._follow_tokens(parked)
        for queue in self._by_queue():
            self._open(
                [each for each in self._all() if each.queue == queue and 0 < each.broken_until <= now]
            )
        try:
            self._join()
            if now >= self._look_at:
                self._look_at = now + (_LOOK_FOR_LANES if self._limits else math.inf)
                if self._adopt():
                    self._look_at = now + _LOOK_AGAIN
            self._has_failed = False
        except self._consumer.connection_errors:
            raise
        except Exception:
            if not self._has_failed:
                # A worker that parks nothing only looks for what others have left, and may have no right to.
                level = logging.WARNING if self._limits else logging.DEBUG
                logger.log(level, "Could not look after the lanes of parked jobs", exc_info=True)
            self._has_failed = True
        if not self._limits and self._look_at == math.inf and self._ticker is not None:
            self._consumer.timer.cancel(self._ticker)  # it was for the lanes that others have left
            self._ticker = None

    def _join(self) -> None:
        """Renew this worker's signs, where they end by themselves."""
        if self._broker is not None and self._is_redis:
            for queue, lanes in self._by_queue().items():
                self._broker.join(queue, lanes)

    def _adopt(self) -> bool:
        """Put back the jobs of lanes that nobody uses: their limits are gone, or have other names.

        Returns:
            Whether other workers use lanes that this one does not know.

        """
        assert self._broker is not None  # noqa: S101 - for mypy
        mine, others = self._by_queue(), False
        for queue in [entity.name for entity in self._consumer.task_consumer.queues]:
            lanes = [lane for lane in self._broker.there(queue) if lane not in mine.get(queue, ())]
            unused = self._broker.unused(queue, lanes)
            others = others or len(unused) < len(lanes)
            for lane in unused:
                count = self._broker.put_back(lane, queue)
                if self._broker.alone(queue):
                    self._broker.remove(queue, [lane])
                if count:
                    logger.info(
                        "Put %d jobs back into queue %s: no limit parks in %s", count, queue, lane
                    )
        return others

    def _put_back_all(self, in_hand: Sequence[Any], *, remove: bool = False) -> None:
        """Put back the jobs of all lanes of those queues that no other worker looks after.

        Args:
            in_hand: Messages that this worker has in hand, the oldest first.
            remove: Delete the lanes too. Not while jobs of them run that acknowledge late: RabbitMQ would delete
                these messages with them.

        """
        if self._broker is None:
            return
        for queue, lanes in self._by_queue().items():
            try:
                self._put_back(queue, list(lanes), in_hand, remove)
            except Exception:
                logger.warning(
                    "Could not put the parked jobs of queue %s back; they stay parked",
                    queue,
                    exc_info=True,
                )

    def _put_back(self, queue: str, lanes: list[str], in_hand: Sequence[Any], remove: bool) -> None:
        assert self._broker is not None  # noqa: S101 - for mypy
        mine: dict[str, list[Any]] = {}
        for message in in_hand:
            parked = self._by_channel.get(message.channel)
            if parked is not None and parked.queue == queue:
                mine.setdefault(parked.name, []).append(message)
        alone = self._broker.alone(queue)
        if self._is_redis or not alone:
            for parked in self._all():
                if parked.lane is not None and parked.name in mine:
                    parked.lane.give_back(reversed(mine[parked.name]))
            mine.clear()
        self._broker.leave(queue)
        if not alone:
            return
        lanes = list({**dict.fromkeys(lanes), **dict.fromkeys(self._broker.there(queue))})
        count = sum(self._broker.put_back(lane, queue, mine.get(lane, ())) for lane in lanes)
        if remove:
            self._broker.remove(queue, lanes)
        if count:
            logger.info("Put %d parked jobs back into queue %s: no other worker is there", count, queue)
