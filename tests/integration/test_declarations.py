"""What `throttle` and `Gate` refuse where it is written. None of this needs a server."""

import inspect

import pytest
from celery import Celery, shared_task
from celery.contrib.testing.app import setup_default_app
from celery.contrib.testing.worker import start_worker
from harness import app_here

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate, throttle


def test_limits_are_declared_before_the_worker_starts():
    """gate.limit() in a running worker is a RuntimeError."""
    app = app_here()
    gate, bucket = Gate(app), TokenBucket(1, 1)
    gate.limit("before", bucket=bucket)
    with (
        setup_default_app(app, use_trap=False),
        start_worker(app, perform_ping_check=False),
        pytest.raises(RuntimeError, match="before the worker starts"),
    ):
        gate.limit("late", bucket=bucket)
    app.close()


async def _coroutine(): ...


def _function(): ...


def _above_app_task(decorate):
    decorate(Celery(set_as_current=False).task(_function))


def _above_shared_task(decorate):
    decorate(shared_task(_function))


BUCKET = TokenBucket(5, 1)


@pytest.mark.parametrize(
    ("decorated", "message"),
    [
        (_above_app_task, "below @app.task"),
        (_above_shared_task, "below @app.task"),
        (lambda decorate: decorate(_coroutine), "is async"),
        (lambda decorate: decorate(print), "decorates a function"),
        (lambda decorate: decorate(TokenBucket), "decorates a function"),
    ],
)
def test_what_cannot_be_limited_is_refused_at_once(decorated, message):
    """@throttle stands below @app.task, on a plain function."""
    with pytest.raises(TypeError, match=message):
        decorated(throttle(BUCKET))


def test_the_signature_is_the_functions():
    """Tools that look at a throttled function see the one below."""

    @throttle(BUCKET)
    def documented(a: int, *, b: str = "") -> None:
        """Says what it does."""

    assert str(inspect.signature(documented)) == "(a: int, *, b: str = '') -> None"
    assert documented.__doc__ == "Says what it does."
