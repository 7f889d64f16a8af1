"""How urgent a message is, in steps, as its broker counts.

On Redis 0 is the most urgent priority, and kombu makes four steps of ten: 0 to 2, 3 to 5, 6 to 8, and 9. On
RabbitMQ a higher number is more urgent, and only queues with ``x-max-priority`` know it. Other brokers that
kombu speaks to know no priority, or none that is counted here.
"""

from bisect import bisect
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Priorities"]


class Priorities:
    """The priorities of the messages of one connection.

    Args:
        queues: Returns the queues that are consumed, as ``kombu.Queue``.

    """

    def __init__(self, queues: Callable[[], Iterable[Any]]) -> None:
        self._queues = queues
        #: For each queue of an AMQP broker: the highest priority that it knows.
        self._highest: dict[str | None, int] = {}

    def steps_behind(self, message: Any, queue: str | None) -> int:
        """Return how many steps a message stands behind one without a priority. Below 0: it is in front.

        Args:
            message: A kombu message.
            queue: The name of the queue that it came from.

        """
        priority = message.properties.get("priority")
        if not priority or not isinstance(priority, int):
            return 0
        channel = message.channel
        if (steps := getattr(channel, "priority_steps", None)) is not None:  # Redis
            return max(0, bisect(steps, priority) - 1)
        if channel.connection.client.transport.driver_type != "amqp":
            return 0
        highest = self._highest.get(queue)
        if highest is None:
            highest = self._highest[queue] = self._find(queue)
        return -max(0, min(priority, highest))

    def _find(self, name: str | None) -> int:
        for queue in self._queues():
            if queue.name == name:
                arguments = queue.queue_arguments or {}
                return int(queue.max_priority or arguments.get("x-max-priority") or 0)
        return 0
