"""What limits hold is shared between the workers, each time another one has started.

A worker that was alone may hold all jobs that wait for a limit; of two that start together, one may have been
faster. A worker that has started tells the others, by an event that Celery's gossip brings them, how many jobs
each limit holds there. They answer the same way. Each worker that holds more than its share then gives back
what is beyond it, and the others get it.

All workers may start at once, after the broker has. So each asks at a moment of its own, answers once those
who have asked shortly before, and compares once. What it was told before it gave jobs back says nothing of who
has got them: if somebody asks then, it asks anew when they have arrived.

All this goes by the name of the limit, whatever queues the workers consume. Without gossip
(``--without-gossip``), or on brokers that have none, a worker keeps what it holds.
"""

import math
import random
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

__all__ = ["SHARE_SECONDS", "Sharing"]

#: Seconds for which a worker holds no more than its share, once it has given back the rest.
SHARE_SECONDS: Final = 5.0

#: Seconds from the start of a worker until it asks, at least and at most. Its first jobs have come by then.
_ASK_AFTER: Final = 2.0, 2.5

#: Seconds from a question until it is answered, and until all answers are there.
_ANSWER_AFTER: Final = 0.2
_COMPARE_AFTER: Final = 0.7

#: Seconds for which an answer counts.
_FRESH: Final = 2.0

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
        clock: Returns the time in seconds.

    """

    def __init__(
        self,
        consumer: Any,
        held: Callable[[], dict[str, int]],
        share: Callable[[dict[str, int]], None],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._consumer = consumer
        self._held = held
        self._share = share
        self._clock = clock
        self._gossip: Any = getattr(consumer, "gossip", None)
        self._update: Any = None
        #: What other workers have told, and when, by their names.
        self._others: dict[str, tuple[float, dict[str, int]]] = {}
        #: Until when jobs that were given back may be on their way to other workers.
        self._given_until = -math.inf
        #: What is to be called soon.
        self._planned: set[Callable[[], None]] = set()
        if self._gossip is not None and hasattr(self._gossip, "update_state"):  # it is switched on
            self._update, self._gossip.update_state = self._gossip.update_state, self._on_event
            self._plan(random.uniform(*_ASK_AFTER), self._ask)  # noqa: S311 - no secret

    def stop(self) -> None:
        """Stop to listen, as the connection ends."""
        if self._update is not None:
            self._gossip.update_state, self._update = self._update, None

    def _on_event(self, event: Any) -> Any:
        limits = event.get("limits")
        if event.get("type") == _EVENT and isinstance(limits, dict):
            told = {name: count for name, count in limits.items() if isinstance(count, int)}
            self._others[str(event.get("hostname"))] = self._clock(), told
            if event.get("asks"):
                self._plan(_ANSWER_AFTER, self._answer)
                self._plan(_COMPARE_AFTER, self._compare)
        return self._update(event)

    def _ask(self) -> None:
        self._tell(asks=True)
        self._plan(_COMPARE_AFTER, self._compare)

    def _answer(self) -> None:
        self._tell(asks=False)

    def _tell(self, *, asks: bool) -> None:
        self._consumer.event_dispatcher.send(_EVENT, limits=self._held(), asks=asks)

    def _compare(self) -> None:
        now = self._clock()
        if now < self._given_until:
            self._plan(self._given_until - now, self._ask)
            return
        self._others = {name: each for name, each in self._others.items() if each[0] >= now - _FRESH}
        others = [told for _, told in self._others.values()]
        shares = {}
        for name, held in self._held().items():
            theirs = [told[name] for told in others if name in told]
            share = math.ceil((held + sum(theirs)) / (1 + len(theirs)))
            if theirs and held > share * _FAIR:
                shares[name] = share
        if shares:
            self._given_until = now + SHARE_SECONDS
            self._others.clear()
            self._share(shares)

    def _plan(self, seconds: float, call: Callable[[], None]) -> None:
        """Have something called in so many seconds, unless it will be called already."""
        if call not in self._planned:
            self._planned.add(call)
            # Without an event loop the timer is a thread of its own.
            self._consumer.timer.call_after(seconds, self._consumer.call_soon, (self._run, call))

    def _run(self, call: Callable[[], None]) -> None:
        self._planned.discard(call)
        if self._update is not None:
            call()
