"""Which queue a job came from, and pausing the consumption of a queue.

The routing key of a message does not tell its queue: a topic exchange or an alias may lie in between.
AMQP names the consumer with each delivery. The virtual transports (Redis) do not, so there the channel
is made to leave a mark on each message.
"""

import functools
import logging
from typing import Any, Final

from ..limit import Limit

__all__ = ["Queues"]

logger = logging.getLogger("rate_limiter")

#: Where the mark is kept, in ``message.delivery_info``.
_MARK: Final = "rate_limiter_queue"


class Queues:
    """The queues of one connection.

    Args:
        consumer: Celery's consumer, before it has begun to consume.
        mark: Whether anybody asks.

    """

    def __init__(self, consumer: Any, mark: bool) -> None:
        self._consumer = consumer
        #: The queues that are not consumed now, and because of which limit.
        self.paused: dict[str, Limit] = {}
        self._entities: dict[str, Any] = {}
        if mark:
            # for the queues that `celery control add_consumer` brings, too
            channel = consumer.task_consumer.channel
            channel.basic_consume = functools.partial(_consume, channel.basic_consume)

    def of(self, request: Any) -> str | None:
        """Return the name of the queue that a job was consumed from."""
        info = request.message.delivery_info or {}
        if (name := info.get(_MARK)) is not None:
            return str(name)
        tag = info.get("consumer_tag")
        for name, active in self._consumer.task_consumer._active_tags.items():
            if active == tag:
                return str(name)
        return info.get("routing_key")

    def pause(self, name: str, limit: Limit) -> None:
        """Stop consuming a queue. What was delivered already still arrives."""
        if name in self.paused:
            return
        self.paused[name] = limit
        # Not from within the handling of a message: cancelling reads further ones.
        self._consumer.call_soon(self._cancel, name)

    def resume(self, name: str) -> None:
        """Take a paused queue up again."""
        if self.paused.pop(name, None) is not None:
            self._consumer.call_soon(self._consume_again, name)

    def stop(self) -> None:
        """Forget it all, with the connection: on the next one every queue is consumed again."""
        self.paused.clear()
        self._entities.clear()

    def _cancel(self, name: str) -> None:
        consumer = self._consumer.task_consumer
        if name not in self.paused or not consumer or not consumer.consuming_from(name):
            return
        self._entities[name] = next(queue for queue in consumer.queues if queue.name == name)
        consumer.cancel_by_queue(name)
        logger.info("Paused queue %s: enough of %s is held", name, self.paused[name].name)

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


def _consume(
    consume: Any,
    queue: str,
    no_ack: bool = False,
    consumer_tag: str = "",
    callback: Any = None,
    **kwargs: Any,
) -> Any:
    """Stand in for a channel's ``basic_consume``: mark each message with its queue."""

    def marked(message: Any) -> Any:
        if message.delivery_info is not None:
            message.delivery_info[_MARK] = queue
        return callback(message)

    return consume(queue=queue, no_ack=no_ack, consumer_tag=consumer_tag, callback=marked, **kwargs)
