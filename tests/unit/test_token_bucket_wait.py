"""Waiting, on a clock that stands still until the test moves it on."""

import math
from fractions import Fraction

import pytest
from waiters import Job, assert_idle, eventually, line_up, moments

from rate_limiter import RateLimitExceeded
from rate_limiter.testing import ManualClock

NEVER = math.inf  # the moment of a waiter that is not the head: it waits for its turn


@pytest.fixture
def clock():
    """Return a clock that stands still until the test moves it on."""
    return ManualClock(auto_advance=False)


@pytest.fixture
def bucket(new_queue, clock):
    """Return an empty bucket of 10 that gains 1 per second."""
    bucket = new_queue(10, 1, clock=clock)
    assert bucket.allow(10)
    return bucket


@pytest.fixture
def served():
    """Collect who was served, in order."""
    return []


@pytest.fixture
def line_up_named(bucket, served):
    """Line up waiters that note their number when they have been served."""

    class Noting:
        _clock = bucket._clock

        def wait(self, named, **options):
            bucket.wait(named[1], **options)
            served.append(named[0])

    return lambda *costs: line_up(Noting(), *enumerate(costs))


# the costs in line; then (step of the clock, how many are served by then, moments of those left)
LINES = {
    "one": ([3], [(2.5, 0, [3]), (0.5, 1, [])]),
    "first come, first served": (
        [3, 1, 2],
        [(0, 0, [3, NEVER, NEVER]), (3, 1, [4, NEVER]), (1, 2, [6]), (2, 3, [])],
    ),
    "a heavy one is not overtaken by light ones": (
        [10, 1, 1, 1],
        [
            (9, 0, [10, NEVER, NEVER, NEVER]),
            (1, 1, [11, NEVER, NEVER]),
            (1, 2, [12, NEVER]),
            (1, 3, [13]),
            (1, 4, []),
        ],
    ),
    "one step of the clock serves all that it pays for": ([2, 3, 4, 5], [(9, 3, [14]), (5, 4, [])]),
    "fractions": ([0.5, 0.25], [(0.5, 1, [0.75]), (0.25, 2, [])]),
}


@pytest.mark.parametrize(("costs", "steps"), LINES.values(), ids=LINES)
def test_lines(bucket, clock, served, line_up_named, costs, steps):
    """They are served in order, each at its moment, and only the head has a moment to wake at."""
    jobs = line_up_named(*costs)
    for step, count, left in steps:
        clock.advance(step)
        eventually(lambda count=count, left=left: (len(served), moments(clock)) == (count, left))
        assert served == list(range(count))
    for job in jobs:
        job.result()
    assert_idle(bucket)


def test_at_once(new_queue):
    """Where the tokens are there, nobody sleeps, and it returns None."""
    clock = ManualClock()
    bucket = new_queue(10, 1, clock=clock)
    assert bucket.wait() is None
    assert bucket.wait(9) is None
    assert (clock.now, bucket.tokens) == (0.0, 0.0)


@pytest.mark.parametrize(("cost", "until"), [(1, 1.0), (2.5, 2.5), (10, 10.0)])
def test_alone(new_queue, cost, until):
    """It returns at the moment the tokens are there, having taken them."""
    clock = ManualClock()
    bucket = new_queue(10, 1, clock=clock)
    bucket.allow(10)
    bucket.wait(cost)
    assert (clock.now, bucket.tokens) == (until, 0.0)


def test_waiters_come_first(bucket, clock):
    """While anybody waits, nobody else is given a token, though there are some."""
    heavy, light = line_up(bucket, 6, 2)
    clock.advance(5)
    assert bucket.tokens == 5
    assert not bucket.allow()
    assert not bucket.try_consume(0.5)
    assert bucket.take_or_delay(1) == 4.0  # 6 + 2 + 1 tokens, of which 5 are there
    clock.advance(1)
    heavy.result()
    eventually(lambda: moments(clock) == [8.0])
    assert bucket.take_or_delay(1) == 3.0
    clock.advance(2)
    light.result()
    assert not bucket.allow()
    clock.advance(1)
    assert bucket.allow()
    assert_idle(bucket)


def test_behind_a_waiter_that_is_about_to_wake(bucket, clock):
    """Even when all tokens are there, those of a waiter who still sleeps are not given away."""
    (job,) = line_up(bucket, 4)
    clock.now = 10.0  # without waking it
    assert not bucket.allow()
    assert 0.0 < bucket.take_or_delay(6) < 0.1
    assert bucket.tokens == 10
    clock.advance(0)
    job.result()
    assert bucket.take_or_delay(6) == 0.0


def test_refund_wakes_the_head(bucket, clock):
    """Tokens that are given back go to the head at once, and bring its moment nearer."""
    first, second = line_up(bucket, 5, 2)
    bucket.refund(3)
    eventually(lambda: moments(clock) == [2.0, NEVER])
    bucket.refund(4)
    first.result()
    second.result()
    assert bucket.tokens == 0
    assert_idle(bucket)


@pytest.mark.parametrize(
    ("tokens", "timeout", "forecast"),
    [
        (1, 0, 1.0),
        (5, 4, 5.0),
        (10, 9.99, 10.0),
        (True, False, 1.0),
        (Fraction(1, 2), Fraction(1, 4), 0.5),
    ],
)
def test_timeout_that_can_be_foreseen(new_queue, tokens, timeout, forecast):
    """Where the forecast is beyond the timeout it raises at once, and takes nothing."""
    clock = ManualClock()
    bucket = new_queue(10, 1, clock=clock)
    bucket.allow(10)
    with pytest.raises(
        RateLimitExceeded, match="^rate limit exceeded: .+ tokens only in .+ s$"
    ) as raised:
        bucket.wait(tokens, timeout=timeout)
    assert raised.value.retry_after == forecast
    assert (clock.now, bucket.tokens) == (0.0, 0.0)
    bucket.wait(tokens, timeout=forecast)
    assert clock.now == forecast


@pytest.mark.parametrize(("cost", "timeout"), [(3, 0.3), (1, 0.1), (7, 0.7), (9, 0.9)])
def test_timeout_that_rounding_would_miss(new_queue, cost, timeout):
    """A timeout of three tenths is enough for three tokens at 10/s, whatever their floats are."""
    clock = ManualClock()
    bucket = new_queue(10, 10, clock=clock)
    clock.advance(0.1)
    clock.advance(0.2)
    bucket.charge(10)
    bucket.wait(cost, timeout=timeout)
    assert clock.now == pytest.approx(0.3 + timeout)


def test_timeout_counts_those_in_front(bucket, clock):
    """The forecast is for one's own turn."""
    (job,) = line_up(bucket, 3)
    with pytest.raises(RateLimitExceeded) as raised:
        bucket.wait(2, timeout=4.5)
    assert raised.value.retry_after == 5.0
    (patient,) = line_up(bucket, 2, timeout=5)
    clock.advance(3)
    job.result()
    clock.advance(2)
    patient.result()
    assert_idle(bucket)


def test_timeout_when_the_forecast_moves(new_queue):
    """Where somebody else takes what was forecast, it raises by the deadline, with the new forecast."""

    class Thief(ManualClock):
        readings = 0

        def __call__(self):
            self.readings += 1
            if self.readings == 4:  # the forecast has been made: 1 s; nobody stands in line yet
                assert bucket.allow(4)
            return self.now

    clock = Thief()
    bucket = new_queue(10, 1, clock=clock)
    assert bucket.allow(6)
    clock.readings = 1
    with pytest.raises(RateLimitExceeded) as raised:
        bucket.wait(5, timeout=2)
    assert raised.value.retry_after == 3.0
    assert (clock.now, bucket.tokens) == (2.0, 2.0)
    assert_idle(bucket)


def test_timeout_lets_the_next_move_up(bucket, clock):
    """Who gives up leaves the line, as its head or further back, and takes nothing."""
    head, middle = line_up(bucket, 4, 3, timeout=7)
    (last,) = line_up(bucket, 2)
    bucket.charge(5)  # the forecast moves for all of them
    clock.advance(7)
    for job in head, middle:
        with pytest.raises(RateLimitExceeded) as raised:
            job.result()
        assert 1.0 <= raised.value.retry_after <= 7.0
    last.result()
    assert bucket.tokens == 0
    assert_idle(bucket)


@pytest.mark.parametrize("timeout", [None, math.inf, 1e300])
def test_no_timeout(bucket, clock, timeout):
    """``None`` and infinity are as long as it takes."""
    (job,) = line_up(bucket, 1, timeout=timeout)
    clock.advance(1)
    job.result()


def test_on_a_real_clock(new_queue):
    """On the clock of the system they sleep too, and are all served."""
    bucket = new_queue(5, 2000)
    bucket.allow(5)
    start = bucket._clock()
    for job in [Job(bucket.wait, cost, timeout=60) for cost in (5, 1, 4, 2) * 5]:
        job.result()
    assert bucket._clock() - start >= 60 / 2000
    assert_idle(bucket)


def test_neighbours_leave_the_middle_of_the_line(bucket, clock):
    """Two waiters side by side who give up one after the other leave the line whole behind them."""
    bucket.allow(bucket.capacity)
    (first,) = line_up(bucket, 1)
    leavers = [line_up(bucket, 1, timeout=patience)[0] for patience in (5, 6)]
    (last,) = line_up(bucket, 1)
    bucket.charge(10)  # the forecast moves for all of them
    clock.advance(5)
    with pytest.raises(RateLimitExceeded):
        leavers[0].result()
    eventually(lambda: clock.sleepers == 3)
    clock.advance(1)
    with pytest.raises(RateLimitExceeded):
        leavers[1].result()
    eventually(lambda: clock.sleepers == 2)
    clock.advance(5)
    first.result()
    eventually(lambda: clock.sleepers == 1)
    clock.advance(1)
    last.result()
    assert_idle(bucket)
