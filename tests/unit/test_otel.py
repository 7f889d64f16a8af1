"""OpenTelemetry's metrics: the numbers of the tally, and how many jobs are held."""

import os
import signal

import pytest
from engine_lab import Lab
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from rate_limiter import AllOf, TokenBucket, otel
from rate_limiter.celery import throttle
from rate_limiter.gating.tally import observers


@pytest.fixture
def read():
    """Return what reads all metrics: by name, then by attributes, the value or (count, sum)."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    otel.instrument(provider)

    def numbers():
        data, found = reader.get_metrics_data(), {}
        for metric in data.resource_metrics[0].scope_metrics[0].metrics if data else ():
            points = metric.data.data_points
            found[metric.name.removeprefix("rate_limiter.")] = {
                tuple(sorted(point.attributes.items())): getattr(point, "value", None)
                if hasattr(point, "value")
                else (point.count, point.sum)
                for point in points
            }
        return found

    yield numbers
    observers.pop()
    provider.shutdown()


def test_jobs_of_a_gate(read):
    """Held ones are counted until they go; waits and tokens by limit and task."""
    lab = Lab(2, 1, tokens=2)
    lab.offer("a", "b", "c", "revoked")
    assert read()["held"] == {(("limit", "limit"),): 3}
    lab.run(10)
    found = read()
    both = (("limit", "limit"), ("task", "a"))
    assert found["held"] == {(("limit", "limit"),): 0}
    assert found["admitted"][both] == 1
    assert found["tokens"][both] == 2
    assert found["wait"][both] == (1, 0)
    assert sum(count for count, _ in found["wait"].values()) == 3
    assert sum(total for _, total in found["wait"].values()) == pytest.approx(2 + 4)


def test_jobs_that_do_not_run(read):
    """Refused with how, failed, given back."""
    lab = Lab(1, 0.1, when_limited="drop")
    lab.offer("a", "b")
    other = Lab(1, 0.1, max_held=9)
    other.offer("c", "d", "e")
    other.engine.clear()
    found = read()
    assert found["refused"] == {(("how", "drop"), ("limit", "limit"), ("task", "b")): 1}
    assert found["held"] == {(("limit", "limit"),): 0}
    bad = Lab(1, 1)
    bad.bucket.configure(capacity=0.5)
    bad.offer("f")
    assert read()["failed"] == {(("limit", "limit"), ("task", "f")): 1}


def test_calls_of_the_decorator(read):
    """One that takes from several buckets pays its tokens once."""

    @throttle(AllOf(TokenBucket(5, 5), TokenBucket(5, 5)), tokens=3, name="both")
    def job(): ...

    job()
    (attributes,) = read()["tokens"]
    assert dict(attributes)["limit"] == "both"
    assert read()["tokens"][attributes] == 3


def test_a_forked_process(read):
    """It begins with nothing held, and no lock of another thread's stops it."""
    lab = Lab(1, 0.1)
    lab.offer("a", "b")
    measuring = observers[-1]
    with measuring._lock:
        child = os.fork()
        if not child:  # the parent's exporter held the lock
            code = 1
            try:
                signal.alarm(10)
                Lab(1, 1).offer("c")
                code = int(read()["held"] != {(("limit", "limit"),): 0})
            finally:
                os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_a_second_call_changes_nothing(read):
    """Nothing is counted twice."""
    before = len(observers)
    otel.instrument(observers[-1].goes_to)
    assert len(observers) == before
