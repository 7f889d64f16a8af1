"""One bucket in several processes: one level, one rate, one line, whoever of them is killed."""

import gc
import os
import random
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
from processes import Child, children, in_child
from waiters import Job, assert_idle, eventually, line_up

from rate_limiter import RateLimitExceeded, SharedTokenBucket, TokenBucket
from rate_limiter import shared_bucket as module
from rate_limiter.shared_bucket import is_shared, share
from rate_limiter.testing import ManualClock

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def rows(bucket):
    """Return how many rows of the table are taken."""
    return sum(map(bool, bucket._common.cells[module._TABLE :: 3].tolist()))


def waits_elsewhere(bucket, number=1):
    """Wait until so many processes stand in line."""
    eventually(lambda: rows(bucket) == number)


# -- one level ---------------------------------------------------------------------------------


def test_level_is_common():
    """What a child takes and gives back is gone and back in the parent, and the other way round."""
    bucket = SharedTokenBucket(10, 1, clock=ManualClock())
    assert in_child(bucket.allow, 4)
    assert bucket.tokens == 6
    bucket.refund(1)
    assert in_child(lambda: (bucket.tokens, bucket.take_or_delay(7))) == [7, 0.0]
    assert not bucket.allow(0.001)
    in_child(bucket.charge, 5)
    assert bucket.tokens == -5
    assert in_child(lambda: in_child(bucket.take_or_delay, 1)) == 6.0


@pytest.mark.parametrize("shared", [False, True], ids=["share()", "SharedTokenBucket"])
def test_it_starts_once(shared):
    """What it starts with is there once, not once per process; sharing a bucket changes no level."""
    clock = ManualClock()
    bucket = (SharedTokenBucket if shared else TokenBucket)(10, 2, initial=3, clock=clock)
    clock.advance(0.5)
    share(bucket)
    assert in_child(lambda: (bucket.tokens, bucket.allow(5), bucket.allow(4))) == [4, False, True]
    assert in_child(lambda: (bucket.tokens, bucket.take_or_delay(1))) == [0, 0.5]
    assert not bucket.allow()


def test_a_child_that_is_there_already():
    """Processes that run beside each other see each other's settlements, pauses and settings."""
    clock = ManualClock()
    bucket = SharedTokenBucket(10, 1, clock=clock)
    here, there = os.pipe(), os.pipe()

    def answer():
        while (question := os.read(here[0], 1)) != b"q":
            allowed = bucket.allow(10)
            facts = (allowed, bucket.tokens, bucket.capacity, bucket.tokens_per_second)
            os.write(there[1], repr(facts).encode())
            assert question

    def ask():
        os.write(here[1], b"?")
        return eval(os.read(there[0], 1000))

    with Child(answer) as child:
        assert ask() == (True, 0.0, 10.0, 1.0)
        assert ask() == (False, 0.0, 10.0, 1.0)  # from now on it remembers the refusal
        assert ask() == (False, 0.0, 10.0, 1.0)
        bucket.refund(12)
        assert ask() == (True, 0.0, 10.0, 1.0)
        assert ask() == (False, 0.0, 10.0, 1.0)
        bucket.configure(capacity=20, tokens_per_second=3)
        bucket.refund(12)
        assert ask() == (True, 2.0, 20.0, 3.0)
        bucket.refund(18)
        bucket.pause(60)
        assert ask() == (False, 0.0, 20.0, 3.0)
        bucket.refund(20)
        assert ask() == (False, 0.0, 20.0, 3.0)
        os.write(here[1], b"q")
        child.result()
    for descriptor in here + there:
        os.close(descriptor)


def snatch(bucket, seconds):
    """Let two threads snatch at a bucket in every way there is. Return what they got."""
    stop = time.monotonic() + seconds

    def grab(cost):
        got = 0.0
        while time.monotonic() < stop:
            for _ in range(20):
                got += cost * bucket.allow(cost)
            if not bucket.take_or_delay(cost):
                got += cost
            if random.random() < 0.2:
                bucket.refund(cost / 2)
                got -= cost / 2
        return got

    return sum(job.result() for job in [Job(grab, 1), Job(grab, 0.5)])


@pytest.mark.parametrize("rate", [1e-3, 2000])
def test_four_processes_of_two_threads_are_exact(rate):
    """However they snatch, they get the burst and what time brought: no token twice, none lost."""
    bucket = SharedTokenBucket(3000, rate)
    began = time.monotonic()
    bucket.charge(2500)  # so that it is never full
    latest = time.monotonic()
    with children(4, lambda _: snatch(bucket, 0.8)) as running:
        got = sum(child.result() for child in running)
    asked = time.monotonic()
    total = got + bucket.tokens
    assert 500 + rate * (asked - latest) - 1e-3 <= total
    assert total <= 500 + rate * (time.monotonic() - began) + 1e-3
    assert got > 490


def test_several_buckets_at_once():
    """Threads of two processes that use two buckets are not taken for a deadlock by the kernel."""
    buckets = SharedTokenBucket(1e6, 1e-3), SharedTokenBucket(1e6, 1e-3)

    def use(_):
        def take(bucket):
            for _ in range(15_000):
                assert bucket.allow()

        for job in [Job(take, bucket) for bucket in buckets]:
            job.result()

    with children(2, use) as running:
        for child in running:
            child.result()
    assert [bucket.tokens for bucket in buckets] == [pytest.approx(1e6 - 30_000, abs=0.1)] * 2


# -- one line ----------------------------------------------------------------------------------


def test_processes_take_turns():
    """Each of several processes that wait without end is served as often as the others."""
    bucket = SharedTokenBucket(1, 400)
    stop = time.monotonic() + 1.0

    def work(_):
        def wait():
            served = 0
            while time.monotonic() < stop:
                bucket.wait()
                served += 1
            return served

        return sum(job.result() for job in [Job(wait), Job(wait)])

    with children(3, work) as running:
        served = [child.result() for child in running]
    assert max(served) <= 1.5 * min(served)
    assert sum(served) <= 1 + 400 * (time.monotonic() - stop + 1.0)
    assert rows(bucket) == 0


def test_a_heavy_waiter_is_not_starved():
    """One who waits for the whole capacity is served though others keep asking for little."""
    bucket = SharedTokenBucket(10, 100)
    done = time.monotonic() + 60

    def light(_, ask):
        while time.monotonic() < done:
            ask(1)
            time.sleep(0)

    with children(2, light, bucket.wait), children(1, light, bucket.allow):
        for _ in range(3):
            began = time.monotonic()
            bucket.wait(10)
            assert time.monotonic() - began < 5


def test_waiters_elsewhere_come_first():
    """While one process waits, others are given nothing, and their forecast counts the one."""
    bucket = SharedTokenBucket(10, 0.01)
    assert bucket.allow(6)
    with Child(bucket.wait, 6) as child:
        waits_elsewhere(bucket)
        assert not bucket.allow(1)
        assert bucket.take_or_delay(1) == pytest.approx(300, rel=0.01)
        with pytest.raises(RateLimitExceeded) as raised:
            bucket.wait(1, timeout=1)
        assert raised.value.retry_after == pytest.approx(300, rel=0.01)
        bucket.refund(2)
        child.result()
    assert bucket.tokens == pytest.approx(0, abs=0.1)
    bucket.refund(1)
    assert bucket.allow(1)


CHANGES = {
    "refund": lambda bucket: bucket.refund(5),
    "a higher rate": lambda bucket: bucket.configure(tokens_per_second=1000),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_reach_who_waits_elsewhere(change):
    """A waiter that slept towards a far moment has its tokens well within a second."""
    bucket = SharedTokenBucket(10, 0.01)
    assert bucket.allow(10)
    with Child(bucket.wait, 5) as child:
        waits_elsewhere(bucket)
        began = time.monotonic()
        change(bucket)
        child.result()
        assert time.monotonic() - began < 1.0


def test_a_pause_reaches_who_waits_elsewhere():
    """A waiter whose tokens were about to come sleeps on."""
    bucket = SharedTokenBucket(10, 10)
    assert bucket.allow(10)
    with Child(bucket.wait, 3) as child:
        began = time.monotonic()
        bucket.pause(0.5)
        child.result()
        assert time.monotonic() - began >= 0.5 + 0.3


def test_a_capacity_too_small_reaches_who_waits_elsewhere():
    """A waiter whose tokens can never come any more gets a ValueError."""
    bucket = SharedTokenBucket(10, 0.01)
    assert bucket.allow(10)

    def wait():
        with pytest.raises(ValueError, match="at most the capacity 4, not 5"):
            bucket.wait(5)
        return "told"

    with Child(wait) as child:
        waits_elsewhere(bucket)
        bucket.configure(capacity=4)
        assert child.result() == "told"
    assert rows(bucket) == 0


def test_timeout_leaves_the_line():
    """Who gives up leaves no row behind, and nothing is taken."""
    bucket = SharedTokenBucket(10, 20)
    assert bucket.allow(10)

    def wait():
        with pytest.raises(RateLimitExceeded):
            bucket.wait(5, timeout=0.3)
        return rows(bucket)

    with Child(wait) as child:
        waits_elsewhere(bucket)
        bucket.charge(100)
        assert child.result() == 0
    assert bucket.tokens == pytest.approx(-100, abs=30)


def test_more_processes_than_rows(monkeypatch):
    """Who finds no row in the table is served as well."""
    monkeypatch.setattr(module, "_ROWS", 2)
    bucket = SharedTokenBucket(1, 50)
    with children(5, lambda _: [bucket.wait() for _ in range(4)]) as running:
        for child in running:
            child.result()
    assert rows(bucket) == 0


def test_a_row_is_taken_again():
    """A waiter whose row was cleared while its process stood still has its old number again."""
    clock = ManualClock(auto_advance=False)
    bucket = SharedTokenBucket(10, 1, clock=clock)
    assert bucket.allow(10)
    (job,) = line_up(bucket, 4)
    cells, common = bucket._common.cells, bucket._common
    number, row = common.number, common.row
    assert in_child(bucket.take_or_delay, 1) == 5.0  # who asks elsewhere sees that its owner lives
    cells[row + 2] -= 1.0  # it was not confirmed for long

    def from_elsewhere():
        taken_later = bucket.take_or_delay(1)
        return taken_later, rows(bucket)

    assert in_child(from_elsewhere) == [1.0, 0]
    clock.advance(1)
    bucket.pause(0)  # wakes the head
    eventually(lambda: cells[row] == number)
    clock.advance(4)
    job.result()
    assert_idle(bucket)


# -- killed, stopped, interrupted --------------------------------------------------------------


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=lambda sign: sign.name)
def test_who_is_gone_does_not_stall_the_rest(monkeypatch, sign):
    """Tokens for which a killed or stopped process stood in line go to the next within a second."""
    if sign == signal.SIGKILL:  # that is seen without waiting for a confirmation
        monkeypatch.setattr(module, "_GIVEN_UP", 3600)
    bucket = SharedTokenBucket(10, 0.01)
    assert bucket.allow(10)
    with children(3, lambda _: bucket.wait(10)) as gone:
        waits_elsewhere(bucket, 3)
        for child in gone:
            os.kill(child.pid, sign)
        began = time.monotonic()
        bucket.refund(8)
        bucket.wait(8)
        assert time.monotonic() - began < 1.0
        assert bucket.tokens == pytest.approx(0, abs=0.1)


def test_a_stopped_waiter_is_served_when_it_continues():
    """A process that was stopped in line loses nothing but time."""
    bucket = SharedTokenBucket(10, 0.01)
    assert bucket.allow(10)
    with Child(bucket.wait, 5) as child:
        waits_elsewhere(bucket)
        os.kill(child.pid, signal.SIGSTOP)
        bucket.refund(3)
        eventually(lambda: bucket.allow(3))
        os.kill(child.pid, signal.SIGCONT)
        bucket.refund(5)
        child.result()
    assert bucket.tokens == pytest.approx(0, abs=0.1)


def test_killed_at_any_instruction():
    """However many are killed while they ask and wait, the rest go on, and get no token too many."""
    rate, capacity = 2000, 20
    granted = SharedTokenBucket(1e9, 1e-9)  # a count that survives whoever counts
    bucket = SharedTokenBucket(capacity, rate)

    def loop(index):
        while True:
            if index % 2:
                bucket.wait(1 + index % 3)
                granted.charge(1 + index % 3)
            elif bucket.allow():
                granted.charge(1)

    began = time.monotonic()
    longest = 0.0
    for number in range(12):
        with Child(loop, number):
            time.sleep(random.uniform(0.005, 0.03))
        asked = time.monotonic()
        bucket.wait(2)
        granted.charge(2)
        longest = max(longest, time.monotonic() - asked)
    assert longest < 1.0
    total = 1e9 - granted.tokens
    assert 12 * 2 < total <= capacity + rate * (time.monotonic() - began)


def test_torn_between_two_stores():
    """Until the last store, of one double, a change has not happened at all."""
    bucket = SharedTokenBucket(10, 1, clock=ManualClock())
    assert bucket.allow(3)
    bucket._load()
    bucket._used, bucket._full_at, bucket._rate = 9.0, 5.0, 1e9

    class Killed(BaseException):
        pass

    class Cells:
        """Memory of a process that is killed just before it writes the record in use."""

        def __getitem__(self, index):
            return cells[index]

        def __setitem__(self, index, value):
            if index == module._RECORD:
                raise Killed
            cells[index] = value

    cells = bucket._common.cells
    bucket._common.cells = Cells()
    with pytest.raises(Killed):
        bucket._store()
    bucket._common.cells = cells
    assert (bucket.tokens, bucket.tokens_per_second) == (7, 1)


def test_fork_in_the_midst_of_it():
    """Whatever other threads are doing in it as it is forked, the child can use the bucket."""
    bucket, other = SharedTokenBucket(1000, 1e6), SharedTokenBucket(10, 1e6)
    done = threading.Event()

    def hammer(ask):
        while not done.is_set():
            ask(300)

    def check():
        bucket.wait(500)
        other.wait(10)
        return bucket._head is None

    jobs = [Job(hammer, ask) for ask in (bucket.allow, bucket.wait, bucket.wait, bucket.take_or_delay)]
    for _ in range(20):
        assert in_child(check)
    done.set()
    for job in jobs:
        job.result()
    assert rows(bucket) == 0


def test_fork_leaves_the_waiters_to_the_parent():
    """A child does not stand in its parent's line, nor take it down as it waits itself."""
    clock = ManualClock(auto_advance=False)
    bucket = SharedTokenBucket(10, 1, clock=clock)
    assert bucket.allow(10)
    (job,) = line_up(bucket, 5)

    def check():
        assert bucket._head is None
        with pytest.raises(RateLimitExceeded) as raised:
            bucket.wait(1, timeout=0)
        return raised.value.retry_after, rows(bucket)

    with module._threads, bucket._lock:
        assert in_child(check) == [6.0, 1]
    clock.advance(5)
    job.result()
    assert_idle(bucket)


# -- a descriptor that was closed --------------------------------------------------------------


def closed(bucket):
    """Have nobody own the number of the bucket's file."""
    os.close(bucket._common.file)


def another_file(bucket):
    """Have another file own it."""
    number = bucket._common.file
    with Path(__file__).open() as file:
        os.dup2(file.fileno(), number)


def another_buckets_file(bucket):
    """Have another bucket's file own it."""
    bucket.clock = other = SharedTokenBucket(1, 1)  # keep it
    os.dup2(other._common.file, bucket._common.file)


def a_pipe(bucket):
    """Have a pipe own it."""
    reader, writer = os.pipe()
    os.dup2(writer, bucket._common.file)
    os.close(reader)
    os.close(writer)


class Plain(SharedTokenBucket):
    """A bucket to which things can be attached."""


USES = {
    "allow": lambda bucket: bucket.allow(),
    "wait": lambda bucket: bucket.wait(),
    "take_or_delay": lambda bucket: bucket.take_or_delay(),
    "refund": lambda bucket: bucket.refund(1),
    "charge": lambda bucket: bucket.charge(1),
    "pause": lambda bucket: bucket.pause(1),
    "configure": lambda bucket: bucket.configure(capacity=5),
    "tokens": lambda bucket: bucket.tokens,
}


@pytest.mark.parametrize("replace", [closed, another_file, another_buckets_file, a_pipe])
def test_a_closed_descriptor_is_an_error(replace):
    """A process that has closed the file (a daemon) cannot use the bucket, and is told so each time."""
    bucket = Plain(10, 1, clock=ManualClock())

    def daemon():
        assert bucket.allow()
        replace(bucket)
        told = []
        for use in USES.values():
            with pytest.raises(RuntimeError) as raised:
                use(bucket)
            told.append(str(raised.value))
        return told

    for told in in_child(daemon):
        assert f"has closed its file descriptor {bucket._common.file}, " in told
        assert "Make the bucket after that" in told
        assert "capacity 10" in told
    assert bucket.tokens == 9
    assert in_child(bucket.allow)


def test_a_bucket_that_is_gone_closes_no_file_of_others():
    """Once another file has the number, it stays open when the bucket is gone."""

    def daemon():
        bucket = SharedTokenBucket(10, 1)
        number = bucket._common.file
        another_file(bucket)
        del bucket
        gc.collect()
        os.fstat(number)

    in_child(daemon)


# -- in place ----------------------------------------------------------------------------------


class Counting(TokenBucket):
    """A user's own class, with a state of its own."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.asked = []

    def take_or_delay(self, tokens=1):
        """Count, and ask."""
        self.asked.append(tokens)
        return super().take_or_delay(tokens)

    def allow(self, tokens=1):
        """Count, and ask."""
        self.asked.append(tokens)
        return super().allow(tokens)

    def wait(self, tokens=1, *, timeout=None):
        """Count, and wait."""
        self.asked.append(tokens)
        super().wait(tokens, timeout=timeout)

    def refund(self, tokens):
        """Keep a tenth."""
        super().refund(tokens * 0.9)


class Further(Counting):
    """A class derived from a user's, with a slot and a property."""

    __slots__ = ("note",)

    @property
    def tokens(self):
        """Whole tokens only."""
        return int(super().tokens)


@pytest.mark.parametrize("kind", [TokenBucket, Counting, Further])
def test_share_in_place(kind):
    """The object stays the same, with its level, its clock and its own methods, and is one for all."""
    clock = ManualClock(50.0)
    bucket = kind(20, 1, clock=clock)
    assert bucket.allow(17)
    assert not bucket.allow(5)  # it remembers that
    if kind is Further:
        bucket.note = "kept"
    assert not is_shared(bucket)
    share(bucket)
    assert is_shared(bucket)
    assert isinstance(bucket, kind)
    memory = bucket._common.cells
    share(bucket)
    assert bucket._common.cells is memory
    assert not bucket.allow(5)
    assert (bucket.tokens, bucket.capacity, bucket.tokens_per_second) == (3, 20, 1)

    def use():
        assert bucket.allow(1)
        assert bucket.take_or_delay(1) == 0.0
        bucket.wait(1)
        bucket.refund(10)
        return getattr(bucket, "asked", None)

    asked = in_child(use)
    assert bucket.tokens == (10 if kind is TokenBucket else 9)
    if kind is not TokenBucket:
        assert asked == [17, 5, 5, 1, 1, 1]
        assert bucket.asked == [17, 5, 5]
    if kind is Further:
        assert bucket.note == "kept"
    clock.advance(1)
    assert bucket.allow(10)


def test_two_of_a_kind_are_two_buckets():
    """Buckets of one class that were shared have nothing in common but the class."""
    clock = ManualClock()
    one, two, plain = (Counting(4, 1, clock=clock) for _ in range(3))
    share(one)
    share(two)
    assert type(one) is type(two) is not type(plain)
    assert one.allow(4)
    assert (two.tokens, plain.tokens) == (4, 4)


@pytest.mark.parametrize("level", [-3, 0, 2.5])
def test_share_keeps_debt_and_pause(level):
    """Whatever state a bucket is in, it is in afterwards."""
    clock = ManualClock()
    bucket = TokenBucket(4, 1, clock=clock)
    bucket.charge(4 - level)
    if level <= 0:
        bucket.pause(2)
    before = (bucket.tokens, bucket.take_or_delay(4))
    share(bucket)
    assert (bucket.tokens, bucket.take_or_delay(4)) == before
    bucket.refund(1.5)
    assert bucket.take_or_delay(4) == {-3: 6, 0: 6, 2.5: 0}[level]


@pytest.mark.parametrize("what", [None, TokenBucket, 5, object()])
def test_what_cannot_be_shared(what):
    """Only a TokenBucket can be shared in place."""
    with pytest.raises(TypeError, match="^only a TokenBucket can be shared, not "):
        share(what)
    assert not is_shared(what)


def test_platform_without_fork(monkeypatch):
    """Where there is no fork or no lockf, making or sharing one says so, and what to use instead."""
    plain = TokenBucket(1, 1)
    monkeypatch.setattr(module, "lockf", None)
    for make in lambda: SharedTokenBucket(1, 1), lambda: share(plain):
        with pytest.raises(
            NotImplementedError, match=r"needs fork and fcntl.lockf.*: use a TokenBucket"
        ):
            make()
    assert plain.allow()
    assert not is_shared(plain)


def test_without_memfd(monkeypatch):
    """Where there is no memfd_create, an unlinked temporary file does."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    bucket = SharedTokenBucket(10, 1, clock=ManualClock())
    assert in_child(bucket.allow, 4)
    assert bucket.tokens == 6


def test_it_leaves_no_file_open():
    """A bucket that nobody holds is gone, and so is its file."""
    bucket = SharedTokenBucket(1, 1)
    gone, file = weakref.ref(bucket), bucket._common.file
    os.fstat(file)
    del bucket
    gc.collect()
    assert gone() is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
