"""Signals of what happens under limits, of the kind of ``celery.signals``::

    from rate_limiter.celery import signals

    @signals.task_throttled.connect
    def count(sender, task_id, limit, delay, **_): ...

Importing this module begins to send them. A receiver runs in the loop of the worker, or in the task's own
thread where the decorator pays: keep it quick. What it raises is logged once, and nothing else happens.

- ``task_throttled``: a job begins to wait at the gate. ``delay``: the seconds until its tokens are there, as
  forecast now; 0.0 if it waits for a free slot of the pool.
- ``task_admitted``: a job has paid and may run. ``waited``: the seconds for which it was held, or waited in the
  decorator. ``limit`` is the limit that made it wait, or the first one of those that it has paid.
- ``task_refused``: a job found no tokens and does not wait. ``delay``: the seconds until they are there.
  ``how``: ``"raise"``, ``"drop"``, ``"retry"``, ``"fallback"``, or ``"timeout"``.
- ``task_shadowed``: a limit with ``shadow=True`` would have made a job wait for ``delay`` seconds, or refused it.
  The sender is the limit's name.
- ``limit_changed``: an operator has changed a limit. The sender is the limit's name. ``what`` says what is new,
  ``reason`` why.

The sender of the first three is the name of the task. ``task_id`` is ``None`` for a call outside of a worker,
``limit`` the name of the limit.
"""

import logging
from collections.abc import Sequence
from typing import Any

from celery import current_task
from celery.utils.dispatch import Signal
from celery.worker.request import Request

from ..gating.limit import Demand, Limit
from ..gating.record import record_of
from ..gating.tally import Observer, observers

__all__ = ["limit_changed", "task_admitted", "task_refused", "task_shadowed", "task_throttled"]

logger = logging.getLogger("rate_limiter")


class _Signal(Signal):
    """Logs the first exception of a receiver, not one for each job."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._failed: set[Any] = set()

    def send(self, sender: Any, **named: Any) -> None:
        """Call the receivers."""
        for receiver in self._live_receivers(sender):
            try:
                receiver(signal=self, sender=sender, **named)
            except Exception:
                if receiver not in self._failed:
                    self._failed.add(receiver)
                    logger.exception(
                        "The receiver %r of %s failed. Further failures are not logged",
                        receiver,
                        self.name,
                    )


task_throttled = _Signal(name="task_throttled", providing_args={"task_id", "limit", "delay"})
task_admitted = _Signal(name="task_admitted", providing_args={"task_id", "limit", "waited"})
task_refused = _Signal(name="task_refused", providing_args={"task_id", "limit", "delay", "how"})
task_shadowed = _Signal(name="task_shadowed", providing_args={"delay"})
limit_changed = _Signal(name="limit_changed", providing_args={"what", "reason"})


class _Sending(Observer):
    """Sends the signals. One without receivers costs nothing but a look."""

    def held(self, job: Any, demand: Demand, delay: float) -> None:
        if task_throttled.receivers:
            _send(task_throttled, job, demand.limit, delay=delay)

    def admitted(self, job: Any, demands: Sequence[Demand], waited: float, limit: Limit | None) -> None:
        if task_admitted.receivers:
            _send(task_admitted, job, limit or demands[0].limit, waited=waited)

    def refused(self, job: Any, demand: Demand, delay: float, how: str) -> None:
        if task_refused.receivers:
            _send(task_refused, job, demand.limit, delay=delay, how=how)

    def shadowed(self, limit: Limit, seconds: float) -> None:
        if task_shadowed.receivers:
            task_shadowed.send(sender=record_of(limit).name, delay=seconds)

    def changed(self, limit: Limit, what: str, reason: str) -> None:
        limit_changed.send(sender=record_of(limit).name, what=what, reason=reason)


def _send(signal: _Signal, job: Any, limit: Limit, **details: Any) -> None:
    if isinstance(job, str):  # the decorator pays, in the task
        name, task_id = job, current_task.request.id if current_task else None
    elif isinstance(job, Request):
        name, task_id = job.name, job.id
    else:  # a message of the gate for kombu consumers, in the same process
        return
    signal.send(sender=name, task_id=task_id, limit=record_of(limit).name, **details)


observers.append(_Sending())
