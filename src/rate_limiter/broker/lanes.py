"""What a broker knows of all lanes, and of the workers that use them.

Two names go with each queue that has lanes (`lane`):

- ``<queue>.parked`` tells which lanes there are: a hash on Redis, a queue with a note for each on RabbitMQ. A
  worker that does not know a lane finds it there: its limit has another name now, or is gone.
- ``<queue>.parked.workers`` tells which workers use them: a sorted set on Redis, on RabbitMQ a queue without
  messages, which each of them consumes. The last one that stops puts everything back. On RabbitMQ each lane has
  such a queue too.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from .amqp_lanes import AmqpLanes
from .redis_lanes import RedisLanes

__all__ = ["Lanes", "lanes_on"]


class Lanes(Protocol):
    """What a broker knows of lanes. Names of queues and lanes are text.

    Each method may raise whatever the connection or the broker says.
    """

    def join(self, queue: str, lanes: Mapping[str, Iterable[str]]) -> None:
        """Say that this worker uses lanes of a queue, and which limits each is for."""

    def leave(self, queue: str) -> None:
        """Say that this worker uses no lanes of a queue any more."""

    def declare(self, entities: Iterable[Any]) -> dict[str, int | Exception]:
        """Make the lanes that are not there. Return how many messages each has, or why there is none."""

    def there(self, queue: str) -> dict[str, list[str]]:
        """Return the lanes of a queue, and the names of the limits that each is for."""

    def unused(self, queue: str, lanes: Iterable[str]) -> list[str]:
        """Return the lanes that no worker uses."""

    def calm(self, channels: Iterable[Any]) -> None:
        """Let channels read what is on its way to them, and nothing after that. Called before `put_back`.

        Else they would take a message that was put back, as they close, and nobody would run it.
        """

    def alone(self, queue: str) -> bool:
        """Tell whether no other worker uses lanes of a queue."""

    def count(self, lane: str) -> int:
        """Return how many messages wait in a lane."""

    def find(self, lane: str, job: str) -> int | None:
        """Return how many jobs of a lane come before one with an id. ``None``: it is not there; or on RabbitMQ."""

    def put_back(self, lane: str, queue: str, first: Iterable[Any] = ()) -> int:
        """Put the messages of a lane in front of what waits in its queue, in order. Return how many.

        Those are all that are there now. What another worker parks meanwhile may stay.

        Args:
            lane: The lane.
            queue: Its queue.
            first: Messages of the lane that this worker has in hand, the oldest first. On Redis they are to be
                given back before.

        """

    def sweep(self, queue: str, lane: str, tasks: Iterable[str], most: int) -> int:
        """Move jobs of some tasks from the front of a queue to the end of a lane, inside the server.

        Args:
            queue: The queue.
            lane: The lane.
            tasks: The names of the tasks.
            most: How many messages to look at. It takes 15 to 25 µs for each.

        Returns:
            How many were moved. On RabbitMQ none.

        """

    def purge(self, lane: str) -> int:
        """Delete all messages of a lane. Return how many."""

    def remove(self, queue: str, lanes: Iterable[str]) -> None:
        """Delete lanes that are empty, and what tells of them."""


def lanes_on(connection: Any, worker: str) -> Lanes | None:
    """Return the lanes on a broker. ``None``: this broker cannot have any.

    Args:
        connection: A kombu connection.
        worker: The name of the worker that asks.

    """
    kind = connection.transport.driver_type
    if kind == "redis":
        return RedisLanes(connection.default_channel, worker)
    return AmqpLanes(connection) if kind == "amqp" else None
