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
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from ..broker.origin import MARK, MOVED, can_be_sent_to, mark_messages, restore_origin
from ..broker.priority import Priorities
from ..broker.restore import Leftovers
from ..exceptions import RateLimitExceeded
from ..gating.engine import Engine, warn_of_unused
from ..gating.host import Host
from ..gating.limit import Call, Demand, Limit, is_of_a_signal
from ..gating.record import record_of
from .pausing import Pausing, check_queue
from .returning import Returning
from .window import DEFAULT_COUNT, Window

if TYPE_CHECKING:
    from .gate import Gate

__all__ = ["Session"]

logger = logging.getLogger("rate_limiter")

#: A moment that is closer than this, in seconds, is waited for in one go, see `Session.timeout`.
_EXACT: Final = 0.004

#: While messages are held, the loop waits no longer, in seconds: another thread that refunds or
#: configures a bucket cannot interrupt it.
_THREAD_POLL: Final = 0.5


class _Job:
    """A message on its way through the gate."""

    __slots__ = (
        *("args", "callback", "can_return", "held"),
        *("message", "queue", "was_sent_back", "window"),
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
        self.was_sent_back: bool = info.pop(MOVED, False)
        queue = info.pop(MARK, queue)
        #: The queue it came from; if nobody knows that, what comes nearest to it.
        self.queue: str = queue or info.get("routing_key") or ""
        #: Whether a copy can go to the end of its queue.
        self.can_return = queue is not None and can_be_sent_to(self.message.channel, queue)
        self.window = window
        #: Whether it counts among what its window holds.
        self.held = False

    def __str__(self) -> str:
        return f"a message of queue {self.queue}"


class Session(Host[_Job]):
    """What one loop holds back.

    Args:
        gate: Whose limits are enforced.
        on_refused: Called with a message and the error, when one ends without having run.

    """

    def __init__(self, gate: "Gate", on_refused: Callable[[Any, Exception], Any]) -> None:
        self._gate = gate
        self._on_refused = on_refused
        self._engine: Engine[_Job] = Engine(self, gate.limits_for, max_held=gate.max_held)
        self._engine.room.window = self._window_of
        self._returning = Returning(gone=self.gone, sent=self._on_sent)
        self._pausing = Pausing()
        self._inbox: deque[_Job] = deque()
        self._busy = False
        #: Whether there is anything for `poll` to do apart from the inbox.
        self._unsettled = False
        self._windows: dict[Any, Window] = {}
        self._leftovers = Leftovers()
        #: The prefetch counts that the consumers of queues have without a gate.
        self._counts: dict[str, int] = {}
        #: The highest of them, of all queues of a limit.
        self._count_of: dict[Limit, int] = {}
        #: For how many held messages there is to be room, and for how many at most.
        self._room = 0, 0
        #: The limits that the log has said are enforced, and those that it has said are for nothing.
        self._announced: set[Limit] = set()
        self._unused: set[Limit] = set()
        #: Whether there may be more of the latter: a consumer was attached.
        self._unwarned = False
        #: The consumers that were attached, and the names of their queues.
        self._consumers: list[Any] = []
        self._priorities = Priorities(
            lambda: (queue for consumer in self._consumers for queue in consumer.queues)
        )
        self._wrapped: WeakSet[Any] = WeakSet()
        self._queues: set[str] = set()
        #: Whether limited messages are taken in. They are not while the consumers are cancelled.
        self.open = True
        #: Whether this broker refuses a prefetch count for a whole channel.
        self.static = False
        gate.sessions.add(self)

    # -- consumers and callbacks ------------------------------------------------------------------

    def attach(self, consumer: Any) -> None:
        """Gate all messages of a consumer that has not begun to consume."""
        self.open = True
        self._cover(consumer)
        if self._gate.limits:
            mark_messages(consumer.channel, on_consume=self._on_consume)
        live = [each for each in self._consumers if each.channel.connection is not None]
        self._consumers = [*live, consumer]
        self._unsettled = self._unwarned = True
        if consumer in self._wrapped:  # it was revived
            return
        self._wrapped.add(consumer)
        if consumer.on_message:
            consumer.on_message = self.wrap(consumer.on_message)
        else:
            consumer.receive = self.wrap(consumer.receive)

    def _cover(self, consumer: Any) -> None:
        """Make room for what the limits of a consumer's queues hold, and announce them."""
        limits_of = {queue.name: self._engine.plan(queue.name).limits for queue in consumer.queues}
        limits = {limit for each in limits_of.values() for limit in each}
        for queue in consumer.queues:
            check_queue(queue, consumer, limits_of[queue.name])
        self._queues |= set(limits_of)
        if limits:
            window = self._window(consumer.channel)
            with self._occupied():
                count = window.add(consumer)
            self._counts.update(dict.fromkeys(limits_of, count))
            self._count_of.clear()
            self._pausing.add(consumer)
        for limit in limits - self._announced:
            names = [name for name, each in limits_of.items() if limit in each]
            logger.info(
                "Limit %s: %r for queue %s, enforced at the gate",
                record_of(limit).name,
                limit.bucket,
                ", ".join(names),
            )
        self._announced |= limits
        self._engine.look(limits)

    def _on_consume(self, queue: str) -> None:
        """Cover a queue that a consumer has got since it was attached."""
        if queue not in self._queues:
            for consumer in self._consumers:
                if any(each.name == queue for each in consumer.queues):
                    self._cover(consumer)

    def _warn_of_others(self) -> None:
        """Tell of the limits that are for no queue of the consumers that were attached."""
        self._unwarned = False
        for limit in self._gate.limits:
            if limit not in self._announced | self._unused:
                self._unused.add(limit)
                warn_of_unused(limit, "queue that is consumed", sorted(self._queues))

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
        forgotten = self.held_by.total()
        self._engine.clear()
        self._returning.forget()
        self._inbox.clear()
        self._windows.clear()
        self._pausing.forget()
        self._consumers.clear()
        self._queues.clear()
        if left := self._leftovers.collect():
            logger.info("%d messages go back to their queues when Redis is there again", left)
        elif forgotten:
            logger.info("Gave %d held messages back to the broker", forgotten)
        return forgotten

    def close(self) -> None:
        """Take nothing in any more, while the connection is still there."""
        self.open = False
        with self._occupied():
            self._returning.wait()
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
        return self._engine.room.held_by

    # -- the way of a message ---------------------------------------------------------------------

    def _pass(self, job: _Job) -> None:
        plan = self._engine.plan(job.queue)
        if not plan.limits:
            self._run(job)
            return
        if not self.open:
            return  # the consumers are stopping; the broker has the message
        with self._occupied():
            # Only the queues of attached consumers are paused, or consumed anew. The name of another one may be a
            # routing key, of which there is no end.
            queue = job.queue if job.queue in self._queues else None
            steps = self._priorities.steps_behind(job.message, queue)
            decision, _ = self._engine.offer(job, plan, queue, steps)
            if decision == "held":
                self._enter(job)
        if decision == "go":
            self._run(job)

    def _run(self, job: _Job) -> None:
        with self._occupied():
            job.callback(*job.args)

    def _enter(self, job: _Job) -> None:
        self._unsettled = True
        if not job.held:
            job.held = True
            job.window.keep(job.message)

    def _leave(self, job: _Job) -> None:
        if job.held:
            job.held = False
            job.window.hand_on(job.message)

    def _window(self, channel: Any) -> Window:
        window = self._windows.get(channel)
        if window is None:
            for other in [other for other in self._windows if other.connection is None]:
                del self._windows[other]  # of a connection that was lost
            with self._occupied():
                self._leftovers.put_back(channel)
            window = self._windows[channel] = Window(channel, self.static)
            if window.is_amqp:
                self._engine.longest_hold = self._gate.longest_hold
        return window

    def _window_of(self, limit: Limit) -> int:
        count = self._count_of.get(limit)
        if count is None:
            plan = self._engine.plan
            counts = [each for name, each in self._counts.items() if limit in plan(name).limits]
            count = self._count_of[limit] = max(counts, default=DEFAULT_COUNT)
        return count

    # -- what the engine asks for -----------------------------------------------------------------

    def call_of(self, job: _Job, asks_headers: bool) -> Call:
        """Return a message as callables of the user's are given it."""
        body = job.args[0] if len(job.args) > 1 else job.message.payload
        return Call(f"queue {job.queue}", (body, job.message), {}, job.message.headers, None)

    def refuse(self, job: _Job, demand: Demand, delay: float) -> bool:
        """End a message, or let it wait for its turn to the end of its queue."""
        bucket, tokens, limit = demand
        if limit.when_limited == "retry":
            if not job.can_return:
                return False
            if job.was_sent_back and self._engine.can_hold(limit, delay):
                return False  # it comes at its turn: a few tokens are missing
            self._engine.room.keep(job, limit)
            self._enter(job)
            longest = self._engine.longest_hold
            self._returning.add(job, record_of(limit).next_return(bucket, tokens, delay, longest))
        elif limit.when_limited == "drop":
            logger.info(
                "Dropped a message of queue %s: rate limit exceeded: %s",
                job.queue,
                record_of(limit).name,
            )
            self._end(job)
        else:
            reason = f"rate limit exceeded: {record_of(limit).name}"
            logger.debug("Refused a message of queue %s: %s", job.queue, reason)
            self._end(job, RateLimitExceeded(reason, delay))
        return True

    def fail(self, job: _Job, error: Exception) -> None:
        """End a message with an error."""
        logger.error("Rejected a message of queue %s: %s", job.queue, error)
        self._end(job, error)

    def send_back(self, job: _Job) -> bool:
        """Send a held message to the end of its queue."""
        if not (job.can_return and job.window.is_amqp):
            return False
        self._engine.room.keep(job)
        self._returning.add(job, 0.0)
        return True

    def gone(self, job: _Job) -> bool:
        """Tell whether a message's channel is closed: the broker has given it out again."""
        if job.message.channel.connection is not None:
            return False
        self._leave(job)
        return True

    def follow(self, held: int, most: int) -> None:
        """Note for how many held messages there is to be room, for the next `poll`."""
        self._unsettled = True
        self._room = held, most

    def _end(self, job: _Job, error: Exception | None = None) -> None:
        """Let a message end without having run: the broker discards it, or dead-letters it."""
        self._leave(job)
        if error is not None:
            try:
                self._on_refused(job.message, error)
            except (Exception, SystemExit, KeyboardInterrupt) as raised:
                if is_of_a_signal(raised):
                    raise
                logger.exception("on_refused failed for a message of queue %s", job.queue)
        if not job.message.acknowledged:
            job.message.reject()

    def _on_sent(self, job: _Job, gone: bool) -> None:
        """Let go of a message whose copy is at the end of its queue."""
        self._engine.room.let_go(job)
        if not gone:
            self._leave(job)

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
        if self._unwarned:
            self._warn_of_others()
        handled = 0
        now = monotonic()  # what becomes due meanwhile waits for the next call, behind new messages
        while handled < most:
            if self._inbox:
                self._pass(self._inbox.popleft())
            elif (job := self._release(now)) is not None:
                self._run(job)
            else:
                break
            handled += 1
        with self._occupied():
            self._returning.send()
            self._engine.settle()
            self._pausing.follow(self._engine.room.paused, self._can_cancel)
            self._follow()
        self._unsettled = bool(
            self.held_by
            or self._engine.room.paused
            or self._engine.next_due < math.inf
            or self._returning.next_due < math.inf
        )
        return handled

    def timeout(self, most: float) -> float:
        """Return after how many seconds, of at most so many, `poll` is to be called."""
        if self._inbox:
            return 0.0
        moments = [self._engine.next_due, self._returning.next_due]
        moments += [window.renewal for window in self._windows.values() if window.held]
        left = min(moments) - monotonic()
        if self._unsettled:
            left = min(left, _THREAD_POLL)
        # drain_events waits for as long once more when something came that was no message, on AMQP
        # the broker's heartbeat, on Redis an empty reply. Half of the time leaves room for that.
        return min(most, max(0.0, left if left < _EXACT else left / 2))

    def _release(self, now: float) -> _Job | None:
        with self._occupied():
            for held in self._engine.release(1, now):
                self._leave(held.job)
                return held.job
        return None

    def _follow(self) -> None:
        """Follow what is held: with the prefetch windows, and with the leases."""
        held, most = self._room
        for window in self._windows.values():
            if window.channel.connection is None:
                continue  # it was lost, and what is held of it goes when its turn comes
            window.follow(min(window.held, held), most, self._engine.room.takes_more_of)
            if window.lease_is_due:
                window.renew([m.delivery_tag for m in self._messages() if m.channel is window.channel])

    def _can_cancel(self, consumer: Any, queue: str) -> bool:
        return self._window(consumer.channel).can_cancel(queue)

    def _messages(self) -> Iterator[Any]:
        for job in self._engine.jobs():
            yield job.message

    @contextlib.contextmanager
    def _occupied(self) -> Iterator[None]:
        busy, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = busy
