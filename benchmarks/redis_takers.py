"""What redis_bucket.py compares: buckets and other limiters in Redis, and a process that takes from one.

The process is given what to do as JSON, and reports by JSON which calls of its threads were granted, each between
which two moments of Redis's clock.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["IN_MEMORY", "OURS", "PEERS"]

#: Asks once; whether it was granted.
Take = Callable[[], bool]

#: Seconds between two asks of a thread that was refused.
PAUSE: Final = 0.004


# Each of these gets a URL, a rate in tokens per second, and a capacity. Those in `IN_MEMORY` may get "" for the URL: they
# then have no Redis. It imports what it needs: a peer may be
# missing, and the clock is to be set before.
# ruff: noqa: PLC0415


def allow(url: str, rate: int, capacity: int) -> Take:
    from rate_limiter.redis_bucket import RedisTokenBucket

    return RedisTokenBucket("taken", capacity, rate, url=url, on_outage="closed", timeout=5).allow


def wait(url: str, rate: int, capacity: int) -> Take:
    from rate_limiter.redis_bucket import RedisTokenBucket

    bucket = RedisTokenBucket("taken", capacity, rate, url=url, on_outage="closed", timeout=5)
    return lambda: bucket.wait() or True


def throttled(using: str) -> Callable[[str, int, int], Take]:
    def make(url: str, rate: int, capacity: int) -> Take:
        from throttled import MemoryStore, RedisStore, Throttled, per_sec

        store = RedisStore(server=url) if url else MemoryStore()
        limiter = Throttled(using=using, quota=per_sec(rate, capacity), store=store)
        return lambda: not limiter.limit("taken").limited

    return make


def pyrate(url: str, rate: int, capacity: int) -> Take:
    import redis
    from pyrate_limiter import Rate
    from pyrate_limiter.abstracts.algorithm import TokenBucket
    from pyrate_limiter.abstracts.rate import RateItem
    from pyrate_limiter.buckets.redis_state import RedisStateStore
    from pyrate_limiter.buckets.state_bucket import InMemoryStateStore, StateBucket

    store = RedisStateStore(redis.Redis.from_url(url), "taken") if url else InMemoryStateStore()
    bucket = StateBucket([Rate(rate, 1000, capacity)], TokenBucket(), store)
    return lambda: bool(bucket.put(RateItem("taken", bucket.now())))


def sliding(url: str, rate: int, _: int) -> Take:
    from limits import RateLimitItemPerSecond
    from limits.storage import MemoryStorage, RedisStorage
    from limits.strategies import SlidingWindowCounterRateLimiter

    limiter = SlidingWindowCounterRateLimiter(RedisStorage(url) if url else MemoryStorage())
    item = RateLimitItemPerSecond(rate)
    return lambda: limiter.hit(item, "taken")


def dramatiq(url: str, rate: int, _: int) -> Take:
    from dramatiq.rate_limits import BucketRateLimiter
    from dramatiq.rate_limits.backends import RedisBackend

    limiter = BucketRateLimiter(RedisBackend(url=url), "taken", limit=rate, bucket=1000)

    def take() -> bool:
        with limiter.acquire(raise_on_failure=False) as acquired:
            return bool(acquired)

    return take


def huey(url: str, rate: int, _: int) -> Take:
    from huey import RedisHuey
    from huey.exceptions import RateLimitExceeded

    limiter = RedisHuey("taken", url=url).rate_limit("taken", rate, per=1)

    def take() -> bool:
        try:
            limiter.acquire()
        except RateLimitExceeded:
            return False
        return True

    return take


OURS: Final[dict[str, Callable[[str, int, int], Take]]] = {
    "RedisTokenBucket.allow": allow,
    "RedisTokenBucket.wait": wait,
}

#: Each in its nearest form to a token bucket. Those with windows have a window of a second, and no burst of another
#: size than the rate.
PEERS: Final[dict[str, Callable[[str, int, int], Take]]] = {
    "throttled-py, token bucket": throttled("token_bucket"),
    "throttled-py, GCRA": throttled("gcra"),
    "pyrate-limiter, token bucket": pyrate,
    "limits, sliding window": sliding,
    "dramatiq, bucket": dramatiq,
    "huey, rate_limit": huey,
}

#: Of them those that can do without a Redis.
IN_MEMORY: Final = [name for name in PEERS if name.partition(",")[0] not in ("dramatiq", "huey")]


def set_clock(seconds: float) -> None:
    """Set the clock of this process, but not the one that only counts."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


class ServersClock(threading.local):
    """Between which moments of Redis's clock its last answer to this thread was made, in microseconds."""

    moments = 0, 0

    def watch(self) -> None:
        """Put a TIME before and after all that is sent from now on, in one transaction with it."""
        from redis import Redis
        from redis.client import Pipeline

        execute = Pipeline.execute

        def execute_between(pipeline: Any, raise_on_error: bool = True) -> list[Any]:
            stack = pipeline.command_stack
            # what may follow a take and is none: a sign of life, and its script
            no_take = any(word in str(stack) for word in ("rate_limiter:workers", "SCRIPT LOAD"))
            stack.insert(0, (("TIME",), {}))
            pipeline.execute_command("TIME")
            (seconds, micros), *replies, (last_seconds, last_micros) = execute(pipeline, raise_on_error)
            if not no_take:
                self.moments = seconds * 10**6 + micros, last_seconds * 10**6 + last_micros
            return replies

        def execute_one(client: Any, *arguments: Any, **options: Any) -> Any:
            with client.pipeline() as pipeline:
                pipeline.execute_command(*arguments, **options)
                return pipeline.execute()[0]

        Pipeline.execute, Redis.execute_command = execute_between, execute_one


def main() -> None:
    options = json.loads(sys.argv[1])
    set_clock(options["clock"])
    clock = ServersClock()
    clock.watch()
    take = {**OURS, **PEERS}[options["kind"]](options["url"], options["rate"], options["capacity"])
    granted: list[tuple[int, int]] = []
    asked: list[tuple[int, int]] = []

    def ask() -> None:
        end = time.monotonic() + options["seconds"]
        while time.monotonic() < end:
            if take():
                granted.append(clock.moments)
            else:
                time.sleep(PAUSE)
            asked.append(clock.moments)

    threads = [threading.Thread(target=ask) for _ in range(options["threads"])]
    print("ready", flush=True)
    sys.stdin.readline()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump({"granted": granted, "first": min(asked)[0], "last": max(asked)[1]}, sys.stdout)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
