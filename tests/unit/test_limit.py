"""A limit checks its declaration where it is written, and prices each job."""

import math

import pytest

from rate_limiter import AllOf, BucketPerKey, TokenBucket
from rate_limiter.gating.limit import Limit

bucket = TokenBucket(10, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bucket": "100/m"}, TypeError, "bucket must be a bucket .* not '100/m'"),
        ({"bucket": 5}, TypeError, "bucket must be a bucket"),
        ({"bucket": TokenBucket}, TypeError, "bucket must be a bucket"),
        ({"tokens": 0}, ValueError, "^tokens must be positive, not 0$"),
        ({"tokens": math.nan}, ValueError, "tokens must be a finite number, not nan"),
        ({"tokens": "2"}, TypeError, "tokens must be a number .* not '2'"),
        ({"tokens": 11}, ValueError, "tokens must be at most the bucket's capacity 10, not 11"),
        ({"when_limited": "hold"}, ValueError, "when_limited must be one of 'wait'.* not 'hold'"),
        ({"timeout": -1}, ValueError, "timeout must be positive"),
        ({"timeout": 1, "when_limited": "drop"}, ValueError, "timeout goes with when_limited='wait'"),
    ],
)
def test_bad_declaration_says_what_is_wrong(arguments, error, message):
    """An impossible declaration raises at once, and names the argument, the value and what was expected."""
    with pytest.raises(error, match=message):
        Limit(**{"bucket": bucket, **arguments})


def test_demand_is_what_the_callables_say():
    """Bucket and tokens may be callables; both are given exactly the arguments that were sent."""
    small, large = TokenBucket(1, 1), TokenBucket(100, 1)
    limit = Limit(
        lambda name, size: large if size > 1 else small, tokens=lambda name, size: size, name="uploads"
    )
    assert limit.demands("task upload", ("a.mp4",), {"size": 1}) == ((small, 1, limit),)
    assert limit.demands("task upload", ("a.mp4", 50), {}) == ((large, 50, limit),)


@pytest.mark.parametrize("value", [0, -3, math.nan, math.inf, "2", None, 11])
def test_impossible_cost_names_task_limit_and_value(value):
    """A cost that can never be paid is an error that names the task, the limit and the value."""
    limit = Limit(bucket, tokens=lambda: value, name="uploads")
    with pytest.raises(ValueError, match=r"task jobs\.upload, limit uploads: tokens is") as raised:
        limit.demands("task jobs.upload", (), {})
    assert repr(value) in str(raised.value)


def test_error_of_a_callable_is_named_and_kept():
    """What a callable raises becomes a ValueError that names the task and says what it was."""
    limit = Limit(bucket, tokens=lambda size: size["MB"])
    with pytest.raises(
        ValueError, match="task upload, limit upload: tokens=… raised KeyError"
    ) as raised:
        limit.demands("task upload", ({},), {})
    assert isinstance(raised.value.__cause__, KeyError)


def test_callable_that_asks_for_headers_gets_them():
    """A keyword-only parameter `headers` gives a callable what the producer sent beside the arguments."""
    limit = Limit(bucket, tokens=lambda size, *, headers: size * headers.get("factor", 1))
    assert limit.asks_headers
    assert limit.demands("task upload", (2,), {}, {"factor": 3})[0][1] == 6
    assert limit.demands("task upload", (2,), {})[0][1] == 2


def test_turns_follow_each_other(monkeypatch):
    """Those sent away get a moment each, at the bucket's rate, and do not come back all at once."""
    monkeypatch.setattr("rate_limiter.gating.limit.monotonic", lambda: 100.0)
    limit = Limit(TokenBucket(1, 2), when_limited="retry")
    assert [limit.turn(limit.bucket, 1, 0.5) for _ in range(3)] == [0.5, 1.0, 1.5]


def test_callable_that_returns_no_bucket_is_named():
    """A bucket callable that returns something else fails the job with that value."""
    limit = Limit(lambda: "gold")
    with pytest.raises(ValueError, match="bucket is 'gold', expected a bucket"):
        limit.demands("task upload", (), {})


def test_key_picks_the_bucket():
    """key=… is asked with the job's arguments; its bucket counts, capacity and all."""
    tenants = BucketPerKey(2, 1, limits={"large": (50, 5)}.get)
    limit = Limit(tenants, key=lambda tenant, _size: tenant, tokens=lambda _tenant, size: size)
    assert limit.demands("task upload", ("large", 40), {}) == ((tenants["large"], 40, limit),)
    with pytest.raises(ValueError, match="tokens is 40, expected at most the capacity 2"):
        limit.demands("task upload", ("small", 40), {})


@pytest.mark.parametrize("key", [1.5, None, ["a"], "x" * 201])
def test_bad_key_names_task_and_limit(key):
    """A key that is none is the job's own fault, and its error says where."""
    limit = Limit(BucketPerKey(1, 1), key=lambda: key, name="tenants")
    with pytest.raises(ValueError, match="task upload, limit tenants: key must "):
        limit.demands("task upload", (), {})


def test_all_of_counts_as_its_buckets():
    """A job takes from each bucket of an AllOf by itself, so that it waits in their queues."""
    one, other, third = TokenBucket(5, 1), TokenBucket(5, 1), TokenBucket(5, 1)
    limit = Limit(AllOf(one, AllOf(other, third)), tokens=2)
    assert limit.demands("task upload", (), {}) == tuple(
        (each, 2, limit) for each in (one, other, third)
    )


def test_buckets_says_what_a_callable_may_return():
    """What buckets=[…] does not name is refused, for it was not shared."""
    one, other = TokenBucket(5, 1), TokenBucket(5, 1)
    limit = Limit(lambda which: which, buckets=[one])
    assert limit.demands("task upload", (one,), {}) == ((one, 1, limit),)
    with pytest.raises(ValueError, match="expected one of buckets=…"):
        limit.demands("task upload", (AllOf(one, other),), {})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bucket": BucketPerKey(1, 1)}, ValueError, "key is missing"),
        ({"bucket": BucketPerKey(1, 1), "key": "tenant"}, TypeError, "key must be a callable"),
        ({"bucket": TokenBucket(1, 1), "key": len}, ValueError, "key goes with a BucketPerKey"),
        ({"bucket": BucketPerKey(1, 1), "key": len, "tokens": 2}, ValueError, "at most the bucket's"),
        (
            {"bucket": TokenBucket(1, 1), "buckets": [TokenBucket(1, 1)]},
            ValueError,
            "buckets goes with",
        ),
        ({"bucket": len, "buckets": [5]}, TypeError, "buckets must be buckets, not 5"),
    ],
)
def test_bad_scope_is_refused_at_declaration(arguments, error, message):
    """What does not go together is refused where it is written."""
    with pytest.raises(error, match=message):
        Limit(**arguments)


@pytest.mark.parametrize(
    ("limit", "bound"),
    [
        (Limit(TokenBucket(1, 100)), 400),
        (Limit(TokenBucket(1, 1)), 8),
        (Limit(TokenBucket(1, 1), max_held=3), 3),
        (Limit(BucketPerKey(1, 1), key=len), 1000),
        (Limit(lambda: None), 8),
    ],
)
def test_how_much_a_gate_holds(limit, bound):
    """Four seconds' worth, a window at least, and more where there is a bucket per key."""
    assert limit.bound(8) == bound
    assert limit.bound(8, 77) == limit.max_held or limit.bound(8, 77) == 77
