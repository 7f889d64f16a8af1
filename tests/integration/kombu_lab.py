"""Plain kombu consumers in threads of the test process, on real brokers."""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import redis
from harness import DEADLINE, wait_for
from kombu import Connection, Exchange, Queue
from kombu.mixins import ConsumerMixin, ConsumerProducerMixin

from rate_limiter import TokenBucket
from rate_limiter.kombu import Gate, GateMixin

_names = itertools.count()


class Broker:
    """A broker, and queues on it that nobody else uses."""

    def __init__(self, url: str, rabbitmq: Any = None) -> None:
        self.url = url
        self.rabbitmq = rabbitmq
        self.prefix = f"kombu{os.getpid()}-{next(_names)}"
        self._producer = self.connection()

    def connection(self, **options: Any) -> Connection:
        """Return a connection, not made yet."""
        return Connection(self.url, **options)

    def queue(self, name: str = "jobs", exchange: Any = None, **options: Any) -> Queue:
        """Return a queue of this test."""
        name = f"{self.prefix}-{name}"
        return Queue(name, exchange or Exchange(""), **{"routing_key": name, **options})

    def declare(self, *queues: Queue) -> None:
        """Make queues before there is a consumer."""
        for queue in queues:
            queue(self._producer.default_channel).declare()

    def send(self, queue: Queue, *bodies: Any, **options: Any) -> None:
        """Send messages to a queue, or to its exchange where ``routing_key`` is given."""
        producer = self._producer.Producer()
        options = {"routing_key": queue.name, "declare": [queue], **options}
        for body in bodies:
            producer.publish(body, **options)

    def waiting(self, queue: Queue) -> int:
        """Return how many messages the broker has not given out."""
        if self.rabbitmq is None:
            with redis.Redis.from_url(self.url) as client:
                lists = [queue.name, *(f"{queue.name}\x06\x16{step}" for step in (3, 6, 9))]
                return sum(map(client.llen, lists))  # one for each step of priorities
        return int(queue(self._producer.default_channel).queue_declare(passive=True).message_count)

    def unacknowledged(self) -> int:
        """Return how many messages Redis would give out again."""
        with redis.Redis.from_url(self.url) as client:
            return int(client.hlen("unacked"))

    def break_connections(self) -> None:
        """Close all connections, as a network would."""
        if self.rabbitmq is None:
            with redis.Redis.from_url(self.url) as client:
                for kind in "pubsub", "normal":
                    client.client_kill_filter(_type=kind, skipme=True)
        else:
            self.rabbitmq.rabbitctl_output("close_all_connections", "a test")

    def rabbitmqctl(self, *arguments: str) -> list[list[str]]:
        """Return the rows that a command of ``rabbitmqctl`` prints."""
        output = self.rabbitmq.rabbitctl_output("-q", *arguments)
        text = output.decode() if isinstance(output, bytes) else output
        return [line.split("\t") for line in text.splitlines()[1:]]

    def close(self) -> None:
        """Close the producer."""
        self._producer.release()


def gate_for(
    queue: Queue,
    bucket: Any = None,
    *,
    rate: float = 20,
    capacity: float = 1,
    gate_held: int | None = None,
    **options: Any,
) -> Gate:
    """Return a gate with one limit, "limit", for a queue: of a bucket, or of a new one with these numbers."""
    gate = Gate(max_held=gate_held)
    limited = TokenBucket(capacity, rate) if bucket is None else bucket
    gate.limit(queue.name, bucket=limited, name="limit", **options)
    return gate


class _Recorder:
    """Notes what runs, and acknowledges it."""

    prefetch_count: int | None = 4

    def __init__(self, broker: Broker, gate: Gate, *queues: Queue, **options: Any) -> None:
        self.connection = broker.connection(**options)
        self.gate = gate
        self.queues = queues
        self.ran: list[Any] = []
        self.at: list[float] = []
        self.messages: list[Any] = []
        self.refused: list[tuple[Any, Exception]] = []
        self.connects = 0
        self.job: Callable[[Any, Any], Any] = lambda _body, _message: None
        self.consumers: Any = None

    def get_consumers(self, consumer: Any, _channel: Any) -> list[Any]:
        return [
            consumer(self.queues, callbacks=[self.on_task], prefetch_count=self.prefetch_count),
        ]

    def on_consume_ready(self, _connection: Any, _channel: Any, consumers: Any, **_: Any) -> None:
        self.consumers = consumers

    def on_connection_revived(self) -> None:
        self.connects += 1

    def on_refused(self, message: Any, error: Exception) -> None:
        self.refused.append((message.payload, error))

    def on_task(self, body: Any, message: Any) -> None:
        self.ran.append(body)
        self.at.append(time.monotonic())
        self.messages.append(message)
        self.job(body, message)
        message.ack()

    def wait_for_runs(self, count: int, deadline: float = DEADLINE) -> list[Any]:
        wait_for(lambda: len(self.ran) >= count, deadline)
        return self.ran


class Worker(_Recorder, GateMixin, ConsumerMixin):
    """A gated consumer."""


class ProducingWorker(_Recorder, GateMixin, ConsumerProducerMixin):
    """A gated consumer with a second connection."""


class RawWorker(Worker):
    """A gated consumer that takes messages without their decoded body."""

    def get_consumers(self, consumer: Any, _channel: Any) -> list[Any]:  # noqa: D102
        return [consumer(self.queues, on_message=self.on_message, prefetch_count=self.prefetch_count)]

    def on_message(self, message: Any) -> None:  # noqa: D102
        self.on_task(message.payload, message)


@contextlib.contextmanager
def running(*workers: Any) -> Iterator[Any]:
    """Run consumers in threads; leaving stops them. What one raises fails the test."""
    errors: list[BaseException] = []

    def run(worker: Any) -> None:
        try:
            worker.run()
        except BaseException as error:  # noqa: BLE001 - for the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=[worker], daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        yield workers[0]
    finally:
        for worker in workers:
            worker.should_stop = True
        for thread in threads:
            thread.join(DEADLINE)
            assert not thread.is_alive(), "the consumer does not stop"
    if errors:
        raise errors[0]
