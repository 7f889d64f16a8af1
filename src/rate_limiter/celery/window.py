"""The prefetch window, raised by what the gate holds.

A held job stays in the prefetch window. Were the window not raised, a few held jobs would fill it, and
nothing behind them in the queue would reach the worker.
"""

import logging
from typing import Any

from celery.worker.consumer.tasks import Tasks

__all__ = ["Window"]

logger = logging.getLogger("rate_limiter")


class Window:
    """Keeps the window of one connection above what is held.

    Args:
        consumer: Celery's consumer.

    On RabbitMQ each change is a round trip, so it moves in chunks: of the consumer's own window, or
    half of what is held.

    """

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._chunk = max(1, consumer.initial_prefetch_count)
        #: What was really added: kombu clamps increments to worker_eta_task_limit.
        self._raised = 0
        # Quorum queues, and RabbitMQ 4 altogether: each consumer has a count that cannot be changed.
        self._static = not _tasks_step(consumer).qos_global(consumer) and (
            consumer.connection.transport.driver_type == "amqp"
        )
        self._told = False
        self._told_soon: Any = None

    def follow(self, held: int, most: int) -> None:
        """Raise or lower the count for ``held`` jobs, of at most so many that may be held."""
        chunk = max(self._chunk, held // 2)
        spare = self._raised - held
        if 0 <= spare <= 2 * chunk and (held or not self._raised):
            return
        consumer = self._consumer
        if self._static:
            self._tell()
            return
        # After a reconnect with worker_enable_prefetch_count_reduction Celery sets the count
        # outright with each acknowledgement, until it is back.
        if not consumer._maximum_prefetch_restored:
            return
        qos = consumer.qos
        before = qos.value
        wanted = min(held + chunk, most)
        if wanted > self._raised:
            qos.increment_eventually(wanted - self._raised)
        else:
            qos.decrement_eventually(self._raised - wanted)
        self._raised += qos.value - before
        if qos.value != before and consumer.hub is not None:
            # Celery's loop tells the broker once a turn, and handles messages after that: it would
            # sleep over this until the next timer. A timer that is due runs before it sleeps.
            self._told_soon = consumer.timer.call_after(0, self.update)

    def update(self) -> None:
        """Tell the broker now."""
        qos = self._consumer.qos
        for _ in range(10):  # the reply may bring messages that raise it once more
            if qos.prev == qos.value:
                break
            qos.update()

    def stop(self) -> None:
        """Leave the connection alone, which is closing."""
        if self._told_soon is not None:
            self._consumer.timer.cancel(self._told_soon)

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "The prefetch count is static here (quorum queues, RabbitMQ 4): while the gate holds %d "
                "jobs of a queue, others in it wait; give them a queue of their own",
                self._chunk,
            )


def _tasks_step(consumer: Any) -> Any:
    return next(step for step in consumer.steps if isinstance(step, Tasks))
