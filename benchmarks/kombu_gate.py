"""What the gate for plain kombu consumers holds, lets through and costs, on real brokers.

uv run benchmarks/kombu_gate.py             # everything, about four minutes
uv run benchmarks/kombu_gate.py --short     # everything, roughly
uv run benchmarks/kombu_gate.py heartbeats  # one part

It starts a redis-server and a RabbitMQ node of its own. Each line is one measurement, with its target
and whether it is met. The exit status is 1 if a message was lost, or run twice or out of order, where it should
not be, or a part could not be measured; a missed rate is only printed.
"""

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from bench import Bench, Part, main
from gate_lab import LabError, Server, wait_until
from kombu import Connection, Queue
from kombu.mixins import ConsumerMixin, ConsumerProducerMixin

from rate_limiter import TokenBucket
from rate_limiter.kombu import Gate, GateMixin

_names = itertools.count(1)


class Consumer(ConsumerMixin):
    """A plain consumer that notes what it handles."""

    def __init__(self, url: str, *queues: Queue, **options: Any) -> None:
        self.connection = Connection(url, **options)
        self.queues = queues
        self.ran: list[Any] = []
        self.at: list[float] = []
        self.redelivered = 0
        self.connects = 0
        self.ready = threading.Event()

    def get_consumers(self, consumer: Any, _channel: Any) -> list[Any]:
        """Consume all queues."""
        return [consumer(self.queues, callbacks=[self.on_task], prefetch_count=3)]

    def on_connection_revived(self) -> None:
        """Count the connections."""
        self.connects += 1

    def on_consume_ready(self, *_: Any, **__: Any) -> None:
        """Say that it consumes."""
        self.ready.set()

    def on_connection_error(self, _error: Exception, _interval: float) -> None:
        """Keep quiet."""

    def on_task(self, body: Any, message: Any) -> None:
        """Note a message, and acknowledge it."""
        self.ran.append(body)
        self.at.append(time.monotonic())
        self.redelivered += bool(message.delivery_info.get("redelivered"))
        self.work(body)
        message.ack()

    def work(self, body: Any) -> None:
        """Do what the message asks for."""

    def summary(self) -> str:
        """Say what ran, and how."""
        order = "in order" if self.ran == sorted(set(self.ran)) else f"order {self.ran}"
        return (
            f"{len(self.ran)} runs, {len(set(self.ran))} distinct, {order}, "
            f"{self.connects} connections, {self.redelivered} redelivered"
        )


class Sleeping(Consumer):
    """One that sleeps in its callback."""

    interval = 10.0

    def work(self, _body: Any) -> None:
        """Wait for the token."""
        if len(self.ran) > 1:
            time.sleep(self.interval)


class Gated(GateMixin, Consumer):
    """One with a gate."""

    def __init__(self, url: str, gate: Gate, *queues: Queue, **options: Any) -> None:
        super().__init__(url, *queues, **options)
        self.gate = gate


class Producing(GateMixin, Consumer, ConsumerProducerMixin):
    """One with a gate that publishes each result."""

    def __init__(self, url: str, gate: Gate, *queues: Queue, **options: Any) -> None:
        super().__init__(url, *queues, **options)
        self.gate = gate

    def work(self, body: Any) -> None:
        """Publish the result, without retry."""
        name = f"{self.queues[0].name}-results"
        self.producer.publish(body, routing_key=name, declare=[Queue(name)])


@contextlib.contextmanager
def running(*consumers: Consumer) -> Iterator[None]:
    """Run consumers in threads."""
    threads = [threading.Thread(target=consumer.run, daemon=True) for consumer in consumers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for consumer in consumers:
            consumer.should_stop = True
        for thread in threads:
            thread.join(30)


def new_queue(**options: Any) -> Queue:
    """Return a queue that nobody has used."""
    name = f"bench-kombu-{next(_names)}"
    return Queue(name, routing_key=name, **options)


def send(server: Server, queue: Queue, *bodies: Any) -> None:
    """Send messages, and have RabbitMQ confirm that they are on disk."""
    options = {"confirm_publish": True} if server.name == "RabbitMQ" else {}
    with Connection(server.url, transport_options=options) as connection:
        producer = connection.Producer()
        for body in bodies:
            producer.publish(body, routing_key=queue.name, declare=[queue])


def gate_for(queue: Queue, bucket: Any, max_held: int | None = None, **options: Any) -> Gate:
    """Return a gate with one limit."""
    gate = Gate(max_held=max_held)
    gate.limit(queue.name, bucket=bucket, **options)
    return gate


# -- what is measured -----------------------------------------------------------------------------


def heartbeats(bench: Bench) -> None:
    """RabbitMQ with heartbeat=2, one job in ten seconds, four jobs."""
    server = bench.server("rabbitmq")
    interval = 5.0 if bench.short else 10.0
    queues = [new_queue() for _ in range(3)]
    for queue in queues:
        send(server, queue, *range(4))
    options = {"heartbeat": 2}
    sleeping = Sleeping(server.url, queues[0], **options)
    sleeping.interval = interval
    gated, producing = (
        kind(server.url, gate_for(queue, TokenBucket(1, 1 / interval)), queue, **options)
        for kind, queue in ((Gated, queues[1]), (Producing, queues[2]))
    )
    with running(sleeping, gated, producing):
        wait_until(lambda: min(len(gated.ran), len(producing.ran)) >= 4, 4 * interval)
        time.sleep(interval / 2)  # for what should not come
    target = "4 runs, in order, 1, 0"
    what = f"heartbeat=2, 1 job in {interval:g} s"
    bench.report(f"{what}: sleep in the callback", sleeping.summary())
    for name, consumer in (("gate", gated), ("gate, publishing results", producing)):
        ok = consumer.ran == [0, 1, 2, 3] and (consumer.connects, consumer.redelivered) == (1, 0)
        bench.must(f"{what}: {name}", consumer.summary(), target, ok)


#: The kinds of queue that messages stand behind each other in.
KINDS: list[tuple[str, dict[str, str]]] = [
    ("redis", {}),
    ("rabbitmq", {}),
    ("rabbitmq", {"x-queue-type": "quorum"}),
]


def passing(bench: Bench) -> None:
    """200 or 900 messages limited to 2/s before 50 others in one queue, with the defaults."""
    free, others = TokenBucket(1e9, 1e9), [f"other {number}" for number in range(50)]
    for (name, arguments), limited in itertools.product(KINDS, (200, 900)):
        server, slow = bench.server(name), TokenBucket(1, 2)
        took = {}
        for gated in False, True:
            queue = new_queue(queue_arguments=arguments)
            send(server, queue, *range(limited), *others)
            gate = gate_for(queue, lambda body, _, slow=slow: slow if isinstance(body, int) else free)
            consumer = Gated(server.url, gate, queue) if gated else Consumer(server.url, queue)
            with running(consumer):
                consumer.ready.wait(10)
                began = time.monotonic()
                done = wait_until(lambda c=consumer: set(others) <= set(c.ran), 20, 0.01)
                took[gated] = time.monotonic() - began
                time.sleep((4 if bench.short else 20) if gated else 0)
        ran = [
            (at, body) for at, body in zip(consumer.at, consumer.ran, strict=True) if body in range(900)
        ]
        rate = (len(ran) - 1) / (ran[-1][0] - ran[0][0])
        in_order = [body for _, body in ran] == list(range(len(ran)))
        most = (1.0 if limited == 200 else 1.5) * took[False] + 1
        bench.report(
            f"{server.name} {'quorum' if arguments else ''}: 50 behind {limited} at 2/s",
            f"{'50' if done else 'not all'} after {took[True]:.2f} s (no gate: {took[False]:.2f} s); "
            f"{rate:.3f}/s, {'in order, once' if in_order else 'OUT OF ORDER'}",
            f"50 within {most:.2f} s, 1.95 .. 2.02/s",
            done and took[True] <= most and in_order and 1.95 <= rate <= 2.02,
        )


def restart(bench: Bench) -> None:
    """Stop the broker in the middle of 300 messages, and start it again; then kill it."""
    for server, how in itertools.product(bench.servers(durable=True), (signal.SIGTERM, signal.SIGKILL)):
        queue = new_queue()
        send(server, queue, *([kind, number] for number in range(150) for kind in "ab"))
        buckets = {"a": TokenBucket(1, 15), "b": TokenBucket(1, 15)}
        gate = gate_for(queue, lambda body, _, buckets=buckets: buckets[body[0]], max_held=30)
        # Redis gives out again after this what it held for a consumer that was cut off
        options = {
            "visibility_timeout": 5,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
        }
        if server.name != "Redis":
            options = {}
        consumer = Gated(server.url, gate, queue, transport_options=options)
        with running(consumer):
            wait_until(lambda c=consumer: len(c.ran) >= 100, 30)
            os.killpg(server.process.pid, how)
            server.process.wait()
            time.sleep(1)
            server.start()
            wait_until(lambda c=consumer: len({tuple(body) for body in c.ran}) == 300, 60)
        distinct = len({tuple(body) for body in consumer.ran})
        inversions = 0
        for kind in "ab":
            first = list(dict.fromkeys(number for which, number in consumer.ran if which == kind))
            inversions += sum(a > b for a, b in itertools.pairwise(first))
        again = sum(count - 1 for count in Counter(map(tuple, consumer.ran)).values())
        in_order = f"{inversions} inversions"
        measured = (
            f"{distinct} distinct, {in_order}, {again} run twice, {consumer.connects} connections"
        )
        what = f"{server.name}: {'restarted' if how == signal.SIGTERM else 'killed and restarted'}"
        if server.name == "RabbitMQ":
            ok = distinct == 300 and inversions == 0
            bench.must(what, measured, "300 distinct, in order per limit", ok)
        else:  # kombu's own transport may lose a message there, and gives back the latest first
            bench.report(what, measured)


def outage(bench: Bench) -> None:
    """Take Redis away while 40 messages are held; have RabbitMQ die with 20 sent back."""
    server = bench.server("redis", durable=True)
    messages, rate = (20, 4) if bench.short else (40, 2)
    for how in restart_redis, kill_clients, stop_for_a_while:
        times = 1 if how is stop_for_a_while else 3
        queue = new_queue()
        send(server, queue, *range(messages))
        consumer = Gated(server.url, gate_for(queue, TokenBucket(1, rate), max_held=1000), queue)
        away = 0.0
        with running(consumer):
            consumer.ready.wait(10)
            began = time.monotonic()
            for _ in range(times):
                time.sleep(messages / rate / 10)
                seen = len(consumer.ran)
                wait_until(lambda c=consumer, n=seen: len(c.ran) > n, 5, 0.01)
                time.sleep(0.2 / rate)  # between two messages, so that no acknowledgement is under way
                connects = consumer.connects
                away += how(server)
                wait_until(lambda c=consumer, n=connects: c.connects > n, 4)
            if len(consumer.ran) >= messages:
                raise LabError("all messages had run before the last outage")
            allowed = (messages - 1) / rate + away
            left = began + allowed + 20 - time.monotonic()
            wait_until(lambda c=consumer: len(set(c.ran)) == messages, left)
            late = time.monotonic() - began - allowed
            time.sleep(1)  # for a second run of one
        target = f"{messages} runs, as many distinct, +5 s"
        ok = sorted(consumer.ran) == list(range(messages)) and late <= 5
        measured = f"{consumer.summary()}, {late:+.1f} s"
        bench.must(f"Redis: {how.__name__}, {times} times", measured, target, ok)
    memory_alarm(bench)


def restart_redis(server: Server) -> float:
    """Restart Redis. Return for how many seconds it was away."""
    server.kill()
    time.sleep(1.5)
    server.start()
    return 1.5


def kill_clients(server: Server) -> float:
    """Close all connections to Redis."""
    server.close_connections()
    return 0


def stop_for_a_while(server: Server) -> float:
    """Let Redis answer nobody for 10 s."""
    with server.stopped():
        time.sleep(10)
    return 10


def memory_alarm(bench: Bench) -> None:
    """Send 20 messages back while RabbitMQ is short of memory, and kill it."""
    server = bench.server("rabbitmq")
    queue = new_queue()
    send(server, queue, *range(21))
    server.control("set_vm_memory_high_watermark", "0.0000001")
    gate = gate_for(queue, TokenBucket(1, 20), max_held=1000, when_limited="retry")
    consumer = Gated(server.url, gate, queue)
    with running(consumer):
        time.sleep(5)
        before = len(consumer.ran)
        server.kill()
        server.start()
        wait_until(lambda: len(set(consumer.ran)) == 21, 30)
    measured = f"{21 - len(set(consumer.ran))} lost; {before} ran before, {len(consumer.ran)} in all"
    ok = len(set(consumer.ran)) == 21
    bench.must("RabbitMQ: memory alarm, 20 sent back, killed", measured, "0 lost", ok)


def rates(bench: Bench) -> None:
    """Measure the rate, from well after the burst to the last message."""
    for server, rate in itertools.product(bench.servers(), (20, 200)):
        queue = new_queue()
        capacity = rate / 10
        seconds = 4 if bench.short else 15
        jobs = int(capacity + rate * seconds)
        send(server, queue, *range(jobs))
        consumer = Gated(server.url, gate_for(queue, TokenBucket(capacity, rate)), queue)
        with running(consumer):
            wait_until(lambda c=consumer, n=jobs: len(c.ran) >= n, 2 * seconds + 20)
        after = consumer.at[3 * int(capacity) :]  # the burst runs while tokens come
        measured = (len(after) - 1) / (after[-1] - after[0])
        off = measured / rate - 1
        ok = len(consumer.ran) == jobs and abs(off) <= 0.01
        text = f"{measured:.2f}/s ({off:+.2%}), {len(consumer.ran)} of {jobs}"
        bench.report(f"{server.name}: limit {rate}/s, burst {capacity:g}", text, "within 1 %", ok)


def cost(bench: Bench) -> None:
    """Messages a second through a consumer, with and without a gate."""
    for server in bench.servers():
        count, rounds = (1000, 3) if bench.short else (4000, 5)
        speeds: dict[str, list[float]] = {"no gate": [], "gate, not limited": [], "gate, limited": []}
        for _ in range(rounds):
            for kind, measured in speeds.items():
                queue = new_queue()
                send(server, queue, *range(count))
                if kind == "no gate":
                    consumer = Consumer(server.url, queue)
                else:
                    limited = gate_for(queue, TokenBucket(1e9, 1e9))
                    consumer = Gated(server.url, limited if kind == "gate, limited" else Gate(), queue)
                with running(consumer):
                    wait_until(lambda c=consumer, n=count: len(c.ran) >= n, 60)
                measured.append(count / (consumer.at[-1] - consumer.at[0]))
        plain = statistics.median(speeds["no gate"])
        for kind, measured in speeds.items():
            speed = statistics.median(measured)
            bench.report(
                f"{server.name}: {kind}", f"{speed:,.0f} messages/s, {speed / plain:.2f} of no gate"
            )


def layout(bench: Bench) -> None:
    """Whether the gates share their engine, and import each other."""
    code = (
        "import sys, rate_limiter.{}; print(*[m for m in sys.modules if m.startswith('rate_limiter')])"
    )
    loaded = {}
    for which in ("kombu", "celery"):
        command = [sys.executable, "-c", code.format(which)]
        loaded[which] = set(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        )
    shared = loaded["kombu"] & loaded["celery"]
    crossed = any(
        name.startswith(f"rate_limiter.{other}")
        for which, other in (("kombu", "celery"), ("celery", "kombu"))
        for name in loaded[which]
    )
    ok = not crossed and "rate_limiter.gating.holding" in shared
    measured = f"{'crossed' if crossed else 'neither'}; shared: holding, limit, bucket"
    bench.must("imports between the two gates", measured, "neither imports the other", ok)


PARTS: Final[dict[str, Part]] = {
    each.__name__: each for each in (layout, passing, heartbeats, restart, outage, rates, cost)
}


if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
