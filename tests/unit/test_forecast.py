"""The forecast of held jobs: each goes when it was said."""

import pytest
from engine_lab import Gate
from hypothesis import given
from hypothesis import strategies as st

from rate_limiter import AllOf, BucketPerKey, TokenBucket
from rate_limiter.gating.engine import Engine
from rate_limiter.gating.limit import Limit
from rate_limiter.testing import ManualClock


def play(limits, jobs, clock):
    """Offer jobs; return the forecast of each that is held, and when it went."""
    plans = {}

    class Host(Gate):
        def call_of(self, job, asks_headers):
            return super().call_of(job[1], asks_headers)

    engine = Engine(Host(), lambda kind: limits[kind], max_held=10_000, clock=clock)
    engine.room.window = lambda _limit: 4
    for number, (kind, value) in enumerate(jobs):
        plans[kind] = engine.plan(kind)
        engine.offer((number, value), plans[kind])
    said = {each.held.job[0]: each for each in engine.forecasts()}
    began, went = clock(), {}
    while len(engine):
        clock.now = max(clock.now, engine.next_due)
        for held in engine.release():
            went[held.job[0]] = clock() - began
        engine.settle()
    return said, went


@given(
    numbers=st.tuples(st.integers(1, 5), st.sampled_from([0.5, 1, 3, 20])),
    costs=st.lists(st.integers(1, 5), min_size=1, max_size=40),
)
def test_each_goes_when_it_was_said(numbers, costs):
    """One bucket: the moment and the number of jobs before it are right."""
    clock = ManualClock()
    bucket = TokenBucket(5, numbers[1], clock=clock)
    bucket.charge(numbers[0])
    said, went = play(
        {"a": [Limit(bucket, tokens=lambda cost: cost)]}, [("a", c) for c in costs], clock
    )
    assert said.keys() == went.keys()
    for number, forecast in said.items():
        assert forecast.seconds == pytest.approx(went[number], abs=1e-6)
    assert [each.before for each in said.values()] == list(range(len(said)))


@given(st.integers(1, 200), st.sampled_from([0.5, 2, 7]), st.sampled_from([1, 2, 10]))
def test_the_slower_of_two_buckets_decides(jobs, rate, other):
    """Two limits: each job goes when both have its tokens; the one that serves last is named."""
    clock = ManualClock()
    slow = Limit(TokenBucket(3, rate, clock=clock), name="slow")
    fast = Limit(TokenBucket(other, rate * 2, clock=clock), name="fast")
    said, went = play({"a": [fast, slow]}, [("a", 1)] * jobs, clock)
    for number, forecast in said.items():
        assert forecast.seconds == pytest.approx(went[number], rel=0.01, abs=1e-6)
    if jobs > 30:
        assert {each.limit.name for each in list(said.values())[20:]} == {"slow"}


def test_keys_do_not_stand_before_each_other():
    """Each key has its own queue."""
    clock = ManualClock()
    limit = Limit(BucketPerKey(1, 1, clock=clock), key=lambda key: key, name="keys")
    said, went = play({"a": [limit]}, [("a", number % 3) for number in range(12)], clock)
    assert {number: each.before for number, each in said.items()} == {
        n: n // 3 - 1 for n in range(3, 12)
    }
    assert {number: each.seconds for number, each in said.items()} == pytest.approx(went)


def test_a_pause_is_in_it():
    """A paused bucket serves after the pause, from empty."""
    clock = ManualClock()
    bucket = TokenBucket(2, 1, clock=clock)
    bucket.pause(60)
    said, went = play({"a": [Limit(AllOf(bucket))]}, [("a", 1)] * 3, clock)
    assert [each.seconds for each in said.values()] == [61, 62, 63] == list(went.values())


def test_a_rate_that_is_for_several_workers():
    """Each has its part of it: the jobs of the others take the rest."""

    class Shared(TokenBucket):
        workers = 4

    clock = ManualClock()
    bucket = Shared(1, 2, clock=clock)
    bucket.allow()
    said, _ = play({"a": [Limit(bucket)]}, [("a", 1)] * 3, clock)
    assert [each.seconds for each in said.values()] == pytest.approx([2, 4, 6])
