"""What is done with kombu's channels of Redis that kombu has no method for."""

import contextlib
from functools import partial
from queue import Empty
from typing import Any

from kombu.transport import virtual

__all__ = [
    "finish_reading",
    "forget",
    "is_redis",
    "put_back",
    "read_again",
    "read_what_comes",
    "redis_client",
    "stop_reading",
]


def is_redis(channel: Any) -> bool:
    """Tell whether a kombu channel is one of Redis."""
    return hasattr(channel, "unacked_index_key")


def redis_client(channel: Any) -> Any:
    """Return a client for the Redis of a channel. It adds no ``global_keyprefix``."""
    from redis import Redis  # noqa: PLC0415 - it is there if there is such a channel

    # kombu's own client adds the prefix for some commands, and for others in other versions.
    return Redis(connection_pool=channel.pool)


def read_what_comes(channel: Any) -> None:
    """Have a channel read a message that is on its way when its prefetch count is lowered. Only Redis needs it.

    The message has left its list. A channel that read it only when it has room again would lose it if its
    worker were killed before.
    """
    if not is_redis(channel):
        return
    if "can_consume" not in vars(channel.qos):  # worker_disable_prefetch has its own
        has_room = channel.qos.can_consume
        channel.qos.can_consume = lambda: has_room() or _is_asked(channel)


def stop_reading(channel: Any) -> None:
    """Have a channel ask for no more messages. A message that is on its way still comes: see `read_what_comes`."""
    channel.qos.can_consume = partial(_is_asked, channel)


def finish_reading(channel: Any) -> None:
    """Stop reading, and read the message that is on its way: it would take the place of one that is put back.

    As kombu does when it closes a channel. It takes a second at most.
    """
    stop_reading(channel)
    if channel._in_poll:
        with contextlib.suppress(Empty):
            channel._brpop_read()


def read_again(channel: Any) -> None:
    """Have a channel ask for messages again, after `stop_reading`."""
    channel.qos.__dict__.pop("can_consume", None)


def forget(message: Any, state: str) -> None:
    """Let the channel of a message count it no more. In Redis it is acknowledged, or put back, already.

    Args:
        message: The kombu message.
        state: What kombu calls the message then: ``"ACK"`` or ``"REQUEUED"``.

    """
    # Redis's own class would ask the server too.
    virtual.QoS.ack(message.channel.qos, message.delivery_tag)  # type: ignore[no-untyped-call]
    message._state = state


def put_back(message: Any) -> None:
    """Put a message back to the head of its list, from where it came. kombu's ``requeue`` puts it to the end."""
    message.channel.qos.restore_by_tag(message.delivery_tag)
    forget(message, "REQUEUED")


def _is_asked(channel: Any) -> bool:
    """Tell whether Redis has been asked for a message, and has not answered."""
    return bool(channel._in_poll)
