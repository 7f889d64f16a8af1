"""Any bucket, any asking: compared with the same bucket in exact arithmetic, fed the same floats."""

import gc
import math
import weakref
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rate_limiter.testing import ManualClock

settings.register_profile("unit", deadline=None)  # how long an example takes says nothing
settings.load_profile("unit")

SIZES = st.floats(1e-3, 1e6)
STARTS = st.one_of(st.just(0.0), st.floats(0, 1e8))
SHARES = st.one_of(st.just(1.0), st.floats(1e-6, 1.0))
#: Steps of the clock, as shares of the time in which the bucket fills.
STEPS = st.one_of(st.just(0.0), st.floats(0, 0.1), st.floats(0, 2), st.just(1e6))
#: What a bucket starts with, as a share of its capacity. ``None``: it is not told.
INITIALS = st.one_of(st.none(), st.sampled_from([0.0, 1.0]), st.floats(0, 1))
ASKS = st.lists(st.tuples(STEPS, SHARES), min_size=1, max_size=40)


class Oracle:
    """What should be there, exactly. It follows the bucket's grants, so it shows each excess as a debt.

    That the level never falls below ``-tolerance`` means that no window saw more than ``capacity`` plus
    the rate: what a window grants is the fall of the level over it, plus what flowed in.

    Because of rounding a grant is due before the exact moment: when at most 2**-30 of the capacity is
    missing, and at most what half a microsecond brings. What was granted early stays owed: the level
    below 0 shows it, and no later grant adds to it.
    """

    def __init__(self, bucket, start, initial=None):
        self.capacity = self.level = Fraction(bucket.capacity)
        if initial is not None:
            self.level = Fraction(initial)
        self.rate = Fraction(bucket.tokens_per_second)
        self.at = Fraction(start)
        self.tolerance = self.capacity / 10**9
        self.rounding = self.capacity / 10**12

    def move_to(self, now):
        """Let time pass; a time that has been already adds nothing."""
        now = max(Fraction(now), self.at)
        self.level = min(self.capacity, self.level + (now - self.at) * self.rate)
        self.at = now

    def check(self, tokens, granted):
        """Assert that granting, or refusing, these tokens now is right."""
        early = min(self.capacity / 2**30, self.rate / 2**21)
        if granted:
            self.level -= Fraction(tokens)
            assert self.level >= -early - self.rounding, "granted too much"
            assert self.level >= -self.tolerance, "granted too much"
        elif not self.paused():
            assert self.level < Fraction(tokens) - early + self.rounding, "refused what is due"

    def paused(self):
        """Nothing is due in a pause."""
        return False


@given(SIZES, SIZES, STARTS, INITIALS, ASKS, st.data())
@example(3.0, 3.0, 0.0, None, [(0.0, 1 / 3)] * 4, None)
@example(3.0, 3.0, 0.0, 0.1, [(0.0, 0.1), (0.3, 1 / 3)], None)
def test_it_grants_what_the_exact_bucket_grants(new_bucket, capacity, rate, start, initial, asks, data):
    """No window sees more than ``capacity + rate * t``, and nothing that is there is refused."""
    clock = ManualClock(start)
    initial = None if initial is None else initial * capacity
    bucket = new_bucket(capacity, rate, initial=initial, clock=clock)
    oracle = Oracle(bucket, start, initial)
    for step, share in asks:
        clock.advance(step * capacity / rate)
        oracle.move_to(clock.now)
        tokens = share * capacity
        if data is None or data.draw(st.booleans()):
            granted = bucket.allow(tokens)
        else:
            delay = bucket.take_or_delay(tokens)
            granted = delay == 0.0
            assert granted or 0.0 < delay < math.inf
        oracle.check(tokens, granted)
        assert abs(Fraction(bucket.tokens) - oracle.level) <= oracle.tolerance


@given(SIZES, SIZES, STARTS, st.floats(0, 1), ASKS)
def test_it_starts_as_a_full_one_that_was_used(new_single, capacity, rate, start, share, asks):
    """From its first moment on it grants, to the token, as a full one from which the rest was taken."""
    clock = ManualClock(start)
    initial = share * capacity
    bucket = new_single(capacity, rate, initial=initial, clock=clock)
    used = new_single(capacity, rate, clock=clock)
    if initial < capacity:
        used.charge(capacity - initial)
    for step, share in asks:
        assert bucket.tokens == used.tokens
        clock.advance(step * capacity / rate)
        assert bucket.take_or_delay(share * capacity) == used.take_or_delay(share * capacity)


@pytest.mark.parametrize("capacity", [1.0, 3.0, 0.3])
@pytest.mark.parametrize(("early", "due"), [(0.4, True), (0.99, True), (1.01, False), (5.0, False)])
def test_the_excess_stays_owed(new_bucket, ask, capacity, early, due):
    """A grant is due when 2**-30 of the capacity is missing. Early grants do not add up."""
    clock = ManualClock()
    bucket = new_bucket(capacity, capacity, clock=clock)
    assert bucket.allow(capacity)
    for step in range(1, 500):
        clock.now = step - early * 2.0**-30
        assert ask(bucket, capacity) is due, step
        if not due:
            clock.now = float(step)
            assert ask(bucket, capacity)
    # Each is early by twice as much as the one before would allow.
    clock.now = 499.0 - early * 2.0**-30
    granted = 0
    for step in range(1, 500):
        clock.now = 499.0 + step - (step + 1) * 2.0**-30
        granted += ask(bucket, capacity)
        assert granted <= step - (step + 1) * 2.0**-30 + 2.0**-30 + 1e-12


def test_a_refusal_is_forgotten_when_a_grant_is_due(new_bucket):
    """A refusal just before the moment of a grant is not remembered beyond it."""
    clock = ManualClock()
    bucket = new_bucket(1, 1, clock=clock)
    assert bucket.allow(1)
    clock.now = 1 - 1.5 * 2.0**-30
    assert not bucket.allow(1)
    clock.now = 1 - 0.9 * 2.0**-30
    assert bucket.allow(1)


@pytest.mark.parametrize("rate", [10, 3, 7, 0.1, 1.7, 100])
@pytest.mark.parametrize("burst", [1, 2, 5])
def test_steps_that_almost_add_up(new_bucket, ask, rate, burst):
    """A token is due after so many steps as make its time, whatever their floats add up to."""
    clock = ManualClock()
    bucket = new_bucket(burst, rate, clock=clock)
    assert bucket.allow(burst)
    for _ in range(200):
        for _ in range(9):
            clock.advance(1 / rate / 10)
        assert not ask(bucket, 1)
        clock.advance(1 / rate / 10)
        assert ask(bucket, 1)


def test_parts_of_the_capacity_that_almost_add_up(new_bucket, ask):
    """A burst of three tenths is granted by tenths, although their floats are more."""
    for parts in range(1, 60):
        bucket = new_bucket(parts * 0.1 if parts % 2 else parts / 10, 1e-3, clock=ManualClock())
        assert [ask(bucket, 0.1) for _ in range(parts)] == [True] * parts, parts
        assert not ask(bucket, 0.1)


@given(SIZES, SIZES, STARTS, ASKS)
def test_allow_and_take_or_delay_agree(new_bucket, capacity, rate, start, asks):
    """Two buckets that are asked the same, each in its way, answer the same."""
    clock = ManualClock(start)
    one, two = (new_bucket(capacity, rate, clock=clock) for _ in range(2))
    for step, share in asks:
        clock.advance(step * capacity / rate)
        assert one.allow(share * capacity) is (two.take_or_delay(share * capacity) == 0.0)


@given(SIZES, SIZES, STARTS, SHARES, SHARES, STEPS, st.booleans())
def test_the_delay_is_the_moment(new_bucket, capacity, rate, start, taken, share, step, by_allow):
    """Asked at now + delay it grants, 1 µs before it refuses, whichever method asks."""
    clock = ManualClock(start)
    bucket = new_bucket(capacity, rate, clock=clock)
    assert bucket.allow(capacity * taken)
    clock.advance(step * capacity / rate)
    tokens = share * capacity
    delay = bucket.take_or_delay(tokens)
    if not delay:
        return
    now = clock.now
    moment = now + delay
    assert now < moment < math.inf
    if delay > 1e-6 and math.ulp(moment) < 1e-7:
        clock.now = moment - 1e-6
        assert bucket.take_or_delay(tokens) > 0.0
        assert not bucket.allow(tokens)
    clock.now = moment
    assert bucket.allow(tokens) if by_allow else bucket.take_or_delay(tokens) == 0.0


@given(SIZES, SIZES, STARTS, st.integers(1, 1000), STEPS)
def test_full_burst_at_any_uptime(new_bucket, capacity, rate, start, count, step):
    """After any idle time that fills it, the whole burst is there, to the token, and no more."""
    clock = ManualClock(start)
    whole, counted = (new_bucket(size, rate, clock=clock) for size in (capacity, count))
    for _ in range(2):
        assert whole.allow(capacity)
        assert not whole.allow(capacity * 1e-6)
        assert [counted.allow() for _ in range(count + 1)] == [True] * count + [False]
        clock.advance((1 + step) * max(capacity, count) / rate * 1.000001 + 2 * math.ulp(clock.now))


@given(SIZES, SIZES, STARTS, st.lists(st.tuples(st.floats(-2, 2), SHARES), min_size=1, max_size=40))
def test_a_clock_that_jumps_mints_nothing(new_bucket, capacity, rate, start, asks):
    """A clock going back and forth is as one that stands still until it has caught up."""
    clock = ManualClock(start)
    bucket = new_bucket(capacity, rate, clock=clock)
    oracle = Oracle(bucket, start)
    for jump, share in asks:
        clock.advance(jump * capacity / rate)
        oracle.move_to(clock.now)
        tokens = share * capacity
        if bucket.allow(tokens):
            oracle.check(tokens, granted=True)


def test_delay_counts_a_clock_that_was_set_back(new_bucket):
    """The bucket stands still until the clock has caught up, and the delay says so."""
    clock = ManualClock(100.0)
    bucket = new_bucket(4, 1, clock=clock)
    assert bucket.allow(4)
    clock.now = 50.0
    assert bucket.take_or_delay(1) == 51.0


def test_refusal_is_forgotten_once_the_bucket_was_full(new_bucket):
    """A clock that is set back to before a refusal ended finds the tokens that are there since."""
    clock = ManualClock()
    bucket = new_bucket(10, 1, clock=clock)
    assert bucket.allow(10)
    assert not bucket.allow(1)
    clock.now = 1000.0
    assert bucket.allow(1)
    clock.now = 0.25
    assert bucket.tokens == 9
    assert bucket.allow(1)


def test_refund_after_the_bucket_was_full_is_lost(new_bucket):
    """What comes back once time has filled the bucket does not count against what is taken then."""
    clock = ManualClock()
    bucket = new_bucket(10, 1, clock=clock)
    assert bucket.allow(10)
    clock.advance(20)
    bucket.refund(4)
    assert bucket.tokens == 10
    assert bucket.allow(10)
    assert not bucket.allow(1)


def test_it_is_not_kept_alive(new_bucket):
    """A bucket that nobody holds is gone, although forks have to know of all buckets."""
    gone = weakref.ref(new_bucket(1, 1))
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("cost", [0.75, 0.1, 1 / 3, 0.7, 0.9])
@pytest.mark.parametrize("start", [0.0, 1e8])
def test_saturated_for_long(new_bucket, start, cost):
    """Under a load that never lets it fill, the excess stays below a 1e-9th of the capacity."""
    now = start
    bucket = new_bucket(1.0, 1.0, clock=lambda: now)
    first = (1.0 + cost) / 2.0
    assert bucket.allow(first)
    for step in range(1, 100_001):
        now = start + step * cost
        assert bucket.allow(cost)
        if step % 1_000 == 0:
            exact = 1 + Fraction(now) - Fraction(start) - Fraction(first) - step * Fraction(cost)
            assert -1e-6 <= Fraction(bucket.tokens) - exact <= 1e-9
            assert bucket.take_or_delay(1.0) > 0.0


def test_whole_costs_stay_exact(new_bucket):
    """A load of whole tokens is granted at the exact moments for as long as it lasts."""
    clock = ManualClock()
    bucket = new_bucket(5, 1, clock=clock)
    assert bucket.allow(5)
    for _ in range(5_000):
        assert not bucket.allow(1)
        clock.advance(1)
        assert bucket.allow(1)
