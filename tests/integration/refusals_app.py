"""The app of tests about what a task sees of a job that is refused, or cannot be priced.

Each task is there twice: ``d …`` has its limit from ``@throttle``, ``g …`` from the gate by name.
"""
# ruff: noqa: D102 - the hooks are Celery's

import sys

from celery import Task
from pydantic import BaseModel
from tests.integration.app import CONFIG, app, gate, note

from rate_limiter import BucketPerKey, RateLimitExceeded, TokenBucket
from rate_limiter.celery import throttle


class Noting(Task):
    """Notes how its jobs end."""

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        note("on_failure", [task_id, type(exc).__name__])

    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        note("after_return", [task_id, status])


def declare(name, function, bucket, tokens=1, when_limited="wait", **options):
    """Make both tasks, with a bucket each."""
    limited = throttle(bucket(), tokens=tokens, when_limited=when_limited)(function)
    app.task(limited, name=f"d {name}", base=Noting, **options)
    if gate:
        app.task(function, name=f"g {name}", base=Noting, **options)
        gate.limit(f"g {name}", bucket=bucket(), tokens=tokens, when_limited=when_limited)


def never():
    return TokenBucket(1, 1e-6)


def refused(number):
    note("ran", number)
    return number


def expected(number):
    return number


def persistent(self, number):
    return [number, self.request.retries]


def priced(price):
    note("ran", price)
    return price


def interrupt():
    raise KeyboardInterrupt


PRICES = {
    "raises": lambda: {}["no price"],
    "exits": lambda: sys.exit("the price list is gone"),
    "interrupts": interrupt,
    "one": lambda: 1,
}


class Order(BaseModel):
    """What a job of a pydantic task is sent."""

    size: int


def ordered(order: Order):
    return order.size


declare("refused", refused, never, when_limited="raise")
declare("expected", expected, never, when_limited="raise", throws=(RateLimitExceeded,))
declare(
    *("persistent", persistent, lambda: TokenBucket(1, 2)),
    when_limited="raise",
    bind=True,
    autoretry_for=(RateLimitExceeded,),
    default_retry_delay=0,
    retry_kwargs={"countdown": 0.3, "max_retries": 50},
)
declare("priced", priced, lambda: TokenBucket(100, 100), tokens=lambda price: PRICES[price]())
declare(
    *("ordered", ordered, lambda: TokenBucket(10, 100)),
    tokens=lambda order: order["size"],
    pydantic=True,
)


@app.task(name="note error")
def note_error(task_id):
    note("errback", task_id)


@app.task(name="total")
def total(values):
    return values


def instead(tenant, number):
    return ["instead", tenant, number]


def limits_of_tenant(tenant):
    if tenant == "lost":
        sys.exit("the plans are gone")


if gate or CONFIG["pool"] != "prefork":

    @app.task(name="fallen")
    @throttle(
        BucketPerKey(1, 1e-6, limits=limits_of_tenant),
        key="tenant",
        when_limited=instead,
        name="fallen",
    )
    def fallen(tenant, number):
        return ["ran", tenant, number]
