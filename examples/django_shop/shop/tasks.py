"""The tasks. The settings limit ``send_newsletter``, the decorator limits ``export``."""

import time

from celery import shared_task

from rate_limiter import TokenBucket
from rate_limiter.celery import throttle


@shared_task
def send_newsletter(to):
    return time.monotonic()


@shared_task
@throttle(TokenBucket(capacity=1, tokens_per_second=5))
def export(table):
    return time.monotonic()
