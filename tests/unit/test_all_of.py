"""Several buckets as one."""

from typing import NamedTuple

import pytest
from waiters import Job

from rate_limiter import AllOf, Bucket, RateLimitExceeded, SharedTokenBucket, TokenBucket
from rate_limiter.all_of import take_all_or_delay, take_all_or_longest_delay, wait_for_all
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


@pytest.mark.parametrize("wanted", [{}, {"capacity": 1}, {"tokens_per_second": 1}])
def test_it_has_no_numbers_to_configure(both, wanted):
    """The error says what to do instead."""
    with pytest.raises(TypeError, match="configure one of its buckets"):
        both.configure(**wanted)


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


def test_a_class_of_the_users_may_have_any_other_attribute(clock):
    """A bucket with a ``server`` of its own is taken from by itself: only those in Redis go together."""

    class Remote(TokenBucket):
        server = "one of ours"

    both = AllOf(Remote(1, 0.1, clock=clock), Remote(2, 1, clock=clock))
    assert [both.allow(), both.allow()] == [True, False]
    both.wait()
    assert [bucket.tokens for bucket in both.buckets] == pytest.approx([0, 1])


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


class Named(TokenBucket):
    """A bucket that any number of objects stand for, as one on a server."""

    __slots__ = ()

    def __eq__(self, other):
        return isinstance(other, Named)

    def __hash__(self):
        return 1


def test_equal_buckets_are_the_same_bucket():
    """Two objects that are equal stand for one bucket, which would pay twice."""
    with pytest.raises(ValueError, match="twice"):
        AllOf(Named(2, 1), AllOf(TokenBucket(2, 1), Named(2, 1)))


def test_keeps_the_limit_of_each_bucket(clock):
    """The example of its docstring: at most ten in any second, at most 1,000 in any 24 hours."""
    both = AllOf(
        TokenBucket(5, 5, clock=clock),
        TokenBucket(500, 500 / 86400, clock=clock),
    )
    granted = []
    for _ in range(1700):
        both.wait()
        granted.append(clock())
    for span, most in ((1, 10), (86400, 1000)):
        assert all(late - early >= span for early, late in zip(granted, granted[most:], strict=False))
    assert granted[998] < 86400  # no fewer either


class Share(NamedTuple):
    """So many tokens of a bucket."""

    bucket: TokenBucket
    tokens: float


@pytest.mark.parametrize("order", [1, -1])
def test_which_bucket_refuses(buckets, order):
    """The first bucket that refuses, or the one that refuses for longest; none of them pays."""
    fast, slow = (Share(bucket, 1) for bucket in buckets)
    third = Share(TokenBucket(1, 1), 1)
    for bucket in buckets:
        bucket.allow(bucket.capacity)
    demands = [third, *[fast, slow][::order]]
    assert take_all_or_delay(demands) == (pytest.approx(1 if order == 1 else 10), 1)
    assert take_all_or_longest_delay(demands) == (pytest.approx(10), demands.index(slow))
    assert third.bucket.tokens == 1
    assert take_all_or_delay([third]) == (0.0, 0)
    assert third.bucket.tokens == pytest.approx(0, abs=0.1)


def test_waits_for_the_slowest_first_and_keeps_what_it_has(clock):
    """Groups that grant at once are taken; then the slowest is waited for, and what refilled is charged."""
    asked = []

    class Watched(TokenBucket):
        __slots__ = ()

        def wait(self, tokens=1, *, timeout=None):
            asked.append((self, timeout, free.tokens))
            super().wait(tokens, timeout=timeout)

    free, fast, slow, other = (Watched(2, rate, clock=clock) for rate in (1, 0.5, 0.1, 0.2))
    assert not wait_for_all([([Share(free, 1)], None)])
    clock.advance(1)
    for bucket in (fast, slow, other):
        bucket.allow(2)
    both = [Share(fast, 1), Share(slow, 1)]
    assert wait_for_all([([Share(free, 2)], 1), ([Share(other, 1)], 5), (both, None)])
    assert asked == [(slow, None, 0), (fast, None, 2), (other, 5, 2)]
    assert clock() == pytest.approx(11)
    assert [bucket.tokens for bucket in (free, fast, slow, other)] == pytest.approx([0, 1, 0, 1])


def test_time_of_a_group_is_for_all_its_buckets(clock, monkeypatch):
    """The time that the first bucket of a group took is missing at the second, by the real clock."""
    left = []

    class Slow(TokenBucket):
        __slots__ = ()

        def wait(self, tokens=1, *, timeout=None):
            left.append(timeout)
            now[0] += 4
            self.refund(tokens)

    now = [0.0]
    monkeypatch.setattr("rate_limiter.all_of.monotonic", lambda: now[0])
    both = AllOf(Slow(1, 1, clock=clock), Slow(1, 1, clock=clock))
    both.allow()
    both.wait(timeout=5)
    assert left == [5, 1]


@pytest.mark.parametrize("ask", [AllOf.allow, AllOf.take_or_delay])
def test_error_of_one_costs_the_others_nothing(clock, ask):
    """If one bucket raises, the others get back what they gave, whatever their refund does."""

    class Broken(TokenBucket):
        __slots__ = ()

        def take_or_delay(self, tokens=1):
            raise ConnectionError

        allow = take_or_delay

        def refund(self, tokens):
            super().refund(tokens)
            raise ConnectionError

    class Deaf(Broken):
        __slots__ = ()
        take_or_delay = TokenBucket.take_or_delay
        allow = TokenBucket.allow

    good, deaf = TokenBucket(2, 1, clock=clock), Deaf(2, 1, clock=clock)
    with pytest.raises(ConnectionError):
        ask(AllOf(good, deaf, Broken(2, 1, clock=clock)))
    assert (good.tokens, deaf.tokens) == (2, 2)


def test_more_than_capacity(both):
    """More than the smallest capacity is refused for good, and costs nothing."""
    assert not both.allow(3)
    with pytest.raises(ValueError, match="at most the capacity"):
        both.take_or_delay(3)
    with pytest.raises(ValueError, match="at most the capacity"):
        both.wait(3)
    assert both.tokens == 2
