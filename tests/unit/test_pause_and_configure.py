"""What a remote's `Retry-After`, and a new setting, do to a bucket, and to those who wait in it."""

import copy
import math
import pickle
import sys
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_token_bucket import NOT_A_NUMBER, NOT_FINITE, complaint
from test_token_bucket_properties import SHARES, SIZES, STARTS, STEPS, Oracle
from waiters import assert_idle, eventually, line_up, moments

from rate_limiter import RateLimitExceeded, TokenBucket
from rate_limiter.testing import ManualClock

# (capacity, tokens_per_second), then rows of (time, tokens before, method, argument, what it returns)
STEPS_OF = {
    "nothing during a pause, then from empty": (
        (4, 2),
        [
            (0, 4, "pause", 10, None),
            (0, 0, "allow", 0.001, False),
            (9.9, 0, "take_or_delay", 1, 10 + 0.5 - 9.9),
            (10, 0, "allow", 0.001, False),
            (10.5, 1, "take_or_delay", 1, 0.0),
            (100, 4, "allow", 4, True),
        ],
    ),
    "a shorter pause within a longer one changes nothing": (
        (4, 2),
        [
            (0, 4, "pause", 10, None),
            (5, 0, "pause", 4, None),
            (9.5, 0, "take_or_delay", 1, 1.0),
            (10.5, 1, "allow", 1, True),
        ],
    ),
    "nothing is so little that a pause would grant it": (
        (4, 2),
        [
            (0, 4, "pause", 10, None),
            (0, 0, "take_or_delay", 1e-12, 10.0),
            (9.9, 0, "allow", 1e-12, False),
        ],
    ),
    "a longer one extends it": (
        (4, 2),
        [(0, 4, "pause", 10, None), (5, 0, "pause", 10, None), (14, 0, "take_or_delay", 2, 2.0)],
    ),
    "a debt that lasts longer stays": (
        (4, 2),
        [
            (0, 4, "charge", 34, None),
            (0, -30, "pause", 10, None),
            (10, -10, "take_or_delay", 2, 6.0),
            (16, 2, "allow", 2, True),
        ],
    ),
    "a debt that is paid off during it does not shorten it": (
        (4, 2),
        [(0, 4, "charge", 6, None), (0, -2, "pause", 10, None), (9, 0, "take_or_delay", 1, 1.5)],
    ),
    "a refund during it brings nothing before its end": (
        (4, 2),
        [
            (0, 4, "allow", 4, True),
            (0, 0, "pause", 10, None),
            (5, 0, "refund", 4, None),
            (5, 0, "allow", 1, False),
            (9, 0, "take_or_delay", 1, 1.5),
        ],
    ),
    "a refund during it pays off debt": (
        (4, 2),
        [
            (0, 4, "pause", 10, None),
            (1, 0, "charge", 3, None),
            (2, -3, "refund", 2, None),
            (2, -1, "take_or_delay", 1, 9.0),
        ],
    ),
    "a refund after it counts": (
        (4, 2),
        [
            (0, 4, "pause", 10, None),
            (10.5, 1, "refund", 2, None),
            (10.5, 3, "allow", 3, True),
            (10.5, 0, "refund", 1, None),
            (10.5, 1, "allow", 1, True),
        ],
    ),
    "a charge during it is a debt after it": (
        (4, 2),
        [(0, 4, "pause", 10, None), (5, 0, "charge", 4, None), (9, -4, "take_or_delay", 2, 4.0)],
    ),
    "a pause of 0 empties": (
        (4, 2),
        [(0, 4, "pause", 0, None), (0, 0, "allow", 1, False), (0.5, 1, "allow", 1, True)],
    ),
    "a pause when it has been full for long": (
        (4, 2),
        [(1000, 4, "pause", 1, None), (1001, 0, "take_or_delay", 4, 2.0)],
    ),
    "a pause after a clock was set back holds until both are over": (
        (4, 2),
        [(100, 4, "allow", 1, True), (50, 3, "pause", 10, None), (60, 0, "take_or_delay", 1, 40.5)],
    ),
    "more capacity keeps the tokens that are there": (
        (4, 2),
        [
            (0, 4, "allow", 1, True),
            (0, 3, "configure", {"capacity": 10}, None),
            (0, 3, "allow", 4, False),
            (0.5, 4, "allow", 4, True),
            (100, 10, "allow", 10, True),
        ],
    ),
    "less capacity keeps what it holds": (
        (10, 2),
        [
            (0, 10, "allow", 1, True),
            (0, 9, "configure", {"capacity": 4}, None),
            (0, 4, "allow", 4.5, False),
            (0, 4, "allow", 4, True),
            (100, 4, "allow", 4, True),
        ],
    ),
    "a full one does not fill a larger capacity": (
        (4, 2),
        [(1000, 4, "configure", {"capacity": 10}, None), (1000, 4, "allow", 5, False)],
    ),
    "debt stays debt": (
        (4, 2),
        [
            (0, 4, "charge", 10, None),
            (0, -6, "configure", {"capacity": 100, "tokens_per_second": 1}, None),
            (2, -4, "take_or_delay", 1, 5.0),
        ],
    ),
    "what time brought until then came at the old rate": (
        (10, 2),
        [
            (0, 10, "allow", 10, True),
            (2, 4, "configure", {"tokens_per_second": 1}, None),
            (3, 5, "allow", 5, True),
            (3, 0, "configure", {"tokens_per_second": 4}, None),
            (4, 4, "allow", 4, True),
        ],
    ),
    "a refusal that is remembered ends with a higher rate": (
        (10, 1),
        [
            (0, 10, "allow", 10, True),
            (0, 0, "allow", 8, False),
            (0, 0, "configure", {"tokens_per_second": 8}, None),
            (1, 8, "allow", 8, True),
        ],
    ),
    "configure during a pause keeps its end": (
        (4, 2),
        [
            (0, 4, "pause", 10, None),
            (5, 0, "configure", {"capacity": 20, "tokens_per_second": 4}, None),
            (5, 0, "refund", 20, None),
            (5, 0, "take_or_delay", 20, 10.0),
            (5, 0, "configure", {"capacity": 2}, None),
            (9, 0, "take_or_delay", 2, 1.5),
        ],
    ),
    "resume ends a pause": (
        (4, 2),
        [
            (0, 4, "pause", 10, None),
            (3, 0, "resume", {}, None),
            (3, 0, "allow", 1, False),
            (3.5, 1, "take_or_delay", 1, 0.0),
            (100, 4, "allow", 4, True),
        ],
    ),
    "resume without a pause changes nothing": (
        (4, 2),
        [
            (0, 4, "allow", 3, True),
            (0, 1, "resume", {}, None),
            (0, 1, "pause", 1, None),
            (2, 2, "resume", {}, None),
            (2, 2, "allow", 2, True),
        ],
    ),
    "resume keeps a debt that lasts beyond the pause": (
        (4, 2),
        [
            (0, 4, "charge", 34, None),
            (0, -30, "pause", 10, None),
            (4, -10, "resume", {}, None),
            (4, -10, "charge", 2, None),
            (10, 0, "take_or_delay", 1, 0.5),
        ],
    ),
    "configure without arguments changes nothing": (
        (4, 2),
        [(0, 4, "allow", 3, True), (0.5, 2, "configure", {}, None), (0.5, 2, "allow", 2, True)],
    ),
}


@pytest.mark.parametrize(("bucket_of", "steps"), STEPS_OF.values(), ids=STEPS_OF)
def test_steps(new_single, bucket_of, steps):
    """A bucket has, and answers, what the table says."""
    clock = ManualClock()
    bucket = new_single(*bucket_of, clock=clock)
    for step in steps:
        clock.now, before, method, argument, answer = step
        assert bucket.tokens == before, step
        call = getattr(bucket, method)
        given = call(**argument) if isinstance(argument, dict) else call(argument)
        assert given == (pytest.approx(answer) if isinstance(answer, float) else answer), step


def test_pause_left(new_single):
    """The seconds until the end of a pause; 0.0 before and after, and in debt."""
    clock = ManualClock()
    bucket = new_single(4, 2, clock=clock)
    bucket.charge(40)
    assert bucket.pause_left == 0.0
    bucket.pause(5)
    clock.advance(1)
    assert bucket.pause_left == 4.0
    bucket.resume()
    assert bucket.pause_left == 0.0
    bucket.pause(5)
    clock.advance(6)
    assert bucket.pause_left == 0.0


def test_configured(new_single):
    """The properties show what was configured last."""
    bucket = new_single(4, 2, clock=ManualClock())
    bucket.configure(capacity=8)
    assert (bucket.capacity, bucket.tokens_per_second) == (8, 2)
    bucket.configure(tokens_per_second=Fraction(1, 2))
    assert (bucket.capacity, bucket.tokens_per_second) == (8, 0.5)
    bucket.configure(capacity=3, tokens_per_second=6)
    assert (bucket.capacity, bucket.tokens_per_second) == (3, 6)
    with pytest.raises(ValueError, match="capacity 3"):
        bucket.take_or_delay(4)


@pytest.mark.parametrize("name", ["capacity", "tokens_per_second"])
def test_wrong_configuration(new_single, name):
    """What is not a positive, finite number is refused by name, and nothing is changed."""
    bucket = new_single(4, 2, clock=ManualClock())
    good = {"capacity": 8, "tokens_per_second": 8}
    for wrong in -1, 0, math.nan, math.inf:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            bucket.configure(**good | {name: wrong})
    with pytest.raises(TypeError, match=f"^{name} must be a number"):
        bucket.configure(**good | {name: "5"})
    assert (bucket.capacity, bucket.tokens_per_second, bucket.tokens) == (4, 2, 4)
    with pytest.raises(TypeError):
        bucket.configure(8)


def test_a_pause_that_is_no_span(new_single):
    """A pause below 0, without an end, or of no number is refused by name, and changes nothing."""
    bucket = new_single(4, 2, clock=ManualClock())
    for wrong in [-1, -0.001, Decimal(-1), Fraction(-1, 3), -math.inf]:
        text = f"seconds must be 0 or more, not {wrong!r}"
        assert complaint(bucket.pause, wrong) == (ValueError, text)
    for wrong in NOT_FINITE:
        text = f"seconds must be a finite number, not {wrong!r}"
        assert complaint(bucket.pause, wrong) == (ValueError, text)
    for wrong in NOT_A_NUMBER:
        text = f"seconds must be a number (int or float), not {wrong!r}"
        assert complaint(bucket.pause, wrong) == (TypeError, text)
    assert bucket.allow(4)


@pytest.mark.parametrize("none", [0, 0.0, -0.0, False, Decimal(0), Fraction(0)], ids=repr)
def test_a_pause_of_nothing(new_single, none):
    """0 seconds of every kind empty the bucket."""
    bucket = new_single(4, 2, clock=ManualClock())
    bucket.pause(none)
    assert (bucket.tokens, bucket.take_or_delay(1)) == (0, 0.5)


@pytest.mark.parametrize("seconds", [1e9, 1e300, 1.7e308])
def test_a_pause_of_ages(new_single, seconds):
    """However long a pause is, forecasts stay finite."""
    bucket = new_single(4, 2, clock=ManualClock(1e6))
    bucket.pause(seconds)
    assert seconds / 2 < bucket.take_or_delay(1) < math.inf
    assert not bucket.allow(1)
    assert bucket.tokens == 0


# -- exactly ---------------------------------------------------------------------------------------


class SettledOracle(Oracle):
    """The exact bucket, paused and configured too."""

    paused_until = Fraction(-1)

    now = Fraction(0)

    def move_to(self, now):
        """Let time pass."""
        super().move_to(now)
        self.now = Fraction(now)

    def paused(self):
        """Nothing is due in a pause."""
        return self.now < self.paused_until

    def pause(self, until):
        """Be empty at that moment, or in debt."""
        until = max(Fraction(until), self.at)
        self.level = min(Fraction(0), self.level + (until - self.at) * self.rate)
        self.at = self.paused_until = until

    def refund(self, tokens, now):
        """Add up to the capacity, or to nothing during a pause."""
        most = self.capacity if Fraction(now) >= self.paused_until else 0
        self.level = min(most, self.level + Fraction(tokens))

    def configure(self, capacity, rate):
        """Keep the level."""
        self.capacity, self.rate = Fraction(capacity), Fraction(rate)
        self.level = min(self.level, self.capacity)
        self.tolerance = max(self.tolerance, self.capacity / 10**9)
        self.rounding = max(self.rounding, self.capacity / 10**12)


@given(SIZES, SIZES, STARTS, st.data())
def test_it_does_what_the_exact_bucket_does(new_single, capacity, rate, start, data):
    """Settled, paused and configured at any moment, it grants what the exact bucket grants."""
    clock = ManualClock(start)
    bucket = new_single(capacity, rate, clock=clock)
    oracle = SettledOracle(bucket, start)
    methods = ["allow", "take_or_delay", "refund", "charge", "pause", "configure"]
    asks = st.lists(st.tuples(STEPS, SHARES, st.sampled_from(methods)), min_size=1, max_size=30)
    for step, share, method in data.draw(asks):
        clock.advance(step * capacity / rate)
        oracle.move_to(clock.now)
        tokens = share * capacity
        if method == "pause":
            seconds = share * 2 * capacity / rate
            bucket.pause(seconds)
            oracle.pause(clock.now + seconds)
        elif method == "configure":
            capacity, rate = capacity * (0.5 + share), rate * (1.5 - share)
            bucket.configure(capacity=capacity, tokens_per_second=rate)
            oracle.configure(capacity, rate)
        elif method == "refund":
            bucket.refund(tokens)
            oracle.refund(tokens, clock.now)
        elif method == "charge":
            bucket.charge(2 * tokens)
            oracle.level -= Fraction(2 * tokens)
        elif method == "allow":
            granted = bucket.allow(tokens)
            oracle.check(tokens, granted)
            assert not (granted and clock.now < oracle.paused_until)
        else:
            delay = bucket.take_or_delay(tokens)
            oracle.check(tokens, delay == 0.0)
            assert delay or clock.now >= oracle.paused_until
        assert abs(Fraction(bucket.tokens) - oracle.level) <= oracle.tolerance


@given(SIZES, SIZES, STARTS, SHARES, SHARES, st.booleans())
def test_the_delay_is_the_moment(new_single, capacity, rate, start, share, seconds, configured):
    """In a pause too, asked at now + delay it grants, 1 µs before it refuses."""
    clock = ManualClock(start)
    bucket = new_single(capacity, rate, clock=clock)
    bucket.pause(seconds * capacity / rate)
    if configured:
        bucket.configure(capacity=2 * capacity, tokens_per_second=3 * rate)
    delay = bucket.take_or_delay(share * capacity)
    moment = clock.now + delay
    if delay > 1e-6 and math.ulp(moment) < 1e-7:
        clock.now = moment - 1e-6
        assert bucket.take_or_delay(share * capacity) > 0.0
        assert not bucket.allow(share * capacity)
    clock.now = moment
    assert bucket.allow(share * capacity)


# -- those who wait --------------------------------------------------------------------------------


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


def test_pause_reaches_who_waits(bucket, clock):
    """A waiter sleeps on until the pause is over and its tokens have come."""
    first, second = line_up(bucket, 4, 2)
    clock.advance(3)
    bucket.pause(100)
    eventually(lambda: moments(clock) == [107.0, math.inf])
    clock.advance(104)
    first.result()
    clock.advance(2)
    second.result()
    assert_idle(bucket)


@pytest.mark.parametrize(("rate", "moment"), [(4, 3.5), (0.5, 6.0)])
def test_configure_reaches_who_waits(bucket, clock, rate, moment):
    """A new rate moves the moment of the head, to earlier and to later."""
    first, second = line_up(bucket, 5, 1)
    clock.advance(3)
    bucket.configure(tokens_per_second=rate)
    eventually(lambda: moments(clock) == [3 + 2 / rate, math.inf])
    assert bucket.take_or_delay(1) == 4 / rate
    clock.advance(2 / rate)
    first.result()
    clock.advance(1 / rate)
    second.result()
    assert_idle(bucket)


def test_waiters_come_first_after_configure(bucket, clock):
    """A new capacity does not open the bucket to others while somebody waits."""
    (job,) = line_up(bucket, 5)
    bucket.configure(capacity=20)
    clock.advance(3)
    assert not bucket.allow(1)
    clock.advance(2)
    job.result()
    assert_idle(bucket)
    clock.advance(20)
    assert bucket.allow(20)


def test_who_waits_for_more_than_the_new_capacity(bucket, clock):
    """A waiter whose tokens can never come any more is told so, and the next one moves up."""
    head, light, heavy, last = line_up(bucket, 8, 2, 9, 1)
    bucket.configure(capacity=5)
    with pytest.raises(ValueError, match=r"^tokens must be at most the capacity 5, not 8$"):
        head.result()
    eventually(lambda: moments(clock)[0] == 2.0)
    clock.advance(2)
    light.result()
    with pytest.raises(ValueError, match="not 9$"):
        heavy.result()
    eventually(lambda: moments(clock) == [3.0])
    clock.advance(1)
    last.result()
    assert bucket.tokens == 0
    assert_idle(bucket)


def test_timeout_that_a_pause_outlasts(bucket, clock):
    """A waiter with a timeout raises by its deadline, with the new forecast."""
    (job,) = line_up(bucket, 2, timeout=5)
    bucket.pause(50)
    clock.advance(5)
    with pytest.raises(RateLimitExceeded) as raised:
        job.result()
    assert raised.value.retry_after == 47.0
    assert_idle(bucket)


class Interrupted(BaseException):
    """What strikes."""


@pytest.fixture
def strike_when_taken(monkeypatch):
    """Have the next wait that took its tokens do something, and be interrupted before it returns."""

    def install(do):
        whole = TokenBucket._wake_head

        def strike(bucket):
            monkeypatch.setattr(TokenBucket, "_wake_head", whole)
            do(bucket)
            raise Interrupted

        monkeypatch.setattr(TokenBucket, "_wake_head", strike)

    return install


def test_interrupted_wait_gives_nothing_back_in_a_pause(new_queue, strike_when_taken):
    """What a wait took before a pause, and is interrupted with, brings nothing before its end."""
    clock = ManualClock()
    bucket = new_queue(4, 2, clock=clock)
    assert bucket.allow(4)
    strike_when_taken(lambda bucket: bucket.pause(10))
    with pytest.raises(Interrupted):
        bucket.wait(3)
    assert (clock.now, bucket.tokens) == (1.5, 0)
    assert not bucket.allow(1)
    assert bucket.take_or_delay(1) == 10.5


def test_interrupted_wait_gives_all_back_after_a_pause(new_queue, strike_when_taken):
    """A wait that is interrupted takes nothing, however the bucket came by its tokens after a pause."""
    clock = ManualClock()
    bucket = new_queue(4, 2, clock=clock)
    bucket.pause(10)
    clock.now = 10.5
    bucket.refund(2)
    assert bucket.allow(0.5)
    strike_when_taken(lambda bucket: None)
    with pytest.raises(Interrupted):
        bucket.wait(3)
    assert (clock.now, bucket.tokens) == (10.75, 3)


def test_configure_in_the_midst_of_a_refusal():
    """A refusal that was reckoned with the old rate is not remembered."""
    clock = ManualClock()
    bucket = TokenBucket(10, 1, clock=clock)
    assert bucket.allow(10)

    def profile(frame, event, function):
        if function is max and frame.f_code is TokenBucket._allow_after_all.__code__:
            sys.setprofile(None)
            bucket.configure(tokens_per_second=1000)

    sys.setprofile(profile)
    try:
        assert not bucket.allow(8)
    finally:
        sys.setprofile(None)
    assert bucket.tokens_per_second == 1000
    clock.advance(0.008)
    assert bucket.allow(8)


# -- what it is not --------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_no_copies(new_single, duplicate):
    """A copy would be a second rate: the error says what to do instead."""
    bucket = new_single(4, 2)
    with pytest.raises(TypeError, match="cannot be pickled or copied: .* second rate .*import"):
        duplicate(bucket)
    assert bucket.allow(4)


def test_repr(new_single):
    """It shows the capacity and the rate, and asks neither the clock nor the lock."""
    asked = []
    bucket = new_single(10, 2.5, clock=lambda: asked.append(1) or 0.0)
    bucket.configure(capacity=20)
    before = len(asked)
    for state in bucket, getattr(bucket, "bucket", bucket):
        if hasattr(state, "_lock"):
            with state._lock:
                assert repr(bucket).endswith("Bucket: capacity 20, 2.5 tokens_per_second>")
    assert len(asked) == before
