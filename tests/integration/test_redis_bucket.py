"""RedisTokenBucket: one bucket for all processes that name it, on a real Redis."""

import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

import pytest
import redis
from harness import DEADLINE, ROOT, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st

from rate_limiter import (
    AllOf,
    Bucket,
    BucketPerKey,
    RateLimitExceeded,
    TokenBucket,
    redis_bucket,
    redis_server,
)
from rate_limiter.all_of import charge_refilled, take_all_or_longest_delay
from rate_limiter.celery import throttle
from rate_limiter.gating import host
from rate_limiter.gating.declared import new_limit
from rate_limiter.gating.engine import Engine
from rate_limiter.gating.limit import Call, Demand, Limit
from rate_limiter.redis_bucket import RedisTokenBucket
from rate_limiter.testing import ManualClock


@pytest.fixture(autouse=True)
def forget_servers():
    """Let each test begin without the servers that another one has used."""
    redis_server._servers.clear()


@pytest.fixture
def url(redis_url):
    return redis_url()


@pytest.fixture
def make(url):
    """Return what makes a bucket that nobody else uses."""
    return lambda *numbers, **options: RedisTokenBucket(uuid4().hex, *numbers, url=url, **options)


# -- what a bucket does -----------------------------------------------------------------------------


def test_it_is_a_bucket():
    """It has the contract of all buckets, and asking that speaks to no server."""
    bucket = RedisTokenBucket("b", 5, 2, url="redis://nobody.invalid")
    assert isinstance(bucket, Bucket)
    assert repr(bucket) == (
        "<RedisTokenBucket 'b': capacity 5, 2 tokens_per_second, on nobody.invalid:6379/0>"
    )


def test_the_burst_and_then_the_rate(make):
    """All of the capacity at once; then the seconds until the next one, and it is there then."""
    bucket = make(3, 5)
    assert [bucket.allow() for _ in range(4)] == [True, True, True, False]
    delay = bucket.take_or_delay()
    assert 0.1 < delay <= 0.2
    time.sleep(delay)
    assert bucket.take_or_delay() == 0.0
    assert bucket.take_or_delay() > 0.1


def test_weights_and_more_than_the_capacity(make):
    """A cost above the capacity is False or an error at once, as in every bucket."""
    bucket = make(5, 1)
    assert bucket.allow(4.5)
    assert not bucket.allow(1)
    assert not bucket.allow(6)
    for ask in bucket.wait, bucket.take_or_delay:
        with pytest.raises(ValueError, match="tokens must be at most the capacity 5, not 6"):
            ask(6)
    for wrong in 0, -1, math.nan, math.inf:
        with pytest.raises(ValueError, match="tokens must be"):
            bucket.allow(wrong)


def test_debt_refund_and_pause(make):
    """A charge may go below 0; a refund ends at the capacity; a pause starts from empty."""
    bucket = make(10, 1000)
    bucket.charge(1000)
    assert -1000 <= bucket.tokens < -900
    bucket.refund(5000)
    assert bucket.tokens == 10
    bucket.pause(0.2)
    assert 0.1 < bucket.pause_left <= 0.2
    assert not bucket.allow()
    assert 0.1 < bucket.take_or_delay() <= 0.21
    bucket.pause(0.05)
    assert bucket.pause_left > 0.1
    bucket.resume()
    assert bucket.pause_left == 0
    assert bucket.tokens < 10


def test_equal_objects_are_one_bucket(url):
    """Wherever they are made; and other numbers for the name are an error where they are written."""
    name = uuid4().hex
    one = RedisTokenBucket(name, 2, 0.001, url=url)
    other = RedisTokenBucket(name, 2, 0.001, client=redis.Redis.from_url(url))
    assert one == other
    assert len({one, other}) == 1
    assert (one.allow(), other.allow(), one.allow()) == (True, True, False)
    with pytest.raises(ValueError, match="elsewhere in this process"):
        RedisTokenBucket(name, 2, 5, url=url)
    with pytest.raises(ValueError, match="the same bucket twice"):
        AllOf(one, other)
    assert RedisTokenBucket("another", 2, 5, url=url) != one


def test_a_bucket_that_is_full_is_gone(make, url):
    """Its key expires a second after it is full."""
    bucket = make(2, 10)
    bucket.allow(2)
    with redis.Redis.from_url(url) as client:
        (key,) = client.keys("rate_limiter:bucket:*")
        assert 1000 < client.pttl(key) <= 1201
        wait_for(lambda: not client.exists(key))
    assert bucket.tokens == 2


def test_waiters_are_served_in_turn(make):
    """Each at its own moment, first come, first served; a heavy one is not overtaken for ever."""
    bucket, order = make(4, 5), []
    bucket.allow(4)

    def wait(name, tokens):
        bucket.wait(tokens)
        order.append(name)

    with ThreadPoolExecutor(8) as threads:
        for name, tokens in ("a", 1), ("heavy", 4), ("b", 1), ("c", 1):
            threads.submit(wait, name, tokens)
            time.sleep(0.15)
    assert order == ["a", "heavy", "b", "c"]


def test_a_wait_ends_in_time(make):
    """At once if the forecast is too long; what it was promised is given up."""
    bucket = make(1, 2)
    bucket.allow()
    with pytest.raises(RateLimitExceeded) as error:
        bucket.wait(timeout=0.1)
    assert 0.3 < error.value.retry_after <= 0.5
    began = time.monotonic()
    bucket.wait()
    assert time.monotonic() - began < 1


SCRIPT = """
import sys, time
from rate_limiter.redis_bucket import RedisTokenBucket
bucket = RedisTokenBucket("together", 5, 40, url=sys.argv[1])
until = time.monotonic() + 3
while time.monotonic() < until:
    bucket.wait()
    print(time.monotonic(), flush=True)
"""


def test_processes_share_one_rate(url):
    """Four of them, each waiting again and again: never more than capacity + rate × t, and each has a share."""
    command = [sys.executable, "-c", SCRIPT, url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    each = [[float(line) for line in process.communicate()[0].split()] for process in processes]
    granted = sorted(moment for moments in each for moment in moments)
    assert len(granted) > 60
    late = 0.1  # a process notes its moment later than the server grants
    for number, moment in enumerate(granted):
        within = [other for other in granted[number:] if other <= moment + 1]
        assert len(within) <= 5 + 40 * (1 + late) + 1
    assert max(map(len, each)) <= 4 * min(map(len, each))


def test_numbers_are_changed_for_all(url):
    """By any process, for those that start later too, until they are restored."""
    name = uuid4().hex
    one = RedisTokenBucket(name, 10, 1, url=url)
    one.allow(10)
    one.configure(capacity=20, tokens_per_second=50, reason="a test")
    redis_server._servers.clear()  # another process
    other = RedisTokenBucket(name, 10, 1, url=url)
    assert (other.capacity, other.tokens_per_second) == (10, 1)
    wait_for(lambda: other.tokens > 10)
    assert (other.capacity, other.tokens_per_second) == (20, 50)
    with redis.Redis.from_url(url, decode_responses=True) as client:
        key = f"rate_limiter:bucket:{name}"
        assert (client.hget(key, "y"), client.pttl(key)) == ("a test", -1)
    other.restore()
    assert one.tokens <= 10
    assert (one.capacity, one.tokens_per_second) == (10, 1)
    with pytest.raises(ValueError, match="tokens_per_second must be positive"):
        one.configure(tokens_per_second=0)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"name": ""}, ValueError, "name must have 1 to 200 characters, not 0"),
        ({"name": "x" * 201}, ValueError, "name must have 1 to 200 characters, not 201"),
        ({"name": 5}, TypeError, "name must be text, not 5"),
        ({"name": "\ud800"}, ValueError, "name must be text that UTF-8 can encode"),
        ({"capacity": 0}, ValueError, "capacity must be positive, not 0"),
        ({"tokens_per_second": math.nan}, ValueError, "tokens_per_second must be a finite number"),
        ({"on_outage": "wait"}, ValueError, "on_outage must be one of 'open', 'closed', 'local'"),
        ({"timeout": 0}, ValueError, "timeout must be positive"),
        ({"url": "http://localhost"}, ValueError, "url must be the URL of a Redis: .*scheme"),
        ({"url": None}, TypeError, "one of client=… and url=…, not none"),
        ({"client": redis.Redis()}, TypeError, "one of client=… and url=…, not both"),
        ({"client": object(), "url": None}, TypeError, "client must be a redis.Redis"),
    ],
)
def test_wrong_arguments(arguments, error, says):
    """The error names the argument, the value and what was expected, where it is written."""
    right = {"name": "b", "capacity": 1, "tokens_per_second": 1, "url": "redis://localhost"}
    with pytest.raises(error, match=says):
        RedisTokenBucket(**right | arguments)


# -- exactness --------------------------------------------------------------------------------------

COSTS = st.lists(st.floats(0.1, 8), min_size=3, max_size=3)
TAKE = st.tuples(st.just("take"), COSTS)
ROOM = st.tuples(st.just("leave room"), COSTS)
CHARGE = st.tuples(st.just("charge"), COSTS)
REFUND = st.tuples(st.just("refund"), COSTS)
PAUSE = st.tuples(st.just("pause"), st.floats(0, 5))


@pytest.fixture(scope="module")
def timed(redis_url):
    """Yield the script with a clock that it is given: a call takes keys, arguments and the microseconds."""
    source = redis_server._SCRIPT.replace("redis.call('TIME')", "{0, ARGV[#ARGV]}")
    source = source.replace("redis.call('PEXPIRE'", "tostring('PEXPIRE'")
    with redis.Redis.from_url(redis_url()) as client:
        script = client.register_script(source)
        yield lambda keys, arguments, now: script(keys=keys, args=[*arguments, now])


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.floats(1, 8), st.floats(0.1, 50), st.floats(0, 1)), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 3_000_000), TAKE | CHARGE | REFUND | ROOM | PAUSE), max_size=30),
)
def test_the_script_decides_as_token_buckets_do(timed, numbers, steps):
    """On one clock, with one bucket or several: the same grants and levels, delays within a microsecond."""
    keys = [uuid4().hex for _ in numbers]
    clock, now = ManualClock(1.0), 1_000_000
    buckets = [TokenBucket(capacity, rate, clock=clock) for capacity, rate, _ in numbers]

    def run(command, first, second, *parts):
        arguments = [f"{command} {first} {second} {len(parts)}"]
        for (capacity, rate, initial), part in zip(numbers, parts, strict=False):
            fields = capacity, rate, initial * capacity, 0, *part, 0
            arguments.append(" ".join(map(repr, fields)))
        words = timed(keys[: len(parts)], arguments, now).split()
        shown = len(words) - 2 * len(parts)
        answer = [float(word) for word in words[:shown] if word != b"-"]
        return answer, [float(level) for level in words[shown + 1 :: 2]]

    nothing = [(0, 0, 0, 0)] * len(keys)
    run("take", 0, 0, *nothing)
    for bucket, (capacity, _, initial) in zip(buckets, numbers, strict=True):
        if (missing := capacity - initial * capacity) > 0:
            bucket.charge(missing)
    for gap, (what, amount) in steps:
        now += gap
        clock.now = now / 1e6
        if what == "take":
            costs = amount[: len(keys)]
            if any(cost > bucket.capacity for cost, bucket in zip(costs, buckets, strict=True)):
                continue
            if any(
                abs(bucket.tokens - cost) < 1e-9 for cost, bucket in zip(costs, buckets, strict=True)
            ):
                return  # which of the two grants it is up to rounding
            (given, wait, _, _), levels = run("take", 1, 0, *[(0, 0, cost, 0) for cost in costs])
            demands = [Demand(bucket, cost, None) for bucket, cost in zip(buckets, costs, strict=True)]
            delay, _ = take_all_or_longest_delay(demands)
            assert bool(given) is not bool(delay)
            assert wait * 1e-6 == pytest.approx(delay, abs=2e-6)
        elif what == "pause":
            run("pause", amount * 1e6, 0, (0, 0, 0, 0))
            buckets[0].pause(amount)
            _, levels = run("take", 0, 0, *nothing)
        elif what == "leave room":
            rooms = [min(each, bucket.capacity) for each, bucket in zip(amount, buckets, strict=False)]
            _, levels = run("take", 0, 0, *[(0, 0, 0, room) for room in rooms])
            charge_refilled(
                Demand(bucket, room, None) for bucket, room in zip(buckets, rooms, strict=True)
            )
        else:
            sign = 1 if what == "refund" else -1
            _, levels = run("take", 0, 0, *[(sign * cost, 0, 0, 0) for cost in amount[: len(keys)]])
            for bucket, cost in zip(buckets, amount, strict=False):
                getattr(bucket, what)(cost)
        for bucket, level, (_, rate, _) in zip(buckets, levels, numbers, strict=True):
            if not bucket.pause_left:
                # The server counts whole microseconds.
                assert level == pytest.approx(bucket.tokens, abs=1e-6 + 2e-6 * rate)


# -- outages ----------------------------------------------------------------------------------------


def test_an_outage_fails_nothing(own, caplog):
    """Each policy holds while the server is killed, and it is logged once; then the bucket is asked again."""
    caplog.set_level("INFO", "rate_limiter")
    buckets = {
        policy: RedisTokenBucket(policy, 4, 0.001, url=own.url, on_outage=policy)
        for policy in ("open", "closed", "local")
    }
    for bucket in buckets.values():
        bucket.allow(2)
    own.kill()
    granted = {name: [bucket.allow() for _ in range(6)] for name, bucket in buckets.items()}
    assert granted["open"] == [True] * 6
    assert granted["closed"] == [False] * 6
    assert granted["local"] == [True, True, False, False, False, False]  # from the last known level
    assert 0 < buckets["closed"].take_or_delay() <= 1
    with pytest.raises(RateLimitExceeded):
        buckets["closed"].wait(timeout=0.01)
    buckets["open"].refund(1)
    buckets["local"].charge(3)
    (error,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert (
        ". Until it does, each bucket there grants this process's share of its rate, or what its on_outage says"
        in error
    )
    assert ".." not in error  # redis-py ends its text with a full stop
    own.start()
    for bucket in buckets.values():
        wait_for(lambda bucket=bucket: bucket.tokens >= 0 and not bucket.server.outages.is_down)
        bucket.allow(0.5)
    assert buckets["open"].tokens <= 0.01  # what was granted without it is charged, up to the capacity
    assert buckets["closed"].tokens == pytest.approx(3.5, abs=0.01)
    assert buckets["local"].tokens == pytest.approx(4 - 2 - 3, abs=0.6)
    assert "answers again" in caplog.text


def test_a_pause_during_an_outage_reaches_the_server(own):
    """It counts here at once, and for the others once the server answers."""
    bucket = RedisTokenBucket("b", 4, 100, url=own.url)
    assert bucket.allow()
    own.kill()
    bucket.pause(30)
    assert not bucket.allow()
    own.start()
    wait_for(lambda: bucket.take_or_delay() and bucket.pause_left > 20)


def test_a_server_that_does_not_answer(own):
    """A call ends after the timeout, and the next ones do not wait for it."""
    bucket = RedisTokenBucket("b", 4, 100, url=own.url, on_outage="closed", timeout=0.1)
    assert bucket.allow()
    own.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert [bucket.allow() for _ in range(50)] == [False] * 50
    assert time.monotonic() - began < 1
    own.process.send_signal(signal.SIGCONT)
    wait_for(bucket.allow)


def test_what_was_granted_is_charged_once(own):
    """However many callers come at once when the server is back, and whatever a forked child does."""
    bucket = RedisTokenBucket("b", 10, 0.01, url=own.url, on_outage="open")
    assert bucket.allow(10)
    own.kill()
    assert [bucket.allow() for _ in range(12)] == [True] * 12
    own.start()
    wait_for(lambda: not bucket.server.outages.left)
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda _: bucket.allow(), range(16)))
    # It was full again, 10 were charged, and 10 may have been granted before that.
    assert -10.1 <= bucket.tokens <= 0.1


def test_a_long_outage_is_charged_up_to_the_capacity(own):
    """However often the server was asked in vain meanwhile; what a task charges itself is charged whole."""
    bucket = RedisTokenBucket("b", 10, 0.01, url=own.url, on_outage="open")
    assert bucket.allow()
    own.kill()
    for _ in range(3):
        assert [bucket.allow() for _ in range(12)] == [True] * 12
        wait_for(lambda: not bucket.server.outages.left)
    bucket.charge(5)
    own.start()
    wait_for(lambda: not bucket.server.outages.left)
    bucket.allow(0.5)
    assert -5.6 <= bucket.tokens <= -4.9  # it was full again


def test_a_shadow_is_refused(make, per_key):
    """Its bucket would be asked in a worker's loop; also within an AllOf, and those of keys."""
    for bucket in make(1, 1), AllOf(TokenBucket(1, 1), make(1, 1)):
        with pytest.raises(ValueError, match="shadow is for a bucket in this process"):
            new_limit(bucket, shadow=True)
    with pytest.raises(ValueError, match="shadow is for a bucket in this process"):
        new_limit(per_key(1, 1), key="tenant", shadow=True)
    limit = new_limit(lambda *_: make(1, 1), shadow=True)  # it is seen with the first job
    with pytest.raises(ValueError, match="expected a bucket in this process, for a shadow"):
        limit.demands(Call("task job", (), {}, None, None))


def test_each_outage_begins_anew(own):
    """What paused, or refilled, the share of one outage is none of the next one's."""
    bucket = RedisTokenBucket("b", 10, 0.01, url=own.url)
    assert bucket.allow(10)
    own.kill()
    bucket.pause(60)
    assert not bucket.allow()
    bucket.resume()
    assert bucket.take_or_delay() < 200
    own.start()
    wait_for(lambda: bucket.take_or_delay() == 0.0 and not bucket.server.outages.is_down)
    own.kill()
    assert [bucket.allow() for _ in range(11)] == [True] * 9 + [False] * 2


def test_capacity_that_an_operator_has_raised(url):
    """A process that starts later learns it from the server, and no call is refused for the old number."""
    name = uuid4().hex
    RedisTokenBucket(name, 10, 1000, url=url).configure(capacity=100)
    redis_server._servers.clear()  # another process
    bucket = RedisTokenBucket(name, 10, 1000, url=url)
    bucket.wait(50)
    assert bucket.capacity == 100
    bucket.configure(capacity=3)
    redis_server._servers.clear()
    bucket = RedisTokenBucket(name, 10, 1000, url=url)
    assert not bucket.allow(5)
    with pytest.raises(ValueError, match="at most the capacity 3, not 5"):
        bucket.wait(5)


def test_long_waits_keep_their_order(make, monkeypatch):
    """A waiter looks meanwhile whether somebody has changed the bucket, and does not ask before its turn."""
    monkeypatch.setattr(redis_bucket, "_LOOK", 0.1)
    bucket, order = make(1, 2.5), []
    bucket.allow()

    def wait(name):
        bucket.wait()
        order.append(name)

    with ThreadPoolExecutor(5) as threads:
        for name in range(5):
            threads.submit(wait, name)
            time.sleep(0.2)
    assert order == list(range(5))


def test_a_change_reaches_waiters(make, monkeypatch):
    """A higher rate, and the end of a pause."""
    monkeypatch.setattr(redis_bucket, "_LOOK", 0.1)
    bucket = make(1, 0.001)
    bucket.allow()
    with ThreadPoolExecutor(1) as threads:
        waiter = threads.submit(bucket.wait)
        time.sleep(0.2)
        bucket.configure(tokens_per_second=50)
        waiter.result(DEADLINE)
        bucket.pause(600)
        waiter = threads.submit(bucket.wait)
        time.sleep(0.3)
        bucket.resume()
        waiter.result(DEADLINE)
    bucket.restore()


# -- for a gate -------------------------------------------------------------------------------------


def taken(asked, tokens=1):
    """Take from what a gate takes from, with a job that waits."""
    asked.jobs_wait(tokens)
    wait_for(lambda: asked.take_or_delay(tokens) == 0.0)
    asked.jobs_wait(0)


@pytest.mark.parametrize("policy", ["open", "local"])
def test_a_gate_finds_out_that_the_server_is_back(own, policy):
    """Also if no job waits meanwhile, for all are granted here."""
    bucket = RedisTokenBucket("b", 4, 100, url=own.url, on_outage=policy)
    asked = bucket.for_gate()
    taken(asked)
    own.kill()
    asked.jobs_wait(1)
    wait_for(lambda: not asked.take_or_delay() and bucket.server.outages.is_down)
    asked.jobs_wait(0)
    own.start()
    wait_for(lambda: not bucket.server.outages.is_down)
    wait_for(lambda: not bucket._state.has_missed)
    taken(asked)


def test_a_gate_that_forgets_its_jobs_asks_no_more(make, url):
    """After a lost connection to the broker: what it was promised and has not used is for the others."""
    bucket = make(2, 50)
    clock = time.monotonic
    engine = Engine(Host(), lambda _: (Limit(bucket, name="limit"),), clock=clock)
    plan = engine.plan("job")
    assert {engine.offer(number, plan)[0] for number in range(20)} == {"held"}
    wait_for(engine.release)
    engine.clear()
    time.sleep(0.2)
    with redis.Redis.from_url(url) as client:
        before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
        time.sleep(0.5)
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - before <= 2
    assert bucket.tokens == 2


class Slots(host.Host):
    """A pool whose slots are free when a test says so."""

    has_slots = True

    def __init__(self, bucket, tokens=1):
        limit = Limit(bucket, tokens=tokens, name="limit")
        self.engine = Engine(self, lambda _: (limit,))
        self.waiting = []

    def unstarted(self, job):
        """Tell whether a job waits for a slot."""
        return any(job is each for each, _ in self.waiting)

    def offer(self, *jobs):
        """Offer jobs to the gate."""
        plan = self.engine.plan("job")
        for job in jobs:
            decision, demands = self.engine.offer(job, plan)
            if decision == "go":
                self.waiting.append((job, demands))

    def release(self):
        """Return how many jobs wait for a slot."""
        self.waiting += [(held.job, held.demands) for held in self.engine.release()]
        return len(self.waiting)

    def start(self, count=None):
        """Start them: so many, or all."""
        starting = self.waiting[:count]
        del self.waiting[:count]
        for job, demands in starting:
            self.engine.started(job, demands)


def test_what_came_back_while_jobs_waited_for_slots_is_not_granted(make):
    """They have paid, and start now: with what the bucket has then, they are at most its capacity."""
    bucket = make(5, 5)
    pool = Slots(bucket)
    pool.offer(*range(20))
    wait_for(lambda: pool.release() == 5)
    time.sleep(1.2)  # the bucket is full again
    assert bucket.tokens == 5
    began = time.monotonic()
    pool.start()
    wait_for(lambda: pool.release() == 3)
    assert time.monotonic() - began > 0.35  # the first of the three goes at once at the most


def test_jobs_that_wait_for_slots_take_nothing_from_other_workers(make, monkeypatch):
    """A gate whose pool is busy asks no more: it would only give the tokens back."""
    bucket, asked = make(1, 50), []
    run_all = bucket.server.run_all
    monkeypatch.setattr(bucket.server, "run_all", lambda each: asked.append(each) or run_all(each))
    pool = Slots(bucket)
    pool.offer(*range(5))
    wait_for(lambda: pool.release() == 1)
    time.sleep(0.2)  # what was asked for before it stopped goes back
    asked.clear()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        assert pool.release() == 1
        time.sleep(0.01)
    assert not asked
    assert bucket.tokens == 1
    pool.start()
    wait_for(lambda: pool.release() == 1)


def test_room_is_left_beside_what_others_were_promised(timed):
    """A worker whose slots become free now and then keeps no heavy job of another one from its tokens."""
    key = uuid4().hex

    def run(jobs, promise, seconds, held=0, unit=0, room=0):
        arguments = [f"take {jobs} {promise} 1", f"10 10 0 0 0 {held} {unit} {room} 0"]
        given, wait, _, promised, _, level = timed(
            [key], arguments, (100 + seconds) * 1_000_000
        ).split()
        return int(given), float(wait) / 1e6, float(promised), float(level)

    assert run(1, 1, 0, unit=5) == (0, 0.5, 5, 0)
    assert run(0, 0, 0.4, room=10)[3] == pytest.approx(4)
    assert run(0, 0, 0.8, room=10)[3] == pytest.approx(5)
    assert run(1, 1, 0.8, held=5, unit=5)[0] == 1
    assert run(0, 0, 1.8, room=7)[3] == pytest.approx(3)


def test_tokens_that_no_job_takes_go_back(make):
    """Also if the gate looks just before at what somebody has changed."""
    bucket = make(5, 100)
    asked = bucket.for_gate()
    asked.jobs_wait(5)
    wait_for(lambda: asked.take_or_delay() == 0.0 and asked.tokens)
    asked._asker.need_at(time.monotonic() + 0.02, asked)
    asked._wants_look = True
    asked.jobs_wait(0)
    wait_for(lambda: not asked.tokens)
    assert bucket.tokens == 5


def test_tokens_go_back_while_jobs_go_on_to_come(make):
    """Jobs that come and cannot start do not keep them here."""
    asked = make(5, 100).for_gate()
    asked.jobs_wait(5)
    wait_for(lambda: asked.take_or_delay() == 0.0 and asked.tokens)
    asked.jobs_wait(0)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        asked.jobs_wait(0)
        time.sleep(0.01)
    assert not asked.tokens


@pytest.fixture
def held_up(monkeypatch):
    """Return what holds up the calls to a bucket's server, until its `set` is called."""

    def hold_up(bucket):
        run_all, goes = bucket.server.run_all, threading.Event()
        monkeypatch.setattr(
            bucket.server, "run_all", lambda each: goes.wait(DEADLINE) and run_all(each)
        )
        return goes

    return hold_up


def test_a_promise_that_comes_too_late_goes_back(make, held_up):
    """The job that waited for it is gone meanwhile."""
    bucket = make(1, 0.01)
    asked = bucket.for_gate()
    taken(asked)
    time.sleep(0.2)  # nothing is planned any more
    goes = held_up(bucket)
    asked.jobs_wait(1)
    asked.take_or_delay()
    wait_for(lambda: asked._is_out)
    asked.jobs_wait(0)
    goes.set()
    wait_for(lambda: not asked._is_out)
    wait_for(lambda: not asked._promised)
    assert asked._state.level < 0.1


def test_jobs_of_two_buckets_leave_room_in_both(make, held_up):
    """Before any is granted: one call asks for both, whichever bucket is named first."""
    one, two = make(20, 0.01), make(10, 0.01)
    first, second = one.for_gate(), two.for_gate()
    limits = [Limit(one, name="one"), Limit(two, name="two")]
    demands = [Demand(first, 1, limits[0]), Demand(second, 1, limits[1])]
    goes = held_up(one)
    other = make(1, 1).for_gate()
    other.look()
    wait_for(lambda: other._is_out)
    first.jobs_wait(5, demands)
    first.take_or_delay()
    second.leave_room(10)
    goes.set()
    wait_for(lambda: first._promised)
    assert (first.tokens, second.tokens) == (0, 0)
    assert two.tokens < 1


def test_promises_that_were_given_up_are_forgotten(make):
    """A slow limit that refuses its jobs is promised tokens for each, which come in an hour."""
    bucket = make(1, 1 / 3600)
    asked = bucket.for_gate()
    taken(asked)
    for _ in range(30):
        asked.jobs_wait(1)
        wait_for(lambda: asked.take_or_delay() > 3500)
        asked.jobs_wait(0)
        wait_for(lambda: not asked._promised)
    assert len(asked._asker._later) < 20


def test_jobs_of_different_costs(make, url):
    """Heavy ones are not starved, and the server is asked a few times for each job."""
    bucket = make(10, 60)
    with redis.Redis.from_url(url) as client:
        before = client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)
        engines = []
        for _ in range(2):
            limit = Limit(bucket, tokens=lambda job: job[1], name="limit")
            engine = Engine(Host(), lambda _, limit=limit: (limit,))
            for number in range(16):
                engine.offer((number, (1, 1, 1, 7)[number % 4]), engine.plan("job"))
            engines.append((engine, []))
        while any(len(went) < 16 for _, went in engines):
            for engine, went in engines:
                went += [held.job[0] for held in engine.release()]
            time.sleep(0.002)
        for _, went in engines:
            assert went == list(range(16))
        calls = client.info("commandstats")["cmdstat_evalsha"]["calls"] - before
    assert calls < 4 * 32


class Host(host.Host):
    """A gate of the engine, without a worker."""

    def call_of(self, job, asks_headers):
        """Give what it costs."""
        return Call("job", (job,), {})


# -- beside the rest --------------------------------------------------------------------------------


def test_it_limits_a_function(make):
    """In the decorator, with the policies there."""
    bucket = make(2, 0.001)

    @throttle(bucket, when_limited="raise", name="limit")
    def call():
        return "done"

    assert [call(), call()] == ["done", "done"]
    with pytest.raises(RateLimitExceeded):
        call()


def test_all_or_none(make):
    """In an AllOf, beside a local bucket."""
    bucket, local = make(5, 0.001), TokenBucket(1, 0.001)
    both = AllOf(bucket, local)
    assert (both.allow(), both.allow()) == (True, False)
    assert bucket.tokens == pytest.approx(4, abs=0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_uses_it(make):
    """While another thread of the parent does, too."""
    bucket, stop = make(1e9, 1), threading.Event()

    def hammer():
        while not stop.is_set():
            bucket.allow()

    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        for _ in range(5):
            child = os.fork()
            if not child:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(20)
                os._exit(0 if bucket.allow() else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()


# -- several together -------------------------------------------------------------------------------


@pytest.fixture
def calls(url):
    """Return what counts the calls of the script."""
    with redis.Redis.from_url(url) as client:
        yield lambda: client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)


def test_several_are_taken_in_one_call(make, calls):
    """From all or from none: a refusal by one costs no other anything, and the delay is the longest one."""
    quick, slow = make(5, 100_000), make(1, 0.2)
    both = AllOf(quick, slow)
    assert both.allow()
    before = calls()
    assert not both.allow()
    assert 2 < both.take_or_delay() <= 5
    assert calls() - before == 2
    assert quick.tokens == 5
    with pytest.raises(ValueError, match="at most the capacity 1, not 2"):
        both.take_or_delay(2)
    assert not both.allow(2)


def test_waiters_for_several_are_served_in_turn(make):
    """At the slower bucket's rate; one that gives up takes nothing and is promised nothing."""
    quick, slow = make(5, 1000), make(1, 2)
    both, order = AllOf(quick, slow), []
    both.allow()

    def wait(name):
        both.wait()
        order.append(name)

    with ThreadPoolExecutor(5) as threads:
        for name in range(5):
            threads.submit(wait, name)
            time.sleep(0.15)
        with pytest.raises(RateLimitExceeded):
            both.wait(timeout=0.01)
    assert order == list(range(5))
    wait_for(lambda: slow.tokens == 1)
    assert (both.allow(), slow.allow()) == (True, False)


def test_a_local_bucket_is_asked_first(make, calls):
    """What it refuses is not asked for, and what Redis refuses goes back to it at no cost."""
    local, far = TokenBucket(2, 0.001), make(1, 0.001)
    both = AllOf(far, local)
    assert (both.allow(), both.allow()) == (True, False)
    assert local.tokens == pytest.approx(1, abs=0.01)
    local.allow()
    before = calls()
    assert not both.allow()
    assert calls() == before


def test_hash_tags(url):
    """Buckets that a Redis Cluster would place apart cannot be taken together, if their names say so."""
    one, same, other = (RedisTokenBucket(name, 1, 1, url=url) for name in ("a{x}", "b{x}", "c{y}"))
    assert AllOf(one, same, RedisTokenBucket("without", 1, 1, url=url))
    with pytest.raises(ValueError, match=r"one hash tag, not 'x' \(of 'b\{x\}'\), 'y' \(of 'c\{y\}'\)"):
        AllOf(one, AllOf(same, other))


def drive(engine, jobs, most=DEADLINE):
    """Let an engine release all jobs, and return them in order."""
    went, until = [], time.monotonic() + most
    while len(went) < jobs and time.monotonic() < until:
        went += [held.job for held in engine.release()]
        time.sleep(0.001)
    return went


@pytest.mark.parametrize("apart", [False, True], ids=["AllOf", "two limits"])
@pytest.mark.parametrize("slow_first", [False, True])
def test_a_gate_asks_for_several_together(make, calls, apart, slow_first):
    """All jobs go in order at the rate of the slower bucket, in about one call each, and little goes back."""
    buckets = [make(6, 100), make(6, 50)]
    if slow_first:
        buckets.reverse()
    limits = [Limit(bucket, name=str(number)) for number, bucket in enumerate(buckets)]
    limits = limits if apart else [Limit(AllOf(*buckets), name="both")]
    engine = Engine(Host(), lambda _: tuple(limits))
    before = calls()
    for number in range(60):
        engine.offer(number, engine.plan("job"))
    assert drive(engine, 60) == list(range(60))
    assert calls() - before < 60 * 1.5 + 10
    slow = min(buckets, key=lambda bucket: bucket.tokens_per_second)
    assert slow.tokens < 6


@pytest.mark.parametrize("local_rate", [40, 400], ids=["local is slower", "Redis is slower"])
def test_a_gate_with_a_local_bucket_beside(make, calls, local_rate):
    """Tokens are fetched only for as many jobs as the local bucket lets go."""
    local, far = TokenBucket(4, local_rate), make(6, 60)
    engine = Engine(Host(), lambda _: (Limit(AllOf(far, local), name="both"),))
    before = calls()
    for number in range(50):
        engine.offer(number, engine.plan("job"))
    assert drive(engine, 50) == list(range(50))
    assert calls() - before < 50 * 2


def test_a_job_that_costs_more_than_a_bucket_beside_can_hold(make):
    """It fails with that error, and the others go on."""
    failed = []
    many, few = make(10, 100), make(2, 100)
    limit = Limit(AllOf(many, few), tokens=lambda job: 5 if job == 3 else 1, name="both")

    class Failing(Host):
        def fail(self, job, error):
            failed.append((job, str(error)))

    engine = Engine(Failing(), lambda _: (limit,))
    for number in range(8):
        engine.offer(number, engine.plan("job"))
    assert drive(engine, 7) == [0, 1, 2, 4, 5, 6, 7]
    assert failed == [(3, "tokens must be at most the capacity 2, not 5")]


# -- one per key ------------------------------------------------------------------------------------


@pytest.fixture
def per_key(url):
    """Return what makes buckets per key that nobody else uses."""
    return lambda *numbers, **options: BucketPerKey(*numbers, redis=url, name=uuid4().hex, **options)


def test_each_key_has_a_bucket_for_all_processes(url):
    """Equal keys of two objects, in two processes, are one bucket; other keys are others."""
    name = uuid4().hex
    one = BucketPerKey(2, 0.001, redis=url, name=name)
    assert one["a"].allow(2)
    redis_server._servers.clear()  # another process
    other = BucketPerKey(2, 0.001, redis=redis.Redis.from_url(url), name=name)
    assert (other["a"].allow(), other["b"].allow()) == (False, True)
    assert other["a"] == other["a"]
    assert isinstance(other["a"], Bucket)


def test_no_two_keys_have_one_bucket(per_key, url):
    """A number and its text are two keys, as in every BucketPerKey; True is the key 1."""
    tenants = per_key(1, 0.001)
    keys = [
        "1",
        1,
        "(int)1",
        "(str)1",
        ("1",),
        (1,),
        ("1", "2"),
        ('1", "2',),
        UUID(int=1),
        str(UUID(int=1)),
    ]
    assert [tenants[key].allow() for key in keys] == [True] * len(keys)
    assert not tenants[True].allow()
    with redis.Redis.from_url(url) as client:
        assert len(client.keys("rate_limiter:bucket:*")) == len(keys)


def test_own_numbers_of_a_key(per_key):
    """They come from limits, and stay when all others are changed."""
    tenants = per_key(2, 0.001, limits=lambda key: (5, 0.001) if key == "gold" else None)
    assert tenants["gold"].allow(5)
    assert not tenants["tin"].allow(5)
    tenants.configure(capacity=7, reason="a test")
    tenants["tin"].refund(7)
    assert tenants["tin"].tokens == pytest.approx(7, abs=0.01)
    assert tenants["gold"].tokens < 1
    assert (tenants["gold"].capacity, tenants["tin"].capacity) == (5, 7)


def test_numbers_are_stored_for_all_keys_and_for_one(url):
    """Those of a key count before those of all; processes that start later know them, until they are restored."""
    name = uuid4().hex
    tenants = BucketPerKey(2, 1, redis=url, name=name)
    tenants.configure(tokens_per_second=3, reason="all")
    tenants["a"].configure(tokens_per_second=4, reason="one", who="anna")
    redis_server._servers.clear()  # another process
    tenants = BucketPerKey(2, 1, redis=url, name=name)
    buckets = one, other = tenants["a"], tenants["b"]
    assert [(bucket.tokens, bucket.tokens_per_second) for bucket in buckets] == [(2, 4), (2, 3)]
    assert one.known.stored[3:] == ("one", "anna")
    one.restore()
    assert (one.tokens, one.tokens_per_second) == (2, 3)
    tenants.restore()
    assert (other.tokens, other.tokens_per_second) == (2, 1)
    with pytest.raises(TypeError, match="is not in Redis"):
        BucketPerKey(1, 1).restore()


def test_keys_that_are_full_leave_nothing(per_key, url):
    """Neither here nor in Redis."""
    tenants = per_key(1, 50)
    for number in range(200):
        tenants[number].allow()
    time.sleep(0.05)
    for number in range(200, 400):
        tenants[number].allow()
    assert len(tenants) < 250  # of 400
    with redis.Redis.from_url(url) as client:
        wait_for(lambda: not client.keys("rate_limiter:bucket:*"))


def test_more_keys_than_are_kept(per_key):
    """Each has its own bucket all the same."""
    tenants = per_key(1, 0.001, max_keys=10)
    assert all(tenants[number].allow() for number in range(30))
    assert not any(tenants[number].allow() for number in range(30))
    assert len(tenants) == 10


def test_what_a_key_owes_is_not_forgotten(own):
    """A charge during an outage reaches the server, though this process has forgotten the key meanwhile."""
    tenants = BucketPerKey(4, 0.001, redis=own.url, name="t")
    assert tenants["a"].allow()
    own.kill()
    tenants["a"].charge(3)
    for number in range(20):
        assert tenants[number].tokens >= 0
    gc.collect()
    own.start()
    wait_for(lambda: tenants["b"].tokens and not tenants["b"].server.outages.is_down)
    assert tenants["a"].allow(0.5)
    assert tenants["a"].tokens == pytest.approx(4 - 3 - 0.5, abs=0.1)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"name": "n"}, TypeError, "redis and name go together"),
        ({"redis": "redis://localhost"}, TypeError, "redis and name go together"),
        ({"redis": "http://x", "name": "n"}, ValueError, "url must be the URL of a Redis"),
        (
            {"redis": "redis://localhost", "name": "n", "on_outage": "no"},
            ValueError,
            "on_outage must be",
        ),
    ],
)
def test_wrong_arguments_of_keys(options, error, says):
    """An error where it is written."""
    with pytest.raises(error, match=says):
        BucketPerKey(1, 1, **options)


# -- the first level, and stored numbers ------------------------------------------------------------


def test_a_new_bucket_starts_with_initial(make, url):
    """And a refusal does not begin it anew; it is known for a day after it is full."""
    bucket = make(10, 10, initial=0)
    assert not bucket.allow()
    time.sleep(0.25)
    assert bucket.allow(2)
    with redis.Redis.from_url(url) as client:
        assert 86_400_000 < client.pttl(f"rate_limiter:bucket:{bucket.name}") <= 86_401_000
    with pytest.raises(ValueError, match="initial must be at most the capacity 10, not 11"):
        make(10, 10, initial=11)


def test_what_is_known_without_the_server(make, own):
    """The level as told last and what has come since; what was stored, when, why, by whom; and an outage."""
    bucket = make(10, 0.001)
    bucket.allow(4)
    assert bucket.known.tokens == pytest.approx(6, abs=0.1)
    assert bucket.known[1:] == (0, (10, 0.001), None, False)
    bucket.configure(capacity=20, reason="a test", who="anna")
    stored = bucket.known.stored
    assert (stored.capacity, stored.tokens_per_second, stored.reason, stored.who) == (
        20,
        0.001,
        "a test",
        "anna",
    )
    assert stored.at.startswith("20")
    bucket.restore()
    assert bucket.known.stored is None
    far = RedisTokenBucket("b", 1, 1, url=own.url)
    own.kill()
    far.allow()
    assert far.known.is_outage


def test_code_that_changed_under_stored_numbers(url, caplog):
    """It is told once: the stored ones count until they are cleared."""
    name = uuid4().hex
    RedisTokenBucket(name, 10, 1, url=url).configure(capacity=20, reason="a test", who="anna")
    for numbers in (10, 1), (10, 2):
        redis_server._servers.clear()  # another process
        bucket = RedisTokenBucket(name, *numbers, url=url)
        bucket.allow()
        bucket.allow()
        assert bucket.capacity == 20
    (record,) = caplog.records
    assert "the code says capacity 10, 2 tokens_per_second now" in record.message
    assert "which anna has set at 20" in record.message
    assert "(a test)" in record.message
