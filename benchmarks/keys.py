"""What a bucket per key costs: memory for each live key, and time beside a plain bucket.

uv run benchmarks/keys.py
"""

import os
from timeit import repeat

import psutil

from rate_limiter import BucketPerKey, TokenBucket
from rate_limiter.testing import ManualClock

KEYS = 100_000


def report(what: str, measured: float, unit: str, target: float) -> None:
    verdict = "ok" if measured <= target else "MISS"
    print(f"{what:<50} {measured:7.2f} {unit:<3} <= {target:<6g} {verdict}")


def main() -> None:
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    tenants = BucketPerKey(10, 5, max_keys=KEYS, clock=ManualClock())
    for number in range(KEYS):
        tenants[f"tenant-{number}"].allow()
    report(
        f"memory of {len(tenants):,} live keys", (process.memory_info().rss - before) / 1e6, "MB", 60
    )
    per_key, plain = BucketPerKey(1e9, 1e9), TokenBucket(1e9, 1e9)
    one = min(repeat('per_key["acme"].allow()', number=100_000, globals={"per_key": per_key}))
    other = min(repeat("plain.allow()", number=100_000, globals={"plain": plain}))
    report("allow() on a key, against a plain bucket's", one / other, "x", 2)


if __name__ == "__main__":
    main()
