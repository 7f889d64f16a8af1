"""What a bucket per key costs: memory for each live key, and time beside a plain bucket.

uv run benchmarks/keys.py
"""

import logging
import os
import sys
from statistics import median
from time import perf_counter
from timeit import repeat
from typing import Final

import psutil
from bench import Bench, Part, main

from rate_limiter import BucketPerKey, TokenBucket
from rate_limiter.testing import ManualClock

KEYS = 100_000


def empty_buckets(keys: int) -> BucketPerKey:
    tenants = BucketPerKey(10, 5, max_keys=keys, clock=ManualClock())
    for number in range(keys):
        tenants[f"tenant-{number}"].allow()
    return tenants


def microseconds_of_a_new_key(tenants: BucketPerKey) -> float:
    took = []
    for number in range(1000):
        began = perf_counter()
        tenants[f"new-{number}"]
        took.append(perf_counter() - began)
    return median(took) * 1e6


def keys(bench: Bench) -> None:
    """Measure the memory of many keys, and the time of a call."""
    logging.disable()  # the warning that it is at max_keys
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    tenants = empty_buckets(KEYS)
    megabytes = (process.memory_info().rss - before) / 1e6
    bench.number(f"memory of {len(tenants):,} live keys", megabytes, "<= 60", "MB")
    few, many = map(microseconds_of_a_new_key, (empty_buckets(1000), tenants))
    bench.number("a new key at max_keys = 1,000, none full", few, "<= 100", "us")
    bench.number(f"the same at {KEYS:,}: grows with cache misses only", many / few, "<= 3")
    per_key, plain = BucketPerKey(1e9, 1e9), TokenBucket(1e9, 1e9)
    one = min(repeat('per_key["acme"].allow()', number=100_000, globals={"per_key": per_key}))
    other = min(repeat("plain.allow()", number=100_000, globals={"plain": plain}))
    bench.number("time of allow() on a key, to a plain bucket's", one / other, "<= 2")
    logging.disable(logging.NOTSET)


PARTS: Final[dict[str, Part]] = {"keys": keys}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
