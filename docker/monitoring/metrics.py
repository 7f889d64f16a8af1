"""Shows what happens under a worker's limits to Prometheus: ``celery -A shop worker --include metrics``."""

import os

from celery.signals import worker_ready
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import start_http_server

from rate_limiter import otel

otel.instrument(MeterProvider([PrometheusMetricReader()]))


@worker_ready.connect
def serve(**_):
    """Listen in the worker's main process, where the gate counts."""
    start_http_server(int(os.environ.get("METRICS_PORT", "9464")))
