"""Redis: held jobs are kept from running a second time.

kombu's Redis transport gives a job that was not acknowledged within ``visibility_timeout`` seconds (an
hour by default) to another worker. It keeps the time of each delivery in a sorted set; what is held
has its time renewed there well before it is up.
"""

import logging
from collections.abc import Callable
from time import time
from typing import Any

__all__ = ["Lease"]

logger = logging.getLogger("rate_limiter")


class Lease:
    """Renews what is held on one connection. Does nothing on other brokers than Redis.

    Args:
        consumer: Celery's consumer.
        held: Returns the requests that are held.

    """

    def __init__(self, consumer: Any, held: Callable[[], list[Any]]) -> None:
        self._held = held
        self._timer = consumer.timer
        self._channel = consumer.task_consumer.channel
        self._entry: Any = None
        if hasattr(self._channel, "unacked_index_key"):
            self._entry = self._timer.call_repeatedly(self._channel.visibility_timeout / 3, self._renew)

    def stop(self) -> None:
        """End the renewing, with the connection."""
        if self._entry is not None:
            self._timer.cancel(self._entry)
            self._entry = None

    def _renew(self) -> None:
        now = time()  # what kombu writes there (kombu/transport/redis.py, QoS.append)
        leases = {request.message.delivery_tag: now for request in self._held()}
        if not leases:
            return
        try:
            with self._channel.conn_or_acquire() as client:
                client.zadd(self._channel.unacked_index_key, leases, xx=True)
        except Exception:
            # The connection is about to be found lost; what is held will be forgotten then.
            logger.warning("Could not renew the leases of %d held jobs", len(leases), exc_info=True)
