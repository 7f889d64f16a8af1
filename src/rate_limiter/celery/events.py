"""The event ``limit-throttled``, for monitors of a worker with ``-E``: a job begins to wait at the gate.

Its fields are ``uuid``, ``limit`` (its name), ``wait`` (the seconds until the tokens are there, as forecast) and
``reason``: ``"tokens"``, or ``"slot"`` if the job waits until another one of its bucket has started.

It is no ``task-`` event. Of each of these that it does not know, a monitor makes a new state of the task
(``celery/events/state.py``, ``Task.event``): Flower would show a held job as "THROTTLED", and not as received.
"""

from typing import Any, Final

from celery.worker.request import Request

from ..gating.limit import Demand
from ..gating.record import record_of
from ..gating.tally import Observer, observers

__all__ = ["send_together"]

_GROUP: Final = "limit"
_THROTTLED: Final = f"{_GROUP}-throttled"


class _Sending(Observer):
    """Sends the event, if the worker sends events at all."""

    def held(self, job: Any, demand: Demand, delay: float) -> None:
        if isinstance(job, Request):
            reason = "tokens" if delay else "slot"
            limit = record_of(demand.limit).name
            job.send_event(_THROTTLED, limit=limit, wait=delay, reason=reason)


def send_together(dispatcher: Any) -> None:
    """Have a worker's dispatcher send many of our events as one message, where it does so with Celery's."""
    if dispatcher is not None and "task" in dispatcher.buffer_group:
        dispatcher.buffer_group = [*dispatcher.buffer_group, _GROUP]


observers.append(_Sending())
