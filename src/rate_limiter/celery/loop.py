"""When the gate looks at what it holds: in the worker's loop, whatever kind of loop that is.

On prefork and threads pools Celery has an event loop, and on green pools a timer that runs in the
consumer's own thread: the gate keeps one timer there, for all that it holds. On the solo pool, and where
the broker has no event loop (``memory://``, Windows), Celery's timer is a second thread, which would run
jobs beside the consumer's: there the gate works around the consumer's own wait for messages.
"""

import contextlib
import math
import socket
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, Final
from weakref import WeakMethod

from celery import bootsteps
from celery.worker import state

__all__ = ["Loop", "forget_lost_reads", "while_in_use"]

#: The least seconds that the timer is set ahead. The event loop fires a timer that is due already once
#: more in the same turn, and reads no messages in between.
_LEAST: Final = 0.001

#: Without an event loop: seconds between two looks while a job with an ETA is in the worker, which
#: Celery's timer thread brings; it cannot interrupt the wait for messages.
_ETA_POLL: Final = 0.1

#: Seconds between two looks where another thread cannot interrupt the wait (no event loop) to tell that a
#: job has started, or a bucket was refunded or configured.
_THREAD_POLL: Final = 0.5

#: The name of what kombu's event loop calls to read on (kombu/transport/base.py).
_READ: Final = "Transport._make_reader.<locals>._read"


class Loop:
    """The loop of one connection.

    Args:
        consumer: Celery's consumer.
        due: Returns the moment, by the monotonic clock, of the next `work`. It may be infinite.
        work: Does what is due; does nothing if nothing is.
        flush: Tells the broker what Celery's event loop tells it in each turn: the prefetch count.

    """

    def __init__(
        self,
        consumer: Any,
        due: Callable[[], float],
        work: Callable[[], None],
        flush: Callable[[], None],
    ) -> None:
        self._consumer = consumer
        self._due = due
        self._work = work
        self._thread = threading.get_ident()
        self._timer: Any = None
        self._timer_at = math.inf
        #: What the timer calls. Made once: a timer is set for each job that is held.
        self._fire = while_in_use(self._on_timer)
        #: Whether `work` may be called by a timer.
        self._is_green = getattr(consumer.pool, "is_green", False)
        self.has_timer = consumer.hub is not None or self._is_green
        self._longest = _THREAD_POLL if consumer.hub is None else math.inf
        #: The connection whose `drain_events` is replaced.
        self._connection: Any = None
        self._waker: _Waker | None = None
        if consumer.hub is not None and not hasattr(consumer.hub, "_waker"):
            self._waker = _Waker(consumer.hub, self.look)
        if consumer.hub is None:
            self._work_between_messages(flush)

    @property
    def is_own_thread(self) -> bool:
        """Whether this is the thread in which jobs may be let go."""
        return self.has_timer or threading.get_ident() == self._thread

    def look(self) -> None:
        """See that `work` is called when something is due. For the loop's own thread."""
        # Until there is nothing more: a signal handler may change a bucket meanwhile.
        while self.has_timer and (due := self._due()) < math.inf:
            now = monotonic()
            moment = min(max(due, now + _LEAST), now + self._longest)
            if moment >= self._timer_at:  # a timer that is due is not put off
                break
            self._cancel()
            self._timer_at = moment
            self._timer = self._consumer.timer.call_at(moment, self._fire)

    def wake(self) -> None:
        """See that `work` is called soon. For any thread."""
        if self._is_green or threading.get_ident() == self._thread:
            self.look()
        elif self._waker is not None:
            self._waker.wake()
        elif self.has_timer:
            self._consumer.call_soon(self.look)

    def stop(self) -> None:
        """End it, with the connection."""
        self._cancel()
        if self._connection is not None:
            # On green pools a timer of Celery's keeps each lost connection for ever: not this loop with it.
            self._connection.__dict__.pop("drain_events", None)
        if self._waker is not None:
            self._waker.close()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._consumer.timer.cancel(self._timer)
        self._timer, self._timer_at = None, math.inf

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, math.inf
        try:
            self._work()
        finally:
            self.look()
        if getattr(self._consumer.hub, "_ready", None):
            # What a timer leaves to call_soon, an acknowledgement for one, the event loop does only
            # after its next sleep. This ends the sleep.
            self._consumer.timer.call_after(_LEAST, int)

    def _work_between_messages(self, flush: Callable[[], None]) -> None:
        """Without an event loop, do what is due around the consumer's own wait for messages.

        Celery's loop there (celery.worker.loops.synloop) blocks in ``drain_events`` until a message
        has come, for up to two seconds. On green pools each of its turns costs another 0.1 s, so this
        stays in for the two seconds, and does in between what a turn of that loop does.
        """
        consumer = self._consumer
        self._connection = consumer.connection
        drain = self._connection.drain_events

        def drain_events(timeout: float | None = None) -> None:
            end = math.inf if timeout is None else monotonic() + timeout
            while consumer.connection and consumer.blueprint.state == bootsteps.RUN:
                self._work()
                flush()
                due = self._due()
                left = max(0.001, min(end, due) - monotonic())
                if due < math.inf:
                    left = min(left, self._longest)
                if getattr(state, "scheduled_requests", True):  # Celery 5.5 does not tell
                    left = min(left, _ETA_POLL)
                try:
                    drain(timeout=None if left == math.inf else left)
                except TimeoutError:
                    if monotonic() >= end:
                        raise
                state.maybe_shutdown()
                consumer.perform_pending_operations()

        self._connection.drain_events = drain_events


def forget_lost_reads(hub: Any) -> None:
    """Let an event loop read no more from connections that are lost. To be called before it has a new one.

    kombu's loop is reset as a connection is lost, and then reads once more from those that it reads from
    (`Hub._close`). What that has asked for the next turn stays. There it raises, and Celery takes the new connection
    for lost too: all that has come on it is redelivered, and a job that had run on it by then runs again.
    """
    ready: set[Any] = getattr(hub, "_ready", set())
    for callback in list(ready):  # other threads add to it meanwhile
        if getattr(getattr(callback, "fun", None), "__qualname__", "") == _READ:
            ready.discard(callback)


def while_in_use(method: Callable[[], None]) -> Callable[[], None]:
    """Return a function for a timer. It calls a bound method, unless nothing else uses the method's object any more.

    A cancelled timer stays in the timer's queue until it would have fired. For so long it would keep the lost
    connection that its object uses, with all messages, in memory.
    """
    reference = WeakMethod(method)

    def call() -> None:
        if (alive := reference()) is not None:
            alive()

    return call


class _Waker:
    """Wakes an event loop of kombu before 5.7, which `call_soon` from another thread does not.

    Args:
        hub: The event loop.
        callback: Called in the loop's thread after `wake`.

    """

    def __init__(self, hub: Any, callback: Callable[[], None]) -> None:
        self._hub = hub
        self._callback = callback
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        hub.add_reader(self._reader, self._on_byte)

    def wake(self) -> None:
        """Have the callback called soon. For any thread."""
        with contextlib.suppress(OSError):  # full: it is called anyway; or closed
            self._writer.send(b"w")

    def close(self) -> None:
        """Let go of the loop."""
        self._hub.remove_reader(self._reader)
        self._reader.close()
        self._writer.close()

    def _on_byte(self, *_: Any) -> None:
        with contextlib.suppress(OSError):
            self._reader.recv(4096)
        self._callback()
