"""A limit with max_wait: jobs wait for so long and no longer; the others end as when_limited says."""

import pytest
from engine_lab import Gate, Lab
from hypothesis import given
from hypothesis import strategies as st

from rate_limiter import RateLimitExceeded, TokenBucket
from rate_limiter.celery import throttle
from rate_limiter.gating.engine import Engine
from rate_limiter.gating.limit import Limit
from rate_limiter.testing import ManualClock


def ended(lab):
    """Return the jobs that ended by their policy since the last call."""
    jobs = [job for what, job in lab.gate.asked if what == "refuse"]
    lab.gate.asked.clear()
    return jobs


@pytest.mark.parametrize("policy", ["wait", "drop", "raise", "retry"])
def test_a_forecast_that_is_too_long_ends_a_job_at_once(policy):
    """Those whose tokens come in time are held, whatever the policy is; the others cost nothing."""
    lab = Lab(1, 1, max_wait=3.5, when_limited=policy)
    assert lab.offer(*"abcdef") == ["go", "held", "held", "held", "ended", "ended"]
    assert ended(lab) == ["e", "f"]
    assert lab.run(10) == ["b", "c", "d"]
    assert lab.numbers()["tokens"] == 4
    assert lab.numbers()["refused"] == 2


def test_without_a_wait():
    """max_wait=0: only what can go now goes."""
    lab = Lab(2, 1, max_wait=0)
    assert lab.offer(*"abc") == ["go", "go", "ended"]


def test_heavy_jobs_count_by_their_tokens():
    """The forecast adds up what the jobs before it take."""
    lab = Lab(10, 1, max_wait=12, tokens=int)
    lab.gate.call_of = lambda job, _: Gate.call_of(lab.gate, job[0], _)
    assert lab.offer("9a", "8a", "4a", "6a") == ["go", "held", "held", "ended"]
    assert lab.offer("1b") == ["held"]
    assert lab.run(30) == ["8a", "4a", "1b"]


def test_a_wait_that_becomes_too_long_ends():
    """The bucket is paused: the jobs end, and free their places."""
    lab = Lab(1, 1, max_wait=3)
    lab.offer("a", "b")
    lab.clock.advance(0.5)
    lab.offer("c")
    lab.bucket.pause(100)
    assert lab.run(0.6) == []
    assert ended(lab) == ["b", "c"]  # their bucket says at once that it is too late
    assert len(lab.engine) == 0
    assert lab.gate.room[0] == 0
    assert lab.numbers()["refused"] == 2


def assert_ends_in_time(lab, *hasty):
    """Check that a job under these limits, behind one that waits for ever, ends after 3 s."""
    limits = {"patient": (lab.limit,), "hasty": hasty}
    engine = lab.engine = Engine(lab.gate, lambda kind: limits[kind], clock=lab.clock)
    engine.room.window = lambda _limit: 4
    for job, kind in ("go", "patient"), ("b", "patient"), ("c", "hasty"):
        engine.offer(job, engine.plan(kind))
    lab.bucket.pause(100)
    lab.run(2.9)
    assert len(engine) == 2
    lab.run(3)
    assert ended(lab) == ["c"]


def test_a_wait_ends_in_time_behind_a_job_that_waits_for_ever():
    """A job whose turn has not come ends when its time is over, too."""
    lab = Lab(1, 1)
    assert_ends_in_time(lab, Limit(lab.bucket, max_wait=3, name="hasty"))
    assert lab.run(101) == ["b"]


def test_a_job_that_cannot_end_is_held():
    """It is tried again a second later."""
    lab = Lab(1, 0.1, max_wait=2, when_limited="retry")
    lab.gate.takes_back = False
    assert lab.offer("a", "b") == ["go", "held"]
    lab.run(4)
    lab.gate.takes_back = True
    lab.run(5.5)
    assert ended(lab) == ["b"]
    assert len(lab.engine) == 0


@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 3)), min_size=1, max_size=40),
    st.floats(0.1, 5),
    st.lists(st.floats(0, 5), max_size=3),
)
def test_no_job_waits_for_longer(jobs, max_wait, pauses):
    """Whatever comes and whatever pauses: each job goes, or ends, within its time; none is left."""
    clock, came, went = ManualClock(), {}, {}
    bucket = TokenBucket(3, 2, clock=clock)
    limit = Limit(bucket, tokens=lambda job: job[1], max_wait=max_wait, name="limit")

    class Host(Gate):
        def refuse(self, job, demand, delay):
            went[job] = clock()
            return True

    engine = Engine(Host(), lambda _: (limit,), clock=clock)
    engine.room.window = lambda _limit: 4
    plan = engine.plan("job")

    def pass_time(until):
        while (due := engine.next_due) <= until:
            clock.now = max(clock.now, due)
            went.update({held.job: clock() for held in engine.release()})
            engine.settle()
        clock.now = max(clock.now, until)

    for number, (gap, cost) in enumerate(jobs):
        pass_time(clock() + gap)
        job = (number, cost)
        came[job] = clock()
        if engine.offer(job, plan)[0] == "go":
            went[job] = clock()
        if number < len(pauses):
            bucket.pause(pauses[number])
    pass_time(clock() + 100)
    assert went.keys() == came.keys()
    assert max(went[job] - came[job] for job in came) <= max_wait + 1e-6
    assert len(engine) == 0


def test_in_the_decorator():
    """It waits as long, and then ends by its policy."""
    clock = ManualClock()
    bucket = TokenBucket(1, 1, clock=clock)

    @throttle(bucket, max_wait=2, when_limited=lambda job: f"no {job}", name="fallback")
    def job(number):
        return number

    assert [job(1), job(2)] == [1, 2]
    bucket.charge(5)
    assert job(3) == "no 3"
    strict = throttle(bucket, max_wait=2, name="strict")(lambda: None)
    with pytest.raises(RateLimitExceeded) as error:
        strict()
    assert error.value.retry_after == pytest.approx(6)
    assert bucket.tokens == pytest.approx(-5)


def test_jobs_that_have_gone_are_forgotten():
    """However long they might have waited: memory is for those that wait."""
    lab = Lab(1, 1e6, max_wait=3600)
    for number in range(20_000):
        lab.offer(number, -number - 1)
        lab.run(lab.clock() + 1e-5)
    assert len(lab.engine) == 0
    assert len(lab.engine._leaving._ends) <= 1000


@pytest.mark.parametrize("other", ["wait", "drop", "raise", "retry"])
def test_beside_a_limit_of_another_kind(other):
    """A job waits no longer than max_wait for its bucket, whatever its other limits do."""
    lab = Lab(1, 1)
    plenty = Limit(TokenBucket(9, 9, clock=lab.clock), name="other", when_limited=other)
    assert_ends_in_time(lab, Limit(lab.bucket, max_wait=3, name="short"), plenty)
