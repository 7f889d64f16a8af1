"""What the tests of buckets share."""

import sys

import pytest

from rate_limiter import RateLimitExceeded, TokenBucket


@pytest.fixture(scope="session", params=[TokenBucket], ids=lambda kind: kind.__name__)
def new_bucket(request):
    """Make a bucket: tests that use this state the contract of all buckets."""
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
