"""What the tests of buckets share."""

import os
import sys

import pytest

from rate_limiter import RateLimitExceeded, SharedTokenBucket, TokenBucket
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

#: Every way to make a bucket. New classes join the contract's tests here.
BUCKETS = {**QUEUES, **({"share()": turned_shared} if hasattr(os, "fork") else {})}


@pytest.fixture(scope="session", params=BUCKETS.values(), ids=BUCKETS)
def new_bucket(request):
    """Make a bucket: tests that use this state the contract of all buckets."""
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
