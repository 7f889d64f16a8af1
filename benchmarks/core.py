"""How cheap, exact and fair `TokenBucket` is, beside its peers in the same run.

uv run benchmarks/core.py [--short] [part ...]

What is compared takes turns in many short rounds, and the best round of each counts. Results are
ratios within this run, so that the machine matters little; a busy one misses some targets all the
same. Only a bucket that granted more than ``capacity + rate * t`` makes it exit with 1.
"""

import contextlib
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from timeit import timeit
from typing import ClassVar, Final

import kombu.utils.limits
from bench import Bench, Part, main
from redis_takers import IN_MEMORY, PEERS

from rate_limiter import TokenBucket

RATE = 200
JOBS = 320


class Floor:
    """The least that any thread-safe bucket does: read the clock, take the lock."""

    def __init__(self, *_: float) -> None:
        self._lock = threading.Lock()

    def allow(self) -> bool:
        """Grant."""
        time.monotonic()
        with self._lock:
            return True


class Textbook:
    """The bucket of every tutorial: tokens and a timestamp, and everything under the lock."""

    def __init__(self, capacity: float, tokens_per_second: float) -> None:
        self._capacity = self._tokens = capacity
        self._rate = tokens_per_second
        self._updated = time.monotonic()
        self._lock = threading.Lock()

    def allow(self, tokens: float = 1) -> bool:
        """Refill, then take."""
        with self._lock:
            now = time.monotonic()
            self._tokens = min(self._capacity, self._tokens + (now - self._updated) * self._rate)
            self._updated = now
            if self._tokens >= tokens:
                self._tokens -= tokens
                return True
            return False


class Kombu(kombu.utils.limits.TokenBucket):
    """What is behind Celery's ``rate_limit``, in the critical section that its docstring demands."""

    def __init__(self, capacity: float, tokens_per_second: float) -> None:
        super().__init__(tokens_per_second, capacity)
        self._lock = threading.Lock()

    def allow(self, tokens: float = 1) -> bool:
        """Take under the lock."""
        with self._lock:
            return self.can_consume(tokens)


class Recording(TokenBucket):
    """Ours, with a record of what `wait` took, and of the clock readings that decided it."""

    made: ClassVar[list["Recording"]] = []

    def __init__(self, capacity: float) -> None:
        self.taken: list[tuple[float, float]] = []
        self._reading = threading.local()
        super().__init__(capacity, RATE, clock=self._read)
        self.made.append(self)

    def _read(self) -> float:
        self._reading.now = time.monotonic()
        return self._reading.now

    def wait(self, tokens: float = 1, *, timeout: float | None = None) -> None:
        """Wait. The last reading in this thread is the one that let it through."""
        super().wait(tokens, timeout=timeout)
        self.taken.append((self._reading.now, tokens))

    def excess(self) -> float:
        """By how many tokens the worst span of time exceeds ``capacity + RATE * t``."""
        total, lowest, worst = 0.0, math.inf, 0.0
        for moment, tokens in sorted(self.taken):
            lowest = min(lowest, total - RATE * moment)
            total += tokens
            worst = max(worst, total - RATE * moment - lowest - self.capacity)
        return worst


@contextlib.contextmanager
def threads(number: int, target: Callable[[], object]) -> Iterator[None]:
    """Run ``target`` in so many threads. Leaving waits until all have returned."""
    running = [threading.Thread(target=target) for _ in range(number)]
    for thread in running:
        thread.start()
    yield
    for thread in running:
        thread.join()


def interleaved(rounds: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Let the measures take turns. Return the results of each, sorted."""
    results = [[measure() for measure in measures] for _ in range(rounds)]
    return [sorted(column) for column in zip(*results, strict=True)]


def time_with_8_threads(kind: type) -> float:
    """Return the seconds per call of `allow` that grants, all threads together."""
    allow, calls = kind(1e9, 1e5).allow, []
    start, stop = threading.Barrier(9), threading.Event()

    def ask() -> None:
        start.wait()
        count = 0
        while not stop.is_set():
            for _ in range(500):
                allow()
            count += 500
        calls.append(count)

    with threads(8, ask):
        start.wait()
        began = time.perf_counter()
        time.sleep(0.3)
        stop.set()
    return (time.perf_counter() - began) / sum(calls)


def seconds_per_job(taken: list[float], capacity: int) -> float:
    """Return the mean distance, from the first after the burst to the last."""
    return (taken[-1] - taken[capacity]) / (len(taken) - capacity - 1)


def one_sleeper(capacity: int) -> float:
    """Let one thread sleep to each exact moment, and take its token as it wakes."""
    taken: list[float] = []
    tokens, updated = float(capacity), time.monotonic()
    while len(taken) < JOBS:
        now = time.monotonic()
        tokens, updated = min(capacity, tokens + (now - updated) * RATE), now
        if tokens >= 1:
            tokens -= 1
            taken.append(now)
        else:
            time.sleep((1 - tokens) / RATE)
    return seconds_per_job(taken, capacity)


def sixteen_waiters(capacity: int) -> float:
    """Let 16 threads stand in `wait` of one bucket."""
    bucket = Recording(capacity)
    with threads(16, lambda: [bucket.wait() for _ in range(JOBS // 16)]):
        pass
    return seconds_per_job(sorted(moment for moment, _ in bucket.taken), capacity)


def heavy_waiter() -> float:
    """Return the seconds of a `wait` for all of 10 tokens, beside 6 threads that keep taking one."""
    bucket, done = Recording(10), threading.Event()
    with threads(6, lambda: [bucket.wait() for _ in iter(done.is_set, True)]):
        time.sleep(0.1)  # the burst is over
        began = time.monotonic()
        bucket.wait(10)
        seconds = time.monotonic() - began
        done.set()
    return seconds


def one_thread(bench: Bench) -> None:
    """Compare the time of a call of `allow` in one thread."""
    kinds = (TokenBucket, Floor, Textbook, Kombu)
    names = ("clock and lock alone", "the textbook bucket", "kombu's, under a lock")
    for verdict, bucket, targets in (
        ("granted", (1e9, 1e5), ("<= 1.7", "<= 0.85", "")),  # neither full nor empty
        ("refused", (10, 10), ("<= 0.6", "", "")),  # empty, but for one call in many thousands
    ):
        asked = [partial(timeit, kind(*bucket).allow, number=1000) for kind in kinds]
        (ours, *_), *others = interleaved(400 if bench.short else 2000, *asked)
        for name, (other, *_), target in zip(names, others, targets, strict=True):
            bench.number(f"time of allow(), {verdict}, to {name}", ours / other, target)


def peers(bench: Bench) -> None:
    """Compare the time of a call of `allow` that grants with that of other libraries."""
    ours = TokenBucket(1e6, 1e6).allow
    for name in IN_MEMORY:
        with bench.left_out(what := f"time of allow(), granted, to {name}"):
            asked = [partial(timeit, ask, number=100) for ask in (ours, PEERS[name]("", 10**6, 10**6))]
            (least, *_), (other, *_) = interleaved(100 if bench.short else 1000, *asked)
            bench.number(what, least / other)


def eight_threads(bench: Bench) -> None:
    """Compare how many calls of `allow` eight threads make."""
    asked = [partial(time_with_8_threads, kind) for kind in (TokenBucket, Floor, Textbook)]
    ours, floor, textbook = interleaved(3 if bench.short else 9, *asked)
    what = "calls of 8 threads, to"
    bench.number(f"{what} clock and lock alone", floor[0] / ours[0])
    # Its threads queue up at the lock, which is worst where they run on two idle CPUs.
    bench.number(f"{what} the textbook bucket", textbook[0] / ours[0], ">= 2.5")
    medians = statistics.median(textbook) / statistics.median(ours)
    bench.number(f"{what} the textbook bucket, median rounds", medians)


def waits(bench: Bench) -> None:
    """Compare 16 threads in `wait` with one that sleeps exactly."""
    for capacity, target in (1, ">= 0.98"), (10, ">= 0.99"):
        measures = partial(sixteen_waiters, capacity), partial(one_sleeper, capacity)
        (ours, *_), (sleeper, *_) = interleaved(1 if bench.short else 4, *measures)
        what = f"rate of 16 in wait(), capacity {capacity}, to"
        bench.number(f"{what} one exact sleeper", sleeper / ours, target)
        bench.number(f"{what} the set {RATE}/s", 1 / ours / RATE)
    bound(bench)


def heavy(bench: Bench) -> None:
    """Measure how long a waiter for all tokens waits, beside six threads that keep taking one."""
    (seconds,) = interleaved(5 if bench.short else 15, heavy_waiter)
    bench.number("wait(10) of 10, median", statistics.median(seconds), "<= 0.12", "s")
    bench.number("wait(10) of 10, longest", seconds[-1], "<= 0.12", "s")
    bound(bench)


def bound(bench: Bench) -> None:
    """Look at all waits of a part in their worst span of time."""
    excess = max(bucket.excess() for bucket in Recording.made)
    bench.number("taken beyond capacity + rate * t", excess, "<= 1e-6", "tokens", must=True)
    Recording.made.clear()


PARTS: Final[dict[str, Part]] = {
    part.__name__: part for part in (one_thread, peers, eight_threads, waits, heavy)
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
