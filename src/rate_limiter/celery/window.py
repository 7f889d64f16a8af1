"""What the gate does to one connection of a worker.

It sees that the jobs behind held ones arrive: it raises the prefetch count by the number of held jobs, or
consumes a queue again, where that count is static. It renews the leases of held jobs on Redis, and lets
them go back to the broker in order.

The leases of jobs that wait for their ETA are renewed too. A job that was sent back is one of them, and
may wait for longer than ``visibility_timeout``. That Celery itself does not renew them is a trap that its
documentation warns of; no user wants those of other tasks to run twice.

After a connection loss Celery lowers the prefetch count, and restores it with each acknowledgement. It
sets it outright then, which would undo the rise, and in the thread that acknowledges, while the consumer
reads from the same socket. So the gate does it instead.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from celery.concurrency.prefork import TaskPool
from celery.exceptions import ImproperlyConfigured
from celery.worker import state
from celery.worker.consumer.tasks import Tasks
from celery.worker.request import Request

from ..broker.lease import Lease
from ..broker.prefetch import Prefetch
from ..broker.redis_channel import read_what_comes
from ..broker.restore import give_back, give_back_at_once, requeue, restore_in_order
from ..broker.static import StaticCounts
from ..gating.limit import Limit
from .loop import while_in_use
from .pausing import Queues

__all__ = ["Window", "refuse_prefetch_without_bound", "running"]

logger = logging.getLogger("rate_limiter")


class Window:
    """The prefetch window of one connection.

    Args:
        consumer: Celery's consumer, connected.
        held: Returns the requests that are held or kept. Called by Celery's timer, which is a thread of
            its own in a worker without event loop.
        takes_more_of: Tells whether more jobs of a queue may come.

    """

    def __init__(
        self,
        consumer: Any,
        held: Callable[[], Sequence[Any]],
        takes_more_of: Callable[[str], bool],
    ) -> None:
        self._consumer = consumer
        self._held = held
        self._takes_more_of = takes_more_of
        self._channel = consumer.task_consumer.channel
        self._qos = consumer.qos
        self._prefetch = Prefetch(self._qos)
        self._static: StaticCounts | None = None
        # Quorum queues, and every queue of RabbitMQ 4.
        if consumer.connection.transport.driver_type == "amqp" and not (
            _tasks_step(consumer).qos_global(consumer)
        ):
            self._static = StaticCounts(
                self._channel,
                count=lambda: int(consumer.initial_prefetch_count),
                changed=self._update_later,
                waits=_has_eta,
            )
            self._static.add(consumer.task_consumer)
        #: Whether the prefetch count cannot be changed.
        self.is_static = self._static is not None
        self.queues = Queues(consumer, None if self._static is None else self._static.full)
        self._stopped = False
        self._update_timer: Any = None
        self._lease = Lease(self._channel)
        self._lease_timer: Any = None
        if self._lease.interval is not None:
            renew = while_in_use(self._renew)
            self._lease_timer = consumer.timer.call_repeatedly(self._lease.interval, renew)
        restore_in_order(self._channel)
        read_what_comes(self._channel)
        consumer._restore_prefetch_count_after_connection_restart = _nothing

    def restore_with(self, request: Any) -> None:
        """When a job is acknowledged, restore a step of the prefetch count that Celery has lowered."""
        restore = partial(self._consumer.call_soon, self._restore)
        for answer in request.on_ack, request.on_reject:
            answer.then(restore)

    def restore_one(self) -> None:
        """Restore a step of the prefetch count that Celery has lowered: a job was acknowledged."""
        if not self._consumer._maximum_prefetch_restored:
            self._consumer.call_soon(self._restore)

    def hand_on(self, request: Any) -> None:
        """Take note of a job that goes to the pool."""
        if self._static is not None and request.message.channel is self._channel:
            self._static.hand_on(request.message)

    def keep(self, request: Any) -> None:
        """Take note of a job that does not go to the pool now."""
        if self._static is not None and request.message.channel is self._channel:
            self._static.keep(request.message)

    def follow(self, held: int, most: int) -> None:
        """Make room for other jobs beside the held ones.

        Args:
            held: The number of held jobs that take up a part of the prefetch count.
            most: The highest number of jobs that may be held.

        """
        if self.is_static or self._prefetch.follow(held, most):
            self._update_later()

    def give_back(self, held: Sequence[Any]) -> None:
        """Let the broker have requests back, for another worker. Each goes to where it was in its queue.

        Args:
            held: The requests, the latest first. They are held no more, and `follow` was told so.

        """
        self.update()  # before that: what there is room for would come again at once
        for request in held:
            requeue(request.message)
            request.acknowledged = True
            state.task_ready(request)

    def lower_now(self) -> None:
        """Let the next `follow` lower the count, however short a time ago it was lowered."""
        self._prefetch.lower_now()

    def update(self) -> None:
        """Tell the broker: the prefetch count, if it has changed; which queues are consumed again."""
        if self._static is None:
            self._prefetch.update()
            return
        self.queues.cancel_paused()
        # In one go: Celery's event loop does not call a chain of timers at once.
        while queues := self._wanted():
            for queue in queues:
                self._static.consume_again(queue)

    def stop(self, held: Sequence[Any], *, warm: bool) -> None:
        """Let go of the connection, which is closing or lost.

        Args:
            held: The requests that were held. They go back to the broker.
            warm: The worker ends, and first lets the jobs end that run.

        """
        self._stopped = True
        self.queues.stop()
        for timer in self._update_timer, self._lease_timer:
            if timer is not None:
                self._consumer.timer.cancel(timer)
        give_back(self._channel, [request.message for request in held])
        if warm and held:
            give_back_at_once(self._channel, self._may_go(held))

    def _may_go(self, held: Sequence[Any]) -> Callable[[str], bool]:
        """Return what tells of a delivery tag whether its job will not run here any more."""
        if isinstance(self._consumer.pool, TaskPool):
            # Celery has thrown out what no process has begun (AsynPool.flush). With that the order is kept.
            runs = running()
            return lambda tag: tag not in runs
        return {request.message.delivery_tag for request in held}.__contains__

    def _wanted(self) -> list[str]:
        """Return the queues that are to be consumed again."""
        assert self._static is not None  # noqa: S101 - for mypy
        consumer = self._consumer
        if self._stopped:
            return []
        most = getattr(consumer.qos, "max_prefetch", None)  # worker_eta_task_limit
        if most and len(self._static) + consumer.initial_prefetch_count > most:
            return []
        return [queue for queue in self._static.wanted() if self._takes_more_of(queue)]

    def _update_later(self) -> None:
        """See that `update` is called soon. Where there is no event loop, `Loop` does it anyway."""
        consumer = self._consumer
        if consumer.hub is None or self._update_timer is not None or self._stopped:
            return
        if self._static is None or self.queues.paused or self._wanted():
            # Celery's event loop sends the count once a turn, then handles messages, then sleeps until
            # the next timer. A timer that is due runs before that sleep; what is called by
            # `hub.call_soon` may not.
            self._update_timer = consumer.timer.call_after(0, self._update_soon)

    def _update_soon(self) -> None:
        self._update_timer = None
        try:
            self.update()
        except self._consumer.connection_errors:
            raise
        except Exception as error:  # noqa: BLE001 - it is raised again
            # Celery's event loop would log it, and no more. If it has cost us the channel, nothing would
            # be consumed any longer.
            self._consumer.hub.call_soon(_raise, error)

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
        # Those of lanes have channels of their own on the same connection, and the same keys.
        here = self._channel.connection
        tags = [message.delivery_tag for message in messages if message.channel.connection is here]
        try:
            self._lease.renew(tags)
        except Exception:
            # If the connection is lost, Celery will notice, and the gate will forget the held jobs.
            logger.warning("Could not renew the leases of %d jobs", len(tags), exc_info=True)


def running() -> set[str]:
    """Return the delivery tags of the jobs that run in the pool."""
    return {request.message.delivery_tag for request in tuple(state.active_requests)}


def _has_eta(message: Any) -> bool:
    """Tell whether Celery lets a job wait for its ETA."""
    return bool((message.headers or {}).get("eta"))


def _raise(error: Exception) -> None:
    raise error


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


def refuse_prefetch_without_bound(consumer: Any, limits: Iterable[Limit]) -> None:
    """Refuse a prefetch count that does not bound what a gate holds.

    Args:
        consumer: Celery's consumer.
        limits: All limits. Without one that makes jobs wait, nothing is held.

    Raises:
        ImproperlyConfigured: It is unlimited, or held jobs would count as running ones.

    """
    if not any(limit.patience and not limit.shadow for limit in limits):
        return
    if not consumer.initial_prefetch_count:
        raise ImproperlyConfigured(
            "worker_prefetch_multiplier is 0: the broker would send the worker everything at once, and "
            "no max_held could bound what the gate holds; set it to 1 or more"
        )
    redis = consumer.conninfo.transport.driver_type == "redis"
    if consumer.app.conf.get("worker_disable_prefetch") and redis:
        raise ImproperlyConfigured(
            "worker_disable_prefetch is set: a worker with as many jobs in hand as it has slots then "
            "stops consuming, and the jobs that the gate holds count; unset it, or remove the gate"
        )
