"""The app of the workers that soak.py runs: that of gate_app, with one task for each kind of limit."""

import time
from typing import Any

from celery import signals
from gate_app import OPTIONS, app, note
from soak import LIMITS

from rate_limiter import BucketPerKey, TokenBucket
from rate_limiter.celery import throttle
from rate_limiter.redis_bucket import RedisTokenBucket

_numbers = {name: (kind.capacity, kind.rate) for name, kind in LIMITS.items()}
_url = OPTIONS["cluster"]
_per_key = BucketPerKey(*_numbers["redis_keyed"], redis=_url, name="soak_keyed")

THROTTLES = {
    "local": throttle(TokenBucket(*_numbers["local"])),
    "weighted": throttle(TokenBucket(*_numbers["weighted"]), tokens="size"),
    "keyed": throttle(BucketPerKey(*_numbers["keyed"]), key="key"),
    "back": throttle(TokenBucket(*_numbers["back"]), when_limited="retry"),
    # With a timeout it is not the gate that makes a job wait, but the decorator: in its slot.
    "shared": throttle(TokenBucket(*_numbers["shared"]), timeout=3600),
    "redis": throttle(RedisTokenBucket("soak", *_numbers["redis"], url=_url)),
    "redis_keyed": throttle(_per_key, key="key"),
    "parked": throttle(TokenBucket(*_numbers["parked"])),
    "parked_redis": throttle(RedisTokenBucket("soak_parked", *_numbers["parked_redis"], url=_url)),
    "unlimited": lambda function: function,
}


@signals.task_received.connect
def received(request: Any, **_: Any) -> None:
    note("received", int(request.id), time.monotonic())


def declare(name: str) -> None:
    def job(number: int, key: str, size: int) -> None:
        note("began", number, time.monotonic())
        time.sleep(number % 4 / 10)
        note("ended", number, time.monotonic())

    app.task(name=name)(THROTTLES[name](job))


for _name in THROTTLES:
    declare(_name)
