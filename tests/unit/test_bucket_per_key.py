"""BucketPerKey: who shares a bucket, at which rate, and what is forgotten when."""

import gc
import logging
import threading
import weakref
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rate_limiter import Bucket, BucketPerKey
from rate_limiter.testing import ManualClock


@pytest.fixture
def clock():
    return ManualClock()


def test_each_key_has_its_own_bucket(clock):
    """What one tenant takes costs another nothing; the same key is the same bucket."""
    tenants = BucketPerKey(2, 1, clock=clock)
    assert tenants  # though it has no bucket yet
    assert isinstance(tenants["a"], Bucket)
    assert tenants["a"].allow(2)
    assert not tenants["a"].allow()
    assert tenants["b"].allow(2)
    assert (tenants["a"].capacity, tenants["a"].tokens_per_second) == (2, 1)
    assert sorted(tenants) == ["a", "b"]


@pytest.mark.parametrize("key", ["acme", "", "x" * 200, 7, -(10**100), ("acme", 7), ()])
def test_what_may_be_a_key(key, clock):
    """A str, an int, or a tuple of them."""
    tenants = BucketPerKey(1, 1, clock=clock)
    assert tenants[key].allow()
    assert not tenants[key].allow()


@pytest.mark.parametrize(
    ("key", "error", "text"),
    [
        (None, TypeError, "key must be a str, an int or a tuple of them, not None"),
        (1.5, TypeError, "not 1.5"),
        (["acme"], TypeError, r"not \['acme'\]"),
        (("acme", None), TypeError, r"not \('acme', None\)"),
        (("acme", ("nested",)), TypeError, "not"),
        (b"acme", TypeError, "not b'acme'"),
        ("x" * 201, ValueError, "key must have at most 200 characters, not 'xxx"),
        (("x" * 100, "y" * 101), ValueError, "at most 200 characters"),
        (10**201, ValueError, "at most 200 characters"),
    ],
)
def test_what_may_not_be_a_key(key, error, text):
    """Anything else is an error that shows it, and makes no bucket."""
    tenants = BucketPerKey(1, 1)
    with pytest.raises(error, match=text):
        tenants[key]
    assert len(tenants) == 0


def test_rates_per_key(clock):
    """limits=… says the capacity and the rate of a key; None is the default."""
    tiers = {"premium": (100, 50), "free": (1, 0.1)}
    tenants = BucketPerKey(10, 5, limits=tiers.get, clock=clock)
    assert (tenants["premium"].capacity, tenants["premium"].tokens_per_second) == (100, 50)
    assert (tenants["free"].capacity, tenants["free"].tokens_per_second) == (1, 0.1)
    assert (tenants["unknown"].capacity, tenants["unknown"].tokens_per_second) == (10, 5)


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (5, TypeError, r"limits must return \(capacity, tokens_per_second\) or None, not 5"),
        ((1, 2, 3), TypeError, "limits must return"),
        ((0, 1), ValueError, "capacity must be positive"),
        ((1, "fast"), TypeError, "tokens_per_second must be a number"),
    ],
)
def test_what_limits_may_not_return(answer, error, text):
    """A wrong answer of limits=… is an error, and makes no bucket."""
    tenants = BucketPerKey(1, 1, limits=lambda _: answer)
    with pytest.raises(error, match=text):
        tenants["acme"]
    assert len(tenants) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"capacity": 0}, ValueError, "capacity must be positive"),
        ({"tokens_per_second": -1}, ValueError, "tokens_per_second must be positive"),
        ({"max_keys": 0}, ValueError, "max_keys must be 1 or more, not 0"),
        ({"max_keys": 2.5}, TypeError, "max_keys must be a whole number, not 2.5"),
        ({"limits": {}}, TypeError, "limits must be a callable that is given a key, or None, not {}"),
    ],
)
def test_bad_arguments(arguments, error, text):
    """A wrong argument is an error where it is written."""
    with pytest.raises(error, match=text):
        BucketPerKey(**{"capacity": 1, "tokens_per_second": 1, **arguments})


def test_full_buckets_are_forgotten(clock):
    """Cycling through keys keeps no more buckets than are not full."""
    tenants = BucketPerKey(1, 1, clock=clock)
    for number in range(1000):
        tenants[number].allow()
        clock.advance(0.1)
    assert 10 <= len(tenants) <= 25


def test_a_bucket_that_is_not_full_is_never_forgotten(clock):
    """Cycling through keys gives nobody a new burst."""
    tenants = BucketPerKey(1, 0.001, max_keys=10, clock=clock)
    assert tenants["abuser"].allow()
    for number in range(500):
        tenants[number].allow()
        assert not tenants["abuser"].allow()
        clock.advance(1)
    assert len(tenants) <= 10


def test_a_bucket_in_use_is_never_forgotten(clock):
    """A held job, or a thread that is about to take, has the bucket that others get by the key."""
    tenants = BucketPerKey(1, 1, clock=clock)
    held = tenants["held"]
    for number in range(100):
        clock.advance(1)
        tenants[number]
    assert tenants["held"] is held


def test_a_bucket_that_was_configured_is_never_forgotten(clock):
    """What configure() has changed for a key stays so."""
    tenants = BucketPerKey(1, 1, limits={"free": (2, 2)}.get, clock=clock)
    tenants["acme"].configure(capacity=9, tokens_per_second=50)
    assert tenants["free"].allow()
    for number in range(100):
        clock.advance(1)
        tenants[number]
    assert (tenants["acme"].capacity, tenants["acme"].tokens_per_second) == (9, 50)
    assert sorted(key for key in tenants if isinstance(key, str)) == ["acme"]


def test_beyond_max_keys_new_keys_share_a_bucket(clock, caplog):
    """At max_keys new keys share one bucket at the default rate, until there is room; told once."""
    tenants = BucketPerKey(2, 1, max_keys=3, limits={"vip": (9, 9)}.get, clock=clock)
    for key in "abc":
        tenants[key].allow(2)
    with caplog.at_level(logging.WARNING, "rate_limiter"):
        assert tenants["d"] is tenants["vip"]
    assert (tenants["d"].capacity, tenants["d"].tokens_per_second) == (2, 1)
    assert caplog.text.count("at max_keys") == 1
    assert tenants["d"].allow(2)
    assert not tenants["e"].allow()
    clock.advance(2)
    assert tenants["vip"].capacity == 9
    assert sorted(tenants) == ["vip"]


@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0, 0.25, 1, 3])), max_size=80))
def test_no_key_ever_gets_more_than_its_rate(asks):
    """Whatever is forgotten and made anew, a key is granted at most capacity + rate × t."""
    clock = ManualClock()
    tenants = BucketPerKey(2, 0.5, max_keys=3, clock=clock)
    granted = {}
    for key, step in asks:
        clock.advance(step)
        own = len(tenants) < 3 or key in set(tenants)
        if tenants[key].allow() and own and key in set(tenants):
            granted.setdefault(key, []).append(Fraction(clock.now))
    for moments in granted.values():
        for first, start in enumerate(moments):
            for count, moment in enumerate(moments[first:], 1):
                assert count <= 2 + (moment - start) / 2


def test_threads_that_ask_for_new_keys_share_their_buckets(restless_threads):
    """However many threads ask for a key at once, it grants its capacity once."""
    tenants = BucketPerKey(3, 1e-9, max_keys=50)
    granted = []

    def take():
        for number in range(200):
            granted.extend(number % 40 for _ in range(3) if tenants[number % 40].allow())

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key: granted.count(key) for key in range(40)} == dict.fromkeys(range(40), 3)


def test_it_can_be_collected(clock):
    """Nothing keeps its buckets once nobody uses it."""
    tenants = BucketPerKey(1, 1, clock=clock)
    bucket = weakref.ref(tenants["a"])
    del tenants
    gc.collect()
    assert bucket() is None
