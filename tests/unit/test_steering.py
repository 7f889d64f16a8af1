"""What an operator sees of a limit and changes in it: each change, and each order that is refused."""

import json
import math
from uuid import UUID

import pytest

from rate_limiter import AllOf, BucketPerKey, TokenBucket
from rate_limiter.gating.limit import Limit
from rate_limiter.gating.steering import Order, carry_out, seconds_of, shown
from rate_limiter.gating.tally import Observer, observers
from rate_limiter.testing import ManualClock

UUID_KEY = UUID(int=7)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def told():
    """Collect the changes that observers are told."""

    class Told(Observer):
        def changed(self, limit, what, reason):
            changes.append((limit.name, what, reason))

    changes = []
    observers.append(Told())
    yield changes
    observers.pop()


def change(limit, *others, **order):
    return carry_out(Order(**order), limit, [limit, *others])


ORDERS = {
    "rate": ({"rate": "30/m"}, (10, 0.5, 0.0), "0.5 tokens_per_second (was 1)"),
    "rate as a number": ({"rate": 5}, (10, 5, 0.0), "5 tokens_per_second (was 1)"),
    "capacity": ({"capacity": "20"}, (20, 1, 0.0), "capacity 20 (was 10)"),
    "both": (
        {"capacity": 3, "rate": "2/s"},
        (3, 2, 0.0),
        "2 tokens_per_second (was 1), capacity 3 (was 10)",
    ),
    "pause": ({"pause": "2m"}, (10, 1, 120.0), "paused for 120 s"),
    "resume": ({"resume": True}, (10, 1, 0.0), "resumed"),
}


@pytest.mark.parametrize(("order", "numbers", "what"), ORDERS.values(), ids=ORDERS)
def test_orders(clock, told, order, numbers, what):
    """The bucket is changed, the answer says how, the record and the observers keep it."""
    bucket = TokenBucket(10, 1, clock=clock)
    limit = Limit(bucket, name="emails")
    assert shown(limit)["changed"] is None
    assert change(limit, **order, reason="a test") == what
    assert (bucket.capacity, bucket.tokens_per_second, bucket.pause_left) == numbers
    changed = shown(limit)["changed"]
    assert (changed["what"], changed["reason"]) == (what, "a test")
    assert told == [("emails", what, "a test")]


def test_what_is_shown(clock):
    """Each kind of bucket shows its numbers; all of it is JSON."""
    one = TokenBucket(4, 2, clock=clock)
    one.pause(3)
    shows = {
        "one": Limit(one, name="one", when_limited="drop"),
        "all": Limit(AllOf(TokenBucket(1, 1), AllOf(TokenBucket(2, 2), TokenBucket(3, 3))), name="all"),
        "keys": Limit(BucketPerKey(5, 5), key="tenant", name="keys"),
        "called": Limit(lambda _: one, name="called", when_limited=print),
        "named": Limit(lambda _: one, buckets=(one,), name="named"),
    }
    seen = {name: json.loads(json.dumps(shown(limit))) for name, limit in shows.items()}
    assert seen["one"]["buckets"] == [
        {"kind": "TokenBucket", "capacity": 4, "rate": 2, "tokens": 0, "paused": 3}
    ]
    assert [bucket["rate"] for bucket in seen["all"]["buckets"]] == [1, 2, 3]
    assert seen["keys"]["buckets"] == [{"kind": "BucketPerKey", "capacity": 5, "rate": 5, "keys": 0}]
    assert (seen["called"]["buckets"], seen["called"]["when_limited"]) == ([], "fallback")
    assert len(seen["named"]["buckets"]) == 1
    assert seen["one"]["admitted"] == 0
    assert seen["one"]["when_limited"] == "drop"


def test_orders_for_a_key():
    """With a key its bucket alone changes, found by the text of the key; without it all."""
    tenants = BucketPerKey(10, 1)
    limit = Limit(tenants, key="tenant", name="tenants")
    tenants[UUID_KEY].charge(3)
    tenants[5].charge(3)
    what = change(limit, rate=4, key=str(UUID_KEY))
    assert what == f"4 tokens_per_second (was 1), for key {UUID_KEY}"
    change(limit, pause=60, key="5")
    change(limit, rate=2, capacity=20)
    assert tenants[UUID_KEY].tokens_per_second == 4
    assert (tenants[5].tokens_per_second, 59 < tenants[5].pause_left <= 60) == (2, True)
    assert tenants["new"].capacity == 20
    change(limit, resume=True, key="5")
    assert tenants[5].pause_left == 0


@pytest.mark.parametrize("key", ["acme", 42, UUID_KEY])
def test_a_key_without_a_bucket(key):
    """It may have come up before, and have been forgotten: the order counts whatever its type is."""
    tenants = BucketPerKey(1, 1)
    change(Limit(tenants, key="tenant", name="tenants"), pause=60, key=str(key))
    assert not tenants[key].allow()


def test_keys_that_have_no_bucket_of_their_own():
    """At max_keys an order for one key would be one for all; and a callable of the user's may fail."""
    full = BucketPerKey(1, 1, max_keys=1)
    full["acme"].charge(1)
    with pytest.raises(ValueError, match="no bucket for key 'other' alone: it is at max_keys"):
        change(Limit(full, key="tenant", name="tenants"), pause=60, key="other")
    assert full["other"].allow()
    failing = BucketPerKey(1, 1, limits={}.__getitem__)
    with pytest.raises(ValueError, match="limit tenants, key 'acme': KeyError"):
        change(Limit(failing, key="tenant", name="tenants"), pause=60, key="acme")


def test_a_pause_within_a_longer_one():
    """A pause is never shortened, and the reply says so."""
    limit = Limit(TokenBucket(1, 1, clock=ManualClock()), name="limit")
    change(limit, pause=3600)
    assert change(limit, pause=10) == "paused for 10 s (an earlier pause ends in 3.6e+03 s)"


def test_orders_for_several_buckets():
    """All of an AllOf are paused and resumed; a callable's only bucket is changed."""
    buckets = TokenBucket(1, 1), TokenBucket(2, 2)
    limit = Limit(AllOf(*buckets), name="all")
    change(limit, pause=60)
    assert all(bucket.pause_left > 59 for bucket in buckets)
    change(limit, resume=True)
    assert all(bucket.pause_left == 0 for bucket in buckets)
    change(Limit(lambda _: buckets[0], buckets=buckets[:1], name="called"), rate=7)
    assert buckets[0].tokens_per_second == 7


class Remote:
    """A bucket of the user's, without what is no part of the contract."""

    capacity = tokens_per_second = tokens = 1
    allow = try_consume = wait = take_or_delay = refund = charge = pause = configure = print


ONE = TokenBucket(10, 1)
REFUSED = {
    "nothing": ({}, "nothing is to change"),
    "rate 0": ({"rate": 0}, "rate must be .* not 0"),
    "rate text": ({"rate": "ten/m"}, "rate must be .* not 'ten/m'"),
    "rate nan": ({"rate": "nan"}, "rate must be .* not 'nan'"),
    "unit": ({"rate": "1/y"}, "rate must be .* not '1/y'"),
    "capacity 0": ({"capacity": "0"}, "capacity must be positive, not 0"),
    "capacity text": ({"capacity": "many"}, "capacity must be a number of tokens, not 'many'"),
    "capacity inf": ({"capacity": math.inf}, "capacity must be a finite number"),
    "below a cost": (
        {"capacity": 1},
        "capacity 1 is below the 2 tokens that a job of limit other costs",
    ),
    "pause text": ({"pause": "a while"}, "pause must be seconds, .* not 'a while'"),
    "pause below 0": ({"pause": -1}, "pause must be 0 or more, not -1"),
    "both": ({"pause": 1, "resume": True}, "pause and resume exclude each other"),
    "no keys": ({"rate": 1, "key": "acme"}, "limit emails has no keys, so key='acme' means nothing"),
    "good and bad": ({"rate": 5, "capacity": -1}, "capacity must be positive"),
}


@pytest.mark.parametrize(("order", "says"), REFUSED.values(), ids=REFUSED)
def test_orders_that_are_refused(told, order, says):
    """The error names the argument and the value, and nothing is changed."""
    limit, other = Limit(ONE, name="emails"), Limit(ONE, tokens=2, name="other")
    with pytest.raises(ValueError, match=says):
        change(limit, other, **order)
    assert (ONE.capacity, ONE.tokens_per_second, ONE.pause_left) == (10, 1, 0)
    assert shown(limit)["changed"] is None
    assert told == []


@pytest.mark.parametrize(
    ("limit", "order", "says"),
    [
        (Limit(AllOf(ONE), name="all"), {"rate": 1}, "limit all takes from several buckets"),
        (Limit(lambda _: ONE, name="called"), {"pause": 1}, "a callable picks one for each job"),
        (Limit(BucketPerKey(1, 1), key="x", name="keys"), {"pause": 1}, "give the key to pause"),
        (Limit(BucketPerKey(1, 1), key="x", name="keys"), {"resume": True}, "give the key"),
        (
            Limit(BucketPerKey(9, 1), key="x", tokens=4, name="keys"),
            {"capacity": 3, "key": "a"},
            "capacity 3 is below the 4 tokens",
        ),
        (Limit(Remote(), name="remote"), {"resume": True}, "cannot be ended"),
    ],
)
def test_orders_that_a_limit_cannot_obey(limit, order, says):
    """What a limit's bucket cannot do is refused, and the error says why."""
    with pytest.raises(ValueError, match=says):
        change(limit, **order)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("30s", 30), ("1.5m", 90), (" 2h ", 7200), ("1d", 86400), (0, 0)]
)
def test_seconds(text, seconds):
    """Numbers and text with a unit."""
    assert seconds_of("pause", text) == seconds


@pytest.mark.parametrize("text", ["", "s", "5 weeks", "-1s", "nan", "inf", "1e999"])
def test_what_says_no_seconds(text):
    """Text that is no number of seconds."""
    with pytest.raises(ValueError, match="pause must be seconds"):
        seconds_of("pause", text)
