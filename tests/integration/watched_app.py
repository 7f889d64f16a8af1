"""``limits_app``, with everything that can be told about limits; ``inspect seen`` shows what was."""

from collections import Counter

from celery.worker.control import inspect_command
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from tests.integration.limits_app import app

from rate_limiter import otel
from rate_limiter.celery import signals

__all__ = ["app"]

told = Counter()
reader = InMemoryMetricReader()
otel.instrument(MeterProvider([reader]))


@signals.task_throttled.connect
def throttled(limit, **_):
    told[f"{limit} throttled"] += 1


@signals.task_admitted.connect
def admitted(limit, **_):
    told[f"{limit} admitted"] += 1


@signals.task_refused.connect
def refused(limit, how, **_):
    told[f"{limit} refused"] += 1


@inspect_command()
def seen(state):
    """Show what the signals and the metrics have told."""
    measured = Counter()
    for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.data.data_points:
            name = f"{point.attributes['limit']} {metric.name.removeprefix('rate_limiter.')}"
            measured[name] += getattr(point, "value", None) or getattr(point, "count", 0)
    return {"signals": dict(told), "metrics": dict(measured)}
