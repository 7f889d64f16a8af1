"""What a `SharedTokenBucket` costs beside a `TokenBucket`, and what is left when its users are killed.

uv run benchmarks/shared.py [--short] [part ...]

Costs are ratios within this run, of the best of many rounds that take turns; a busy machine misses
some targets all the same. Only a bucket that granted more than ``capacity + rate * t`` makes it exit
with 1.
"""

import contextlib
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from timeit import timeit
from typing import Final

from bench import Bench, Part, main
from core import interleaved

from rate_limiter import SharedTokenBucket, TokenBucket

CAPACITY, RATE = 20, 2000


class Tally:
    """What each process was granted, and what took it longest, in memory that outlives it."""

    def __init__(self, processes: int) -> None:
        cells = memoryview(mmap.mmap(-1, 16 * processes)).cast("d")
        self.granted, self.longest = cells[:processes], cells[processes:]

    def loop(self, ask: Callable[[float], object], index: int) -> None:
        """Ask for tokens without end. What `wait` returns is not ``False``."""
        tokens = 1 + index % 3
        while True:
            began = time.monotonic()
            if ask(tokens) is not False:
                self.granted[index] += tokens
            self.longest[index] = max(self.longest[index], time.monotonic() - began)


@contextlib.contextmanager
def process(target: Callable[..., object], *args: object) -> Iterator[None]:
    """Run ``target`` in a forked process. Leaving kills it, by its pid."""
    pid = os.fork()
    if not pid:
        try:
            target(*args)
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def kill_many(kills: int) -> tuple[list[float], float, float]:
    """Kill many in the midst of a tight loop. Three that live on ask too.

    Returns:
        The longest call of each that lives on, the tokens granted, and the most that may be.

    """
    bucket, tally = SharedTokenBucket(CAPACITY, RATE), Tally(kills + 3)
    began = time.monotonic()
    with contextlib.ExitStack() as survivors:
        for index, ask in enumerate((bucket.wait, bucket.wait, bucket.allow)):
            survivors.enter_context(process(tally.loop, ask, index))
        for index in range(3, kills + 3):
            with process(tally.loop, random.choice((bucket.wait, bucket.allow)), index):
                time.sleep(random.uniform(0.002, 0.04))
        asked, last = time.monotonic(), list(tally.granted[:2])
        while min(now - then for now, then in zip(tally.granted[:2], last, strict=True)) == 0:
            time.sleep(0.001)  # a call that hangs has not been noted: see each being served once more
            if time.monotonic() - asked > 30:
                return [30.0] * 3, sum(tally.granted), CAPACITY + RATE * (time.monotonic() - began)
    return list(tally.longest[:3]), sum(tally.granted), CAPACITY + RATE * (time.monotonic() - began)


def calls_per_second(processes: int) -> float:
    """Let several processes take what is always there. Return how many calls all of them make."""
    bucket, tally, seconds = SharedTokenBucket(1e9, 1e5), Tally(processes), 0.3
    with contextlib.ExitStack() as running:
        for index in range(processes):
            running.enter_context(process(tally.loop, bucket.allow, index))
        time.sleep(seconds)
    return sum(granted / (1 + index % 3) for index, granted in enumerate(tally.granted)) / seconds


def rate_of_waits(capacity: float, rate: float, seconds: float) -> float:
    """Let 4 processes stand in `wait` for one token each. Return the jobs per second of all."""
    bucket, tally = SharedTokenBucket(capacity, rate), Tally(4)
    with contextlib.ExitStack() as running:
        for index in range(4):
            running.enter_context(process(tally.loop, lambda _: bucket.wait(), index))
        time.sleep(0.2 + capacity / rate)  # the burst is over
        before, began = list(tally.granted), time.monotonic()
        time.sleep(seconds)
        after, ended = list(tally.granted), time.monotonic()
    jobs = sum((after[index] - before[index]) / (1 + index % 3) for index in range(4))
    return jobs / (ended - began)


def one_process(bench: Bench) -> None:
    """Compare the time of a call of `allow` with that of a `TokenBucket` that grants."""
    buckets = (TokenBucket(1e9, 1e5), SharedTokenBucket(1e9, 1e5), SharedTokenBucket(10, 10))
    asked = [partial(timeit, bucket.allow, number=1000) for bucket in buckets]
    (plain, *_), (granted, *_), (refused, *_) = interleaved(200 if bench.short else 1000, *asked)
    bench.number("time of allow(), granted, to TokenBucket's", granted / plain, "<= 9")
    bench.number("time of allow(), refused, to TokenBucket's", refused / plain, "<= 0.8")


def four_processes(bench: Bench) -> None:
    """Compare how many calls of `allow` four processes make, and one."""
    rounds = 1 if bench.short else 5
    several, one = interleaved(rounds, *(partial(calls_per_second, number) for number in (4, 1)))
    bench.number("calls of 4 processes, to those of one", several[-1] / one[-1])


def waits(bench: Bench) -> None:
    """Compare the rate of 4 processes in `wait` with the set one."""
    for capacity, rate in (1, 200), (10, 200), (10, 2000):
        ran = rate_of_waits(capacity, rate, 1.0 if bench.short else 5.0)
        bench.number(f"rate of 4 in wait(), capacity {capacity}, to the set {rate}/s", ran / rate)


def kills(bench: Bench) -> None:
    """Measure the longest call of processes that live on while others are killed."""
    number = 20 if bench.short else 200
    (first, second, allow), granted, most = kill_many(number)
    bench.number(f"{number} killed: longest wait() of others", max(first, second), "<= 1", "s")
    bench.number(f"{number} killed: longest allow() of others", allow, "<= 1", "s")
    bench.number("granted, to capacity + rate * t", granted / most, "<= 1", must=True)


PARTS: Final[dict[str, Part]] = {
    part.__name__: part for part in (one_process, four_processes, waits, kills)
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
