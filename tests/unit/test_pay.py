"""What a task pays in the decorator, for all its limits or for none."""

from types import SimpleNamespace

import pytest

from rate_limiter import AllOf, RateLimitExceeded, TokenBucket
from rate_limiter.celery.throttle import _pay
from rate_limiter.gating.limit import Call, Limit
from rate_limiter.testing import ManualClock


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def buckets(clock):
    return [TokenBucket(2, rate, clock=clock) for rate in (1, 0.5, 0.1)]


def pay(*limits, request=None):
    """Pay as one call of a function; return what was demanded, what was refused, and who made it wait."""
    each = [limit.demands(Call("job", (), {})) for limit in limits]
    return [demand for one in each for demand in one], *_pay(each, "job", request)


def test_takes_from_all(buckets):
    """Each bucket pays, those of an AllOf too, and the charge knows them all."""
    first, second = Limit(AllOf(*buckets[:2])), Limit(buckets[2], tokens=2, when_limited="drop")
    paid, refused, _ = pay(first, second)
    assert paid == [(buckets[0], 1, first), (buckets[1], 1, first), (buckets[2], 2, second)]
    assert refused is None
    assert [bucket.tokens for bucket in buckets] == [1, 1, 0]


@pytest.mark.parametrize("policy", ["retry", "raise", "drop", print])
@pytest.mark.parametrize("order", [1, -1])
def test_refusal_names_the_slowest_bucket_and_costs_nothing(buckets, clock, policy, order):
    """A limit that does not wait refuses with its slowest bucket; nobody has paid, or has waited."""
    fast, slow, other = buckets
    for bucket in (fast, slow):
        bucket.allow(2)
    waits = Limit(other)
    limit = Limit(AllOf(*[fast, slow][::order]), when_limited=policy)
    for limits in ((waits, limit), (limit, waits)):
        _, (demand, delay), _ = pay(*limits)
        assert (demand, delay) == ((slow, 1, limit), pytest.approx(2))
    other.allow(2)
    assert pay(waits, limit)[1][0].limit is limit
    assert [bucket.tokens for bucket in buckets] == [0, 0, 0]
    assert clock() == 0


def test_waits_for_all_and_charges_what_refilled(buckets, clock):
    """It waits for the slowest, and what the others gave counts as taken when it ends."""
    fast, slow, other = buckets
    slow.allow(2)
    other.allow(2)
    limits = [Limit(fast, tokens=2, when_limited="raise"), Limit(AllOf(slow, other))]
    assert pay(*limits)[1:] == (None, limits[1])
    assert clock() == pytest.approx(10)
    assert [bucket.tokens for bucket in buckets] == pytest.approx([0, 1, 0])


@pytest.mark.parametrize("error", [RateLimitExceeded, KeyboardInterrupt])
def test_what_was_paid_is_given_back_after_an_error(buckets, clock, error):
    """Whatever ends the wait: the buckets that have paid get it back."""

    class Ends(TokenBucket):
        __slots__ = ()

        def wait(self, tokens=1, *, timeout=None):
            raise error

    last = Ends(1, 1, clock=clock)
    last.allow()
    buckets[1].allow(2)  # is waited for first
    with pytest.raises(error):
        pay(
            Limit(last, timeout=1),
            Limit(buckets[0], when_limited="raise"),
            Limit(buckets[1]),
            Limit(buckets[2], when_limited="drop"),
        )
    assert clock() == 2
    assert [bucket.tokens for bucket in buckets] == [2, 1, 2]


def test_job_that_comes_again_waits_a_little(buckets, clock):
    """A job that was sent back waits for up to half a second, also at an AllOf; no other does."""
    again = SimpleNamespace(headers=None, eta="2030-01-01T00:00:00")
    limit = Limit(AllOf(*buckets[:2]), when_limited="retry")
    buckets[0].allow(2)
    clock.advance(0.6)
    assert pay(limit)[1] == ((buckets[0], 1, limit), pytest.approx(0.4))
    drops = Limit(buckets[0], when_limited="drop")
    assert pay(drops, request=again)[1] == ((buckets[0], 1, drops), pytest.approx(0.4))
    assert pay(limit, request=again)[1] is None
    assert clock() == pytest.approx(1)
    assert pay(limit, request=again)[1] == ((buckets[0], 1, limit), pytest.approx(1))
    assert clock() == pytest.approx(1)
