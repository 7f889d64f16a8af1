"""Who is told when a forecast may have become wrong, and what can be seen of it from outside."""

import gc
import os
import random
import signal
import threading
import weakref

import pytest
from processes import in_child
from waiters import Job, eventually, line_up

from rate_limiter import RateLimitExceeded, SharedTokenBucket, TokenBucket
from rate_limiter.shared_bucket import share
from rate_limiter.testing import ManualClock

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def bucket(new_queue):
    """Return a full bucket of 10 that gains 1 per second."""
    return new_queue(10, 1, clock=ManualClock())


@pytest.fixture
def told(bucket):
    """Collect what a listener is given."""
    told = []
    bucket.subscribe(told.append)
    return told


# (what is done, whether it may make a forecast wrong)
ACTS = {
    "refund": (lambda bucket: bucket.refund(1), True),
    "pause": (lambda bucket: bucket.pause(1), True),
    "pause of 0": (lambda bucket: bucket.pause(0), True),
    "resume": (lambda bucket: bucket.resume(), True),
    "capacity": (lambda bucket: bucket.configure(capacity=20), True),
    "rate": (lambda bucket: bucket.configure(tokens_per_second=2), True),
    "allow": (lambda bucket: bucket.allow(), False),
    "refused": (lambda bucket: bucket.allow(11), False),
    "take_or_delay": (lambda bucket: bucket.take_or_delay(), False),
    "wait": (lambda bucket: bucket.wait(), False),
    "charge": (lambda bucket: bucket.charge(3), False),
    "tokens": (lambda bucket: bucket.tokens, False),
    "repr": (repr, False),
}


@pytest.mark.parametrize(("act", "may_be_wrong"), ACTS.values(), ids=ACTS)
def test_what_is_told(bucket, told, act, may_be_wrong):
    """Refunds, pauses and new settings are told and counted; what only takes tokens is not."""
    before = bucket.changes
    act(bucket)
    assert told == [bucket] * may_be_wrong
    assert bucket.changes == before + may_be_wrong


@pytest.mark.parametrize(
    "wrong",
    [
        lambda bucket: bucket.refund(0),
        lambda bucket: bucket.pause(-1),
        lambda bucket: bucket.configure(capacity=0),
    ],
)
def test_what_is_wrong_is_not_told(bucket, told, wrong):
    """A call that raises has changed nothing."""
    with pytest.raises(ValueError, match="must be"):
        wrong(bucket)
    assert (told, bucket.changes) == ([], 0)


@pytest.mark.parametrize("act", [ACTS[name][0] for name in ("refund", "pause", "rate")])
def test_a_listener_may_use_the_bucket(bucket, act):
    """It is called when the change is made, and no lock is held."""
    seen = []

    def listener(changed):
        seen.append((changed.take_or_delay(1), changed.tokens))
        changed.unsubscribe(listener)
        changed.refund(1)

    assert bucket.allow(10)
    bucket.subscribe(listener)
    act(bucket)
    assert len(seen) == 1
    assert bucket.changes == 2


class Gate:
    """Something with a method that listens."""

    def __init__(self):
        self.poked = 0

    def poke(self, bucket):
        """Count."""
        self.poked += 1


def test_subscribing(bucket):
    """Subscribing twice counts once, several listeners are all told, unsubscribing ends it."""
    one, two = Gate(), Gate()
    bucket.subscribe(one.poke)
    bucket.subscribe(one.poke)  # another object, but equal
    bucket.subscribe(two.poke)
    bucket.refund(1)
    assert (one.poked, two.poked) == (1, 1)
    bucket.unsubscribe(one.poke)
    bucket.unsubscribe(one.poke)
    bucket.refund(1)
    assert (one.poked, two.poked) == (1, 2)
    bucket.unsubscribe(two.poke)
    assert bucket._listeners is None


@pytest.mark.parametrize("thing", [None, 5, "poke"])
def test_a_listener_that_cannot_be_called(bucket, thing):
    """A listener is a callable."""
    with pytest.raises(TypeError, match="^listener must be a callable that takes the bucket, not "):
        bucket.subscribe(thing)
    bucket.unsubscribe(thing)


def test_a_listener_is_held_until_it_is_unsubscribed(bucket):
    """Nobody else has to keep it; afterwards nobody does."""
    gate = Gate()
    gone = weakref.ref(gate)
    bucket.subscribe(gate.poke)
    del gate
    gc.collect()
    bucket.refund(1)
    assert gone().poked == 1
    bucket.unsubscribe(gone().poke)
    gc.collect()
    assert gone() is None


def test_a_listener_that_fails(bucket, told, caplog):
    """The change is made: who made it gets no error, the others are told, and the log says it."""
    bucket.unsubscribe(told.append)

    def fail(_):
        raise ZeroDivisionError

    bucket.subscribe(fail)
    bucket.subscribe(told.append)
    bucket.allow(5)
    bucket.refund(2)
    assert (bucket.tokens, told) == (7, [bucket])
    assert "A listener of <" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_listener_that_is_interrupted(bucket):
    """What is no `Exception`, as Ctrl-C, goes through; the change is made."""

    def strike(_):
        raise KeyboardInterrupt

    bucket.subscribe(strike)
    bucket.allow(5)
    with pytest.raises(KeyboardInterrupt):
        bucket.refund(2)
    assert bucket.tokens == 7


@pytest.mark.parametrize("place", [0, 1], ids=["head", "behind"])
def test_a_wait_that_ends_without_its_tokens_is_told(new_queue, place):
    """The forecasts of others were made with a waiter before them that is gone now."""
    clock = ManualClock(auto_advance=False)
    bucket = new_queue(10, 1, clock=clock)
    bucket.allow(10)
    line = line_up(bucket, 2) if place else []
    (leaver,) = line_up(bucket, 5, timeout=9)
    told = []
    bucket.subscribe(lambda changed: told.append(changed.take_or_delay(1)))
    before = bucket.changes
    bucket.charge(20)
    assert bucket.take_or_delay(1) > 20
    clock.advance(9)
    with pytest.raises(RateLimitExceeded):
        leaver.result()
    assert told == [12 + 2 * place]
    if not place or new_queue is TokenBucket:  # of a process, others see its first waiter only
        assert bucket.changes == before + 1
    # more than once: the waiter may just have looked at the clock
    eventually(lambda: clock.advance(50) or not any(job.is_alive() for job in line))
    for job in line:
        job.result()


def test_a_wait_that_gives_its_tokens_back_is_told(bucket, told, monkeypatch):
    """A wait that took its tokens and is interrupted before it returns gives them back: a refund."""

    def strike(_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    bucket.charge(10)
    monkeypatch.setattr(TokenBucket, "_wake_head", strike)
    with pytest.raises(KeyboardInterrupt):
        bucket.wait(3)
    assert bucket.tokens == 3
    assert bucket.changes == 1
    assert told[0] is bucket


@pytest.mark.usefixtures("restless_threads")
def test_many_threads_subscribe(bucket):
    """No subscription is lost, and none is left, however many threads do it at once."""
    gates = [Gate() for _ in range(8)]

    def work(gate):
        for _ in range(200):
            bucket.subscribe(gate.poke)
            before = gate.poked
            bucket.refund(1)
            assert gate.poked > before
            bucket.unsubscribe(gate.poke)

    for job in [Job(work, gate) for gate in gates]:
        job.result()
    assert bucket._listeners is None
    assert bucket.changes == 8 * 200


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
@pytest.mark.timeout(method="thread")
def test_a_signal_handler_subscribes():
    """A handler may subscribe, unsubscribe and refund in the midst of the main thread doing so."""
    bucket, mine = TokenBucket(10, 1, clock=ManualClock()), Gate()
    struck = []

    def handle(*_):
        own = Gate()  # one handler may interrupt another
        bucket.subscribe(own.poke)
        bucket.refund(1)
        bucket.unsubscribe(own.poke)
        struck.append(own.poked)

    before = signal.signal(signal.SIGALRM, handle)
    try:
        while len(struck) < 300:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 1e-4))
            for _ in range(20):
                bucket.subscribe(mine.poke)
                count = mine.poked
                bucket.refund(1)
                assert mine.poked > count
                bucket.unsubscribe(mine.poke)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert min(struck) >= 1
    assert bucket._listeners is None


@needs_fork
@forks
def test_children_start_without_listeners(bucket, told):
    """The listeners of the parent are not called in a child, which has its own; nor the other way round."""

    def child():
        bucket.refund(1)
        mine = []
        bucket.subscribe(mine.append)
        bucket.refund(1)
        return len(told), len(mine)

    assert in_child(child) == [0, 1]
    assert told == []
    bucket.refund(1)
    assert told == [bucket]


@needs_fork
@forks
def test_changes_in_other_processes_are_seen():
    """The number of changes of a shared bucket is one for all processes, and is read without a lock."""
    bucket = SharedTokenBucket(10, 1, clock=ManualClock())
    for name, (act, may_be_wrong) in ACTS.items():
        before = bucket.changes
        in_child(lambda act=act: act(bucket) and None)
        assert bucket.changes == before + may_be_wrong, name
    with bucket._lock:
        thread = Job(lambda: bucket.changes)
        assert thread.result() == bucket.changes


@needs_fork
def test_a_bucket_that_becomes_shared_keeps_its_listeners():
    """Whoever listens to a bucket goes on hearing of it."""
    bucket, gate = TokenBucket(10, 1, clock=ManualClock()), Gate()
    bucket.subscribe(gate.poke)
    bucket.refund(1)
    share(bucket)
    assert bucket.changes == 1
    bucket.refund(1)
    assert (gate.poked, bucket.changes) == (2, 2)


def test_it_wakes_a_gate():
    """A gate that sleeps until a forecast moment wakes when tokens come back before."""
    bucket, woken, delays = TokenBucket(10, 0.001), threading.Event(), []
    assert bucket.allow(10)
    bucket.subscribe(lambda _: woken.set())

    def gate():
        while delay := bucket.take_or_delay(1):
            delays.append(delay)
            woken.wait(delay)
            woken.clear()

    job = Job(gate)
    eventually(lambda: delays)
    bucket.refund(1)
    job.result()
    assert len(delays) == 1
