"""Signals, killed greenlets and forks: whatever strikes, nothing is lost and nobody is left waiting."""

import contextlib
import ctypes
import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
from processes import children, in_child
from waiters import Job, assert_idle, eventually, line_up, moments

from rate_limiter import RateLimitExceeded, SharedTokenBucket, TokenBucket
from rate_limiter.testing import ManualClock
from rate_limiter.token_bucket import _after_fork_in_child

SRC = Path(__file__).parents[2] / "src"
MAIN = threading.main_thread()

needs_signals = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def clock():
    """Return a clock that stands still until the test moves it on."""
    return ManualClock(auto_advance=False)


class Interrupted(BaseException):
    """What strikes, like ``KeyboardInterrupt``, a soft time limit or ``GreenletExit``."""


def in_wait(frame):
    """Tell whether this frame is, or was called from, `TokenBucket.wait`."""
    while frame is not None and frame.f_code is not TokenBucket.wait.__code__:
        frame = frame.f_back
    return frame is not None


# -- at every single point ---------------------------------------------------------------------


class Stage(ManualClock):
    """A clock on which the first wait of the main thread has a script play instead of sleeping."""

    def __init__(self):
        super().__init__(auto_advance=False)
        self.script = None
        self.used_by_others = 10

    def wait_for(self, alarm, seconds):
        """Sleep, or play the script."""
        if threading.current_thread() is not MAIN:
            super().wait_for(alarm, seconds)
        elif self.script is not None:
            profile = sys.getprofile()
            sys.setprofile(None)
            script, self.script = self.script, None
            script()
            sys.setprofile(profile)
        else:
            assert alarm.acquire(timeout=30)


def interrupt(point):
    """Raise in `wait` where CPython looks for signals for the ``point``-th time: at calls."""
    passed = count()

    def profile(frame, event, _):
        if event in ("call", "c_return") and in_wait(frame) and next(passed) == point:
            sys.setprofile(None)
            raise Interrupted

    sys.setprofile(profile)


def at_once(bucket, clock):
    """Find the tokens there."""
    bucket.refund(5)
    clock.used_by_others = 5
    return [], {}


def as_head(bucket, clock):
    """Have another line up behind; then there are the tokens of both."""
    jobs = []

    def script():
        jobs.extend(line_up(bucket, 2))
        clock.used_by_others = 10 + 2
        clock.advance(5)

    clock.script = script
    return jobs, {}


def as_second(bucket, clock):
    """Stand behind one; another lines up behind; then there are the tokens of all three."""
    jobs = line_up(bucket, 1)
    clock.used_by_others = 10 + 1

    def script():
        jobs.extend(line_up(bucket, 2))
        clock.used_by_others = 10 + 1 + 2
        clock.advance(6)

    clock.script = script
    return jobs, {}


def as_head_whose_time_is_up(bucket, clock):
    """Have another line up behind; then somebody takes what was promised, and time is up."""
    jobs = []

    def script():
        jobs.extend(line_up(bucket, 2))
        bucket.charge(3)
        clock.used_by_others = 10 + 2 + 3
        clock.advance(5)

    clock.script = script
    return jobs, {"timeout": 5}


@pytest.mark.parametrize("scene", [at_once, as_head, as_second, as_head_whose_time_is_up])
def test_interrupt_at_every_point(new_queue, scene):
    """Wherever it strikes in `wait`: taken or not, never half, and the next one moves up."""
    for point in count():
        clock = Stage()
        bucket = new_queue(10, 1, clock=clock)
        bucket.allow(10)
        jobs, options = scene(bucket, clock)
        outcome = None
        interrupt(point)
        try:
            bucket.wait(3, **options)
            bucket.refund(3)
        except (Interrupted, RateLimitExceeded) as error:
            outcome = error
        finally:
            sys.setprofile(None)
        clock.advance(1)
        for job in jobs:
            job.result()
        assert_idle(bucket)
        # The bucket was never full, so all that time brought is there or was taken.
        assert 10 + clock.now - bucket.tokens == clock.used_by_others, f"point {point}"
        if not isinstance(outcome, Interrupted):
            assert point >= 5
            return


def test_interrupt_as_the_turn_comes(new_queue, clock):
    """A waiter that is struck down as it is woken hands the turn on."""
    bucket = new_queue(10, 1, clock=clock)
    bucket.allow(10)
    head, struck, last = line_up(bucket, 1, 5, 2)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(struck.ident), ctypes.py_object(Interrupted)
    )
    clock.advance(1)
    head.result()
    with pytest.raises(Interrupted):
        struck.result()
    eventually(lambda: moments(clock) == [3.0])
    clock.advance(2)
    last.result()
    assert bucket.tokens == 0
    assert_idle(bucket)


# -- signals -----------------------------------------------------------------------------------


@pytest.fixture
def alarm():
    """Install a handler for SIGALRM; ``alarm(handler)`` returns what sets it off after some seconds."""
    before = signal.getsignal(signal.SIGALRM)

    def install(handler):
        signal.signal(signal.SIGALRM, lambda _, frame: handler(frame))
        return lambda seconds, again=0.0: signal.setitimer(signal.ITIMER_REAL, seconds, again)

    yield install
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def strike_in_wait(frame):
    """Raise if `wait` is on the stack, once; else the timer strikes again.

    It has to strike again in any case: a signal between CPython's last look for one and the system
    call that sleeps does not end the sleep.
    """
    if in_wait(frame):
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise Interrupted


#: pytest-timeout uses SIGALRM too, unless told otherwise.
uses_alarm = pytest.mark.timeout(method="thread")


@needs_signals
@uses_alarm
def test_signal_handler_may_ask(alarm):
    """A handler that takes from the bucket which the main thread is in the midst of using."""
    bucket = TokenBucket(1e9, 1, clock=ManualClock())
    by_handler = []
    set_off = alarm(lambda _: by_handler.append(bucket.allow() and not bucket.take_or_delay(1)))
    taken = 0
    set_off(1e-4, 1e-4)
    while len(by_handler) < 1000:
        taken += bucket.allow()
        bucket.wait()
        bucket.refund(1)
    set_off(0)
    assert all(by_handler)
    assert bucket.tokens == 1e9 - taken - 2 * len(by_handler)


@needs_signals
@uses_alarm
@pytest.mark.parametrize("in_front", [0, 1], ids=["head", "middle"])
def test_signal_while_asleep(new_queue, alarm, clock, in_front):
    """A handler raises at any moment of a wait that does not end: nothing is taken or left behind."""
    bucket = new_queue(10, 1, clock=clock)
    bucket.allow(10)
    jobs = line_up(bucket, *[4] * in_front)

    set_off = alarm(strike_in_wait)
    for _ in range(2000):
        with pytest.raises(Interrupted):  # noqa: PT012
            set_off(random.uniform(2e-6, 2e-4), 1e-3)
            bucket.wait(3)
        assert bucket._ahead == 4 * in_front
        assert bucket._tail is bucket._head
    clock.advance(4)
    for job in jobs:
        job.result()
    assert bucket.tokens == 4 - 4 * in_front
    assert_idle(bucket)


@needs_signals
@uses_alarm
def test_signal_while_taking(new_queue, alarm):
    """A handler raises at any moment of a wait that is served at once: it was taken, or it was not."""
    bucket = new_queue(1e9, 1, clock=ManualClock())
    struck = taken = 0

    set_off = alarm(strike_in_wait)
    while struck < 2000:
        set_off(random.uniform(2e-6, 1e-4), 1e-3)
        try:
            while True:
                bucket.wait()
                taken += 1
        except Interrupted:
            struck += 1
    assert bucket.tokens == 1e9 - taken
    assert_idle(bucket)


@needs_fork
@needs_signals
@uses_alarm
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_signal_beside_other_processes(alarm):
    """A handler raises at any moment of a wait, others take besides: no token is lost, none taken twice."""
    bucket = SharedTokenBucket(1e9, 1, clock=ManualClock())
    stop = time.monotonic() + 1.5

    def take(_):
        taken = 0
        while time.monotonic() < stop:
            bucket.wait(2)
            taken += 2 + bucket.allow()
        return taken

    struck = taken = 0
    with children(2, take) as running:
        set_off = alarm(strike_in_wait)
        while time.monotonic() < stop:
            set_off(random.uniform(2e-6, 1e-4), 1e-3)
            try:
                while time.monotonic() < stop:
                    bucket.wait()
                    taken += 1
            except Interrupted:
                struck += 1
        set_off(0)
        taken += sum(child.result() for child in running)
    assert struck > 100
    assert bucket.tokens == 1e9 - taken
    assert_idle(bucket)


@needs_signals
@uses_alarm
def test_signal_among_waiting_threads(new_queue, alarm):
    """The main thread is struck in a line that moves, as its head or further back: the line goes on."""
    bucket = new_queue(4, 10_000)
    start = bucket._clock()
    others = [Job(lambda: [bucket.wait(2) for _ in range(1500)]) for _ in range(3)]
    struck = taken = 0

    set_off = alarm(strike_in_wait)
    while any(job.is_alive() for job in others):
        set_off(random.uniform(2e-6, 5e-4), 1e-3)
        try:
            while any(job.is_alive() for job in others):
                bucket.wait(1)
                taken += 1
        except Interrupted:
            struck += 1
    set_off(0)
    for job in others:
        taken += 2 * len(job.result())
    assert struck > 100
    assert taken <= 4 + 10_000 * (bucket._clock() - start) + 1e-6
    assert_idle(bucket)


# -- greenlets ---------------------------------------------------------------------------------

GREENLETS = """
from gevent import monkey; monkey.patch_all()
import gevent
from rate_limiter import TokenBucket

bucket = TokenBucket(10, 50)
assert bucket.allow(10)
head, middle, last = (gevent.spawn(bucket.wait, cost) for cost in (10, 9, 1))
while bucket._ahead < 20:
    gevent.idle()
middle.kill()
head.kill()
last.get(timeout=30)
assert bucket._head is None and bucket._ahead == 0.0
assert bucket.take_or_delay(bucket.tokens / 2) == 0.0
"""


@pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="needs gevent")
def test_killed_greenlets():
    """A greenlet that is killed while it waits leaves the line, and the next one moves up."""
    subprocess.run([sys.executable, "-c", GREENLETS], cwd=SRC, check=True, timeout=60)


# -- forks -------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_in_the_midst_of_it():
    """Whatever other threads are doing in the bucket as it is forked, the child can use it."""
    bucket = TokenBucket(1000, 1e6)
    done = threading.Event()

    def hammer(ask):
        while not done.is_set():
            ask(300)

    jobs = [Job(hammer, ask) for ask in (bucket.allow, bucket.wait, bucket.wait, bucket.take_or_delay)]

    def check():
        bucket.wait(500)
        return bucket._head is None and bucket.take_or_delay(1) == 0.0 and bucket.allow()

    for _ in range(30):
        assert in_child(check)
    done.set()
    for job in jobs:
        job.result()


def test_a_fork_costs_the_same_whatever_is_idle(new_queue):
    """What is done after a fork does not grow with the buckets that there are, nor with past waits."""

    def calls():
        made = count()

        def profile(frame, event, _):
            next(made)

        sys.setprofile(profile)
        try:
            _after_fork_in_child()
        finally:
            sys.setprofile(None)
        return next(made)

    before = calls()
    clock = ManualClock()
    buckets = [new_queue(1, 1, clock=clock) for _ in range(100)]
    for bucket in buckets:
        bucket.wait()
        bucket.wait()  # this one sleeps
        assert bucket._head is None
    assert calls() <= before


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_while_locks_are_held(clock):
    """Whichever locks are held as the process is forked, the child finds none of them held."""
    buckets = [TokenBucket(10, 1, clock=clock) for _ in range(1000)]
    with contextlib.ExitStack() as held:
        for lock in {bucket._lock for bucket in buckets}:
            held.enter_context(lock)
        assert in_child(lambda: all(bucket.allow(10) and not bucket.allow() for bucket in buckets))
    assert all(bucket.allow(10) for bucket in buckets)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_in_the_midst_of_a_wait(new_queue):
    """A process that is forked while it waits (a greenlet, a signal handler) waits on, as its child does."""
    children = []

    class Forking(ManualClock):
        def wait_for(self, alarm, seconds):
            if not children:
                children.append(os.fork())
                if not children[0]:
                    signal.alarm(30)  # rather than hang
                    return
            super().wait_for(alarm, seconds)

    bucket = new_queue(10, 1, clock=Forking())
    assert bucket.allow(10)
    code = 2
    try:
        bucket.wait(3)
        assert_idle(bucket)
        code = 0 if bucket._clock.now >= 3.0 else 1
    finally:
        if children and not children[0]:
            os._exit(code)
    assert code == 0
    _, status = os.waitpid(children[0], 0)
    assert os.waitstatus_to_exitcode(status) == 0


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_keeps_the_level_and_drops_the_waiters(clock):
    """A child starts with its parent's level, without its waiters, and counts on its own from there."""
    bucket = TokenBucket(10, 1, clock=clock)
    bucket.allow(8)
    (job,) = line_up(bucket, 5)

    def check():
        assert_idle(bucket)
        return bucket.tokens == 2 and bucket.allow(2) and not bucket.allow()

    with bucket._lock:
        assert in_child(check)
    assert bucket.tokens == 2
    clock.advance(3)
    job.result()
    assert bucket.tokens == 0
    assert_idle(bucket)
