"""A limit prices each job, and says how many of them a gate holds."""

import math

import pytest

from rate_limiter import AllOf, BucketPerKey, TokenBucket
from rate_limiter.gating.declared import new_limit
from rate_limiter.gating.limit import Call, Limit
from rate_limiter.gating.parameters import Parameters
from rate_limiter.gating.record import record_of

bucket = TokenBucket(10, 1)


def test_demand_is_what_the_callables_say():
    """Bucket and tokens may be callables; both are given exactly the arguments that were sent."""
    small, large = TokenBucket(1, 1), TokenBucket(100, 1)
    limit = Limit(
        lambda name, size: large if size > 1 else small, tokens=lambda name, size: size, name="uploads"
    )
    assert limit.demands(Call("task upload", ("a.mp4",), {"size": 1})) == ((small, 1, limit),)
    assert limit.demands(Call("task upload", ("a.mp4", 50), {})) == ((large, 50, limit),)


@pytest.mark.parametrize("value", [0, -3, math.nan, math.inf, "2", None, 11])
def test_impossible_cost_names_task_limit_and_value(value):
    """A cost that can never be paid is an error that names the task, the limit and the value."""
    limit = Limit(bucket, tokens=lambda: value, name="uploads")
    with pytest.raises(ValueError, match=r"task jobs\.upload, limit uploads: tokens is") as raised:
        limit.demands(Call("task jobs.upload", (), {}))
    assert repr(value) in str(raised.value)


def test_error_of_a_callable_is_named_and_kept():
    """What a callable raises becomes a ValueError that names the task and says what it was."""
    limit = Limit(bucket, tokens=lambda size: size["MB"])
    with pytest.raises(
        ValueError, match="task upload, limit upload: tokens=… raised KeyError"
    ) as raised:
        limit.demands(Call("task upload", ({},), {}))
    assert isinstance(raised.value.__cause__, KeyError)


def test_callable_that_asks_for_headers_gets_them():
    """A keyword-only parameter `headers` gives a callable what the producer sent beside the arguments."""
    limit = Limit(bucket, tokens=lambda size, *, headers: size * headers.get("factor", 1))
    assert limit.asks_headers
    assert limit.demands(Call("task upload", (2,), {}, {"factor": 3}))[0][1] == 6
    assert limit.demands(Call("task upload", (2,), {}))[0][1] == 2


def test_jobs_that_are_sent_back_come_one_after_another(monkeypatch):
    """Each gets a moment of its own, at the bucket's rate, so that they do not come back all at once."""
    monkeypatch.setattr("rate_limiter.gating.record.monotonic", lambda: 100.0)
    limit = Limit(TokenBucket(1, 2), when_limited="retry")
    record = record_of(limit)
    assert [record.next_return(limit.bucket, 1, 0.5) for _ in range(3)] == [0.5, 1.0, 1.5]
    assert record.next_return(limit.bucket, 4, 0.5) == 3.5  # as many tokens take as much longer


def test_callable_that_returns_no_bucket_is_named():
    """A bucket callable that returns something else fails the job with that value."""
    limit = Limit(lambda: "gold")
    with pytest.raises(ValueError, match="bucket is 'gold', expected a bucket"):
        limit.demands(Call("task upload", (), {}))


def test_key_picks_the_bucket():
    """key=… is asked with the job's arguments; its bucket counts, capacity and all."""
    tenants = BucketPerKey(2, 1, limits={"large": (50, 5)}.get)
    limit = Limit(tenants, key=lambda tenant, _size: tenant, tokens=lambda _tenant, size: size)
    assert limit.demands(Call("task upload", ("large", 40), {})) == ((tenants["large"], 40, limit),)
    with pytest.raises(ValueError, match="tokens is 40, expected at most the capacity 2"):
        limit.demands(Call("task upload", ("small", 40), {}))


@pytest.mark.parametrize("key", [1.5, None, ["a"], "x" * 201])
def test_bad_key_names_task_and_limit(key):
    """A key that is none is the job's own fault, and its error says where."""
    limit = Limit(BucketPerKey(1, 1), key=lambda: key, name="tenants")
    with pytest.raises(ValueError, match="task upload, limit tenants: key must "):
        limit.demands(Call("task upload", (), {}))


def test_all_of_counts_as_its_buckets():
    """A job takes from each bucket of an AllOf by itself, so that it waits in their queues."""
    one, other, third = TokenBucket(5, 1), TokenBucket(5, 1), TokenBucket(5, 1)
    limit = Limit(AllOf(one, AllOf(other, third)), tokens=2)
    assert limit.demands(Call("task upload", (), {})) == tuple(
        (each, 2, limit) for each in (one, other, third)
    )


def test_buckets_says_what_a_callable_may_return():
    """What buckets=[…] does not name is refused, for it was not shared."""
    one, other = TokenBucket(5, 1), TokenBucket(5, 1)
    limit = Limit(lambda which: which, buckets=[one])
    assert limit.demands(Call("task upload", (one,), {})) == ((one, 1, limit),)
    with pytest.raises(ValueError, match="expected one of buckets=…"):
        limit.demands(Call("task upload", (AllOf(one, other),), {}))


@pytest.mark.parametrize(
    ("limit", "bound", "with_default"),
    [
        (Limit(TokenBucket(1, 0.1)), 60, 77),
        (Limit(TokenBucket(5, 0.1), tokens=5), 12, 77),
        (Limit(TokenBucket(5, 0.1), tokens=len), 60, 77),
        (Limit(TokenBucket(1, 0.001)), 8, 77),
        (Limit(TokenBucket(1, 100)), 1000, 77),
        (Limit(TokenBucket(1, 1e308)), 1000, 77),
        (Limit(TokenBucket(1, 1), max_held=3), 3, 3),
        (Limit(BucketPerKey(1, 1e-3), key=len), 1000, 77),
        (Limit(lambda: None), 1000, 77),
    ],
)
def test_how_much_a_gate_holds(limit, bound, with_default):
    """What runs in ten minutes, a window at least, 1,000 at most and by default; unless limit or gate say."""
    assert limit.bound(8) == bound
    assert limit.bound(8, 77) == with_default
    assert limit.bound(2000) == (limit.max_held or 2000)


@pytest.mark.parametrize(
    "cost", [lambda size, headers: size, lambda size, headers=None: size, lambda *headers: headers[0]]
)
def test_headers_are_for_a_keyword_only_parameter(cost):
    """A parameter `headers` that is not keyword-only is an argument of the job like any other."""
    limit = Limit(bucket, tokens=cost)
    assert not limit.asks_headers
    assert limit.demands(Call("task upload", (2, "of the job"), {}, {"x": 1}))[0].tokens == 2


@pytest.mark.parametrize("change", [{"name": "x"}, {"tokens": 2}, {"slow": True}])
def test_a_limit_is_what_was_declared(change):
    """It cannot be changed; what happens to it is in its record."""
    limit = Limit(bucket, name="mails")
    with pytest.raises((AttributeError, TypeError)):
        setattr(limit, *change.popitem())
    assert record_of(limit) is record_of(limit)
    assert record_of(limit).name == "mails"


# -- arguments by their names ---------------------------------------------------------------------------


def arguments(first, second=2, *rest, third, fourth=4): ...


def anything(first, /, *, second=2, **others): ...


@pytest.mark.parametrize(
    ("function", "name", "args", "kwargs", "value"),
    [
        (arguments, "first", (1,), {}, 1),
        (arguments, "first", (), {"first": 1}, 1),
        (arguments, "second", (1, 3), {}, 3),
        (arguments, "second", (1,), {"second": 3}, 3),
        (arguments, "second", (1,), {}, 2),
        (arguments, "third", (1, 2, 5, 6, 7), {"third": 3}, 3),
        (arguments, "fourth", (1, 2, 5, 6, 7), {"third": 3}, 4),
        (anything, "first", (1,), {"first": 2}, 1),
        (anything, "second", (1,), {}, 2),
        (anything, "tenant", (1,), {"tenant": 3}, 3),
    ],
)
def test_an_argument_is_found_by_its_name(function, name, args, kwargs, value):
    """However it was sent, by position or by keyword; else it is the default."""
    limit = Limit(BucketPerKey(9, 1), key=name, tokens=name)
    assert limit.demands(Call("task t", args, kwargs, None, Parameters(function))) == (
        (limit.bucket[value], value, limit),
    )
    assert limit.buckets_of(Call("task t", args, kwargs, None, Parameters(function))) == (
        limit.bucket[value],
    )


@pytest.mark.parametrize(
    ("function", "name", "args", "kwargs"),
    [
        (arguments, "first", (), {}),
        (arguments, "third", (1, 2, 3, 4), {}),
        (anything, "first", (), {"first": 1}),
        (anything, "tenant", (1,), {}),
    ],
)
def test_a_job_without_the_argument_fails_alone(function, name, args, kwargs):
    """Its error names the job, the limit, the argument of the declaration and the name."""
    limit = new_limit(TokenBucket(9, 1), tokens=name, name="uploads")
    with pytest.raises(
        ValueError, match=f"task t, limit uploads: tokens='{name}': the job has no such argument"
    ):
        limit.demands(Call("task t", args, kwargs, None, Parameters(function)))


def test_self_is_no_argument():
    """Without its first parameter a bound function has the arguments that the producer sends."""

    def bound(self, tenant, size=3): ...

    limit = new_limit(TokenBucket(9, 1), tokens="size")
    parameters = Parameters(bound).without_first
    assert parameters.names == ["tenant", "size"]
    assert limit.demands(Call("task t", ("acme", 5), {}, None, parameters))[0].tokens == 5
    assert Parameters(lambda *args: None).without_first.names == []


def test_a_name_is_a_field_of_a_message():
    """At the gate for kombu the body of a message is a mapping, and has the fields by name."""
    limit = Limit(BucketPerKey(9, 1), key="tenant", tokens="size", name="uploads")
    body = {"tenant": "acme", "size": 3}
    assert limit.demands(Call("queue q", (body, None), {})) == ((limit.bucket["acme"], 3, limit),)
    with pytest.raises(ValueError, match="queue q, limit uploads: tokens='size': the body has no such"):
        limit.demands(Call("queue q", ({"tenant": "acme"}, None), {}))
    with pytest.raises(ValueError, match="queue q, limit uploads: key='tenant': the body is not a map"):
        limit.demands(Call("queue q", (["acme"], None), {}))
