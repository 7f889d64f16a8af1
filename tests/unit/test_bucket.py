"""What counts as a bucket."""

import pytest

from rate_limiter import AllOf, Bucket, BucketPerKey, TokenBucket


class Remote:
    """A bucket of somebody else's, on a server that is down."""

    def allow(self, tokens=1):
        """Ask the server, as each method and property here."""
        raise ConnectionError

    wait = take_or_delay = refund = charge = pause = configure = allow
    capacity = tokens_per_second = tokens = property(allow)


class WithAttributes:
    """A bucket whose numbers are attributes of the instance."""

    allow = wait = take_or_delay = refund = charge = pause = configure = Remote.allow

    def __init__(self):
        self.capacity = self.tokens_per_second = self.tokens = 1.0


class Declared(Bucket):
    """A bucket that says so."""


class Half:
    """Has some of the members only."""

    def allow(self, tokens=1):
        """Grant everything."""
        return True


@pytest.mark.parametrize("kind", [Remote, WithAttributes, Declared])
def test_a_class_with_the_members_is_a_bucket(kind):
    """A class needs to have the members, not to know the library; no property of it is read."""
    assert isinstance(kind(), Bucket)


@pytest.mark.parametrize("other", [Half(), None, print, 5, BucketPerKey(1, 1), TokenBucket, Remote])
def test_other_things_are_no_buckets(other):
    """Without a member it is no bucket, and neither is the class of a bucket."""
    assert not isinstance(other, Bucket)


def test_subclass_of_bucket_is_a_class_of_its_own():
    """What has the members of Bucket is no instance of a class that is derived from it."""
    assert isinstance(Declared(), Declared)
    assert not isinstance(TokenBucket(1, 1), Declared)


def test_looking_at_a_bucket_reads_no_level():
    """AllOf and BucketPerKey are made and shown without asking a server."""
    both = AllOf(Remote(), Remote())
    assert repr(both).count("Remote") == 2
    assert "1 tokens" in repr(BucketPerKey(1, 1))
