"""The tasks that the worker containers run. ``run`` is the name of a test's own log."""

import time

from celery import shared_task
from smoke_log import note

from rate_limiter import BucketPerKey, TokenBucket
from rate_limiter.celery import throttle


@shared_task(name="free")
def free(run, value):
    note(run, value)


@shared_task(name="from settings")
def from_settings(run, value):
    note(run, value)


@shared_task(name="one rate")
def one_rate(run, value):
    note(run, value)


@shared_task(name="shared")
@throttle(TokenBucket(capacity=1, tokens_per_second=5))
def shared(run, value):
    note(run, value)


@shared_task(name="prefork")
@throttle(TokenBucket(capacity=2, tokens_per_second=10), timeout=60)  # it waits in the children
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
@throttle(TokenBucket(capacity=10, tokens_per_second=20), tokens="megabytes")
def upload(run, megabytes):
    note(run, megabytes)


@shared_task(name="for tenant")
@throttle(BucketPerKey(1, 5, limits={"calm": (2, 5)}.get), key="tenant")
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
