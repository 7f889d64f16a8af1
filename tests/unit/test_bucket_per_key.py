"""BucketPerKey: who shares a bucket, at which rate, and what is forgotten when."""

import gc
import logging
import os
import sys
import threading
import weakref
from decimal import Decimal
from fractions import Fraction
from http import HTTPStatus
from itertools import count
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import in_child

from rate_limiter import Bucket, BucketPerKey, TokenBucket
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


@pytest.mark.parametrize(
    "key",
    [
        "acme",
        "",
        "x" * 200,
        7,
        -(10**198),
        True,
        HTTPStatus.OK,
        UUID(int=7),
        ("acme", 7, UUID(int=7)),
        ("acme", True),
        (),
        (0,) * 200,
        ("",) * 200,
        (UUID(int=7),) * 5,
    ],
)
def test_what_may_be_a_key(key, clock):
    """A str, an int, a UUID, or a tuple of them, up to 200 characters."""
    tenants = BucketPerKey(1, 1, clock=clock)
    assert tenants[key].allow()
    assert not tenants[key].allow()


@pytest.mark.parametrize(
    ("key", "error", "text"),
    [
        (None, TypeError, "key must be a str, an int, a UUID or a tuple of them, not None"),
        (1.5, TypeError, "not 1.5"),
        (["acme"], TypeError, r"not \['acme'\]"),
        (("acme", None), TypeError, r"not \('acme', None\)"),
        (("acme", ("nested",)), TypeError, "not"),
        (b"acme", TypeError, "not b'acme'"),
        ("x" * 201, ValueError, "key must have at most 200 characters, not 'xxx"),
        (("x" * 100, "y" * 101), ValueError, "at most 200 characters"),
        (10**200, ValueError, "at most 200 characters"),
        (-(10**199), ValueError, "at most 200 characters"),
        pytest.param(10**5000, ValueError, "at most 200 .* not one with an int that is too", id="long"),
        ((0,) * 201, ValueError, "at most 200 characters"),
        ((0,) * 200_000, ValueError, "at most 200 characters"),
        (("",) * 201, ValueError, "at most 200 characters"),
        ((UUID(int=7),) * 6, ValueError, "at most 200 characters"),
        ([0] * 200_000, TypeError, r"not \[0, 0, 0, 0, 0, 0, \.\.\.\]"),
    ],
)
def test_what_may_not_be_a_key(key, error, text):
    """Anything else is an error that shows it, and makes no bucket."""
    tenants = BucketPerKey(1, 1)
    with pytest.raises(error, match=text):
        tenants[key]
    assert len(tenants) == 0


@pytest.mark.parametrize("key", [1.0, Decimal(1), 1 + 0j, (1.0,), ("acme", Fraction(1))])
def test_a_key_does_not_depend_on_others(key):
    """What is equal to a key but may not be one is refused, whatever was used before."""
    tenants = BucketPerKey(1, 1)
    for used in (None, 1, (1,), ("acme", 1)):
        if used is not None:
            tenants[used].allow()
        with pytest.raises(TypeError, match="key must be"):
            tenants[key]


def test_equal_keys_have_the_same_bucket():
    """True is the key 1, in a tuple too, whichever came first; a UUID and its text are two."""
    tenants = BucketPerKey(1, 1)
    assert tenants[True] is tenants[1]
    assert tenants[200] is tenants[HTTPStatus.OK]
    assert tenants["acme", 0] is tenants["acme", False]
    assert tenants[str(UUID(int=7))] is not tenants[UUID(int=7)] is tenants[UUID(int=7)]


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
        ({"initial": -1}, ValueError, "initial must be 0 or more, not -1"),
        ({"initial": 2}, ValueError, "initial must be at most the capacity 1, not 2"),
        ({"initial": "1"}, TypeError, "initial must be a number"),
        ({"max_keys": 0}, ValueError, "max_keys must be 1 or more, not 0"),
        ({"max_keys": 2.5}, TypeError, "max_keys must be a whole number, not 2.5"),
        (
            {"on_outage": "opne"},
            ValueError,
            "on_outage must be one of 'open', 'closed', 'local', not 'opne'",
        ),
        ({"limits": {}}, TypeError, "limits must be a callable that is given a key, or None, not {}"),
    ],
)
def test_bad_arguments(arguments, error, text):
    """A wrong argument is an error where it is written."""
    with pytest.raises(error, match=text):
        BucketPerKey(**{"capacity": 1, "tokens_per_second": 1, **arguments})


@pytest.mark.parametrize("initial", [None, 0])
def test_full_buckets_are_forgotten(clock, initial):
    """Cycling through keys keeps no more buckets than are not full; with ``initial``, once a new one would be."""
    tenants = BucketPerKey(1, 1, initial=initial, clock=clock)
    for number in range(1000):
        tenants[number].allow()
        clock.advance(0.1)
    assert 10 <= len(tenants) <= 25


@pytest.mark.parametrize("keys", [100, 1000])
def test_a_new_key_checks_a_few_buckets(keys):
    """However many buckets there are, a new key looks at the level of at most 64 of them."""
    reads = []
    tenants = BucketPerKey(1, 1, max_keys=keys, clock=lambda: reads.append(None) or 0.0)
    for number in range(keys):
        tenants[number].allow()
    reads.clear()
    tenants["new"]
    assert len(reads) == 64


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


def test_configure_changes_all_keys_without_numbers_of_their_own(clock):
    """Old keys and new ones; not those of limits, nor one whose bucket was configured."""
    tenants = BucketPerKey(2, 1, clock=clock, limits={"premium": (9, 9)}.get)
    old, premium, configured = (tenants[key] for key in ("old", "premium", "configured"))
    configured.configure(capacity=5)
    old.charge(2)
    tenants.configure(tokens_per_second=4)
    clock.advance(0.25)
    numbers = {
        bucket: (bucket.capacity, bucket.tokens_per_second)
        for bucket in (tenants, old, premium, configured, tenants["new"], tenants.buckets()[-1])
    }
    assert list(numbers.values()) == [(2, 4), (2, 4), (9, 9), (5, 1), (2, 4), (2, 4)]
    assert old.tokens == 1


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"capacity": 0}, ValueError, "capacity must be positive, not 0"),
        ({"tokens_per_second": float("nan")}, ValueError, "tokens_per_second must be a finite number"),
        ({"tokens_per_secnd": 5}, TypeError, "tokens_per_secnd"),
        ({"capacity": 5, "by": "anna"}, TypeError, "by"),
    ],
)
def test_wrong_configuration(wrong, error, text):
    """A wrong value is an error, and so is a wrong name; nothing is changed."""
    tenants = BucketPerKey(2, 1)
    with pytest.raises(error, match=text):
        tenants.configure(**wrong)
    assert (tenants.capacity, tenants["new"].capacity) == (2, 2)


# -- initial -----------------------------------------------------------------------------------------------


def test_each_key_starts_with_initial(clock):
    """Each key has that from the start, and at most the capacity that it has of its own."""
    tenants = BucketPerKey(8, 1, initial=4, limits={"small": (3, 1), "large": (90, 9)}.get, clock=clock)
    assert tenants.initial == 4
    assert {key: tenants[key].tokens for key in ("a", "small", "large")} == {
        "a": 4,
        "small": 3,
        "large": 4,
    }
    assert [tenants["a"].allow(5), tenants["a"].allow(4), tenants["b"].allow(4)] == [False, True, True]


def test_tokens_of_a_key_come_before_its_bucket_does(clock):
    """A key that first comes up later has what its own rate has brought since the start."""
    tenants = BucketPerKey(8, 1, initial=0, limits={"vip": (9, 2)}.get, clock=clock)
    clock.advance(3)
    assert {key: tenants[key].tokens for key in ("new", "vip")} == {"new": 3, "vip": 6}
    clock.advance(1000)
    assert tenants["later"].tokens == 8


def test_keys_beyond_max_keys_start_with_initial_too(clock):
    """The bucket that they share brings no burst either."""
    tenants = BucketPerKey(8, 1, initial=1, max_keys=1, clock=clock)
    assert tenants["a"].allow()
    assert [tenants["b"].allow(), tenants["c"].allow()] == [True, False]


@given(
    st.sampled_from([0, 0.5, 2, 4]),
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from([0.5, 1, 4]), st.sampled_from([0, 0.25, 2, 9])),
        max_size=80,
    ),
)
def test_a_key_that_was_forgotten_starts_as_if_it_was_not(initial, asks):
    """Whatever is forgotten, a key is granted what one bucket grants that was made at the start."""
    clock = ManualClock()
    tenants = BucketPerKey(4, 1, initial=initial, clock=clock)
    kept = [TokenBucket(4, 1, initial=initial, clock=clock) for _ in range(10)]
    for key, tokens, step in asks:
        clock.advance(step)
        assert tenants[key].tokens == kept[key].tokens
        assert tenants[key].take_or_delay(tokens) == kept[key].take_or_delay(tokens)


def test_no_bucket_is_forgotten_that_a_new_one_would_not_equal(clock):
    """After a lower rate for all, a full key does not come back with less."""
    tenants = BucketPerKey(8, 4, initial=0, clock=clock)
    assert tenants["full"].tokens == 0
    clock.advance(2)
    tenants.configure(tokens_per_second=1)
    for number in range(10):
        tenants[number]
    assert (tenants["full"].tokens, tenants[0].tokens) == (8, 2)
    clock.advance(6)
    for number in range(20, 40):
        tenants[number]
    assert "full" not in set(tenants)
    assert tenants["full"].tokens == 8


def test_a_lower_capacity_cuts_initial(clock):
    """After a lower capacity for all, a new key has no more than that."""
    tenants = BucketPerKey(8, 1, initial=6, clock=clock)
    tenants.configure(capacity=2)
    assert tenants["new"].tokens == 2


def test_a_clock_set_back_before_the_start_leaves_initial(clock):
    """A key that is made then has what all had at the start."""
    clock.advance(100)
    tenants = BucketPerKey(8, 1, initial=3, clock=clock)
    clock.now = 50.0
    assert tenants["new"].tokens == 3


# -- max_keys ----------------------------------------------------------------------------------------------


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
            for number, moment in enumerate(moments[first:], 1):
                assert number <= 2 + (moment - start) / 2


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


def at(point, handler):
    """Call a handler where CPython calls those of signals, at the ``point``-th time in a new key."""
    passed = count()

    def profile(frame, event, _):
        # An exception in a callback of a weakref, `_remove`, goes nowhere.
        if event not in ("call", "c_return") or frame.f_code.co_name == "_remove":
            return
        while frame is not None and frame.f_code is not BucketPerKey.__getitem__.__code__:
            frame = frame.f_back
        if frame is not None and next(passed) == point:
            sys.setprofile(None)
            handler()

    sys.setprofile(profile)


def interrupted(handler, keys, hold=None):
    """Ask for a new key with a handler at each point in turn: yield the buckets after each."""
    for point in count():
        clock = ManualClock(auto_advance=False)
        tenants = BucketPerKey(1, 1, clock=clock)
        slow = {keys["empty"], keys["slow"]}
        for name in ("full", "empty", "slow"):
            assert tenants[keys[name]].allow()
        for key in slow:
            tenants[key].configure(tokens_per_second=0.001)
        clock.advance(1)  # "full", which the next key checks, is full now
        held = tenants[hold] if hold is not None else None
        struck = []

        def strike(tenants=tenants, struck=struck):
            struck.append(True)
            handler(tenants)

        try:
            at(point, strike)
            tenants[keys["new"]]
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        if not struck:
            assert point > 30
            return
        yield tenants
        if held is not None:
            assert tenants[hold] is held
            del held
        for number in range(10):
            clock.advance(1)
            tenants[number].allow()
        assert slow <= set(tenants) <= {*slow, 6, 7, 8, 9}  # the others were full
        assert len(tenants._order) == len(tenants)


KEYS = pytest.mark.parametrize(
    "keys",
    [
        {
            name: make(number)
            for number, name in enumerate(("empty", "slow", "full", "new", "other", "more"))
        }
        for make in (str, lambda number: UUID(int=number))  # a UUID has its hash from Python code
    ],
    ids=["str", "UUID"],
)


@KEYS
@pytest.mark.parametrize(
    "asked", [["other"], ["new", "full"], ["full", "new"], ["other", "full", "more", "new"]]
)
def test_a_signal_handler_may_ask_for_keys(keys, asked):
    """Wherever a handler strikes, each key has one bucket, and buckets are forgotten as before."""
    for hold in (None, keys["full"]):
        for tenants in interrupted(
            lambda each: [each[keys[name]].allow() for name in asked], keys, hold
        ):
            assert not [name for name in ("empty", "slow", *asked) if tenants[keys[name]].allow()]


@KEYS
def test_an_interrupted_new_key_loses_no_bucket(keys):
    """Wherever an exception strikes, the levels stay, and buckets are forgotten as before."""

    def strike(tenants):
        raise KeyboardInterrupt

    for hold in (None, keys["full"]):
        for tenants in interrupted(strike, keys, hold):
            assert not tenants[keys["empty"]].allow()
            assert [tenants[keys["new"]].allow() for _ in range(2)] == [True, False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_while_another_thread_makes_a_key(clock):
    """A child can use the buckets, and forgets full ones, whatever another thread was doing."""
    asked, go_on = threading.Event(), threading.Event()

    def limits(key):
        if key == "full" and len(tenants):  # it is to be forgotten
            asked.set()
            go_on.wait(30)

    tenants = BucketPerKey(1, 1, limits=limits, clock=clock)
    assert tenants["full"].allow()
    clock.advance(1)
    thread = threading.Thread(target=tenants.__getitem__, args=("new",))
    thread.start()
    assert asked.wait(30)

    def check():
        go_on.set()
        for number in range(10):
            tenants[number].allow()
            clock.advance(1)
        return list(tenants)

    assert set(in_child(check)) <= {"full", 8, 9}  # the thread that is gone still holds "full"
    go_on.set()
    thread.join()


def test_it_can_be_collected(clock):
    """Nothing keeps its buckets once nobody uses it."""
    tenants = BucketPerKey(1, 1, clock=clock)
    bucket = weakref.ref(tenants["a"])
    del tenants
    gc.collect()
    assert bucket() is None
