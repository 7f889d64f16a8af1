"""The prefetch count, raised by what the gate holds.

A held job stays in the prefetch window. Were the window not raised, a few held jobs would fill it, and
nothing behind them in the queue would reach the worker.
"""

import logging
from typing import Any

__all__ = ["Prefetch"]

logger = logging.getLogger("rate_limiter")


class Prefetch:
    """Keeps the window of one connection above what is held.

    Args:
        consumer: Celery's consumer.
        max_held: Up to how many held jobs it follows. Beyond that the broker keeps the rest.

    On RabbitMQ each change is a round trip, so it moves in chunks of the consumer's own window.

    """

    def __init__(self, consumer: Any, max_held: int) -> None:
        self._consumer = consumer
        self._max_held = max_held
        self._chunk = max(1, consumer.initial_prefetch_count)
        #: What was really added: kombu clamps increments to worker_eta_task_limit.
        self._raised = 0

    def follow(self, held: int) -> None:
        """Raise or lower the count for ``held`` jobs."""
        spare = self._raised - min(held, self._max_held)
        if spare >= 0 and spare <= 2 * self._chunk and (held or not self._raised):
            return
        qos = self._consumer.qos
        if not qos.value:
            return  # 0: everything is prefetched anyway
        wanted = min(held + self._chunk, self._max_held) if held else 0
        before = qos.value
        if wanted > self._raised:
            qos.increment_eventually(wanted - self._raised)
        else:
            qos.decrement_eventually(self._raised - wanted)
        self._raised += qos.value - before
        if qos.value != before and self._consumer.hub is not None:
            # Celery's loop sets the count before it polls. The reply may bring further messages, so
            # let it come by once more before it sleeps.
            self._consumer.hub.call_soon(_nothing)

    def update(self) -> None:
        """Tell the broker now. For loops that poll for long without looking at the count."""
        qos = self._consumer.qos
        for _ in range(10):  # the reply may bring messages that raise it once more
            if qos.prev == qos.value:
                break
            qos.update()


def _nothing() -> None:
    pass
