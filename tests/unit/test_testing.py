"""`ManualClock`, with which users test their own code."""

import math
import threading
from decimal import Decimal
from fractions import Fraction

import pytest
from waiters import Job, eventually, line_up

from rate_limiter import RateLimitExceeded, TokenBucket
from rate_limiter.testing import ManualClock


@pytest.fixture
def clock():
    """Return a clock that stands still until the test moves it on."""
    return ManualClock(auto_advance=False)


def test_it_stands_still():
    """It shows what it was given until it is moved, forwards or back."""
    clock = ManualClock(5.0)
    assert (clock(), clock()) == (5.0, 5.0)
    for seconds, shown in (2.5, 7.5), (0, 7.5), (-4.0, 3.5):
        clock.advance(seconds)
        assert clock() == clock.now == shown
    assert repr(clock) == "ManualClock(3.5)"
    assert ManualClock()() == 0.0


def test_the_example():
    """The example at the head of the module is right."""
    clock = ManualClock()
    bucket = TokenBucket(1, 2, clock=clock)
    assert bucket.allow()
    assert not bucket.allow()
    clock.advance(0.5)
    assert bucket.allow()


def test_wait_moves_it_on():
    """A test with one thread gets through its waits at once, and sees how long they would have been."""
    clock = ManualClock(100.0)
    bucket = TokenBucket(2, 4, clock=clock)
    for _ in range(10):
        bucket.wait()
    assert clock() == 102.0


def test_a_wait_that_is_over_costs_no_time():
    """One that another thread has woken already does not move the clock."""
    clock = ManualClock()
    clock.wait_for(threading.Lock(), 3.0)
    assert clock() == 0.0


def test_advance_wakes_whose_moment_has_come(clock):
    """Without ``auto_advance`` a wait blocks until the clock has been moved far enough."""
    buckets = [TokenBucket(5, 1, clock=clock) for _ in range(2)]
    assert clock.sleepers == 0
    for bucket in buckets:
        bucket.allow(5)
    (short,), (long,) = line_up(buckets[0], 2), line_up(buckets[1], 3)
    assert clock.sleepers == 2
    clock.advance(1.5)
    assert clock.sleepers == 2
    clock.advance(0.5)
    short.result()
    eventually(lambda: clock.sleepers == 1)
    clock.advance(-1)
    assert long.is_alive()
    clock.advance(2)
    long.result()
    assert clock.sleepers == 0
    assert clock() == 3.0


def test_a_clock_that_moves_before_a_sleep_is_not_missed(clock):
    """A sleep counts from when its thread has read the clock, whatever another thread does meanwhile."""
    alarm = threading.Lock()
    alarm.acquire()
    assert clock() == 0
    Job(clock.advance, 2).result()
    clock.wait_for(alarm, 2)  # it is over already
    assert clock.sleepers == 0
    assert clock() == 2
    sleeper = Job(lambda: (clock(), clock.wait_for(alarm, 1)))
    eventually(lambda: clock.sleepers)
    clock.advance(1)
    sleeper.result()


@pytest.mark.parametrize("auto_advance", [True, False])
def test_a_wait_is_over_after_ten_tenths(auto_advance):
    """A wait of a second ends, and a timeout of a second is up, when ten steps of 0.1 s were made."""
    clock = ManualClock(auto_advance=auto_advance)
    served, late = TokenBucket(1, 1, clock=clock), TokenBucket(1, 1, clock=clock)
    if auto_advance:
        served.allow()
        for _ in range(10):
            clock.advance(0.1)
        assert clock() < 1.0
        served.wait(timeout=0)
        return
    for bucket in served, late:
        bucket.allow()
    (first,) = line_up(served, 1)
    (second,) = line_up(late, 1, timeout=1)
    late.charge(5)
    for _ in range(10):
        clock.advance(0.1)
    first.result()
    with pytest.raises(RateLimitExceeded):
        second.result()


@pytest.mark.parametrize("seconds", [1, Fraction(1, 2), Decimal("0.25"), True])
def test_steps_of_every_kind(seconds):
    """Whatever kind of number it is given, the clock shows a float."""
    clock = ManualClock(seconds)
    clock.advance(seconds)
    assert clock() == 2 * seconds
    assert type(clock()) is float


def test_a_wait_without_a_moment_does_not_move_it():
    """With ``auto_advance``, a wait that has no moment yet does not move the clock to infinity."""
    clock = ManualClock()
    alarm = threading.Lock()
    alarm.acquire()
    job = Job(clock.wait_for, alarm, math.inf)
    eventually(lambda: clock.sleepers or not job.is_alive())
    if alarm.locked():
        alarm.release()
    job.result()
    assert clock() == 0.0
