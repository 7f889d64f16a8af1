"""Redis: a held job is kept from being given to a second worker.

kombu's Redis transport gives a job to another worker when it has not been acknowledged for
``visibility_timeout`` seconds (an hour by default). The transport keeps the time of each delivery in a
sorted set. The lease of a held job is renewed by writing the present time there.
"""

from collections.abc import Iterable
from time import time
from typing import Any

from .redis_channel import is_redis

__all__ = ["Lease"]


class Lease:
    """Renews the leases of one channel. Only Redis has leases.

    Args:
        channel: A kombu channel.

    """

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        #: Seconds between two renewals: a third of ``visibility_timeout``. ``None``: there are no leases.
        self.interval: float | None = None
        if is_redis(channel):
            self.interval = channel.visibility_timeout / 3

    def renew(self, tags: Iterable[str]) -> None:
        """Renew leases. Any thread may call this: it uses a connection of the channel's pool.

        Args:
            tags: The delivery tags of the jobs. A tag that is acknowledged already is left out.

        Raises:
            Exception: Redis could not be reached.

        """
        leases = dict.fromkeys(tags, time())  # as kombu/transport/redis.py does in QoS.append
        if leases and self._channel.connection is not None:
            with self._channel.conn_or_acquire() as client:
                client.zadd(self._channel.unacked_index_key, leases, xx=True)
