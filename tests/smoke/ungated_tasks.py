"""The task of a worker that has no gate."""

import time

from celery import shared_task
from smoke_log import note

from rate_limiter import TokenBucket
from rate_limiter.celery import throttle


@shared_task(name="ungated")
@throttle(TokenBucket(capacity=2, tokens_per_second=10))
def ungated(run, value):
    note(run, value)
    time.sleep(0.25)  # so that one child alone could not run them all
