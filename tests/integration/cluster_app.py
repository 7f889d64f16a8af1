"""An app whose limits are in Redis, for several workers together."""

import json
import os
import time
from pathlib import Path

from celery import Celery

from rate_limiter import AllOf, BucketPerKey, TokenBucket
from rate_limiter.celery import Gate, current_charge, throttle
from rate_limiter.redis_bucket import RedisTokenBucket

CONFIG = json.loads(os.environ["LAB"])

app = Celery("lab")
app.conf.update(CONFIG["settings"])
if CONFIG["gate"]:
    Gate(app)


def note(kind, value):
    with Path(CONFIG["log"]).open("a") as file:
        file.write(json.dumps([kind, value, time.monotonic()]) + "\n")


def bucket(name, capacity=3, rate=30, **options):
    return RedisTokenBucket(
        name, capacity, rate, url=CONFIG["settings"]["limits_url"], **{"on_outage": "local", **options}
    )


@app.task(name="shared", bind=True, ignore_result=True)
@throttle(bucket("shared"), name="shared")
def shared(self, number):
    note("shared", number)
    note("shared by", self.request.hostname)


@app.task(name="closed", ignore_result=True)
@throttle(bucket("closed", 1, 20, on_outage="closed"))
def closed(number):
    note("closed", number)


@app.task(name="open", ignore_result=True)
@throttle(bucket("open", 1, 0.01, on_outage="open"))
def opened(number):
    note("open", number)


@app.task(name="heavy", ignore_result=True)
@throttle(bucket("heavy", 10, 40), tokens="cost")
def heavy(number, cost=1):
    note("heavy", number)


@app.task(name="both", ignore_result=True)
@throttle(AllOf(TokenBucket(1, 20), bucket("both", 5, 100)), name="both")
def both(number):
    note("both", number)


@app.task(name="two", ignore_result=True)
@throttle(AllOf(bucket("two quick", 5, 100), bucket("two slow", 3, 30)), name="two")
def two(number):
    note("two", number)


tenants = BucketPerKey(2, 20, redis=CONFIG["settings"]["limits_url"], name="tenants")


@app.task(name="tenant", bind=True, ignore_result=True)
@throttle(tenants, key="tenant", tokens="cost", name="tenant")
def per_tenant(self, number, tenant, cost=1, uses=1):
    note("tenant " + tenant, number)
    current_charge().settle(uses)


@app.task(name="refused")
@throttle(bucket("refused", 2, 0.001), when_limited="raise")
def refused(number):
    return number


@app.task(name="free", ignore_result=True)
def free(number):
    note("free", number)
