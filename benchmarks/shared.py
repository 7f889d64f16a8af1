"""What a `SharedTokenBucket` costs beside a `TokenBucket`, and what is left when its users are killed.

    uv run benchmarks/shared.py [--short]

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

from core import interleaved, line

from rate_limiter import SharedTokenBucket, TokenBucket

SHORT = "--short" in sys.argv
KILLS = 20 if SHORT else 200
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


def kill_many() -> tuple[list[float], float, float]:
    """Kill many in the midst of a tight loop. Three that live on ask too.

    Returns:
        The longest call of each that lives on, the tokens granted, and the most that may be.

    """
    bucket, tally = SharedTokenBucket(CAPACITY, RATE), Tally(KILLS + 3)
    began = time.monotonic()
    with contextlib.ExitStack() as survivors:
        for index, ask in enumerate((bucket.wait, bucket.wait, bucket.allow)):
            survivors.enter_context(process(tally.loop, ask, index))
        for index in range(3, KILLS + 3):
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


def main() -> int:
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    print("allow(), one thread: time per call, against TokenBucket's that grants")
    asked = [
        partial(timeit, bucket.allow, number=1000)
        for bucket in (TokenBucket(1e9, 1e5), SharedTokenBucket(1e9, 1e5), SharedTokenBucket(10, 10))
    ]
    (plain, *_), (granted, *_), (refused, *_) = interleaved(200 if SHORT else 1000, *asked)
    line("granted", granted / plain, "<= 9")
    line("refused", refused / plain, "<= 0.8")

    print("allow(), granted, 4 processes: calls per second")
    several, one = interleaved(1 if SHORT else 5, *(partial(calls_per_second, n) for n in (4, 1)))
    line("against one process", several[-1] / one[-1])

    print(
        f"{KILLS} processes killed in allow() or wait(), {RATE}/s: the longest call of one that lives on"
    )
    (first, second, allow), granted, most = kill_many()
    line("wait()", max(first, second), "<= 1", "s")
    line("allow()", allow, "<= 1", "s")
    print("tokens granted, against capacity + rate * t")
    line("all processes", granted / most, "<= 1")
    return 1 if granted > most else 0


if __name__ == "__main__":
    sys.exit(main())
