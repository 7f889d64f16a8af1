"""What the gate does to one connection of a worker.

It raises the prefetch count by the number of held jobs, renews their leases on Redis, and lets them go
back to the broker in order.

The leases of jobs that wait for their ETA are renewed too. A job that was sent back is one of them, and
may wait for longer than ``visibility_timeout``. That Celery itself does not renew them is a trap that its
documentation warns of; no user wants those of other tasks to run twice.

After a connection loss Celery lowers the prefetch count, and restores it with each acknowledgement. It
sets it outright then, which would undo the rise, and in the thread that acknowledges, while the consumer
reads from the same socket. So the gate does it instead.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from celery.worker.consumer.tasks import Tasks
from celery.worker.request import Request

from ..broker.lease import Lease
from ..broker.prefetch import Prefetch
from ..broker.restore import give_back, restore_in_order

__all__ = ["Window"]

logger = logging.getLogger("rate_limiter")


class Window:
    """The prefetch window of one connection.

    Args:
        consumer: Celery's consumer, connected.
        held: Returns the requests that are held or kept. Called by Celery's timer, which is a thread of
            its own in a worker without event loop.

    """

    def __init__(self, consumer: Any, held: Callable[[], Sequence[Any]]) -> None:
        self._consumer = consumer
        self._held = held
        self._channel = consumer.task_consumer.channel
        self._qos = consumer.qos
        self._prefetch = Prefetch(self._qos)
        # Quorum queues, and every queue of RabbitMQ 4.
        self._static = not _tasks_step(consumer).qos_global(consumer) and (
            consumer.connection.transport.driver_type == "amqp"
        )
        self._warned = False
        self._update_timer: Any = None
        self._lease = Lease(self._channel)
        self._lease_timer: Any = None
        if self._lease.interval is not None:
            self._lease_timer = consumer.timer.call_repeatedly(self._lease.interval, self._renew)
        restore_in_order(self._channel)
        consumer._restore_prefetch_count_after_connection_restart = _nothing

    def restore_with(self, request: Any) -> None:
        """Restore a step of the prefetch count that Celery has lowered when a job is acknowledged."""
        restore = partial(self._consumer.call_soon, self._restore)
        for answer in request.on_ack, request.on_reject:
            answer.then(restore)

    def follow(self, held: int, most: int) -> None:
        """Raise or lower the prefetch count.

        Args:
            held: The number of held jobs that take up a part of the count.
            most: The highest number of jobs that may be held.

        """
        consumer = self._consumer
        if self._static:
            if held:
                self._warn()
            return
        if self._prefetch.follow(held, most) and consumer.hub is not None and not self._update_timer:
            # Celery's event loop sends the count once a turn, then handles messages, then sleeps until
            # the next timer. A timer that is due runs before that sleep.
            self._update_timer = consumer.timer.call_after(0, self._update_soon)

    def update(self) -> None:
        """Send the prefetch count to the broker, if it has changed."""
        self._prefetch.update()

    def stop(self, held: Sequence[Any]) -> None:
        """Let go of the connection, which is closing or lost.

        Args:
            held: The requests that were held. They go back to the broker.

        """
        for timer in self._update_timer, self._lease_timer:
            if timer is not None:
                self._consumer.timer.cancel(timer)
        give_back(self._channel, [request.message for request in held])

    def _update_soon(self) -> None:
        self._update_timer = None
        self._prefetch.update()

    def _restore(self, *_: Any) -> None:
        consumer = self._consumer
        if consumer._maximum_prefetch_restored or consumer.qos is not self._qos:
            return
        count, most = consumer.initial_prefetch_count, consumer.max_prefetch_count
        restored = min(most, count + consumer.prefetch_multiplier)
        consumer.initial_prefetch_count = restored
        self._qos.increment_eventually(restored - count)
        if restored == most:
            consumer._maximum_prefetch_restored = True
            logger.info("Prefetch count has been restored to the maximum of %d", most)

    def _renew(self) -> None:
        messages = [request.message for request in (*self._held(), *_scheduled(self._consumer.timer))]
        tags = [message.delivery_tag for message in messages if message.channel is self._channel]
        try:
            self._lease.renew(tags)
        except Exception:
            # If the connection is lost, Celery will notice, and the gate will forget the held jobs.
            logger.warning("Could not renew the leases of %d jobs", len(tags), exc_info=True)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "The prefetch count is static here (quorum queues, RabbitMQ 4): while the gate holds %d "
                "jobs of a queue, the other jobs in it wait; give them a queue of their own",
                self._consumer.initial_prefetch_count,
            )


def _tasks_step(consumer: Any) -> Any:
    return next(step for step in consumer.steps if isinstance(step, Tasks))


def _scheduled(timer: Any) -> Iterator[Any]:
    """Yield the requests that wait for their ETA, where `celery inspect scheduled` finds them too."""
    for item in list(timer.queue):
        arguments = item.entry.args
        if arguments and isinstance(arguments[0], Request):
            yield arguments[0]


def _nothing(*_: Any) -> None:
    """Stand in for the consumer's own way to restore the prefetch count."""
