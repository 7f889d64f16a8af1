"""Jobs that were let go, and wait for a slot of the pool: on a manual clock, with a model of a pool."""
# ruff: noqa: D102 - the methods are documented at Host

import itertools
import logging
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rate_limiter import TokenBucket
from rate_limiter.gating.engine import Engine
from rate_limiter.gating.host import Host
from rate_limiter.gating.limit import Demand, Limit
from rate_limiter.gating.unstarted import Unstarted
from rate_limiter.testing import ManualClock


class Pool(Host):
    """A pool whose slots become free when a test says so: what was held first, then the others."""

    has_slots = True

    def __init__(self, capacity=1, rate=1, costs=(1,), *, buckets=1, bucket=TokenBucket, **options):
        self.clock = ManualClock()
        self.buckets = [bucket(capacity, rate, clock=self.clock) for _ in range(buckets)]
        self.limits = [
            [Limit(bucket, tokens=cost, name="limit", **options) for bucket in self.buckets]
            for cost in costs
        ]
        self.engine = Engine(self, self._limits_for, clock=self.clock)
        self.engine.room.window = lambda _limit: 1000
        self.first, self.others, self.started, self.refused = [], [], [], []
        self.wakes = 0

    def _limits_for(self, cost, used):
        return tuple(self.limits[cost][number] for number in used)

    def unstarted(self, job):
        return any(job is each for each, _ in self.first + self.others)

    def refuse(self, job, demand, delay):
        self.refused.append((self.clock(), job))
        return True

    def wake(self):
        self.wakes += 1

    def offer(self, job, cost=0, used=(0,)):
        decision, demands = self.engine.offer(job, self.engine.plan(cost, used))
        if decision == "go":
            self.others.append((job, demands))
        return decision

    def advance_to(self, moment):
        """Release what is due until a moment, each when it is due."""
        while (due := self.engine.next_due) <= moment:
            self.clock.now = max(due, self.clock.now)
            self.first += [(held.job, held.demands) for held in self.engine.release()]
            self.engine.settle()
        self.clock.now = moment

    def free_slot(self):
        """Start the next job, if there is one."""
        if waiting := self.first or self.others:
            job, demands = waiting.pop(0)
            self.started.append((self.clock(), job, demands))
            self.engine.started(job, demands)
            self.advance_to(self.clock())

    def lose(self):
        """Let a job that waits for a slot be revoked. Nobody is told."""
        if waiting := self.first or self.others:
            return waiting.pop()[0]
        return None


def excess(starts, rate):
    """Return the least ``c`` for which no span of time has more than ``c + rate * t`` tokens."""
    level, lowest, worst = 0.0, math.inf, 0.0
    for moment, tokens in starts:
        lowest = min(lowest, level - rate * moment)
        level += tokens
        worst = max(worst, level - rate * moment - lowest)
    return worst


def test_a_bucket_lets_go_what_may_start_at_once():
    """Jobs up to the capacity go; the next one when one of them has started, if the tokens are there."""
    pool = Pool(capacity=2)
    assert [pool.offer(job) for job in "abcd"] == ["go", "go", "held", "held"]
    pool.advance_to(9.7)
    assert not pool.first
    assert pool.wakes == 0
    pool.free_slot()
    assert pool.wakes == 1
    assert [job for job, _ in pool.first] == []  # what came back while two waited was charged
    pool.advance_to(10.7)
    assert [job for job, _ in pool.first] == ["c"]


def test_the_last_one_that_starts_late_is_not_charged():
    """What came back while a single job waited makes up for it: the next one goes at once."""
    pool = Pool()
    assert [pool.offer(job) for job in "abc"] == ["go", "held", "held"]
    pool.advance_to(9.5)
    pool.free_slot()
    pool.free_slot()
    assert [(moment, job) for moment, job, _ in pool.started] == [(9.5, "a"), (9.5, "b")]
    pool.advance_to(10.4)
    pool.free_slot()
    assert not pool.first
    assert len(pool.started) == 2
    pool.advance_to(10.5)
    assert [job for job, _ in pool.first] == ["c"]


class Told(TokenBucket):
    """A bucket that is told of the jobs that wait for it, as one in Redis is: it fetches tokens for them."""

    waiting = 0

    def jobs_wait(self, tokens, demands=()):
        self.waiting = tokens
        assert bool(tokens) == bool(demands)


def test_no_tokens_are_fetched_for_a_job_that_cannot_start():
    """A job that waits for a slot takes none: they would be missing elsewhere, and go back."""
    pool = Pool(bucket=Told)
    (bucket,) = pool.buckets
    assert [pool.offer(job) for job in "abc"] == ["go", "held", "held"]
    assert bucket.waiting == 0
    pool.free_slot()
    assert bucket.waiting == 2
    assert pool.offer("d") == "held"
    assert bucket.waiting == 3
    pool.advance_to(1)
    assert [job for job, _ in pool.first] == ["b"]
    assert bucket.waiting == 0
    pool.advance_to(2)
    pool.free_slot()
    assert [job for job, _ in pool.first] == ["c"]


def test_a_pool_that_cannot_tell_fails_no_job(caplog):
    """It may raise, say if no process can be forked: that is logged, and the jobs go in their turn."""
    pool = Pool()

    def broken(_job):
        raise BlockingIOError("no process")

    pool.unstarted = broken
    assert [pool.offer(job) for job in "ab"] == ["go", "held"]
    pool.advance_to(3)
    pool.free_slot()
    pool.free_slot()
    assert [job for _, job, _ in pool.started] == ["a", "b"]
    assert "Could not tell whether a is still to start" in caplog.text


def test_a_host_without_slots_is_not_asked():
    """A gate that runs its jobs itself lets them go by the bucket alone, and notes nothing."""
    pool = Pool(capacity=3)
    engine = Engine(Host(), lambda *_: (pool.limits[0][0],), clock=pool.clock)
    assert [engine.offer(job, engine.plan("job"))[0] for job in "abcd"] == ["go", "go", "go", "held"]
    assert engine.unstarted() == []


@pytest.mark.parametrize("held", [True, False])
def test_a_job_that_ended_without_a_start_is_found_out(held):
    """It stops the next one for half a second at most; one that comes later, not at all."""
    pool = Pool(rate=10)
    pool.offer("a")
    if held:
        assert pool.offer("b") == "held"
    assert pool.lose() == "a"
    pool.advance_to(0.4)
    if not held:
        assert pool.offer("b") == "go"
        return
    assert not pool.first
    pool.advance_to(0.6)
    assert [job for job, _ in pool.first] == ["b"]


@pytest.mark.parametrize("when_limited", ["drop", "raise", "retry"])
def test_whether_a_job_is_refused_is_decided_when_it_could_start(when_limited):
    """A limit that does not let jobs wait holds them while a job is unstarted, and then asks its bucket."""
    pool = Pool(capacity=1, rate=1, when_limited=when_limited)
    assert [pool.offer(job) for job in "abc"] == ["go", "held", "held"]
    pool.advance_to(3.5)
    assert pool.refused == []
    pool.free_slot()
    assert [job for job, _ in pool.first] == ["b"]
    pool.free_slot()
    assert pool.refused == [(3.5, "c")]
    assert len(pool.engine) == 0


def test_what_is_forgotten_stops_nobody():
    """After `clear` nothing is held and nothing is unstarted: the broker has it all."""
    pool = Pool()
    assert [pool.offer(job) for job in "ab"] == ["go", "held"]
    assert pool.engine.unstarted() == ["a"]
    assert pool.engine.clear() == ["b"]
    assert pool.engine.unstarted() == []
    pool.clock.advance(1)
    assert pool.offer("c") == "go"


def test_a_job_that_waits_for_a_slot_is_told_of(caplog):
    """The log says that jobs wait for a slot, and not for tokens."""
    caplog.set_level(logging.DEBUG, "rate_limiter")
    pool = Pool()
    pool.offer("a")
    pool.offer("b")
    assert [record.getMessage() for record in caplog.records] == [
        "Limit limit: jobs begin to wait, the first for a free slot of the pool",
        "Held b: jobs of limit limit wait for a free slot",
    ]


def test_a_job_at_two_buckets_waits_for_the_one_that_is_stopped():
    """A job with two limits goes when neither has too many unstarted jobs; others pass it meanwhile."""
    pool = Pool(capacity=1, buckets=2)
    assert pool.offer("a", used=(0,)) == "go"
    assert pool.offer("both", used=(0, 1)) == "held"
    assert pool.offer("b", used=(1,)) == "go"
    pool.advance_to(5)
    assert not pool.first
    pool.free_slot()  # a; both is stopped by b now
    assert not pool.first
    assert pool.offer("c", used=(0,)) == "held"  # it has come later
    pool.free_slot()
    pool.free_slot()
    assert [job for _, job, _ in pool.started] == ["a", "b", "both"]
    pool.advance_to(6)
    assert [job for job, _ in pool.first] == ["c"]


def test_buckets_of_jobs_that_ended_unseen_do_not_pile_up():
    """However many buckets there were, few are kept when their jobs have ended untold."""
    unstarted = Unstarted(lambda _job: False)
    limit = Limit(TokenBucket(1, 1))
    for number in range(1000):
        unstarted.add(number, [Demand(TokenBucket(1, 1), 1.0, limit)], number)
    assert len(unstarted.jobs()) < 64


def test_a_start_may_be_told_of_while_it_is_asked_for():
    """To ask whether jobs are unstarted may bring the news that they have started."""
    bucket = TokenBucket(9, 1)
    demands = [Demand(bucket, 1.0, Limit(bucket))]

    def is_unstarted(_job):
        for number in range(9):
            unstarted.started(number, demands, 1.0)
        return False

    unstarted = Unstarted(is_unstarted)
    for number in range(9):
        unstarted.add(number, demands, 0.0)
    unstarted.forget_ended(bucket)
    assert unstarted.jobs() == []


GAPS = st.one_of(st.just(0.0), st.floats(0.01, 0.4), st.floats(0.4, 30.0))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("slot"), GAPS, st.integers(1, 25)),
        st.tuples(st.just("come"), GAPS, st.lists(st.integers(0, 2), min_size=1, max_size=25)),
        st.tuples(st.just("lose"), GAPS, st.just(None)),
    ),
    min_size=1,
    max_size=40,
)


@given(
    capacity=st.sampled_from([1, 3, 20]),
    rate=st.sampled_from([0.5, 2.0, 10.0]),
    weighted=st.booleans(),
    buckets=st.sampled_from([1, 2]),
    steps=STEPS,
)
@example(3, 2.0, False, 1, [("come", 0.0, [0] * 9), ("slot", 20.0, 9)])
@example(1, 2.0, False, 1, [("come", 0.0, [0] * 9), ("slot", 20.0, 9), ("slot", 20.0, 9)])
def test_starts_keep_the_rate_however_slots_become_free(capacity, rate, weighted, buckets, steps):
    """In any span of ``t`` seconds jobs start for ``capacity + rate * t`` tokens, and one job more.

    And every job starts in the end, but those that are lost.
    """
    costs = (1.0, capacity / 2, float(capacity)) if weighted and capacity > 1 else (1.0,) * 3
    pool, numbers, lost = Pool(capacity, rate, costs, buckets=buckets), itertools.count(), set()
    uses = [(0,), (0,)] if buckets == 1 else [(0,), (1,), (0, 1)]
    of = {}
    for what, gap, more in steps:
        pool.advance_to(pool.clock() + gap)
        if what == "come":
            for cost in more:
                job = next(numbers)
                of[job] = cost, uses[job % len(uses)]
                pool.offer(job, *of[job])
        elif what == "lose":
            lost.add(pool.lose())
        else:
            for _ in range(more):
                pool.free_slot()
    for _ in range(100 * len(of)):
        if len(pool.started) + len(lost - {None}) < len(of):
            pool.advance_to(pool.clock() + 0.5)
            pool.free_slot()
    started = [job for _, job, _ in pool.started]
    assert sorted(started + list(lost - {None})) == list(range(len(of)))
    for bucket in pool.buckets:
        mine = [
            (moment, each.tokens)
            for moment, _, demands in pool.started
            for each in demands
            if each.bucket is bucket
        ]
        assert excess(mine, rate) <= (capacity + max(costs)) * (1 + 1e-6)
