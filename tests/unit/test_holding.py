"""The engine of the gates, on a manual clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rate_limiter import SharedTokenBucket, TokenBucket
from rate_limiter.gating.holding import Holding
from rate_limiter.gating.limit import Demand, Limit
from rate_limiter.testing import ManualClock


def demand(bucket, tokens, when_limited="wait"):
    return Demand(bucket, tokens, Limit(bucket, tokens=tokens, when_limited=when_limited))


def raise_error(job, *error):
    raise AssertionError(f"{job} failed: {error}")


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def holding():
    return Holding(fail=raise_error, refuse=raise_error)


def jobs_of(held):
    return [each.job for each in held]


def released(holding, clock, until):
    """Walk from due moment to due moment, and return (moment, jobs) for each that lets some go."""
    steps = []
    while holding.next_due is not None and holding.next_due <= until:
        clock.now = holding.next_due
        if jobs := jobs_of(holding.release(clock.now)):
            steps.append((clock.now, jobs))
    return steps


def test_goes_at_once_while_there_are_tokens(holding, clock):
    """A job whose tokens are there is not held."""
    bucket = TokenBucket(2, 1, clock=clock)
    assert [holding.offer(job, [demand(bucket, 1)], clock()) for job in "abc"] == [True, True, False]
    assert len(holding) == 1


def test_releases_each_job_at_its_moment_in_order(holding, clock):
    """Held jobs go one by one at the bucket's rate, first come, first served."""
    bucket = TokenBucket(1, 2, clock=clock)
    for job in "abcd":
        holding.offer(job, [demand(bucket, 1)], clock())
    assert released(holding, clock, 9) == [(0.5, ["b"]), (1.0, ["c"]), (1.5, ["d"])]
    assert holding.next_due is None
    assert len(holding) == 0


def test_releases_all_that_is_due_in_one_go(holding, clock):
    """A late release lets everything go whose tokens have come meanwhile."""
    bucket = TokenBucket(3, 1, clock=clock)
    for job in range(9):
        holding.offer(job, [demand(bucket, 1)], clock())
    clock.advance(2.5)
    assert jobs_of(holding.release(clock())) == [3, 4]
    assert holding.next_due == pytest.approx(3.0)


def test_heavy_job_is_not_overtaken(holding, clock):
    """A light job behind a heavy one of the same bucket waits, though its own tokens are there."""
    bucket = TokenBucket(10, 1, clock=clock)
    bucket.allow(10)
    holding.offer("heavy", [demand(bucket, 10)], clock())
    clock.advance(5)
    assert not holding.offer("light", [demand(bucket, 1)], clock())
    assert released(holding, clock, 99) == [(10.0, ["heavy"]), (11.0, ["light"])]


def test_urgent_jobs_go_first(holding, clock):
    """By priority, then by arrival; one that has just come may take tokens that are there."""
    bucket = TokenBucket(1, 1, clock=clock)
    bucket.allow()
    for job, steps in enumerate([0, 2, 0, -1, 1, -1]):
        holding.offer(job, [demand(bucket, 1)], clock(), steps)
    clock.advance(1)
    assert holding.offer("most urgent", [demand(bucket, 1)], clock(), -2)
    assert not holding.offer("late", [demand(bucket, 1)], clock(), 2)
    jobs = [job for _, jobs in released(holding, clock, 99) for job in jobs]
    assert jobs == [3, 5, 0, 2, 4, 1, "late"]


def test_a_job_gains_a_step_of_priority_for_each_30_seconds(holding, clock):
    """Urgent jobs that keep coming overtake it for that long, and no longer."""
    bucket = TokenBucket(1, 0.1, clock=clock)
    bucket.allow()
    holding.offer("patient", [demand(bucket, 1)], clock(), 2)
    went = []
    for number in range(12):
        holding.offer(number, [demand(bucket, 1)], clock())
        went += released(holding, clock, 10 * (number + 1))
    jobs = [job for _, jobs in went for job in jobs]
    assert jobs.index("patient") == 6  # those that came in the first 60 s, one every 10 s
    assert [job for job in jobs if job != "patient"] == list(range(11))


def test_an_urgent_job_takes_back_a_bucket_that_was_claimed(holding, clock):
    """The bucket that waits for a job with two limits serves one that is before it by priority."""
    one, other = TokenBucket(1, 1, clock=clock), TokenBucket(1, 1, clock=clock)
    one.allow()
    clock.advance(0.5)
    other.allow()
    holding.offer("both", [demand(one, 1), demand(other, 1)], clock())
    released(holding, clock, 1)  # it claims the first one, until 1.5
    holding.offer("urgent", [demand(one, 1)], clock(), -1)
    assert released(holding, clock, 9) == [(1.5, ["urgent"]), (2.5, ["both"])]


def test_buckets_do_not_wait_for_each_other(holding, clock):
    """The queue of one bucket stands in nobody's way at another."""
    slow, fast = TokenBucket(1, 0.1, clock=clock), TokenBucket(1, 10, clock=clock)
    for job in range(3):
        holding.offer(("slow", job), [demand(slow, 1)], clock())
        holding.offer(("fast", job), [demand(fast, 1)], clock())
    jobs = [job for _, jobs in released(holding, clock, 99) for job in jobs]
    assert jobs == [("fast", 1), ("fast", 2), ("slow", 1), ("slow", 2)]


def test_two_buckets_are_taken_from_together_or_not_at_all(holding, clock):
    """A job that one bucket refuses takes nothing from the other, and goes when both grant it."""
    per_second, per_day = TokenBucket(1, 1, clock=clock), TokenBucket(2, 0.01, clock=clock)
    for job in "abc":
        holding.offer(job, [demand(per_second, 1), demand(per_day, 1)], clock())
    assert released(holding, clock, 50) == [(1.0, ["b"])]  # then the day has no more
    assert per_second.tokens == 1
    assert released(holding, clock, 200) == [(100.0, ["c"])]


def test_job_that_waits_elsewhere_does_not_block_this_bucket(holding, clock):
    """Who waits for another bucket lets later jobs of this one pass, and keeps its place by arrival."""
    shared, tenant = TokenBucket(1, 1, clock=clock), TokenBucket(1, 0.1, clock=clock)
    tenant.allow()
    holding.offer("tenant's", [demand(shared, 1), demand(tenant, 1)], clock())
    assert holding.offer("other's", [demand(shared, 1)], clock())


def test_job_at_two_buckets_is_not_overtaken_for_ever(holding, clock):
    """Two buckets whose tokens never come at once: the one that has one keeps it for the oldest job."""
    one, other = TokenBucket(1, 1, clock=clock), TokenBucket(1, 1, clock=clock)
    one.allow()
    clock.advance(0.5)
    other.allow()
    holding.offer("both", [demand(one, 1), demand(other, 1)], clock())
    for job in range(20):
        holding.offer(("one", job), [demand(one, 1)], clock())
        holding.offer(("other", job), [demand(other, 1)], clock())
    assert released(holding, clock, 1.5) == [(1.5, ["both"])]
    assert {job for _, jobs in released(holding, clock, 2.5) for job in jobs} == {
        ("one", 0),
        ("other", 0),
    }


def test_heavy_job_elsewhere_is_not_starved_by_jobs_at_two_buckets(holding, clock):
    """A job whose turn has come at one bucket still stands behind older ones at the other."""
    shared, tenant = TokenBucket(10, 1, clock=clock), TokenBucket(1, 1, clock=clock)
    shared.allow(10)
    tenant.allow()
    holding.offer("tenant's", [demand(tenant, 1)], clock())
    holding.offer("heavy", [demand(shared, 10)], clock())
    for job in range(3):
        holding.offer(job, [demand(tenant, 1), demand(shared, 1)], clock())
    assert released(holding, clock, 10) == [(1.0, ["tenant's"]), (10.0, ["heavy"])]
    assert [job for _, jobs in released(holding, clock, 99) for job in jobs] == [0, 1, 2]


def test_slow_bucket_does_not_stop_a_fast_one(holding, clock):
    """A tenant whose own bucket is slow leaves the tokens that all share to the others."""
    shared, tenant = TokenBucket(1, 10, clock=clock), TokenBucket(1, 1, clock=clock)
    for job in range(10):
        holding.offer(("slow", job), [demand(shared, 1), demand(tenant, 1)], clock())
        for other in range(10):
            holding.offer(("fast", job, other), [demand(shared, 1)], clock())
    steps = released(holding, clock, 8)
    jobs = [job for _, jobs in steps for job in jobs]
    assert len(jobs) == pytest.approx(80, abs=2)
    slow = [job for kind, job, *_ in jobs if kind == "slow"]
    assert slow == list(range(1, len(slow) + 1))
    assert len(slow) >= 7


def test_bucket_is_claimed_only_where_that_costs_it_little(holding, clock):
    """A job whose turn has come at a fast bucket waits for a slow one without keeping the fast one."""
    fast, slow = TokenBucket(1, 10, clock=clock), TokenBucket(1, 0.1, clock=clock)
    fast.allow()
    slow.allow()
    holding.offer("fast", [demand(fast, 1)], clock())
    holding.offer("both", [demand(fast, 1), demand(slow, 1)], clock())
    for job in range(20):
        holding.offer(job, [demand(fast, 1)], clock())
    jobs = [job for _, jobs in released(holding, clock, 5) for job in jobs]
    assert jobs == ["fast", *range(20)]


def test_claimed_bucket_without_jobs_serves_nobody_new(holding, clock):
    """A bucket that is claimed, and that nobody waits for, keeps its tokens from those who come."""
    one, other = TokenBucket(1, 1, clock=clock), TokenBucket(1, 1, clock=clock)
    one.allow()
    clock.advance(0.5)
    other.allow()
    holding.offer("one's", [demand(one, 1)], clock())
    holding.offer("both", [demand(one, 1), demand(other, 1)], clock())
    assert released(holding, clock, 1) == [(1.0, ["one's"])]
    clock.now = 1.5
    other.allow()  # so that "both" has to wait again, at the turn that "one" gives it
    clock.now = 2.0
    assert holding.release(clock()) == []
    assert not holding.offer("new", [demand(one, 1)], clock())
    assert released(holding, clock, 2.5) == [(2.5, ["both"])]


@pytest.mark.parametrize("later", ["third bucket", "pause", "debt"])
def test_claim_is_given_up_when_it_would_cost_much(holding, clock, later):
    """A job that has come to wait long, at whatever bucket, keeps none of the others from serving."""
    one, other, third = (TokenBucket(1, rate, clock=clock) for rate in (1, 1, 0.001))
    one.allow()
    clock.advance(0.5)
    other.allow()
    wants = [demand(one, 1), demand(other, 1)]
    if later == "third bucket":
        third.allow()
        wants.append(demand(third, 1))
    holding.offer("all", wants, clock())
    for job in range(3):
        holding.offer(job, [demand(one, 1)], clock())
    assert released(holding, clock, 1.2) == []  # it has claimed the one, and waits for the other
    if later == "pause":
        other.pause(600)
    elif later == "debt":
        other.charge(600)
    assert [job for _, jobs in released(holding, clock, 10) for job in jobs] == [0, 1, 2]
    assert released(holding, clock, 2000)[-1][1] == ["all"]


PRICES = st.dictionaries(st.integers(0, 2), st.sampled_from([0.5, 1, 2]), min_size=1)


@given(st.lists(st.tuples(st.sampled_from([0, 0, 0.3, 1]), PRICES), max_size=30))
def test_every_job_goes_and_none_overtakes_its_like(jobs):
    """Whatever buckets jobs share: all go, those that want the same in order, and no bucket overspends."""
    clock = ManualClock()
    holding = Holding(fail=raise_error, refuse=raise_error)
    buckets = [TokenBucket(2, rate, clock=clock) for rate in (1, 1, 7)]
    ran = []
    for number, (step, prices) in enumerate(jobs):
        ran += [job for _, some in released(holding, clock, clock.now + step) for job in some]
        wants = [demand(buckets[index], tokens) for index, tokens in prices.items()]
        job = (number, tuple(sorted(prices.items())))
        if holding.offer(job, wants, clock()):
            ran.append(job)
        assert all(bucket.tokens >= -2e-9 for bucket in buckets)  # the rounding that a bucket allows
    ran += [job for _, some in released(holding, clock, 1000) for job in some]
    assert len(ran) == len(jobs)
    assert len(holding) == 0
    assert not holding.held_by
    assert not holding._queues
    for kind in {prices for _, prices in ran}:
        numbers = [number for number, prices in ran if prices == kind]
        assert numbers == sorted(numbers)


def test_revoked_job_is_skipped_free_of_charge(clock):
    """A job that is gone when its turn comes costs nothing, and the next one takes its moment."""
    holding = Holding(skip=lambda held: held.job == "revoked", fail=raise_error, refuse=raise_error)
    bucket = TokenBucket(1, 1, clock=clock)
    for job in ["first", "revoked", "next"]:
        holding.offer(job, [demand(bucket, 1)], clock())
    assert released(holding, clock, 9) == [(1.0, ["next"])]


def test_error_of_a_bucket_ends_that_job_alone(clock):
    """A bucket that raises for one held job fails that job; the others go on."""

    class Poisoned(TokenBucket):
        __slots__ = ()

        def take_or_delay(self, tokens=1):
            if tokens == 2 and clock() > 0:
                raise ValueError("no")
            return super().take_or_delay(tokens)

    failed = []
    holding = Holding(
        fail=lambda held, error: failed.append((held.job, str(error))), refuse=raise_error
    )
    bucket = Poisoned(2, 1, clock=clock)
    bucket.allow(2)
    holding.offer("bad", [demand(bucket, 2)], clock())
    holding.offer("good", [demand(bucket, 1)], clock())
    assert released(holding, clock, 9) == [(2.0, ["good"])]
    assert failed == [("bad", "no")]


def test_limit_that_does_not_wait_refuses(clock):
    """A job refused by a limit that is not "wait" is handed back with the delay, and not held."""
    refused = []
    holding = Holding(
        fail=raise_error, refuse=lambda job, asked, delay: not refused.append((job, delay))
    )
    bucket = TokenBucket(1, 2, clock=clock)
    dropped = demand(bucket, 1, "drop")
    assert holding.offer("a", [dropped], clock())
    assert not holding.offer("b", [dropped], clock())
    assert (refused, len(holding)) == ([("b", 0.5)], 0)
    assert not holding.offer("waits", [demand(bucket, 1)], clock())
    assert not holding.offer("c", [dropped], clock())  # behind those who came before
    assert refused[1:] == [("c", 0.5)]


def test_counts_what_each_limit_holds(holding, clock):
    """held_by says how many jobs each limit makes wait, and forgets limits that hold none."""
    bucket, other = TokenBucket(1, 1, clock=clock), TokenBucket(1, 1, clock=clock)
    first, second = demand(bucket, 1), demand(other, 1)
    for job in range(3):
        holding.offer(job, [first, second], clock())
    assert holding.held_by == {first[2]: 2}
    released(holding, clock, 9)
    assert holding.held_by == {}


def test_clear_forgets_everything(holding, clock):
    """After clear() nothing is held or due, and new jobs are served as if nothing had been."""
    bucket = TokenBucket(1, 1, clock=clock)
    for job in "abc":
        holding.offer(job, [demand(bucket, 1)], clock())
    assert sorted(jobs_of(holding.clear())) == ["b", "c"]
    assert (len(holding), holding.next_due) == (0, None)
    clock.advance(1)
    assert holding.offer("d", [demand(bucket, 1)], clock())


def test_releases_no_more_than_asked_for(holding, clock):
    """With most=1 one job takes its tokens at a time, in order, and the others are due at once."""
    bucket, other = TokenBucket(3, 1, clock=clock), TokenBucket(1, 1, clock=clock)
    holding.offer("burst", [demand(bucket, 3)], clock())
    for job in "abc":
        holding.offer(job, [demand(bucket, 1)], clock())
    holding.offer("burst", [demand(other, 1)], clock())
    holding.offer("x", [demand(other, 1)], clock())
    clock.advance(5)
    out = []
    while (due := holding.next_due) is not None and due <= clock():
        taken = jobs_of(holding.release(clock(), 1))
        assert len(taken) <= 1
        out += taken
    assert ([job for job in out if job in "abc"], sorted(out)) == (
        ["a", "b", "c"],
        ["a", "b", "c", "x"],
    )
    assert bucket.tokens == 0


CHANGES = {
    "configure": lambda bucket: bucket.configure(tokens_per_second=1000),
    "refund": lambda bucket: bucket.refund(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("kind", [TokenBucket, SharedTokenBucket])
def test_a_change_just_before_a_job_waits_is_seen(clock, holding, kind, others, change):
    """Another thread may change a bucket after it has refused, and before anybody listens to it."""

    class Bucket(kind):
        __slots__ = ()

        def take_or_delay(self, tokens=1):
            delay = super().take_or_delay(tokens)
            if delay and not clock.now:
                change(self)
            return delay

    bucket = Bucket(1, 0.001, clock=clock)
    bucket.allow()
    ample = [demand(TokenBucket(9, 1, clock=clock), 1) for _ in range(others)]
    assert not holding.offer("job", [*ample, demand(bucket, 1)], clock())
    clock.now = 0.01
    assert holding.next_due == 0
    assert jobs_of(holding.release(clock())) == ["job"]


@pytest.mark.parametrize("kind", [TokenBucket, SharedTokenBucket])
@pytest.mark.parametrize("taken", [0, 1])
def test_a_signal_handler_may_change_a_bucket_at_any_time(clock, kind, taken):
    """While jobs are let go, a handler may refund and then read when the next one is due."""
    due = []

    class Bucket(kind):
        __slots__ = ("asked",)

        def take_or_delay(self, tokens=1):
            delay = super().take_or_delay(tokens)
            self.asked = getattr(self, "asked", 0) + 1
            if self.asked == 3 + taken:  # a signal arrives just now
                self.refund(1)
                due.append(holding.next_due)
            return delay

    holding = Holding(fail=raise_error, refuse=raise_error)
    bucket = Bucket(1, 1, clock=clock)
    for job in "abc":
        holding.offer(job, [demand(bucket, 1)], clock())
    clock.now = 1.0
    assert jobs_of(holding.release(clock())) == ["b", "c"]
    assert due == [0.0]


def test_many_jobs_that_are_gone_do_not_stop_the_loop(clock):
    """To announce that a job was revoked takes time too: at most 50 of them in one turn."""
    skipped = []
    holding = Holding(
        fail=raise_error, refuse=raise_error, skip=lambda held: skipped.append(held) or True
    )
    bucket = TokenBucket(1, 1, clock=clock)
    for job in range(121):
        holding.offer(job, [demand(bucket, 1)], clock())
    clock.now = 1.0
    turns = []
    while holding.next_due is not None and holding.next_due <= clock.now:
        before = len(skipped)
        holding.release(clock())
        turns.append(len(skipped) - before)
    assert turns == [50, 50, 20]
