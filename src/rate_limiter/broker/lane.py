"""A lane: a queue in the broker where jobs wait for their tokens, beside the queue that they came from.

It belongs to one queue and one set of limits, and is named ``<queue>.parked.<name>``. It is of the queue's type. On
Redis it holds the messages as they came; on RabbitMQ their copies say where the originals were sent (`origin`).
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha1
from typing import Any, Final

from kombu.entity import Queue
from kombu.messaging import Consumer

from .origin import MARK, restore_origin
from .redis_channel import is_redis, read_again, stop_reading
from .restore import requeue, restore_in_order
from .static import StaticCounts

__all__ = ["SIGN", "Lane", "lane_entity", "lane_name"]

#: The longest name of a queue on RabbitMQ, in bytes, and of the last part of a lane's name that is left as it is.
_LONGEST_NAME: Final = 255
_LONGEST_PART: Final = 60

#: What the names of queues end with that tell which workers use a lane, or any lane of a queue: no lane's name does.
SIGN: Final = ".workers"

#: What a lane takes over of the arguments of its queue. No ``x-expires`` or length: they would delete jobs.
_ARGUMENTS: Final = ("x-queue-type", "x-max-priority", "x-queue-mode")


def lane_name(queue: str, limits: Iterable[str]) -> str:
    """Return the name of the lane for jobs of a queue that have these limits.

    Args:
        queue: The name of the queue.
        limits: The names of the limits.

    It has letters, digits and ``_ - .`` behind the name of the queue. A set of limits whose names are long, or
    have other characters, gets a part of them and a number that is the same in all workers.

    """
    names = sorted(limits)
    last = "+".join(names)
    safe = re.sub(r"[^A-Za-z0-9_.+-]+", "-", last)
    room = min(_LONGEST_PART, _LONGEST_NAME - len(f"{queue}.parked.{SIGN}".encode()))
    if safe != last or len(safe) > room or f".{safe}".endswith(SIGN):
        number = sha1("\0".join(names).encode(), usedforsecurity=False).hexdigest()[:8]
        safe = f"{safe[: max(0, room - 9)].strip('-+.')}-{number}".lstrip("-")
    return f"{queue}.parked.{safe}"


def lane_entity(queue: Any, name: str) -> Any:
    """Return the lane of a queue as ``kombu.Queue``."""
    given = {**(queue.queue_arguments or {})}
    if queue.max_priority is not None:
        given["x-max-priority"] = queue.max_priority
    arguments = {key: given[key] for key in _ARGUMENTS if key in given}
    options = {"routing_key": name, "durable": queue.durable, "queue_arguments": arguments}
    return Queue(name, **options)  # type: ignore[no-untyped-call]


class Lane:
    """One lane, as one connection consumes it: through a channel and a prefetch window of its own.

    Args:
        connection: The kombu connection of the consumer.
        entity: The lane. It is declared already.
        queue: The name of the queue that its jobs came from.
        on_message: Called with each message. It looks as if it came from the queue.
        options: Further arguments of ``kombu.Consumer``.

    """

    def __init__(
        self,
        connection: Any,
        entity: Any,
        queue: str,
        on_message: Callable[[Any], Any],
        **options: Any,
    ) -> None:
        self.queue = queue
        self._name = entity.name
        self._on_message = on_message
        self.channel: Any = connection.channel()
        self._is_redis = is_redis(self.channel)
        #: The prefetch count. On RabbitMQ it is a new consumer's.
        self.window = 1
        self._counts: StaticCounts | None = None
        if self._is_redis:
            restore_in_order(self.channel)
            self.channel.Message = _message_class(self.channel.Message, self._name)
        else:
            self._counts = StaticCounts(self.channel, count=lambda: self.window)
        self._consumer: Any = Consumer(  # type: ignore[no-untyped-call]
            self.channel, [entity], on_message=self._receive, auto_declare=False, **options
        )
        self.consumes = False
        #: Whether what is given back comes again in its turn. Without ``delivery-limit`` a quorum queue appends it.
        self.keeps_order = (entity.queue_arguments or {}).get("x-queue-type") != "quorum"

    def __len__(self) -> int:
        """How many messages of it are not acknowledged."""
        if self._counts is not None:
            return len(self._counts)
        qos = self.channel.qos
        return len(qos._delivered) - len(qos._dirty)

    @property
    def full(self) -> bool:
        """Whether no more come before one is acknowledged, though there may be more."""
        return self.consumes and len(self) >= self.window

    def consume(self, window: int) -> None:
        """Consume it.

        Args:
            window: At most so many messages, besides those that are there already.

        """
        self.window = window + len(self) if self._is_redis else window
        self.channel.basic_qos(0, self.window, False)
        if self._is_redis:
            read_again(self.channel)
        if not self._is_redis or not self._consumer._active_tags:
            self._consumer.consume()
        if not self._is_redis:
            # `rest` has left the callbacks of consumers before this one. All that was on its way to them has come.
            for tag in self.channel.callbacks.keys() - self._consumer._active_tags.values():
                del self.channel.callbacks[tag]
        self.consumes = True

    def rest(self) -> None:
        """Consume it no more for a while. Messages that are on their way still come."""
        self.consumes = False
        if self._is_redis:
            # Cancelled, it would leave a message that comes now to no one.
            stop_reading(self.channel)
            return
        for tag in list(self._consumer._active_tags.values()):
            # Without an answer: while it is waited for, jobs arrive and are handled.
            self.channel.basic_cancel(tag, nowait=True)
        self._consumer._active_tags.clear()

    def give_back(self, messages: Sequence[Any]) -> None:
        """Put messages back to the front of the lane; on a quorum queue to its end.

        Args:
            messages: The messages, the latest first.

        """
        for message in messages if self._is_redis else reversed(messages):
            if message.acknowledged or message.channel is not self.channel:
                continue
            requeue(message)

    def close(self) -> None:
        """Close the channel. What is not acknowledged goes back to the lane."""
        self.consumes = False
        with contextlib.suppress(Exception):  # the connection is lost, and the channel with it
            self.channel.close()

    def _receive(self, message: Any) -> None:
        if self._is_redis:
            message.delivery_info = message._raw["properties"]["delivery_info"]
        message.delivery_info[MARK] = self.queue
        restore_origin(message)
        self._on_message(message)


def _message_class(kind: Any, lane: str) -> Any:
    """Return a class of messages that kombu, where it has to put them back, puts back into a lane."""

    class Parked(kind):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # kombu notes these two as it takes the message. See Lane._receive.
            self.delivery_info: Any = {
                **self._raw["properties"]["delivery_info"],
                "exchange": "",
                "routing_key": lane,
            }

    return Parked
