"""A process of redis_bucket.py: the engine of a gate, without a worker. There is always a next job.

It notes when each job went in a file, as a double. What it is to do comes as JSON.
"""

import contextlib
import itertools
import json
import os
import struct
import sys
import threading
import time
from typing import Any

from rate_limiter import AllOf, Bucket, TokenBucket
from rate_limiter.gating.engine import Engine
from rate_limiter.gating.host import Host
from rate_limiter.gating.limit import Limit
from rate_limiter.redis_bucket import RedisTokenBucket
from rate_limiter.redis_gate_bucket import GateBucket


class Gate(Host[int]):
    """A gate that can be woken."""

    def __init__(self) -> None:
        self.woken = threading.Event()

    def wake(self) -> None:
        """Look again."""
        self.woken.set()


# What touches the inside of the bucket: to tell what was given back from what jobs took.


class Watched(GateBucket):
    """Counts the tokens that came to this gate."""

    came = 0.0

    @property
    def _stash(self) -> float:
        return float(self.__dict__["stash"])

    @_stash.setter
    def _stash(self, tokens: float) -> None:
        self.came += max(0.0, tokens - self.__dict__.get("stash", 0.0))
        self.__dict__["stash"] = tokens


class Counted(RedisTokenBucket):
    """A bucket whose tokens are counted."""

    watched: Watched

    def for_gate(self) -> Any:
        """Return what counts them."""
        asked = super().for_gate()
        stash = asked.__dict__.pop("_stash")
        asked.__class__ = Watched
        asked._stash = stash
        self.watched = asked
        return asked


def main() -> None:
    options = json.loads(sys.argv[1])
    bucket = Counted(
        "asked", options["capacity"], options["rate"], url=options["url"], on_outage="closed"
    )
    # Two more that a job takes from, if they have a rate: in this process, and in Redis.
    beside: list[Bucket] = []
    if rate := options.get("local"):
        beside.append(TokenBucket(options["capacity"], rate))
    if rate := options.get("second"):
        beside.append(RedisTokenBucket("second", options["capacity"], rate, url=options["url"]))
    host, limit = Gate(), Limit(AllOf(bucket, *beside), name="asked")
    engine = Engine(host, lambda _: (limit,))
    plan = engine.plan("job")
    numbers = itertools.count()
    log = os.open(options["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + options["seconds"]
    ran, missing = 0, options["backlog"]
    while time.monotonic() < end:
        for _ in range(missing):
            engine.offer(next(numbers), plan)
        host.woken.wait(max(0.0, min(engine.next_due, end) - time.monotonic()))
        host.woken.clear()
        missing = len(engine.release())
        if missing:
            os.write(log, struct.pack("d", time.monotonic()) * missing)
            ran += missing
    json.dump({"ran": ran, "came": bucket.watched.came, "left": bucket.watched.tokens}, sys.stdout)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
