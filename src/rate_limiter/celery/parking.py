"""Parking: jobs of limits with ``overflow="park"`` wait in the broker, aside, in lanes (`broker.lane`).

The gate holds a few jobs of such a limit. The next ones are moved to the lane of their queue and their limits, and
come back through a channel and a prefetch window of their own. While there are jobs in a lane, new ones go there
too: first parked, first run. The broker is not asked whether there are any: a lane that is consumed, has room in
its window, and has brought nothing for a moment, is empty.

A job that the broker refuses (permissions, a full lane, no memory) is held, and the log says so once. The lane is
tried again later.

`outbox` sends jobs to lanes, `unparking` puts them back into their queues, `parked` is what is known of each lane.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import monotonic
from typing import Any, Final

from celery.worker import state

from ..broker.lane import Lane, lane_entity, lane_name
from ..broker.lanes import Lanes, lanes_on
from ..gating.engine import Decision, Engine, Plan
from ..gating.limit import Limit
from ..gating.record import listed, record_of
from .loop import while_in_use
from .outbox import Outbox
from .parkable import why_not
from .parked import Parked
from .unparking import adopt, put_back

__all__ = ["Parking"]

logger = logging.getLogger("rate_limiter")

#: A lane is consumed only while its next token is due in so many seconds.
_SOON: Final = 60.0

#: Seconds without a job after which a lane counts as empty, if it has had jobs at the start of the worker.
_QUIET_AT_START: Final = 5.0

#: Seconds between two looks at this worker's lanes.
_TICK: Final = 1.0

#: Seconds between two looks for lanes that other workers have left.
_LOOK_FOR_LANES: Final = 60.0

#: Seconds after which a lane that the broker has refused is tried again.
_TRY_AGAIN: Final = 10.0


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
        self._is_green = consumer.hub is None
        self._is_redis = consumer.connection.transport.driver_type == "redis"
        self._outbox = Outbox(consumer, self._refused, acknowledged)
        self._parked: dict[tuple[Plan, str], Parked | None] = {}
        self._by_channel: dict[Any, Parked] = {}
        self._broker: Lanes | None = None
        self._ticker: Any = None
        self._look_at = 0.0
        self._stopping = False
        #: Whether the last look at the lanes has failed: the log says so once.
        self._has_failed = False
        engine.room.parking = self._limits

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
            self._broker = lanes_on(self._consumer.connection, self._consumer.hostname)
            for queue in self._by_queue():
                self._open([parked for parked in self._all() if parked.queue == queue])
        except self._consumer.connection_errors:
            raise
        except Exception:
            logger.exception("No job is parked")
            self._engine.room.parking = frozenset()
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
        self._outbox.stop()
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
        return self._outbox.where(task_id)

    # -- the way of a job -------------------------------------------------------------------------

    def of(self, plan: Plan, queue: str | None, task: str) -> Parked | None:
        """Return where jobs of a plan and a task from a queue are parked. ``None``: they are not."""
        if queue is None:
            return None
        try:
            return self._parked[plan, queue]
        except KeyError:
            found = self._parked[plan, queue] = self._new(plan, queue)
            if found is not None:
                if plan.demands:  # what its jobs take does not depend on their arguments
                    found.tasks.add(task)
                if found.lane is None and self._broker is not None:
                    self._consumer.call_soon(self._open, [found])
            return found

    def behind(self, parked: Parked, request: Any) -> bool | None:
        """Tell whether jobs are parked that a job is to go behind. ``None``: it cannot be parked."""
        now = monotonic()
        if request.message.channel in self._by_channel or now < parked.broken_until:
            return None
        return None if parked.lane is None else parked.in_use(now)

    def park(self, parked: Parked, request: Any) -> None:
        """Move a job aside."""
        self._rest_if_late(parked)  # before it is sent: it would come back at once
        if self._outbox.put(parked, request):
            self._sweep(parked)

    def _sweep(self, parked: Parked) -> None:
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
        parked.swept(count, now)

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
        self._give_back(parked, [request])
        return True

    @staticmethod
    def _give_back(parked: Parked, requests: Sequence[Any]) -> None:
        """Put requests back to the front of their lane, the latest first."""
        assert parked.lane is not None  # noqa: S101 - for mypy
        parked.waiting.difference_update(requests)
        parked.lane.give_back([request.message for request in requests])
        for request in requests:
            request.acknowledged = True
            state.task_ready(request)

    def _refused(self, parked: Parked, request: Any, why: str) -> None:
        """Hold a job that the broker does not take."""
        self._break(parked, why)
        self._offer(request)

    def _break(self, parked: Parked, why: str) -> None:
        """Send nothing to a lane for a while: the broker has refused it."""
        parked.broken_until = monotonic() + _TRY_AGAIN
        self._engine.room.parking = self._engine.room.parking.difference(parked.limits)
        if not parked.said:
            parked.said = True
            logger.warning(
                "Jobs for %s are held: the broker does not take them there (%s). This is tried again",
                parked.name,
                why,
            )

    def _came_back(self, parked: Parked, message: Any) -> None:
        parked.saw_job(monotonic())
        self._outbox.came_back((message.headers or {}).get("id", ""))
        self._handle(message)

    # -- the lanes --------------------------------------------------------------------------------

    def _new(self, plan: Plan, queue: str) -> Parked | None:
        limits = [limit for limit in plan.limits if not limit.shadow]
        if self._limits.isdisjoint(limits):
            return None
        broker = "redis"  # any broker that can: only the limits are asked about
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
        return there or Parked(plan, lane_entity(entity, name), queue)

    def _entity(self, name: str) -> Any:
        queues = self._consumer.task_consumer.queues
        return next((queue for queue in queues if queue.name == name), None)

    def _all(self) -> list[Parked]:
        # The plans of several tasks may have a lane in common.
        return [parked for parked in dict.fromkeys(self._parked.values()) if parked is not None]

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
        tick = while_in_use(self._tick)
        every = partial(self._consumer.call_soon, tick) if self._is_green else tick
        self._ticker = self._consumer.timer.call_repeatedly(_TICK, every)
        self._tick()

    def _open(self, of_one_queue: Sequence[Parked]) -> None:
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

    def _use(self, parked: Parked, count: int) -> None:
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
        self._engine.room.parking = self._engine.room.parking.union(
            self._limits.intersection(parked.limits)
        )

    def _follow_tokens(self, parked: Parked) -> None:
        """Consume a lane while its next token is due soon."""
        lane = parked.lane
        if lane is None or self._stopping or self._rest_if_late(parked):
            return
        parked.rests = False
        if not lane.consumes:
            lane.consume(self._window(parked))

    def _rest_if_late(self, parked: Parked) -> bool:
        """Consume a lane no more if its next token is not due soon. Return whether that is so.

        Then what is in hand goes back to the lane, from its end, where that keeps the order.
        """
        late = self._engine.due_in(parked.plan) > _SOON
        if late and parked.lane is not None:
            parked.rests = True
            if parked.lane.consumes:
                parked.lane.rest()
            # A long pause, or a lower rate. The first one stays: it knows when the tokens come.
            if len(parked.waiting) > 1 and parked.lane.keeps_order:
                self._give_back(parked, self._engine.withdraw(parked.waiting, keep=1))
        return late

    def _window(self, parked: Parked) -> int:
        """Return how many jobs of a lane are in hand: those that go within a minute, and those that run."""
        consumer = self._consumer
        most = int(max(consumer.initial_prefetch_count, consumer.max_prefetch_count))
        slowest = min(limit.jobs_per_second for limit in parked.limits if not limit.shadow)
        running = consumer.pool.num_processes if consumer.app.conf.task_acks_late else 0
        return max(1, min(most, math.ceil(slowest * _SOON) + running))

    def _tick(self) -> None:
        """Look at the lanes; put back what others have left."""
        if self._stopping or not self._consumer.connection or self._broker is None:
            return
        now = monotonic()
        self._outbox.tend()
        held = set(self._engine.jobs())
        for parked in self._all():
            parked.waiting &= held
            if not parked.in_use(now):
                parked.since = None
            self._follow_tokens(parked)
        mine = self._by_queue()
        for queue in mine:
            self._open(
                [each for each in self._all() if each.queue == queue and 0 < each.broken_until <= now]
            )
        try:
            if self._is_redis:  # where the signs of a worker end by themselves
                for queue, lanes in mine.items():
                    self._broker.join(queue, lanes)
            if now >= self._look_at:
                self._look_at = now + (_LOOK_FOR_LANES if self._limits else math.inf)
                queues = [entity.name for entity in self._consumer.task_consumer.queues]
                self._look_at = min(self._look_at, now + adopt(self._broker, queues, mine))
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
                self._put_back(queue, lanes, in_hand, remove)
            except Exception:
                logger.warning(
                    "Could not put the parked jobs of queue %s back; they stay parked",
                    queue,
                    exc_info=True,
                )

    def _put_back(self, queue: str, lanes: Iterable[str], in_hand: Sequence[Any], remove: bool) -> None:
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
                    parked.lane.give_back(mine[parked.name][::-1])
            mine.clear()
        self._broker.leave(queue)
        if alone:
            put_back(self._broker, queue, lanes, mine, remove=remove)
