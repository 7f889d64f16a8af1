"""Jobs on their way to a lane, see `parking`: a copy is sent, and the job is acknowledged when the copy is stored."""

import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from celery.worker import state

from ..broker.relay import Relay
from .parked import Parked

__all__ = ["Outbox"]

logger = logging.getLogger("rate_limiter")

#: The outbox remembers the lanes of so many jobs.
_REMEMBERED: Final = 10_000

#: Seconds to wait for the confirmation of a job, on green pools.
_CONFIRM: Final = 0.5

#: Why RabbitMQ takes nothing.
_SHORT: Final = "the broker is short of memory or disk space"


class Outbox:
    """The jobs that one connection of a worker sends to lanes.

    Args:
        consumer: Celery's consumer, connected.
        refused: Called with a lane, a request and a reason, if the broker does not take the job.
        acknowledged: Called when a job was parked, and is acknowledged.

    """

    def __init__(
        self,
        consumer: Any,
        refused: Callable[[Parked, Any, str], None],
        acknowledged: Callable[[], None],
    ) -> None:
        self._consumer = consumer
        self._refused = refused
        self._acknowledged = acknowledged
        self._is_green = consumer.hub is None
        self._is_redis = consumer.connection.transport.driver_type == "redis"
        self._relay = Relay(self._moved, self._failed, consumer.hub)
        #: Jobs that are to be sent as soon as the relay takes them.
        self._waiting: deque[tuple[Parked, Any]] = deque()
        #: The lanes of the last jobs that were parked, by their ids.
        self._lane_of: OrderedDict[str, str] = OrderedDict()
        self._flushing = False
        self._stopping = False

    def put(self, parked: Parked, request: Any) -> bool:
        """Send a job to a lane. Return whether it was sent at once. Else it is sent, or refused, later."""
        state.task_ready(request)
        parked.leaving += 1
        if not self._waiting and not self._relay.full:
            self._send(parked, request)
            return True
        self._waiting.append((parked, request))
        if self._relay.blocked:
            self._refuse_all()
        return False

    def where(self, task_id: str) -> str | None:
        """Return the lane that a job was sent to, one of the last 10,000, if it has not come back."""
        return self._lane_of.get(task_id)

    def came_back(self, task_id: str) -> None:
        """Take note of a job that has come back from its lane."""
        self._lane_of.pop(task_id, None)

    def tend(self) -> None:
        """Take in what the broker has confirmed, and send jobs that wait. Called now and then."""
        if self._waiting and self._relay.blocked:
            self._refuse_all()
        self._relay.tend()
        self._flush()

    def stop(self) -> None:
        """Wait a moment for the last confirmations, and close. Jobs that were not sent stay unacknowledged."""
        self._stopping = True
        self._waiting.clear()
        self._relay.farewell()
        self._relay.close()

    def _send(self, parked: Parked, request: Any) -> None:
        try:
            self._relay.send((parked, request), request.message, parked.name, as_it_came=True)
        except Exception as error:
            if self._is_redis and isinstance(error, self._consumer.connection_errors):
                raise  # it may have been moved; the next connection knows
            self._refuse(parked, request, repr(error))
            return
        if self._is_green:
            # Nothing tells of confirmations there.
            self._relay.wait(_CONFIRM)

    def _flush(self) -> None:
        if self._flushing:  # on green pools `_send` waits for a confirmation, which calls this
            return
        self._flushing = True
        try:
            while self._waiting and not self._relay.full:
                self._send(*self._waiting.popleft())
        finally:
            self._flushing = False

    def _moved(self, job: tuple[Parked, Any]) -> None:
        parked, request = job
        parked.leaving -= 1
        parked.count(1)
        parked.saw_job(monotonic())
        self._lane_of[request.id] = parked.name
        if len(self._lane_of) > _REMEMBERED:
            self._lane_of.popitem(last=False)
        message = request.message
        if not message.acknowledged and message.channel.connection is not None:
            message.ack_log_error(logger, self._consumer.connection_errors)
        request.acknowledged = True
        if not self._stopping:
            self._acknowledged()
            self._flush()

    def _failed(self, job: tuple[Parked, Any]) -> None:
        if not self._stopping:
            self._refuse(*job, "it was not confirmed")

    def _refuse_all(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for parked, request in waiting:
            self._refuse(parked, request, _SHORT)

    def _refuse(self, parked: Parked, request: Any, why: str) -> None:
        parked.leaving -= 1
        state.task_reserved(request)
        self._refused(parked, request, why)
