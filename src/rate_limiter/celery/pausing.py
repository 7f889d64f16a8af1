"""Finding the queue that a job came from, and pausing the consumption of a queue."""

import logging
from collections.abc import Callable
from typing import Any

from ..broker.origin import MARK, mark_messages
from ..gating.limit import Limit
from ..gating.record import record_of

__all__ = ["Queues"]

logger = logging.getLogger("rate_limiter")


class Queues:
    """The queues of one connection.

    Args:
        consumer: Celery's consumer, before it has begun to consume.
        mark: Whether the gate needs to know the queue of each job.
        on_consume: With ``mark``, it is called with the name of each queue before it is consumed.

    """

    def __init__(self, consumer: Any, mark: bool, on_consume: Callable[[str], Any]) -> None:
        self._consumer = consumer
        #: The queues that are paused now, each with the limit that caused it.
        self.paused: dict[str, Limit] = {}
        self._entities: dict[str, Any] = {}
        if mark:
            # The channel is marked, so this covers queues of `celery control add_consumer` too.
            mark_messages(consumer.task_consumer.channel, on_consume)

    def of(self, request: Any) -> str | None:
        """Return the name of the queue that a job was consumed from."""
        info = request.message.delivery_info or {}
        name = info.get(MARK, info.get("routing_key"))
        return None if name is None else str(name)

    def pause(self, name: str, limit: Limit) -> None:
        """Stop consuming a queue. Messages that the broker has sent already still arrive."""
        if name in self.paused:
            return
        self.paused[name] = limit
        # Not while a message is being handled: cancelling reads further messages.
        self._consumer.call_soon(self._cancel, name)

    def resume(self, name: str) -> None:
        """Consume a paused queue again."""
        if self.paused.pop(name, None) is not None:
            self._consumer.call_soon(self._consume_again, name)

    def stop(self) -> None:
        """Forget all paused queues, as the connection ends. On the next one every queue is consumed."""
        self.paused.clear()
        self._entities.clear()

    def _cancel(self, name: str) -> None:
        consumer = self._consumer.task_consumer
        if name not in self.paused or not consumer or not consumer.consuming_from(name):
            return
        self._entities[name] = next(queue for queue in consumer.queues if queue.name == name)
        consumer.cancel_by_queue(name)
        logger.info(
            "Paused queue %s: enough jobs of limit %s are held", name, record_of(self.paused[name]).name
        )

    def _consume_again(self, name: str) -> None:
        consumer = self._consumer.task_consumer
        if name in self.paused or not consumer or name not in self._entities:
            return
        queue = self._entities.pop(name)
        if name not in self._consumer.app.amqp.queues.consume_from:
            return  # `celery control cancel_consumer` came meanwhile
        consumer.add_queue(queue)
        consumer.consume()
        logger.info("Resumed queue %s", name)
