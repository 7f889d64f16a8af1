"""What a bucket per key costs: memory for each live key, and time beside a plain bucket.

uv run benchmarks/keys.py
"""

import logging
import os
from statistics import median
from time import perf_counter
from timeit import repeat

import psutil

from rate_limiter import BucketPerKey, TokenBucket
from rate_limiter.testing import ManualClock

KEYS = 100_000


def report(what: str, measured: float, unit: str, target: float) -> None:
    verdict = "ok" if measured <= target else "MISS"
    print(f"{what:<50} {measured:7.2f} {unit:<3} <= {target:<6g} {verdict}")


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


def main() -> None:
    logging.disable()  # the warning that it is at max_keys
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    tenants = empty_buckets(KEYS)
    report(
        f"memory of {len(tenants):,} live keys", (process.memory_info().rss - before) / 1e6, "MB", 60
    )
    few, many = map(microseconds_of_a_new_key, (empty_buckets(1000), tenants))
    report("a new key at max_keys = 1,000, none full", few, "us", 100)
    report(f"the same at {KEYS:,}: grows with cache misses only", many / few, "x", 3)
    per_key, plain = BucketPerKey(1e9, 1e9), TokenBucket(1e9, 1e9)
    one = min(repeat('per_key["acme"].allow()', number=100_000, globals={"per_key": per_key}))
    other = min(repeat("plain.allow()", number=100_000, globals={"plain": plain}))
    report("allow() on a key, against a plain bucket's", one / other, "x", 2)


if __name__ == "__main__":
    main()
