"""What the worker holds is shared with a worker that starts later.

A worker that was alone may hold all jobs that wait for a limit. Celery's gossip tells it that another
worker has started. It then gives back what is beyond its share. Gossip tells of all workers of the broker,
not which queues they consume. Without gossip (``--without-gossip``), or on brokers that have none, a worker
keeps what it holds.
"""

from collections.abc import Callable
from typing import Any, Final

__all__ = ["SECONDS", "Sharing"]

#: Seconds for which a worker holds no more than its share, once another one has started. A worker tells of
#: its start about a second before it consumes.
SECONDS: Final = 5.0


class Sharing:
    """Learns from gossip, over one connection, that another worker has started.

    Args:
        consumer: Celery's consumer, whose steps are made.
        share: Called with the part of what is held that this worker is to keep, and the name of the other.

    """

    def __init__(self, consumer: Any, share: Callable[[float, str], None]) -> None:
        self._consumer = consumer
        self._share = share
        self._gossip: Any = getattr(consumer, "gossip", None)
        self._update: Any = None
        # The public `gossip.on.node_join` is called for workers too that were there before this one.
        if self._gossip is not None and hasattr(self._gossip, "update_state"):  # it is switched on
            self._update, self._gossip.update_state = self._gossip.update_state, self._on_event

    def stop(self) -> None:
        """Stop to listen, as the connection ends."""
        if self._update is not None:
            self._gossip.update_state = self._update

    def _on_event(self, event: Any) -> Any:
        result = self._update(event)
        if event.get("type") == "worker-online":
            others = len(list(self._gossip.state.alive_workers()))
            # Not here, where a message is being handled.
            self._consumer.call_soon(self._share, others / (others + 1), event.get("hostname"))
        return result
