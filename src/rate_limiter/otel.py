"""Metrics of limits through OpenTelemetry's API. It needs the extra ``otel``::

    from rate_limiter import otel

    otel.instrument()  # where the app is made

| instrument | kind | attributes |
|---|---|---|
| ``rate_limiter.admitted`` | counter, jobs that have paid | limit, task |
| ``rate_limiter.tokens`` | counter, tokens that they have paid | limit, task |
| ``rate_limiter.refused`` | counter, jobs that found no tokens and did not wait | limit, task, how |
| ``rate_limiter.failed`` | counter, jobs that could not pay | limit, task |
| ``rate_limiter.parked`` | counter, jobs that were moved aside in the broker | limit |
| ``rate_limiter.shadowed`` | counter, jobs that a limit with ``shadow=True`` would have made wait | limit |
| ``rate_limiter.wait`` | histogram, seconds that admitted jobs have waited | limit, task |
| ``rate_limiter.held`` | gauge, jobs that are held now | limit |

``task`` is the name of a Celery task or of a kombu queue. Keys and arguments are in no attribute. What the
decorator pays in a process of a prefork pool is counted there: set up OpenTelemetry's SDK in each process, as
its documentation says of forking servers.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any

from .extras import extra
from .gating.limit import Demand, Limit
from .gating.record import record_of
from .gating.tally import Observer, observers

with extra("otel", "opentelemetry.metrics"):
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter

__all__ = ["instrument"]


def instrument(meter_provider: MeterProvider | None = None) -> None:
    """Begin to measure what happens under all limits of this process.

    Args:
        meter_provider: Where the metrics go. By default to OpenTelemetry's global provider. A second call
            with the same one does nothing.

    """
    if not any(isinstance(each, _Measuring) and each.goes_to is meter_provider for each in observers):
        observers.append(_Measuring(meter_provider))


class _Measuring(Observer):
    """Adds each outcome to its instruments."""

    def __init__(self, meter_provider: MeterProvider | None) -> None:
        self.goes_to = meter_provider
        meter = get_meter("rate_limiter", meter_provider=meter_provider)
        self._admitted = meter.create_counter("rate_limiter.admitted", "{job}")
        self._tokens = meter.create_counter("rate_limiter.tokens", "{token}")
        self._refused = meter.create_counter("rate_limiter.refused", "{job}")
        self._failed = meter.create_counter("rate_limiter.failed", "{job}")
        self._parked = meter.create_counter("rate_limiter.parked", "{job}")
        self._shadowed = meter.create_counter("rate_limiter.shadowed", "{job}")
        self._wait = meter.create_histogram("rate_limiter.wait", "s")
        meter.create_observable_gauge("rate_limiter.held", [self._count_held], "{job}")
        #: The limit of each held job, and all limits that have held one.
        self._held: dict[int, Limit] = {}
        self._seen: set[Limit] = set()
        self._lock = Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork_in_child)

    def _after_fork_in_child(self) -> None:
        self._lock = Lock()  # the exporter's thread may have held it
        self._held.clear()  # the parent's gate holds them

    def held(self, job: Any, demand: Demand, delay: float) -> None:
        with self._lock:
            self._held[id(job)] = demand.limit
            self._seen.add(demand.limit)

    def admitted(self, job: Any, demands: Sequence[Demand], waited: float, limit: Limit | None) -> None:
        self._leave(job)
        for each, tokens in {demand.limit: demand.tokens for demand in demands}.items():
            attributes = _attributes(each, job)
            self._admitted.add(1, attributes)
            self._tokens.add(tokens, attributes)
        self._wait.record(waited, _attributes(limit or demands[0].limit, job))

    def refused(self, job: Any, demand: Demand, delay: float, how: str) -> None:
        self._leave(job)
        self._refused.add(1, _attributes(demand.limit, job) | {"how": how})

    def skipped(self, job: Any, limit: Limit) -> None:
        self._leave(job)

    def failed(self, job: Any, limit: Limit, error: Exception) -> None:
        self._leave(job)
        self._failed.add(1, _attributes(limit, job))

    def returned(self, job: Any, limit: Limit) -> None:
        self._leave(job)

    def parked(self, limit: Limit, jobs: int) -> None:
        self._parked.add(jobs, {"limit": record_of(limit).name})

    def shadowed(self, limit: Limit, seconds: float) -> None:
        self._shadowed.add(1, {"limit": record_of(limit).name})

    def forgotten(self, jobs: Sequence[Any]) -> None:
        for job in jobs:
            self._leave(job)

    def _leave(self, job: Any) -> None:
        with self._lock:
            self._held.pop(id(job), None)

    def _count_held(self, _options: CallbackOptions) -> Iterable[Observation]:
        with self._lock:
            counts = Counter(self._held.values())
            return [Observation(counts[each], {"limit": record_of(each).name}) for each in self._seen]


def _attributes(limit: Limit, job: Any) -> dict[str, str]:
    task = job if isinstance(job, str) else getattr(job, "name", None) or job.queue
    return {"limit": record_of(limit).name, "task": str(task)}
