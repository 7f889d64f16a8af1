"""Which queue a message was consumed from.

Its routing key does not tell: a topic exchange or an alias may lie in between. So the channel is made to
leave a mark on each message, on every transport. It knows no Celery, and of kombu only what a channel and
a message look like.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

__all__ = ["MARK", "mark_messages"]

#: Where the mark is kept, in ``message.delivery_info``.
MARK: Final = "rate_limiter_queue"


def mark_messages(channel: Any, on_consume: Callable[[str], Any]) -> None:
    """Mark what is consumed on a channel from now on with the name of its queue.

    Args:
        channel: A kombu channel. Where it is marked already, it stays as it is.
        on_consume: Called with the name of each queue that is about to be consumed on the channel.

    """
    if not isinstance(channel.basic_consume, functools.partial):
        channel.basic_consume = functools.partial(_consume, channel.basic_consume, on_consume)


def _consume(
    consume: Any,
    on_consume: Callable[[str], Any],
    queue: str,
    no_ack: bool = False,
    consumer_tag: str = "",
    callback: Any = None,
    **kwargs: Any,
) -> Any:
    """Stand in for a channel's ``basic_consume``."""
    on_consume(queue)

    def marked(message: Any) -> Any:
        if message.delivery_info is not None:
            message.delivery_info[MARK] = queue
        return callback(message)

    return consume(queue=queue, no_ack=no_ack, consumer_tag=consumer_tag, callback=marked, **kwargs)
