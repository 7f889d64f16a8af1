"""Jobs go back to their queue in the order in which they came.

When a channel closes, RabbitMQ puts the jobs that are not acknowledged back where they were. For the
virtual transports kombu does it, one job after the other. Redis: the oldest first, each to the head of
its queue. The others: the newest first, each to the end. Either way the order is reversed. For
``memory://`` kombu puts nothing back.

A Redis that is away gets nothing back when the channel closes. Its jobs would stay among the
unacknowledged ones until ``visibility_timeout`` has passed. `Leftovers` puts them back over the next
channel.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterable
from time import time
from typing import Any, Final, NamedTuple

from kombu.transport import memory, virtual

from .redis_channel import finish_reading, is_redis, put_back, redis_client

__all__ = ["Leftovers", "give_back", "give_back_at_once", "requeue", "restore_in_order"]

logger = logging.getLogger("rate_limiter")

#: The attribute of a channel's ``qos`` that says when kombu began to put its jobs back.
_CLOSED_AT: Final = "rate_limiter_closed_at"


def restore_in_order(channel: Any) -> None:
    """Make kombu keep the order of the jobs that it puts back when a channel closes.

    This is for all jobs of the channel, held or not. Calling it again changes nothing.

    Args:
        channel: A kombu channel of any transport.

    """
    if isinstance(channel, virtual.Channel):
        qos = channel.qos
        if not isinstance(qos.restore_unacked, functools.partial):
            restore = _restore_redis if is_redis(channel) else _restore
            qos.restore_unacked = functools.partial(restore, qos, qos.restore_unacked)


def requeue(message: Any) -> None:
    """Let the broker have a message back, to where it was in its queue. Of several the latest goes first on Redis."""
    if is_redis(message.channel):
        put_back(message)
    else:
        message.requeue()


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


def give_back_at_once(channel: Any, may_go: Callable[[str], bool]) -> None:
    """Put jobs back before the channel closes, on Redis.

    A worker that stops warm closes it when its last job has ended. If the worker is killed before, Redis keeps the
    unacknowledged jobs for ``visibility_timeout``. RabbitMQ gives out those of a killed worker at once.

    Args:
        channel: The channel that they came from. If it is closed already, nothing is done.
        may_go: Tells of a delivery tag whether its job does not run, and will not.

    """
    if channel.connection is None or not is_redis(channel):
        return
    try:
        finish_reading(channel)
        # Else those that were acknowledged last are among them. A job that was moved keeps its tag: it would be taken
        # from the worker that has it by now.
        channel.qos._flush()
        with channel.conn_or_acquire() as client:
            _restore_tags(channel.qos, [tag for tag in channel.qos._delivered if may_go(tag)], client)
    except Exception:
        logger.warning(
            "Could not put held jobs back at once; they go as the worker ends", exc_info=True
        )


class _Left(NamedTuple):
    """The jobs that one lost channel has left unacknowledged."""

    #: The Redis that has them.
    url: str
    #: Their delivery tags, the oldest first.
    tags: list[str]
    #: The moment of the loss, as ``time.time``.
    lost_at: float


class Leftovers:
    """The unacknowledged jobs of lost Redis channels, until they are back in their queues.

    Other brokers need nothing of this: a channel of theirs may be given, and nothing happens.
    """

    def __init__(self) -> None:
        #: The channels that are to be looked at, and their Redis. A lost connection forgets where it was.
        self._urls: dict[Any, str] = {}
        self._left: list[_Left] = []

    def collect(self, running: Collection[str] = ()) -> int:
        """Take over what the channels that were lost have not put back.

        Args:
            running: The delivery tags of jobs that run now. They are left as they are.

        Returns:
            How many jobs are to be put back.

        """
        for channel in list(self._urls):
            if not _is_lost(channel):
                continue
            url, qos = self._urls.pop(channel), channel.qos
            qos._flush()
            tags = [tag for tag in qos._delivered if tag not in running]
            none_runs = len(tags) == len(qos._delivered)
            # Each tag is used once only: a job that is put back keeps its tag, and to put it back once
            # more would take it from the worker that has it by then.
            qos._delivered.clear()
            # One that runs may be acknowledged yet, where kombu has not come to close the channel.
            if none_runs:
                _take_apart(channel)
            if tags:
                self._left.append(_Left(url, tags, getattr(qos, _CLOSED_AT, time())))
        return sum(len(left.tags) for left in self._left)

    def put_back(self, channel: Any, running: Collection[str] = ()) -> None:
        """Put back what lost channels to the same Redis have left: in order, before what waits there.

        Args:
            channel: A new channel. If it is lost in turn, the next call looks after its jobs.
            running: See `collect`.

        Raises:
            Exception: The connection is lost again. The next call tries once more.

        """
        if not is_redis(channel) or channel in self._urls:
            return
        self.collect(running)
        url = channel.connection.client.as_uri()
        for left in [left for left in self._left if left.url == url]:
            try:
                count = _put_back(channel, left)
            except channel.connection_errors:
                raise
            except Exception:
                logger.warning(
                    "Could not put %d jobs back into their queues", len(left.tags), exc_info=True
                )
            else:
                self._left.remove(left)
                logger.info(
                    "Put %d jobs back into their queues that Redis had not got back when it was away",
                    count,
                )
        self._urls[channel] = url


def _is_lost(channel: Any) -> bool:
    transport = channel.connection
    return channel.closed or transport is None or transport.client is None


def _take_apart(channel: Any) -> None:
    """Let go of what a lost channel has. It does not speak to Redis.

    To close a connection kombu closes its channels, and stops at the first one that cannot tell Redis. Python would
    keep the others in memory until the process ends, for what they do at its exit.
    """
    channel.qos._on_collect.cancel()
    with contextlib.suppress(Exception):  # half of it is done already
        channel._disconnect_pools()
        virtual.Channel.close(channel)  # type: ignore[no-untyped-call]


def _put_back(channel: Any, left: _Left) -> int:
    """Put jobs back that nobody else has got since. Return how many."""
    index = f"{channel.global_keyprefix}{channel.unacked_index_key}"
    with redis_client(channel).pipeline(transaction=False) as pipe:
        for tag in left.tags:
            pipe.zscore(index, tag)
        delivered_at = dict(zip(left.tags, pipe.execute(), strict=True))
    count = 0
    with channel.conn_or_acquire() as client:
        for tag in reversed(left.tags):
            at = delivered_at[tag]
            # None: it was acknowledged, or is back already. Later: another worker has it.
            if at is not None and at <= left.lost_at:
                channel.qos.restore_by_tag(tag, client=client)
                count += 1
    return count


def _restore(qos: Any, restore: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stand in for ``qos.restore_unacked``."""
    delivered = qos._delivered  # an OrderedDict by delivery tag, oldest first
    for tag in reversed(list(delivered)):
        delivered.move_to_end(tag)
    return restore(*args, **kwargs)


def _restore_tags(qos: Any, tags: list[str], client: Any) -> None:
    """Put jobs back to the heads of their queues in Redis, the latest first, by their tags, the oldest first."""
    for tag in reversed(tags):
        qos.restore_by_tag(tag, client=client)
        del qos._delivered[tag]


def _restore_redis(qos: Any, _: Callable[..., Any], client: Any = None) -> None:
    """Stand in for ``qos.restore_unacked`` on Redis. What cannot be put back stays noted there.

    kombu's own raises where Redis is away, or where the connection was taken apart already. That leaves
    the channel half closed, and ends the worker in the second case.
    """
    setattr(qos, _CLOSED_AT, time())
    delivered = qos._delivered
    try:
        with qos.channel.conn_or_acquire(client) as client:
            _restore_tags(qos, list(delivered), client)
    except Exception as error:  # noqa: BLE001 - whatever state the connection is in
        logger.warning(
            "Could not put %d unacknowledged jobs back: the connection to Redis is lost (%r). The next "
            "connection does it; without one Redis gives them out again after visibility_timeout",
            len(delivered),
            error,
        )
