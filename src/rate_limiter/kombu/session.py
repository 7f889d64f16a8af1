"""The gate in one consumer's loop: where limited messages are held and let go.

A message arrives while the loop reads from the broker. It goes to the user's callback if no limit is for
it or its tokens are there; else it is held, unacknowledged: whatever happens to the process, the broker
has it still. Between messages the loop calls `Session.poll`, which lets go what is due.

What talks to the broker happens in `poll` alone. A command to RabbitMQ reads from the connection until
its answer has come, and the messages that come before it are handed over in the middle of the command.
They are put aside here, so that nothing is handled inside something else, or before what came first.
"""

import contextlib
import functools
import heapq
import itertools
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..broker.origin import MARK, MOVED, can_be_sent_to, mark_messages, restore_origin
from ..broker.relay import Relay
from ..exceptions import RateLimitExceeded
from ..gating.holding import Holding
from ..gating.limit import Demand, Limit, price
from .window import DEFAULT, Window

if TYPE_CHECKING:
    from .gate import Gate

__all__ = ["Session"]

logger = logging.getLogger("rate_limiter")

#: When to try again what the broker did not do, in seconds.
_TRY_AGAIN: Final = 1.0

#: What is due so soon, in seconds, is waited for as a whole.
_EXACT: Final = 0.004

#: How long to wait for the last confirmations, in seconds: without them messages run twice.
_FAREWELL: Final = 0.5


class _Job:
    """A message on its way through the gate."""

    __slots__ = (
        *("args", "callback", "can_return", "copy", "ended"),
        *("held", "limit", "message", "queue", "window"),
    )

    def __init__(
        self, callback: Callable[..., Any], args: tuple[Any, ...], queue: str | None, window: Window
    ) -> None:
        self.callback = callback
        self.args = args
        self.message = args[-1]
        restore_origin(self.message)
        info = self.message.delivery_info
        #: Whether it was sent back before.
        self.copy: bool = info.pop(MOVED, False)
        queue = info.pop(MARK, queue)
        #: The queue it came from; if nobody knows that, what comes nearest to it.
        self.queue: str = queue or info.get("routing_key") or ""
        #: Whether a copy can go to the end of its queue.
        self.can_return = queue is not None and can_be_sent_to(self.message.channel, queue)
        self.window = window
        #: Whether it counts among what its window holds.
        self.held = False
        #: Whether it was refused; by which limit, if it waits for a turn to be sent back.
        self.ended = False
        self.limit: Limit | None = None


class _Plan(NamedTuple):
    """What the gate does with the messages of one queue."""

    limits: tuple[Limit, ...]
    #: What each of them is to take, where that is the same for all.
    demands: tuple[Demand, ...]


class _Paused(NamedTuple):
    consumer: Any
    queue: Any
    limit: Limit


class Session:
    """What one loop holds back.

    Args:
        gate: Whose limits are enforced.
        on_refused: Called with a message and the error, when one ends without having run.

    """

    def __init__(self, gate: "Gate", on_refused: Callable[[Any, Exception], Any]) -> None:
        self._gate = gate
        self._on_refused = on_refused
        self._held: Holding[_Job] = Holding(refuse=self._refuse, fail=self._fail, skip=self._skip)
        self._relay = Relay(moved=self._moved, failed=self._await_turn)
        self._count = itertools.count()
        #: Messages to be sent to the end of their queue, and when.
        self._turns: list[tuple[float, int, _Job]] = []
        self._turns_of: Counter[Limit] = Counter()
        self._inbox: deque[_Job] = deque()
        self._busy = False
        #: Whether there is anything for `poll` to do apart from the inbox.
        self._unsettled = False
        self._plans: dict[str, _Plan] = {}
        self._windows: dict[Any, Window] = {}
        self._own: dict[str, int] = {}
        self._bounds: dict[Limit, int] = {}
        self._consumers: dict[str, Any] = {}
        self._paused: dict[str, _Paused] = {}
        self._announced: set[Limit] = set()
        #: Whether limited messages are taken in. They are not while the consumers are cancelled.
        self.open = True
        #: Whether this broker refuses a prefetch count for a whole channel.
        self.static = False
        gate.sessions.add(self)

    # -- what it is put in front of ---------------------------------------------------------------

    def attach(self, consumer: Any) -> None:
        """Gate all messages of a consumer that has not begun to consume."""
        self.open = True
        plans = {queue.name: self._plan(queue.name) for queue in consumer.queues}
        limits = {limit for plan in plans.values() for limit in plan.limits}
        for queue in consumer.queues:
            _check(queue, consumer, plans[queue.name].limits)
        if limits:
            channel = consumer.channel
            window = self._window(channel)
            mark_messages(channel)
            own = consumer.prefetch_count or DEFAULT
            room = sum(limit.bound(own, self._gate.max_held) for limit in limits)
            with self._occupied():
                own = window.add(consumer, room)
            for name in plans:
                self._own[name] = own
                self._consumers[name] = consumer
                self._paused.pop(name, None)
            self._bounds.clear()
        for limit in limits - self._announced:
            names = [name for name, plan in plans.items() if limit in plan.limits]
            logger.info("Limit %s: %r for queue %s", limit.name, limit.bucket, ", ".join(names))
        self._announced |= limits
        if consumer.on_message:
            consumer.on_message = self.wrap(consumer.on_message)
        else:
            consumer.receive = self.wrap(consumer.receive)

    def warn_of_others(self) -> None:
        """Tell of the limits that are for no queue of the consumers that were attached."""
        for limit in self._gate.limits:
            if limit not in self._announced:
                self._announced.add(limit)
                logger.warning("Limit %s matches no queue that is consumed", limit.name)

    def wrap(self, callback: Callable[..., Any], queue: str | None = None) -> Callable[..., None]:
        """Return what calls ``callback`` with the same arguments once the tokens are taken."""

        @functools.wraps(callback)
        def gated(*args: Any) -> None:
            job = _Job(callback, args, queue, self._window(args[-1].channel))
            if self._busy or self._inbox:
                self._inbox.append(job)
            else:
                self._pass(job)

        return gated

    def forget(self) -> int:
        """Forget what is held, with the connection: the broker has it still. Return how many."""
        forgotten = len(self._held) + self._turns_of.total()
        self._held.clear()
        self._relay.close()
        self._turns.clear()
        self._turns_of.clear()
        self._inbox.clear()
        self._windows.clear()
        self._consumers.clear()
        self._paused.clear()
        if forgotten:
            logger.info("Gave %d held messages back to the broker", forgotten)
        return forgotten

    def close(self) -> None:
        """Take nothing in any more, while the connection is still there."""
        self.open = False
        with self._occupied():
            self._relay.wait(_FAREWELL)
            messages = list(self._messages())
            for window in self._windows.values():
                window.give_back([m for m in messages if m.channel is window.channel])

    @property
    def busy(self) -> bool:
        """Whether a message is being handled, or a command to the broker."""
        return self._busy

    @property
    def held_by(self) -> Counter[Limit]:
        """How many messages are held because of each limit."""
        return self._held.held_by + self._turns_of

    # -- the way of a message ---------------------------------------------------------------------

    def _pass(self, job: _Job) -> None:
        plan = self._plan(job.queue)
        if not plan.limits:
            self._run(job)
            return
        if not self.open:
            return  # the consumers are stopping; the broker has the message
        with self._occupied():
            try:
                demands = plan.demands or self._demands(job, plan.limits)
                goes = self._held.offer(job, demands, monotonic())
            except Exception as error:  # noqa: BLE001 - a callable of the user's, or its result
                self._fail(job, error)
                return
            if not goes and not job.ended:
                self._enter(job)
        if goes:
            self._run(job)

    def _run(self, job: _Job) -> None:
        with self._occupied():
            job.callback(*job.args)

    def _plan(self, queue: str) -> _Plan:
        plan = self._plans.get(queue)
        if plan is None:
            limits = self._gate.limits_for(queue)
            fixed = all(limit.fixed for limit in limits)
            plan = _Plan(limits, tuple(d for limit in limits for d in limit.fixed) if fixed else ())
            self._plans[queue] = plan
        return plan

    def _demands(self, job: _Job, limits: Sequence[Limit]) -> Sequence[Demand]:
        body = job.args[0] if len(job.args) > 1 else job.message.payload
        return price(limits, f"queue {job.queue}", (body, job.message), {}, job.message.headers)

    def _enter(self, job: _Job) -> None:
        self._unsettled = True
        if not job.held:
            job.held = True
            job.window.held += 1

    def _leave(self, job: _Job) -> None:
        if job.held:
            job.held = False
            job.window.held -= 1

    def _skip(self, job: _Job) -> bool:
        """Whether a message's channel is closed. Then the broker has given it out again."""
        if job.message.channel.connection is not None:
            return False
        self._leave(job)
        return True

    def _window(self, channel: Any) -> Window:
        window = self._windows.get(channel)
        if window is None:
            for other in [other for other in self._windows if other.connection is None]:
                del self._windows[other]  # of a connection that was lost
            window = self._windows[channel] = Window(channel, self.static)
        return window

    # -- those that do not wait -------------------------------------------------------------------

    def _refuse(self, job: _Job, demand: Demand, delay: float) -> bool:
        bucket, tokens, limit = demand
        if limit.when_limited == "retry":
            if not job.can_return:
                return False
            if job.copy and self.held_by[limit] < self._bound(limit):
                return False  # it comes when its turn is due, and waits for what little is missing
            # Held until its turn: back in its queue it would come again at once, and again.
            job.ended, job.limit = True, limit
            self._enter(job)
            self._turns_of[limit] += 1
            self._await_turn(job, limit.turn(bucket, tokens, delay))
        elif limit.when_limited == "drop":
            logger.info("Dropped a message of queue %s: rate limit exceeded: %s", job.queue, limit.name)
            self._end(job)
        else:
            reason = f"rate limit exceeded: {limit.name}"
            logger.info("Refused a message of queue %s: %s", job.queue, reason)
            self._end(job, RateLimitExceeded(reason, delay))
        return True

    def _fail(self, job: _Job, error: Exception) -> None:
        logger.error("Rejected a message of queue %s: %s", job.queue, error)
        self._end(job, error)

    def _end(self, job: _Job, error: Exception | None = None) -> None:
        """Let a message end without having run: the broker discards it, or dead-letters it."""
        job.ended = True
        self._leave(job)
        if error is not None:
            try:
                self._on_refused(job.message, error)
            except Exception:
                logger.exception("on_refused failed for a message of queue %s", job.queue)
        if not job.message.acknowledged:
            job.message.reject()

    def _await_turn(self, job: _Job, delay: float = _TRY_AGAIN) -> None:
        heapq.heappush(self._turns, (monotonic() + delay, next(self._count), job))

    def _send_back(self) -> None:
        now = monotonic()
        while self._turns and self._turns[0][0] <= now and not self._relay.full:
            job = heapq.heappop(self._turns)[2]
            if self._skip(job):
                self._uncount_turn(job)
                continue
            try:
                self._relay.send(job, job.message, job.queue)
            except Exception:
                logger.warning("Could not send back a message of queue %s", job.queue, exc_info=True)
                self._await_turn(job)
        self._relay.tend()

    def _moved(self, job: _Job) -> None:
        self._uncount_turn(job)
        if not self._skip(job):
            self._leave(job)
            job.message.ack()
            logger.debug("Sent a message to the end of queue %s", job.queue)

    def _uncount_turn(self, job: _Job) -> None:
        assert job.limit is not None  # noqa: S101 - for mypy
        self._turns_of[job.limit] -= 1

    # -- between messages -------------------------------------------------------------------------

    def poll(self, most: float = math.inf) -> int:
        """Let go what is due, and do what else is to be done between messages.

        Args:
            most: After so many messages, leave the others for the next time.

        Returns:
            How many messages were handled.

        """
        if self._busy or not (self._inbox or self._unsettled):  # called by a callback; nothing to do
            return 0
        handled = 0
        now = monotonic()
        while handled < most:
            if self._inbox:
                self._pass(self._inbox.popleft())
            elif (job := self._release(now)) is not None:
                self._run(job)
            else:
                break
            handled += 1
        with self._occupied():
            self._send_back()
            self._pause_and_resume()
            self._follow()
        self._unsettled = bool(
            self._held.held_by or self._turns_of.total() or self._paused or self._relay.due < math.inf
        )
        return handled

    def timeout(self, most: float) -> float:
        """Return after how many seconds, of at most so many, `poll` is to be called."""
        if self._inbox:
            return 0.0
        moments = [self._held.next_due] if self._held.held_by else []
        if self._turns and not self._relay.full:
            moments.append(self._turns[0][0])
        now = monotonic()
        moments.append(self._relay.due)
        moments += [window.renewal for window in self._windows.values() if window.held]
        left = min((moment for moment in moments if moment is not None), default=math.inf) - now
        # drain_events waits for as long once more when something came that was no message, on AMQP
        # the broker's heartbeat, on Redis an empty reply. Half of the time leaves room for that.
        return min(most, max(0.0, left if left < _EXACT else left / 2))

    def _release(self, now: float) -> _Job | None:
        with self._occupied():
            for job in self._held.release(now, 1):
                self._leave(job)
                return job
        return None

    def _follow(self) -> None:
        """Follow what is held: with the prefetch windows, and with the leases."""
        held_by = self.held_by
        held = sum(min(held, self._bound(limit)) for limit, held in held_by.items())
        most = sum(map(self._bound, held_by))
        for window in self._windows.values():
            if window.channel.connection is None:
                continue  # it was lost, and what is held of it goes when its turn comes
            window.follow(min(window.held, held), most)
            if window.lease_is_due:
                window.renew([m.delivery_tag for m in self._messages() if m.channel is window.channel])

    def _messages(self) -> Iterator[Any]:
        for job in self._held.jobs():
            yield job.message
        for _, _, job in self._turns:
            yield job.message

    def _bound(self, limit: Limit) -> int:
        bound = self._bounds.get(limit)
        if bound is None:
            owns = [own for name, own in self._own.items() if limit in self._plan(name).limits]
            bound = limit.bound(max(owns, default=DEFAULT), self._gate.max_held)
            self._bounds[limit] = bound
        return bound

    def _pause_and_resume(self) -> None:
        """Stop consuming a queue whose limit holds enough; take it up again at half of that."""
        held_by = self.held_by
        for limit, held in held_by.items():
            if limit.overflow == "pause" and held >= self._bound(limit):
                for name in [name for name in self._consumers if limit in self._plan(name).limits]:
                    self._pause(name, limit)
        for name, paused in list(self._paused.items()):
            if held_by[paused.limit] <= self._bound(paused.limit) // 2:
                self._resume(name)

    def _pause(self, name: str, limit: Limit) -> None:
        consumer = self._consumers[name]
        if name in self._paused or not consumer.consuming_from(name):
            return
        queue = next(queue for queue in consumer.queues if queue.name == name)
        consumer.cancel_by_queue(name)
        self._paused[name] = _Paused(consumer, queue, limit)
        logger.info("Paused queue %s: enough of %s is held", name, limit.name)

    def _resume(self, name: str) -> None:
        consumer, queue, _ = self._paused.pop(name)
        consumer.add_queue(queue)
        consumer.consume()
        logger.info("Resumed queue %s", name)

    @contextlib.contextmanager
    def _occupied(self) -> Iterator[None]:
        busy, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = busy


def _check(queue: Any, consumer: Any, limits: Sequence[Limit]) -> None:
    """Refuse what cannot be held, or not be paused."""
    if not limits:
        return
    if consumer.no_ack or queue.no_ack:
        raise ValueError(
            f"queue {queue.name} is consumed with no_ack, and limited by {limits[0].name}: the broker "
            "would forget what is held; consume it with acknowledgements"
        )
    pausing = next((limit for limit in limits if limit.overflow == "pause"), None)
    if pausing is not None and queue.auto_delete:
        raise ValueError(
            f"queue {queue.name} is auto_delete, so overflow='pause' of {pausing.name} would delete it: "
            "use overflow='hold'"
        )
