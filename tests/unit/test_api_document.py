"""What the API document promises: its methods, parameters, patterns and error texts."""

import inspect
import threading
from queue import Queue

import pytest
from src.rate_limiter.exceptions import RateLimitExceeded
from src.rate_limiter.testing import ManualClock
from src.rate_limiter.token_bucket import TokenBucket
from waiters import Job, eventually


@pytest.fixture
def clock():
    """Return a clock that waits move on."""
    return ManualClock()


@pytest.fixture
def limiter(clock):
    """Return the bucket of most of the document's examples."""
    return TokenBucket(capacity=10, tokens_per_second=5, clock=clock)


# -- constructor -------------------------------------------------------------------------------

CONFIGURATIONS = [
    (100, 50), (5.5, 2), (10000, 1000), (1, 0.1), (50, 100), (10, 10), (1, 1 / 60), (1, 0.5),
    (100, 10000), (20, 100 / 60), (500, 1000), (5, 1), (5, 5), (1000, 2), (1000, 100), (10, 1000),
    (50, 50), (100, 1), (1000, 10000 / 60), (500, 5000), (100, 100), (50000, 100000),
]  # fmt: skip


@pytest.mark.parametrize(("capacity", "rate"), CONFIGURATIONS)
def test_configurations(clock, capacity, rate):
    """Each: the whole burst at once, and not one more; then the rate, whole numbers or not."""
    limiter = TokenBucket(capacity=capacity, tokens_per_second=rate, clock=clock)
    burst = int(capacity)
    assert sum(limiter.allow() for _ in range(burst + 10)) == burst
    assert not limiter.allow(1)
    for count in range(1, 100):
        limiter.wait()
        assert clock() == pytest.approx((burst + count - capacity) / rate)


def test_arguments_by_position_and_name():
    """The two arguments have their documented names and order, and no default."""
    limiter = TokenBucket(10, 5)
    assert (limiter.capacity, limiter.tokens_per_second) == (10, 5)
    for arguments in {}, {"capacity": 1}, {"tokens_per_second": 1}:
        with pytest.raises(TypeError):
            TokenBucket(**arguments)


@pytest.mark.parametrize("method", ["allow", "wait", "try_consume"])
def test_tokens_defaults_to_one(limiter, method):
    """``tokens`` is 1 unless given, by position or by name."""
    ask = getattr(limiter, method)
    assert inspect.signature(ask).parameters["tokens"].default == 1
    ask()
    ask(2)
    ask(tokens=3)
    assert limiter.tokens == 4


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -5, -0.1])
def test_error_texts(limiter, bad):
    """The documented texts, to the letter, with nothing appended."""
    calls = {
        "capacity must be positive": [lambda: TokenBucket(capacity=bad, tokens_per_second=5)],
        "tokens_per_second must be positive": [lambda: TokenBucket(capacity=10, tokens_per_second=bad)],
        "tokens must be positive": [
            lambda m=m: m(bad) for m in (limiter.allow, limiter.wait, limiter.try_consume)
        ],
    }
    for text, bad_calls in calls.items():
        for call in bad_calls:
            with pytest.raises(ValueError, match="must be positive") as raised:
                call()
            assert str(raised.value) == text


def test_both_bad():
    """Of two bad arguments the first is named."""
    with pytest.raises(ValueError, match=r"^capacity must be positive$"):
        TokenBucket(capacity=0, tokens_per_second=0)


def test_rate_limit_exceeded(limiter):
    """It is for own code to raise, with a text; a bucket that refuses does not raise it."""

    def protected():
        if not limiter.allow(6):
            raise RateLimitExceeded("Rate limit exceeded, try again later")
        return "done"

    assert protected() == "done"
    with pytest.raises(RateLimitExceeded) as raised:
        protected()
    assert str(raised.value) == "Rate limit exceeded, try again later"
    assert isinstance(raised.value, Exception)


# -- allow() and try_consume() -----------------------------------------------------------------


@pytest.mark.parametrize("method", ["allow", "try_consume"])
def test_allow(limiter, clock, method):
    """True and taken, or False and nothing taken; never a part; refilled by the time that passes."""
    ask = getattr(limiter, method)
    assert ask(7) is True
    assert ask(4) is False
    assert limiter.tokens == 3
    assert ask(3) is True
    clock.advance(0.2)
    assert ask() is True
    assert ask() is False


def test_try_consume_is_allow():
    """It is another name of the same thing, so both take from the same bucket in the same way."""
    assert TokenBucket.try_consume is TokenBucket.allow


def test_fractional_tokens(clock):
    """Half tokens: twice as many."""
    limiter = TokenBucket(capacity=10, tokens_per_second=1, clock=clock)
    assert sum(limiter.allow(0.5) for _ in range(100)) == 20


def test_loop_with_backoff(clock):
    """Who comes back later gets it then."""
    limiter = TokenBucket(capacity=5, tokens_per_second=2, clock=clock)
    limiter.allow(5)
    attempts = []
    while not limiter.allow(3):
        attempts.append(clock())
        clock.advance(1)
    assert attempts == [0.0, 1.0]


def test_in_expressions(limiter):
    """As a predicate, and in a comprehension."""
    assert (limiter.try_consume(10) and "processed") or "fallback" == "processed"
    assert ((limiter.try_consume() and "processed") or "fallback") == "fallback"
    limiter.refund(10)
    assert [weight for weight in (4, 5, 3, 1) if limiter.try_consume(weight)] == [4, 5, 1]


# -- wait() ------------------------------------------------------------------------------------


def test_wait(limiter, clock):
    """It returns None, at once or when the tokens are there, which are taken then."""
    assert limiter.wait(10) is None
    assert clock() == 0.0
    assert limiter.wait(tokens=4) is None
    assert (clock(), limiter.tokens) == (0.8, 0.0)


def test_controlled_loop(clock):
    """A loop that waits each time: the burst, then exactly the rate."""
    limiter = TokenBucket(capacity=5, tokens_per_second=8, clock=clock)
    times = [limiter.wait() or clock() for _ in range(13)]
    assert times == [0.0] * 5 + [n / 8 for n in range(1, 9)]


def test_wait_of_many_threads():
    """Threads that wait for 3 of 5 at the same time are all served."""
    limiter = TokenBucket(capacity=5, tokens_per_second=1000)
    for job in [Job(limiter.wait, 3) for _ in range(10)]:
        assert job.result() is None


def test_shared_by_threads(clock):
    """Ten threads with a hundred requests each, one limiter: its capacity is granted in all."""
    limiter = TokenBucket(capacity=100, tokens_per_second=100, clock=clock)
    jobs = [Job(lambda: sum(limiter.allow() for _ in range(100))) for _ in range(10)]
    assert sum(job.result() for job in jobs) == 100


# -- patterns ----------------------------------------------------------------------------------


def test_pattern_1_fallback(limiter):
    """What is not allowed is served from the cache."""
    answers = ["processed" if limiter.allow() else "cached" for _ in range(12)]
    assert answers == ["processed"] * 10 + ["cached"] * 2


def test_pattern_2_wait_with_timeout(clock):
    """A thread waits, its caller for no longer than it likes; ``timeout`` does the same without one."""
    clock.auto_advance = False
    limiter = TokenBucket(capacity=10, tokens_per_second=5, clock=clock)

    def attempt():
        event = threading.Event()
        threading.Thread(target=lambda: limiter.wait() or event.set(), daemon=True).start()
        return event

    assert all(attempt().wait(30) for _ in range(10))
    late = attempt()
    eventually(lambda: clock.sleepers == 1)
    assert not late.wait(0)
    with pytest.raises(RateLimitExceeded):
        limiter.wait(timeout=0.1)
    clock.advance(0.2)
    assert late.wait(30)


def test_pattern_3_weights(clock):
    """Each kind of job costs what the price list says, and 1 if it is not in it."""
    limiter = TokenBucket(capacity=100, tokens_per_second=50, clock=clock)
    weights = {"read": 1, "write": 5, "delete": 10}
    done = [
        limiter.allow(weights.get(kind, 1))
        for kind in ["delete"] * 9 + ["write", "write", "read", "other"]
    ]
    assert done == [True] * 11 + [False] * 2


def test_pattern_4_adaptive(clock):
    """Larger payloads cost more, and none less than 1."""
    limiter = TokenBucket(capacity=100, tokens_per_second=50, clock=clock)
    sizes = [10, 50_000, 49_999, 1_999, 0]
    assert [limiter.allow(max(1, size // 1000)) for size in sizes] == [True, True, True, False, False]
    assert limiter.tokens == 0


def test_pattern_5_tiers(clock):
    """Each tier has its own limiter, and the free one does not use up the premium one."""
    sizes = {"premium": 1000, "standard": 100, "free": 10}
    limiters = {tier: TokenBucket(size, size, clock=clock) for tier, size in sizes.items()}
    for tier, size in sizes.items():
        assert sum(limiters[tier].allow() for _ in range(1001)) == size


def test_pattern_6_queue():
    """Four workers on one queue process all of it, and no faster than the limiter lets them."""
    limiter = TokenBucket(capacity=50, tokens_per_second=5000)
    start = limiter._clock()
    requests, processed = Queue(), []

    def worker():
        while (request := requests.get()) is not None:
            limiter.wait()
            processed.append(request)

    for _ in range(4):
        threading.Thread(target=worker, daemon=True).start()
    for request in [*range(200), None, None, None, None]:
        requests.put(request)
    eventually(lambda: len(processed) == 200)
    assert sorted(processed) == list(range(200))
    assert limiter._clock() - start >= (200 - 50) / 5000
