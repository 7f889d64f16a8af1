"""What a user writes, with every public name. Type checkers are to find nothing in it."""

from collections.abc import Callable, Sequence

import pytest
from celery import Celery
from kombu import Connection, Consumer, Queue
from kombu.message import Message
from kombu.mixins import ConsumerMixin, ConsumerProducerMixin
from kombu.transport.base import StdChannel

import rate_limiter
from rate_limiter import (
    AllOf,
    Bucket,
    BucketPerKey,
    RateLimitExceeded,
    RetryAfter,
    SharedTokenBucket,
    TokenBucket,
    otel,
)
from rate_limiter import kombu as rate_limiter_kombu
from rate_limiter.celery import Charge, Gate, current_charge, signals, throttle
from rate_limiter.kombu import GateMixin
from rate_limiter.pytest_plugin import RateLimits
from rate_limiter.redis_bucket import RedisTokenBucket
from rate_limiter.testing import Charged, ManualClock, charged

version: str = rate_limiter.__version__

# Buckets

bucket = TokenBucket(capacity=10, tokens_per_second=5)
taken: bool = bucket.allow() and bucket.try_consume(2.5)
level: float = bucket.tokens
bucket.wait(2.5, timeout=0.1)
bucket.refund(1)
bucket.charge(1)
bucket.pause(0.5)
bucket.configure(capacity=20, tokens_per_second=10)
if delay := bucket.take_or_delay(10):
    print(f"ask again in {delay:.1f} s")
try:
    bucket.wait(10, timeout=0.1)
except RateLimitExceeded as error:
    print(error.retry_after)

plans: dict[str, tuple[float, float]] = {"acme": (100, 50)}
per_tenant = BucketPerKey(10, 5, limits=plans.get)
of_acme: Bucket = per_tenant["acme"]
in_redis = RedisTokenBucket("partner", 5, 2, url="redis://localhost/1", on_outage="closed")
buckets: list[Bucket] = [
    bucket,
    SharedTokenBucket(20, 10),
    in_redis,
    AllOf(TokenBucket(20, 10), TokenBucket(1000, 0.1), in_redis),
]


class Mine:
    """A bucket of the user's own, without a base class."""

    capacity = 10.0
    tokens_per_second = 5.0
    tokens = 10.0

    def allow(self, tokens: float = 1) -> bool:
        return True

    def wait(self, tokens: float = 1, *, timeout: float | None = None) -> None: ...

    def take_or_delay(self, tokens: float = 1) -> float:
        return 0.0

    def refund(self, tokens: float) -> None: ...

    def charge(self, tokens: float) -> None: ...

    def pause(self, seconds: float) -> None: ...

    def configure(
        self, *, capacity: float | None = None, tokens_per_second: float | None = None
    ) -> None: ...


buckets.append(Mine())

# Celery

app = Celery("shop", broker="redis://")
app.conf.rate_limiter_limits = {"shop.export": {"rate": "10/s", "burst": 20, "per": "cluster"}}
gate = Gate(app, max_held=100)
gate.limit("shop.send_*", bucket="100/m", burst=10)
gate.limit(queue="bulk", bucket=TokenBucket(capacity=1, tokens_per_second=20), overflow="pause")


def size_of(prompt: str) -> int:
    return 50 + len(prompt)


def bucket_of(prompt: str) -> Bucket:
    return buckets[len(prompt) % 2]


def from_cache(prompt: str) -> str:
    return prompt


@app.task
@throttle("60/m", burst=5, initial=0, max_wait=30, shadow=True)
def send_email(to: str) -> None: ...


@app.task(name="shop.upload")
@throttle(bucket, tokens="megabytes", name="uplink")
@throttle(per_tenant, key="name")
def upload(name: str, megabytes: float) -> None: ...


@app.task(bind=True)
@throttle(bucket_of, tokens=size_of, buckets=buckets[:2], when_limited=from_cache)
def complete(self: object, prompt: str) -> str:
    if not prompt:
        raise RetryAfter(30)
    charge: Charge = current_charge()
    charge.settle(len(prompt))
    return prompt


@throttle("5/s", when_limited="raise", timeout=1)
def plain(number: int) -> str:
    return str(number)


text: str = plain(1)
same: Callable[[int], str] = plain
send_email.delay("ann@example.com")


@signals.task_throttled.connect
def count(sender: str, task_id: str, limit: str, delay: float, **_: object) -> None:
    print(f"{sender} waits {delay:.1f} s for {limit}")


otel.instrument()

# kombu


class Worker(GateMixin, ConsumerMixin):
    gate = rate_limiter_kombu.Gate(max_held=10)
    gate.limit("emails", bucket=TokenBucket(capacity=5, tokens_per_second=1), key=None)

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def get_consumers(
        self, Consumer: Callable[..., Consumer], channel: StdChannel
    ) -> Sequence[Consumer]:
        return [Consumer([Queue("emails")], callbacks=[self.on_task], prefetch_count=10)]

    def on_task(self, body: object, message: Message) -> None:
        message.ack()

    def on_refused(self, message: Message, error: Exception) -> None:
        message.reject()


class Producer(GateMixin, ConsumerProducerMixin):
    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.gate = rate_limiter_kombu.Gate()


def own_loop(connection: Connection) -> None:
    gate = rate_limiter_kombu.Gate()
    gate.limit("emails", bucket="1/s")
    with gate.attach(connection.Consumer([Queue("emails")])):
        connection.drain_events(timeout=gate.timeout())
        gate.poll()


# Tests

clock = ManualClock()
still = TokenBucket(1, 2, clock=clock)
clock.advance(0.5)
now: float = clock()
cost: list[Charged] = charged(upload.s("a.bin", megabytes=12))
tokens: float = cost[0].tokens


def test_a_limited_email(rate_limits: RateLimits) -> None:
    rate_limits.refuse(retry_after=30)
    with pytest.raises(RateLimitExceeded):
        plain(1)
    rate_limits.lift()
