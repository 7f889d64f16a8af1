"""Where a message comes from: its queue, and the exchange and routing key that it was sent to.

The routing key does not tell the queue: a topic exchange or an alias may lie in between. So the channel
is made to note the queue in each message's ``delivery_info``, on every transport.

A message that `Relay` has moved arrives from the default exchange. A header of it says where the original
was sent to, and `restore_origin` undoes the difference before anybody looks at the message.
"""

from collections.abc import Callable
from typing import Any, Final

__all__ = ["MARK", "MOVED", "ORIGIN", "can_be_sent_to", "mark_messages", "restore_origin"]

#: The key in ``message.delivery_info`` that holds the name of the queue.
MARK: Final = "rate_limiter_queue"

#: The key in ``message.delivery_info`` that is there if `Relay` has moved the message.
MOVED: Final = "rate_limiter_moved"

#: The header of a moved message that says what its ``delivery_info`` and its routing headers were.
ORIGIN: Final = "x-rate-limiter-origin"


#: What is called with each message that a consumer gets.
_Callback = Callable[[Any], Any]


def mark_messages(
    channel: Any,
    *,
    on_consume: Callable[[str], Any] | None = None,
    around: Callable[[str, str, _Callback], _Callback] | None = None,
) -> None:
    """Note the queue of each message that is consumed on a channel from now on; restore its origin.

    Args:
        channel: A kombu channel.
        on_consume: Called with the name of each queue that is about to be consumed on the channel.
        around: Called for each consumer to come that acknowledges what it gets, with the name of its
            queue, its tag and its callback. It returns what is called instead of the callback.

    """
    if not isinstance(channel.basic_consume, _Consume):
        channel.basic_consume = _Consume(channel.basic_consume)
    consume: _Consume = channel.basic_consume
    if on_consume is not None and on_consume not in consume.listeners:
        consume.listeners.append(on_consume)
    if around is not None:
        consume.arounds.append(around)


def restore_origin(message: Any) -> None:
    """Make a moved message look like its original. Does nothing to any other message."""
    origin = message.headers.pop(ORIGIN, None) if message.headers else None
    if not isinstance(origin, dict):
        return
    info = message.delivery_info
    for name in "exchange", "routing_key":
        if isinstance(origin.get(name), str):
            info[name] = origin[name]
    if origin.get("redelivered") is True:
        info["redelivered"] = True
    if isinstance(origin.get("CC"), list):
        message.headers["CC"] = origin["CC"]
    info[MOVED] = True


def can_be_sent_to(channel: Any, queue: str) -> bool:
    """Whether a message can be put at the end of a queue that is consumed on the channel.

    On Redis and MongoDB the queue of a fanout exchange (Celery's ``Broadcast``) is no queue: the exchange
    has subscribers only.
    """
    return queue not in getattr(channel, "_fanout_queues", ())


class _Consume:
    """Stands in for a channel's ``basic_consume``."""

    def __init__(self, consume: Callable[..., Any]) -> None:
        self._consume = consume
        self.listeners: list[Callable[[str], Any]] = []
        self.arounds: list[Callable[[str, str, _Callback], _Callback]] = []

    def __call__(
        self,
        queue: str,
        no_ack: bool = False,
        consumer_tag: str = "",
        callback: Any = None,
        **kwargs: Any,
    ) -> Any:
        for listener in self.listeners:
            listener(queue)
        for around in self.arounds if not no_ack else ():
            callback = around(queue, consumer_tag, callback)

        def marked(message: Any) -> Any:
            if message.delivery_info is not None:
                message.delivery_info[MARK] = queue
                restore_origin(message)
            return callback(message)

        return self._consume(
            queue=queue, no_ack=no_ack, consumer_tag=consumer_tag, callback=marked, **kwargs
        )
