"""The tasks that the worker containers run. Each notes what it ran, where and when.

``run`` is the name of a test's own log. The log is in the Redis that keeps the results too, and the time
is the monotonic clock, which all containers of one engine share.
"""

import json
import os
import time

import redis
from celery import current_task, shared_task

from rate_limiter import TokenBucket
from rate_limiter.celery import throttle

log = redis.Redis.from_url(os.environ.get("CELERY_RESULT_BACKEND", "redis://"))


def note(run, value):
    entry = [value, current_task.request.hostname, os.getpid(), time.monotonic()]
    log.rpush(run, json.dumps(entry))


@shared_task(name="free")
def free(run, value):
    note(run, value)


@shared_task(name="from settings")
def from_settings(run, value):
    note(run, value)


@shared_task(name="shared")
@throttle(TokenBucket(capacity=1, tokens_per_second=5))
def shared(run, value):
    note(run, value)


@shared_task(name="prefork")
@throttle(TokenBucket(capacity=2, tokens_per_second=10))
def prefork(run, value):
    note(run, value)
    time.sleep(0.25)  # so that one child alone could not run them all


@shared_task(name="backlog")
@throttle(TokenBucket(capacity=1, tokens_per_second=5))
def backlog(run, value):
    note(run, value)


@shared_task(name="kept")
@throttle(TokenBucket(capacity=1, tokens_per_second=4))
def kept(run, value):
    note(run, value)


@shared_task(name="upload")
@throttle(TokenBucket(capacity=10, tokens_per_second=20), tokens=lambda run, megabytes: megabytes)
def upload(run, megabytes):
    note(run, megabytes)


TENANTS = {
    "busy": TokenBucket(capacity=1, tokens_per_second=5),
    "calm": TokenBucket(capacity=2, tokens_per_second=5),
}


@shared_task(name="for tenant")
@throttle(lambda run, tenant: TENANTS[tenant])
def for_tenant(run, tenant):
    note(run, tenant)


@shared_task(name="member")
@throttle(TokenBucket(capacity=2, tokens_per_second=5))
def member(run, value):
    note(run, value)
    return value


@shared_task(name="total")
def total(values, run):
    note(run, "total")
    return sum(values)


@shared_task(name="refused")
@throttle(TokenBucket(capacity=1, tokens_per_second=0.01), when_limited="raise")
def refused(run, value):
    note(run, value)
    return value


@shared_task(name="sent back", bind=True)
@throttle(TokenBucket(capacity=1, tokens_per_second=4), when_limited="retry")
def sent_back(self, run, value):
    note(run, value)
    return self.request.retries
