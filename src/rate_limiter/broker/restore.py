"""Jobs go back to their queue in the order in which they came.

When a channel closes, RabbitMQ puts the jobs that are not acknowledged back where they were. For the
virtual transports kombu does it, one job after the other. Redis: the oldest first, each to the head of
its queue. The others: the newest first, each to the end. Either way the order is reversed. For
``memory://`` kombu puts nothing back.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from kombu.transport import memory, virtual

__all__ = ["give_back", "restore_in_order"]


def restore_in_order(channel: Any) -> None:
    """Make kombu keep the order of the jobs that it puts back when a channel closes.

    This is for all jobs of the channel, held or not. Calling it again changes nothing.

    Args:
        channel: A kombu channel of any transport.

    """
    if isinstance(channel, virtual.Channel):
        qos = channel.qos
        if not isinstance(qos.restore_unacked, functools.partial):
            qos.restore_unacked = functools.partial(_restore, qos, qos.restore_unacked)


def give_back(channel: Any, messages: Iterable[Any]) -> None:
    """Put held jobs back, where nobody else does when the channel closes: on ``memory://``.

    Args:
        channel: The channel that they came from. If it is closed already, nothing is done.
        messages: The messages, in any order.

    """
    if isinstance(channel, memory.Channel) and channel.connection is not None:
        held = {message.delivery_tag: message for message in messages}
        for tag in list(channel.qos._delivered):
            if tag in held:
                held[tag].requeue()


def _restore(qos: Any, restore: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stand in for ``qos.restore_unacked``."""
    delivered = qos._delivered  # an OrderedDict by delivery tag, oldest first
    for tag in reversed(list(delivered)):
        delivered.move_to_end(tag)
    return restore(*args, **kwargs)
