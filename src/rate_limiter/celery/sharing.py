"""What limits hold is shared between the workers, each time another one has started.

A worker that was alone may hold all jobs that wait for a limit; of two that start together, one may have been
faster. A worker that has started tells the others, by an event that Celery's gossip brings them, how many jobs
each limit holds there. They answer the same way. Each worker that holds more than its share then gives back
what is beyond it, and the others get it.

All this goes by the name of the limit, whatever queues the workers consume. Without gossip
(``--without-gossip``), or on brokers that have none, a worker keeps what it holds.
"""

import math
from collections.abc import Callable
from typing import Any, Final

__all__ = ["SECONDS", "Sharing"]

#: Seconds for which a worker holds no more than its share, once it has given back the rest.
SECONDS: Final = 5.0

#: Seconds from the start of a worker until it asks. Its first jobs have come by then.
_ASK_AFTER: Final = 2.0

#: Seconds until all answers are there.
_ANSWERED_AFTER: Final = 0.5

#: The event. Gossip listens to all that begin with ``worker-``.
_EVENT: Final = "worker-held"

#: A worker keeps what it holds if that is less than so many times its share.
_FAIR: Final = 1.1


class Sharing:
    """Tells other workers what this one holds, and learns what they do, over one connection.

    Args:
        consumer: Celery's consumer, whose steps are made.
        held: Returns how many jobs each limit holds here, by its name; also those that hold none.
        share: Called with the most jobs that each limit is to hold here, by its name, where it holds more.

    """

    def __init__(
        self,
        consumer: Any,
        held: Callable[[], dict[str, int]],
        share: Callable[[dict[str, int]], None],
    ) -> None:
        self._consumer = consumer
        self._held = held
        self._share = share
        self._gossip: Any = getattr(consumer, "gossip", None)
        self._update: Any = None
        #: What other workers have told since the last comparison, by their names.
        self._others: dict[str, dict[str, int]] = {}
        if self._gossip is not None and hasattr(self._gossip, "update_state"):  # it is switched on
            self._update, self._gossip.update_state = self._gossip.update_state, self._on_event
            self._after(_ASK_AFTER, self._ask)

    def stop(self) -> None:
        """Stop to listen, as the connection ends."""
        if self._update is not None:
            self._gossip.update_state, self._update = self._update, None

    def _on_event(self, event: Any) -> Any:
        if event.get("type") == _EVENT and isinstance(event.get("limits"), dict):
            self._others[event["hostname"]] = event["limits"]
            if event.get("asks"):
                # Not here, where a message is being handled.
                self._consumer.call_soon(self._unless_stopped, self._answer)
        return self._update(event)

    def _ask(self) -> None:
        self._tell(asks=True)

    def _answer(self) -> None:
        self._tell(asks=False)

    def _tell(self, *, asks: bool) -> None:
        self._consumer.event_dispatcher.send(_EVENT, limits=self._held(), asks=asks)
        self._after(_ANSWERED_AFTER, self._compare)

    def _compare(self) -> None:
        shares = {}
        for name, held in self._held().items():
            theirs = [told[name] for told in self._others.values() if name in told]
            share = math.ceil((held + sum(theirs)) / (1 + len(theirs)))
            if theirs and held > share * _FAIR:
                shares[name] = share
        self._others.clear()
        if shares:
            self._share(shares)

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        # Without an event loop the timer is a thread of its own.
        self._consumer.timer.call_after(seconds, self._consumer.call_soon, (self._unless_stopped, call))

    def _unless_stopped(self, call: Callable[[], None]) -> None:
        if self._update is not None:
            call()
