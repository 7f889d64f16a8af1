"""What the tests of buckets share."""

import logging
import os
import sys

import pytest

from rate_limiter import AllOf, BucketPerKey, RateLimitExceeded, SharedTokenBucket, TokenBucket
from rate_limiter.shared_bucket import share


def turned_shared(*args, **options):
    """Make a bucket that was a plain one at first."""
    bucket = TokenBucket(*args, **options)
    share(bucket)
    return bucket


#: What stands for a queue of its own: all of the contract, to the last line of `wait`.
QUEUES = {
    "TokenBucket": TokenBucket,
    **({"SharedTokenBucket": SharedTokenBucket} if hasattr(os, "fork") else {}),
}


def of_a_key(*args, **options):
    """Make the bucket of a key."""
    return BucketPerKey(*args, **options)["acme"]


def all_of(capacity, tokens_per_second, **options):
    """Make an `AllOf` in which one bucket always decides."""
    other = TokenBucket(capacity * 3, tokens_per_second * 3, **options)
    return AllOf(other, TokenBucket(capacity, tokens_per_second, **options))


#: Every way to make a bucket with a level of its own. New classes join the contract's tests here.
SINGLE = {
    **QUEUES,
    **({"share()": turned_shared} if hasattr(os, "fork") else {}),
    "BucketPerKey": of_a_key,
}

#: And those that are made of others.
BUCKETS = {**SINGLE, "AllOf": all_of}


@pytest.fixture(scope="session", params=BUCKETS.values(), ids=BUCKETS)
def new_bucket(request):
    """Make a bucket: tests that use this state the contract of all buckets."""
    return request.param


@pytest.fixture(scope="session", params=SINGLE.values(), ids=SINGLE)
def new_single(request):
    """Make a bucket that has its own numbers: tests that use this are about them."""
    return request.param


@pytest.fixture(scope="session", params=QUEUES.values(), ids=QUEUES)
def new_queue(request):
    """Make a bucket that has a queue of its own: tests that use this look into it."""
    return request.param


def wait_now(bucket, tokens):
    """Ask with a `wait` that has no time."""
    try:
        bucket.wait(tokens, timeout=0)
    except RateLimitExceeded:
        return False
    return True


WAYS_TO_ASK = {
    "allow": lambda bucket, tokens: bucket.allow(tokens),
    "try_consume": lambda bucket, tokens: bucket.try_consume(tokens),
    "take_or_delay": lambda bucket, tokens: bucket.take_or_delay(tokens) == 0.0,
    "wait": wait_now,
}


@pytest.fixture(scope="session", params=WAYS_TO_ASK.values(), ids=WAYS_TO_ASK)
def ask(request):
    """Ask a bucket for tokens now: whether they were taken."""
    return request.param


@pytest.fixture
def restless_threads():
    """Threads are switched as often as Python can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(autouse=True)
def warnings_are_logged(caplog):
    """Show warnings to `caplog`, also after a Celery worker in this process has set the root's level."""
    caplog.set_level(logging.WARNING, "rate_limiter")
