"""What a bucket grants, what it refuses, and what it calls wrong."""

import math
import sys
import time
from decimal import Decimal
from fractions import Fraction
from numbers import Real

import pytest
from waiters import Job

from rate_limiter import Bucket, SharedTokenBucket, TokenBucket
from rate_limiter.checks import positive, zero_or_more
from rate_limiter.testing import ManualClock

# -- what is granted ------------------------------------------------------------------------------

#: (capacity, tokens_per_second, initial if it does not start full), then rows of (time, tokens before, asked, granted)
STEPS = {
    "one after the other": (
        (1, 2),
        [
            (0.0, 1, 1, True),
            (0.0, 0, 1, False),
            (0.25, 0.5, 1, False),
            (0.5, 1, 1, True),
            (0.5, 0, 1, False),
        ],
    ),
    "the burst, then the rate": (
        (3, 1),
        [
            (0, 3, 1, True),
            (0, 2, 1, True),
            (0, 1, 1, True),
            (0, 0, 1, False),
            (1, 1, 1, True),
            (1, 0, 1, False),
            (3, 2, 2, True),
        ],
    ),
    "all or nothing": (
        (10, 4),
        [
            (0, 10, 8, True),
            (0, 2, 3, False),
            (0, 2, 2, True),
            (0.5, 2, 2.5, False),
            (0.625, 2.5, 2.5, True),
        ],
    ),
    "never more than the capacity": (
        (5, 10),
        [
            (0, 5, 5, True),
            (0.5, 5, 2, True),
            (0.5, 3, 1, True),
            (1000, 5, 5, True),
            (1000, 0, 0.001, False),
        ],
    ),
    "fractions": (
        (1.5, 0.5),
        [(0, 1.5, 0.25, True), (0, 1.25, 1.25, True), (1, 0.5, 0.75, False), (1.5, 0.75, 0.75, True)],
    ),
    "a refusal that holds for one cost holds for no smaller one": (
        (8, 1),
        [
            (0, 8, 8, True),
            (2, 2, 6, False),
            (2, 2, 6, False),
            (2, 2, 2, True),
            (3, 1, 6, False),
            (8, 6, 6, True),
        ],
    ),
    "a refusal is not remembered longer than it is right": (
        (4, 1),
        [
            (0, 4, 4, True),
            (0, 0, 2, False),
            (1, 1, 2, False),
            (1.9375, 1.9375, 2, False),
            (2, 2, 2, True),
        ],
    ),
    "from empty: the rate, then the burst": (
        (3, 2, 0),
        [
            (0, 0, 0.001, False),
            (0.25, 0.5, 1, False),
            (0.5, 1, 1, True),
            (0.5, 0, 1, False),
            (1.5, 2, 2, True),
            (100, 3, 3, True),
            (100, 0, 0.001, False),
        ],
    ),
    "from a part: that at once, and not one more": (
        (8, 1, 2.5),
        [(0, 2.5, 3, False), (0, 2.5, 2.5, True), (0, 0, 1, False), (1, 1, 1, True), (9, 8, 8, True)],
    ),
    "from full": ((2, 1, 2), [(0, 2, 2, True), (0, 0, 1, False), (1, 1, 1, True)]),
    "from empty, with a clock that is set back": (
        (4, 1, 0),
        [(0, 0, 1, False), (-50, 0, 1, False), (1, 1, 1, True), (1, 0, 1, False)],
    ),
    "a clock that is set back mints nothing and loses nothing": (
        (4, 1),
        [(100, 4, 3, True), (50, 1, 2, False), (50, 1, 1, True), (100, 0, 1, False), (101, 1, 1, True)],
    ),
}


@pytest.mark.parametrize(("bucket_of", "steps"), STEPS.values(), ids=STEPS)
def test_steps(new_bucket, ask, bucket_of, steps):
    """Whichever way it is asked, a bucket has and grants what the table says."""
    clock = ManualClock()
    capacity, rate, initial = (*bucket_of, None)[:3]
    bucket = new_bucket(capacity, rate, initial=initial, clock=clock)
    for step in steps:
        clock.now, before, asked, granted = step
        assert (bucket.tokens, ask(bucket, asked)) == (before, granted), step


@pytest.mark.parametrize(
    ("level", "asked", "delay"),
    [(0, 1, 0.5), (0, 10, 5.0), (4, 5, 0.5), (4, 4, 0.0), (10, 10, 0.0), (9.5, 10, 0.25)],
)
def test_delay(new_bucket, level, asked, delay):
    """`take_or_delay` says how long the missing tokens take to come back."""
    bucket = new_bucket(10, 2, clock=ManualClock())
    if level < 10:
        assert bucket.allow(10 - level)
    assert bucket.take_or_delay(asked) == delay
    assert bucket.tokens == (level if delay else level - asked)


def test_delay_of_a_bucket_that_starts_empty(new_bucket):
    """Its first token takes the time of one token, its burst the time of all; a refund counts at once."""
    clock = ManualClock()
    bucket = new_bucket(10, 2, initial=0, clock=clock)
    assert (bucket.take_or_delay(), bucket.take_or_delay(10)) == (0.5, 5.0)
    bucket.wait()
    assert clock() == 0.5
    bucket.refund(1)
    assert bucket.allow()


def test_more_than_the_capacity(new_bucket):
    """What can never be granted is refused by `allow`, and is an error for those who would wait for it."""
    bucket = new_bucket(10, 1, clock=ManualClock())
    assert bucket.allow(10.001) is bucket.try_consume(11) is False
    for ask in bucket.wait, bucket.take_or_delay:
        with pytest.raises(ValueError, match=r"^tokens must be at most the capacity 10, not 10\.001$"):
            ask(10.001)
    with pytest.raises(ValueError, match="capacity"):
        bucket.wait(11, timeout=0)
    assert bucket.tokens == 10


@pytest.mark.parametrize("level", [10, 10 - 2.0**-30])
def test_a_trace_more_than_the_capacity(new_single, level):
    """What is allowed for rounding does not lift the capacity."""
    bucket = new_single(10, 1, clock=ManualClock())
    bucket.charge(10)
    bucket.refund(level)
    more = 10 + 2.0**-29
    assert not bucket.allow(more)
    with pytest.raises(ValueError, match="at most the capacity 10"):
        bucket.take_or_delay(more)
    assert bucket.take_or_delay(10) == 0.0


@pytest.mark.parametrize(
    ("level", "refund", "after"),
    [(0, 3, 3), (4, 0.5, 4.5), (4, 6, 10), (4, 7, 10), (10, 1, 10), (0, 1e9, 10)],
)
def test_refund(new_bucket, level, refund, after):
    """A refund gives back at once, but never lifts a bucket above its capacity."""
    bucket = new_bucket(10, 1, clock=ManualClock())
    if level < 10:
        assert bucket.allow(10 - level)
    bucket.refund(refund)
    assert bucket.tokens == after
    assert bucket.allow(after)
    assert not bucket.allow(0.001)


def test_charge_goes_into_debt(new_bucket):
    """A charge takes what is not there too; nothing is granted until the debt is paid off."""
    clock = ManualClock()
    bucket = new_bucket(4, 2, clock=clock)
    bucket.charge(7)
    assert bucket.tokens == -3
    assert bucket.take_or_delay() == 2.0
    clock.advance(1.5)
    assert not bucket.allow()
    clock.advance(0.5)
    assert bucket.allow()


def test_charge_after_rest_counts_from_now(new_bucket):
    """What time brought beyond the capacity before a charge does not pay for it."""
    clock = ManualClock()
    bucket = new_bucket(4, 2, clock=clock)
    clock.advance(100)
    bucket.charge(5)
    assert bucket.tokens == -1


def test_delay_stays_finite(new_bucket):
    """A delay beyond what a float can hold is the largest that it can."""
    bucket = new_bucket(1e300, 1e-300)
    bucket.allow(1e300)
    assert 0 < bucket.take_or_delay(1e300) < math.inf
    bucket = new_bucket(5e307, 1e-300)
    bucket.allow(5e307)
    assert 0 < bucket.take_or_delay(1) < math.inf


LARGEST = sys.float_info.max


@pytest.mark.parametrize("capacity", [1.0, 1e300, 1e308, LARGEST])
@pytest.mark.parametrize("rate", [5e-324, 1e-300, 1.0, 1e308])
@pytest.mark.parametrize("share", [1e-6, 1.0])
def test_forecasts_of_absurd_buckets(new_single, capacity, rate, share):
    """Whatever the numbers are, a forecast is finite and above 0, and the level is a number."""
    clock = ManualClock(1000.0)
    bucket = new_single(capacity, rate, clock=clock)
    bucket.charge(LARGEST)
    for _ in range(2):
        assert 0.0 < bucket.take_or_delay(share * capacity) <= LARGEST
        bucket.charge(LARGEST)
        assert -LARGEST <= bucket.tokens <= 0
        assert not bucket.allow(capacity)
    clock.advance(1e-3)
    assert bucket.take_or_delay(capacity) > 0.0
    assert -LARGEST <= bucket.tokens <= capacity
    bucket.configure(capacity=LARGEST)
    assert -LARGEST <= bucket.tokens <= capacity


def test_a_debt_without_end_has_one(new_single):
    """However much is charged, refunds and time make the bucket usable again."""
    clock = ManualClock()
    bucket = new_single(10, 1e307, clock=clock)
    for _ in range(4):
        bucket.charge(1.7e308)
    assert bucket.tokens > -math.inf
    bucket.refund(LARGEST)
    assert bucket.tokens == 10
    for _ in range(4):
        bucket.charge(1.7e308)
    clock.advance(20)
    assert bucket.allow(10)


def test_a_burst_beyond_the_largest_float(new_single):
    """Sums of absurd costs do not overflow into a debt without end."""
    clock = ManualClock()
    bucket = new_single(1e308, 1e308, clock=clock)
    assert bucket.allow(1e308)
    for _ in range(3):
        clock.advance(0.9)
        assert bucket.allow(0.9e308)
    assert not bucket.allow(1e308)
    clock.advance(4)
    assert bucket.tokens == 1e308
    assert bucket.allow(1e308)


def test_a_refusal_of_an_absurd_cost_ends(new_single):
    """A refusal is not remembered for ever because a sum overflowed."""
    clock = ManualClock()
    bucket = new_single(1e308, 1e308, clock=clock)
    assert bucket.allow(1e308)
    assert bucket.take_or_delay(1e308) == 1.0
    assert not bucket.allow(1e308)
    clock.advance(1)
    assert bucket.allow(1e308)


def test_refund_ends_a_refusal(new_bucket):
    """A refusal that was remembered is forgotten when tokens come back."""
    bucket = new_bucket(10, 1, clock=ManualClock())
    assert [bucket.allow(10), bucket.allow(2), bucket.allow(2)] == [True, False, False]
    bucket.refund(2)
    assert bucket.allow(2)


class Half(float):
    """A number whose sums have eleven bits, as those of ``numpy.float16``, whatever it is added to."""

    def __add__(self, other):
        """Add, and round."""
        total = float(self) + float(other)
        exponent = max(math.frexp(total)[1] - 11, -24)
        return Half(math.ldexp(round(math.ldexp(total, -exponent)), exponent))

    __radd__ = __add__

    def __sub__(self, other):
        """Subtract, and round."""
        return self + -float(other)

    def __rsub__(self, other):
        """Subtract, and round."""
        return Half(-self) + other

    def __neg__(self):
        """Keep the kind."""
        return Half(-float(self))


#: It is no float and not derived from one, as `numpy.float32`.
Single = type("Single", (Fraction,), {})
assert not issubclass(Single, float)
assert issubclass(Single, Real)


@pytest.mark.parametrize(
    "one", [1, 1.0, True, Fraction(1), Decimal(1), Decimal("1.0"), Half(1), Single(1)], ids=repr
)
def test_kinds_of_numbers(new_bucket, ask, one):
    """Every real number is a cost; ``True`` counts as 1."""
    assert new_bucket(2 * one, one, initial=one, clock=ManualClock()).tokens == 1
    bucket = new_bucket(2 * one, one, clock=ManualClock())
    assert [ask(bucket, one) for _ in range(3)] == [True, True, False]
    bucket.refund(one)
    assert bucket.tokens == 1
    bucket.charge(one)
    bucket.pause(one)
    assert bucket.take_or_delay(one) == 2


#: Every call that gives a number to a bucket that has 10,000 tokens.
ENTRIES = {
    "allow": lambda bucket, one: bucket.allow(one),
    "allow when empty": lambda bucket, one: bucket.charge(10_000) or bucket.allow(one),
    "wait": lambda bucket, one: bucket.wait(one),
    "wait with a timeout": lambda bucket, one: bucket.wait(2, timeout=one),
    "take_or_delay": lambda bucket, one: bucket.take_or_delay(one),
    "refund": lambda bucket, one: bucket.charge(5) or bucket.refund(one),
    "charge": lambda bucket, one: bucket.charge(one),
    "charge twice": lambda bucket, one: bucket.charge(one) or bucket.charge(one),
    "pause": lambda bucket, one: bucket.pause(one),
    "capacity": lambda bucket, one: bucket.configure(capacity=one),
    "rate": lambda bucket, one: bucket.configure(tokens_per_second=one),
}


@pytest.mark.parametrize("enter", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize("one", [1, True, Half(1), Single(1), Decimal(1)], ids=repr)
def test_numbers_are_kept_as_floats(new_queue, enter, one):
    """Whatever kind of number comes in, a bucket keeps floats: a level in another kind might not move."""
    clock = ManualClock()
    made = new_queue(one, one, initial=one, clock=clock)
    bucket = new_queue(10_000, 1, clock=clock)
    enter(bucket, one)
    clock.advance(one)
    assert type(clock.now) is float
    for kept in made, bucket:
        for name in "_used", "_full_at", "_paused_until", "_capacity", "_rate", "_ahead", "_allowed":
            assert type(getattr(kept, name)) is float, name
        assert {type(number) for number in kept._refused} == {float}


@pytest.mark.parametrize("one", [Half(1), Single(1)], ids=repr)
def test_a_level_moves_whatever_the_numbers(new_queue, one):
    """A bucket is empty after its burst also if each cost is a number of low precision."""
    bucket = new_queue(3000, 1, clock=ManualClock())
    assert sum(bucket.allow(one) for _ in range(6000)) == 3000


def test_default_cost(new_bucket):
    """Without an argument, every method takes 1."""
    bucket = new_bucket(4, 1, clock=ManualClock())
    assert bucket.allow() is bucket.try_consume() is True
    assert bucket.take_or_delay() == 0.0
    assert bucket.wait() is None
    assert bucket.tokens == 0


def test_contract(new_bucket):
    """A bucket is a `Bucket`, and says how it was made."""
    bucket = new_bucket(10, 2.5, clock=ManualClock())
    assert isinstance(bucket, Bucket)
    assert (bucket.capacity, bucket.tokens_per_second) == (10, 2.5)
    with pytest.raises(AttributeError):
        bucket.capacity = 11
    assert bucket.allow(7.5)
    for fact in "10", "2.5 tokens_per_second":
        assert fact in repr(bucket)


def test_it_is_time_that_passes(new_bucket):
    """Without a clock of one's own a bucket runs on real time, and a wait really lasts."""
    bucket = new_bucket(1, 500)
    began = time.monotonic()
    for _ in range(11):
        bucket.wait()
    assert time.monotonic() - began >= 10 / 500


# -- many threads ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("restless_threads")
@pytest.mark.parametrize("costs", [(1, 1), (2, 1), (0.5, 0.25)], ids=str)
def test_threads_share_one_burst(new_bucket, costs):
    """Eight threads that snatch at a bucket get exactly what is in it."""
    bucket = new_bucket(3000, 1, clock=ManualClock())

    def snatch():
        return sum(cost for cost in costs * 1500 for _ in range(2) if bucket.allow(cost))

    assert sum(job.result() for job in [Job(snatch) for _ in range(8)]) == 3000
    assert bucket.tokens == 0


@pytest.mark.usefixtures("restless_threads")
def test_threads_that_wait_and_threads_that_ask(new_bucket):
    """Waiting and asking threads together get no more than the burst and what time brought."""
    began = time.monotonic()
    bucket = new_bucket(5, 4000)

    def wait():
        for _ in range(100):
            bucket.wait(2)
        return 200

    def snatch():
        return sum(bucket.allow() + (bucket.take_or_delay() == 0) for _ in range(2000))

    granted = sum(job.result() for job in [Job(function) for function in [wait] * 4 + [snatch] * 4])
    assert 800 <= granted <= 5 + 4000 * (time.monotonic() - began)


# -- what is wrong --------------------------------------------------------------------------------

NOT_POSITIVE = [
    *(0, -1, 0.0, -0.0, -0.5, -math.inf, False, Fraction(-1, 3), -(10**400)),
    *(Decimal(0), Decimal("-0.5"), Decimal("-Infinity"), Decimal("-1e400")),
    # as floats these are 0
    *(Fraction(1, 10**400), Decimal("1e-400")),
]
NOT_FINITE = [
    *(math.nan, math.inf, 10**400, Fraction(10**400)),
    *(Decimal("nan"), Decimal("snan"), Decimal("Infinity"), Decimal("1e400")),
]
NOT_A_NUMBER = ["1", None, [1], 1j, 0j, b"1"]

METHODS = ["allow", "try_consume", "wait", "take_or_delay", "refund", "charge"]

#: The methods for which the API document fixes the text.
DOCUMENTED = {"allow", "try_consume", "wait"}


def complaint(call, value):
    """Return the kind and the text of what is raised."""
    with pytest.raises((ValueError, TypeError)) as error:
        call(value)
    return error.type, str(error.value)


def expect_complaints(name, call, documented):
    """Assert what is raised about every wrong value of an argument."""
    for value in NOT_POSITIVE:
        kind, text = complaint(call, value)
        bare = f"{name} must be positive"
        assert kind is ValueError
        assert text in ({bare} if documented else {f"{bare}, not {value!r}", bare})
    for value in NOT_FINITE:
        text = f"{name} must be a finite number, not {value!r}"
        assert complaint(call, value) == (ValueError, text)
    for value in NOT_A_NUMBER:
        text = f"{name} must be a number (int or float), not {value!r}"
        assert complaint(call, value) == (TypeError, text)


@pytest.mark.parametrize("check", [positive, zero_or_more])
def test_undocumented_texts_name_the_value(check):
    """An error whose text the API document does not fix names the argument, the value, and what fits."""
    expected = {positive: "positive", zero_or_more: "0 or more"}[check]
    with pytest.raises(ValueError, match=rf"^price must be {expected}, not Decimal\('-2'\)$"):
        check("price", Decimal(-2))


#: Python does not turn them into text.
TOO_LONG = [10**5000, -(10**5000), Fraction(10**5000, 3)]


@pytest.mark.parametrize("value", TOO_LONG, ids=["int", "negative", "Fraction"])
def test_numbers_that_cannot_be_shown(new_single, value):
    """The error about a number of 5,000 digits names the argument like any other."""
    bucket = new_single(10, 1, clock=ManualClock())
    calls = {
        "tokens": [bucket.allow, bucket.wait, bucket.take_or_delay, bucket.refund, bucket.charge],
        "seconds": [bucket.pause],
        "capacity": [lambda value: bucket.configure(capacity=value)],
        "tokens_per_second": [lambda value: bucket.configure(tokens_per_second=value)],
    }
    if value < 0:
        calls["timeout"] = [lambda value: bucket.wait(timeout=value)]
    for name, each in calls.items():
        for call in each:
            assert complaint(call, value)[1].startswith(f"{name} must be ")
    assert bucket.tokens == 10


@pytest.mark.parametrize("name", ["capacity", "tokens_per_second"])
def test_wrong_arguments_of_the_constructor(new_single, name):
    """What is not a positive, finite number is refused by name, with the documented words."""
    good = {"capacity": 1, "tokens_per_second": 1}
    documented = new_single in {TokenBucket, SharedTokenBucket}
    expect_complaints(name, lambda value: new_single(**good | {name: value}), documented)


@pytest.mark.parametrize(
    ("initial", "error", "text"),
    [
        (-1, ValueError, "initial must be 0 or more, not -1"),
        (Decimal("-0.5"), ValueError, r"initial must be 0 or more, not Decimal\('-0.5'\)"),
        (10.5, ValueError, "initial must be at most the capacity 10, not 10.5"),
        (math.nextafter(10, 11), ValueError, "initial must be at most the capacity 10, not 10.0000"),
        *((each, ValueError, "initial must be a finite number") for each in NOT_FINITE),
        *((each, TypeError, "initial must be a number") for each in NOT_A_NUMBER if each is not None),
    ],
)
def test_wrong_initial(new_single, initial, error, text):
    """What a bucket starts with is a number from 0 to its capacity."""
    with pytest.raises(error, match=f"^{text}"):
        new_single(10, 1, initial=initial)


@pytest.mark.parametrize("clock", [None, 0.0, "time"])
def test_a_clock_that_cannot_be_called(new_single, clock):
    """A clock is a callable."""
    with pytest.raises(TypeError, match="^clock must be a callable"):
        new_single(1, 1, clock=clock)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [10, 4, 0])
@pytest.mark.parametrize("refused_before", [False, True], ids=["", "refused_before"])
def test_wrong_costs(new_bucket, method, level, refused_before):
    """A wrong cost is refused with the documented words, in every state, and changes no state."""
    clock = ManualClock()
    bucket = new_bucket(10, 1, clock=clock)
    if level < 10:
        assert bucket.allow(10 - level)
    if refused_before:
        assert not bucket.allow(level + 1)
    documented = isinstance(bucket, TokenBucket) and method in DOCUMENTED
    expect_complaints("tokens", getattr(bucket, method), documented)
    assert bucket.tokens == level
    clock.advance(1)
    assert bucket.allow(min(10, level + 1))
    assert bucket.tokens == 0


BAD_TIMEOUTS = [
    *(-1, -0.001, -1e-9, math.nan, -math.inf),
    *(Decimal("nan"), Decimal("snan"), Decimal(-1), Fraction(-1, 3)),
]


@pytest.mark.parametrize(
    ("timeout", "error", "expected"),
    [
        *((each, ValueError, "0 or more seconds, or None") for each in BAD_TIMEOUTS),
        *((each, TypeError, "a number of seconds or None") for each in ("1", [1], 0j, b"1")),
    ],
    ids=repr,
)
def test_wrong_timeouts(new_bucket, timeout, error, expected):
    """A bad timeout is named, even where nobody would have to wait, and nothing is taken."""
    bucket = new_bucket(1, 1, clock=ManualClock())
    assert complaint(lambda wrong: bucket.wait(timeout=wrong), timeout) == (
        error,
        f"timeout must be {expected}, not {timeout!r}",
    )
    assert bucket.tokens == 1
