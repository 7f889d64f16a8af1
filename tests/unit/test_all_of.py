"""Several buckets as one."""

import pytest
from waiters import Job

from rate_limiter import AllOf, Bucket, RateLimitExceeded, SharedTokenBucket, TokenBucket
from rate_limiter.testing import ManualClock


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def buckets(clock):
    return TokenBucket(2, 1, clock=clock), TokenBucket(3, 0.1, clock=clock)


@pytest.fixture
def both(buckets):
    return AllOf(*buckets)


def test_is_a_bucket(both):
    """AllOf has the contract of a bucket, with the smallest of each number."""
    assert isinstance(both, Bucket)
    assert (both.capacity, both.tokens_per_second, both.tokens) == (2, 0.1, 2)


@pytest.mark.parametrize("order", [1, -1])
def test_takes_from_all_or_from_none(buckets, clock, order):
    """What one refuses costs the others nothing, whatever the order."""
    fast, slow = buckets
    both = AllOf(*buckets[::order])
    assert [both.allow() for _ in range(3)] == [True, True, False]
    clock.advance(1)
    assert both.allow()  # the fast one has one again, the slow one its last
    clock.advance(1)
    assert not both.allow()
    assert (fast.tokens, slow.tokens) == (1, pytest.approx(0.2))


@pytest.mark.parametrize("order", [1, -1])
def test_delay_is_that_of_the_slowest(buckets, clock, order):
    """take_or_delay answers when all of them can grant, and takes nothing before."""
    both = AllOf(*buckets[::order])
    for bucket in buckets:
        bucket.allow(bucket.capacity)
    delay = both.take_or_delay()
    assert delay == pytest.approx(10)
    clock.advance(delay)
    assert both.take_or_delay() == 0.0


def test_wait_takes_when_all_grant(both, buckets, clock):
    """wait() returns when the slowest grants, and has taken from each once."""
    for bucket in buckets:
        bucket.allow(bucket.capacity)
    both.wait()
    assert clock() == pytest.approx(10)
    assert [bucket.tokens for bucket in buckets] == pytest.approx([1, 0])


def test_wait_with_timeout_takes_nothing(both, buckets):
    """A wait that would take too long raises at once, and takes nothing."""
    for bucket in buckets:
        bucket.allow(bucket.capacity)
    with pytest.raises(RateLimitExceeded):
        both.wait(timeout=0.5)
    assert [bucket.tokens for bucket in buckets] == [0, 0]


def test_wait_knows_the_slowest(clock):
    """A timeout that the first bucket would keep, and a slower one not, raises at once."""
    both = AllOf(TokenBucket(1, 1, clock=clock), TokenBucket(1, 0.01, clock=clock))
    both.allow()
    with pytest.raises(RateLimitExceeded) as error:
        both.wait(timeout=5)
    assert error.value.retry_after == pytest.approx(100)
    assert clock() == 0


@pytest.mark.parametrize("kind", [TokenBucket, SharedTokenBucket])
def test_threads_may_name_the_buckets_in_any_order(kind):
    """No order in which threads take from several buckets makes them wait for each other for ever."""
    one, other = kind(3, 5000), kind(5, 4000)

    def take(*buckets):
        for _ in range(40):
            AllOf(*buckets).wait(2)

    for job in [Job(take, *order) for order in ((one, other), (other, one)) * 2]:
        job.result()
    assert one.tokens <= 3
    assert other.tokens <= 5


def test_pause_reaches_all(both, buckets, clock):
    """A pause of several buckets is one of each."""
    both.pause(3)
    clock.advance(2.9)
    assert [bucket.tokens for bucket in buckets] == [0, 0]
    with pytest.raises(TypeError, match="configure one of its buckets"):
        both.configure(capacity=1)


def test_wait_takes_from_all_at_the_moment_it_returns(clock):
    """A bucket that granted early, and has refilled by then, is charged for that."""

    class Late(TokenBucket):
        __slots__ = ()

        def wait(self, tokens=1, *, timeout=None):
            clock.advance(0.75)
            super().wait(tokens, timeout=timeout)

    first, last = TokenBucket(2, 1, clock=clock), Late(2, 10, clock=clock)
    both = AllOf(last, first)
    both.allow(2)
    both.wait(2)  # the slow one first: it has 0.75 again when the other grants
    assert clock() == 2.75
    assert (first.tokens, last.tokens) == (0, 0)


def test_interrupted_wait_gives_everything_back(clock):
    """An exception while it waits for the second bucket takes nothing from the first."""

    class Interrupted(TokenBucket):
        __slots__ = ()

        def wait(self, tokens=1, *, timeout=None):
            raise KeyboardInterrupt

    first, second = TokenBucket(1, 0.1, clock=clock), Interrupted(1, 1, clock=clock)
    both = AllOf(second, first)
    both.allow()
    with pytest.raises(KeyboardInterrupt):
        both.wait()
    assert (clock(), first.tokens, second.tokens) == (10, 1, 1)


def test_refund_and_charge_reach_all(both, buckets):
    """An estimate is settled with each bucket."""
    both.charge(3)
    assert [bucket.tokens for bucket in buckets] == [-1, 0]
    both.refund(2)
    assert [bucket.tokens for bucket in buckets] == [1, 2]


def test_nests(both, clock):
    """An AllOf may stand in another one."""
    outer = AllOf(both, TokenBucket(1, 1, clock=clock))
    assert [outer.allow() for _ in range(2)] == [True, False]
    assert both.tokens == 1


@pytest.mark.parametrize("arguments", [(), (5,), (TokenBucket,)])
def test_bad_arguments(arguments):
    """Without a bucket, or with something else, the declaration raises."""
    with pytest.raises((TypeError, ValueError), match="AllOf"):
        AllOf(*arguments)


def test_same_bucket_twice(buckets):
    """One bucket cannot be paid twice for one job by mistake."""
    with pytest.raises(ValueError, match="twice"):
        AllOf(buckets[0], buckets[0])
    with pytest.raises(ValueError, match="twice"):
        AllOf(AllOf(*buckets), buckets[0])


def test_more_than_capacity(both):
    """More than the smallest capacity is refused for good, and costs nothing."""
    assert not both.allow(3)
    with pytest.raises(ValueError, match="at most the capacity"):
        both.take_or_delay(3)
    with pytest.raises(ValueError, match="at most the capacity"):
        both.wait(3)
    assert both.tokens == 2
