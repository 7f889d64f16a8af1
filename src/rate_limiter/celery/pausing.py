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
        full: Tells of a queue whether its consumer can be cancelled now. If it cannot, `cancel_paused` is
            called later. ``None``: it always can.

    """

    def __init__(self, consumer: Any, full: Callable[[str], bool] | None) -> None:
        self._consumer = consumer
        self._full = full
        #: The queues that are not consumed now, and because of which limit.
        self.paused: dict[str, Limit] = {}
        self._entities: dict[str, Any] = {}
        # for the queues that `celery control add_consumer` brings, too
        mark_messages(consumer.task_consumer.channel)

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

    def cancel_paused(self) -> None:
        """Stop consuming the queues that are paused, as far as they are still consumed."""
        for name in list(self.paused):
            self._cancel(name)

    def _cancel(self, name: str) -> None:
        consumer = self._consumer.task_consumer
        if name not in self.paused or not consumer or not consumer.consuming_from(name):
            return
        if self._full is not None and not self._full(name):
            return  # what is on its way would go behind all others in the queue
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
