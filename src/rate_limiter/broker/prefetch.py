"""The prefetch count of a channel, raised by the number of held jobs.

A broker sends a consumer at most ``prefetch_count`` jobs that are not acknowledged yet. A held job is
one of them. If the count stayed as it is, a few held jobs would use it up, and no job behind them in
the queue would reach the worker.
"""

from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from kombu.common import QoS

__all__ = ["HIGHEST_COUNT", "STATIC_QUEUE_TYPES", "Prefetch"]

#: The highest prefetch count: AMQP has 16 bits for it. For a higher one kombu sends 0, no limit at all.
HIGHEST_COUNT: Final = 0xFFFF

#: Queue types whose prefetch count belongs to each consumer and cannot be changed while it consumes: see
#: `StaticCounts`. In RabbitMQ 4 this is so for every type.
STATIC_QUEUE_TYPES: Final = ("quorum", "stream")

#: Up to this number of held jobs the count is raised by exactly their number, so that the worker
#: reserves no more other jobs than it does without a gate.
_FEW: Final = 32

#: If more are held, the count is raised in steps: on RabbitMQ each change is a round trip. A step is this
#: share of the jobs above ``_FEW``.
_STEP: Final = 1 / 4

#: While jobs are held, the count is lowered once in this number of seconds: a limit whose jobs wait for
#: moments only would else cost two round trips a job.
_LOWER_EVERY: Final = 1.0


class Prefetch:
    """Raises and lowers a prefetch count.

    Args:
        qos: Holds the count, and sends it to the broker.
        clock: Returns a monotonic time in seconds.

    """

    def __init__(self, qos: QoS, clock: Callable[[], float] = monotonic) -> None:
        self._qos: Any = qos
        self._clock = clock
        #: The number really added to the count: ``worker_eta_task_limit`` may allow less than asked for.
        self._raised = 0
        #: The moment before which the count is not lowered while jobs are held.
        self._lower_at = 0.0

    def follow(self, held: int, most: int) -> bool:
        """Raise or lower the count. `update` sends it to the broker.

        Args:
            held: The number of held jobs that take up a part of the count.
            most: The highest number of jobs that may be held.

        Returns:
            Whether the count has changed.

        """
        step = int(max(0, held - _FEW) * _STEP)
        if held <= self._raised <= held + step:
            return False
        before = self._qos.value
        room = HIGHEST_COUNT - (before - self._raised)
        wanted = max(0, min(held + step, most, room))
        if wanted > self._raised:
            self._qos.increment_eventually(wanted - self._raised)
        elif not held or self._clock() >= self._lower_at:
            self._lower_at = self._clock() + _LOWER_EVERY
            self._qos.decrement_eventually(self._raised - wanted)
        change: int = self._qos.value - before
        self._raised += change
        return change != 0

    def lower_now(self) -> None:
        """Let the next `follow` lower the count, however short a time ago it was lowered."""
        self._lower_at = 0.0

    def update(self) -> None:
        """Send the count to the broker, if the broker has another one."""
        # While RabbitMQ's answer is awaited, more jobs may arrive and raise the count again.
        for _ in range(10):
            if self._qos.prev == self._qos.value:
                break
            self._qos.update()
