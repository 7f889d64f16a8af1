"""Messages that go to the end of their queue (``when_limited="retry"``), each when its turn comes.

A message is held until its turn: back in its queue it would come again at once, and again.
"""

import heapq
import itertools
import logging
import math
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from ..broker.relay import Relay

__all__ = ["Returning"]

logger = logging.getLogger("rate_limiter")

#: Seconds after which a message that could not be sent is tried again.
_TRY_AGAIN: Final = 1.0


class Returning:
    """The messages of one loop that wait for their turn.

    Args:
        gone: Tells whether a message's channel is closed; the broker has given it out again then.
        sent: Called with a message whose copy is safe, and with whether it is gone.

    """

    def __init__(self, gone: Callable[[Any], bool], sent: Callable[[Any, bool], None]) -> None:
        self._gone = gone
        self._sent = sent
        self._relay = Relay(moved=self._moved, failed=self.add)
        self._count = itertools.count()
        #: The messages, by the moment of their turn.
        self._turns: list[tuple[float, int, Any]] = []

    @property
    def next_due(self) -> float:
        """The moment, by the monotonic clock, at which `send` is to be called."""
        turn = self._turns[0][0] if self._turns and not self._relay.full else math.inf
        return min(turn, self._relay.due)

    def add(self, job: Any, seconds: float = _TRY_AGAIN) -> None:
        """Let a message wait for its turn, in so many seconds."""
        heapq.heappush(self._turns, (monotonic() + seconds, next(self._count), job))

    def send(self) -> None:
        """Send a copy of each message whose turn has come; settle those that the broker has confirmed."""
        now = monotonic()
        while self._turns and self._turns[0][0] <= now and not self._relay.full:
            job = heapq.heappop(self._turns)[2]
            if self._gone(job):
                self._sent(job, True)
                continue
            try:
                self._relay.send(job, job.message, job.queue)
            except Exception:
                logger.warning("Could not send back a message of queue %s", job.queue, exc_info=True)
                self.add(job)
        self._relay.tend()

    def wait(self) -> None:
        """Wait a moment for the last confirmations."""
        self._relay.farewell()

    def forget(self) -> None:
        """Forget all messages, with their connection."""
        self._relay.close()
        self._turns.clear()

    def _moved(self, job: Any) -> None:
        gone = self._gone(job)
        if not gone:
            if not job.message.acknowledged:
                job.message.ack()
            logger.debug("Sent a message to the end of queue %s", job.queue)
        self._sent(job, gone)
