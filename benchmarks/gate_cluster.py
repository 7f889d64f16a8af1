"""The parts of gate.py with one rate for several workers.

`cluster` is one RedisTokenBucket: its rate, its shares, its calls. In `divided`, on RabbitMQ, each worker has
its share of the rate: how near to it they are together, while workers come and go.
"""

import time
from collections import Counter
from typing import Any, Final, NamedTuple

import redis
from bench import Bench, per_second
from gate_lab import Redis, Run, Server, excess, rate_of

__all__ = ["cluster", "divided"]

#: Seconds from the start of the workers until the measurement, so that all of them take part.
SETTLED: Final = 3.0

#: Workers, rate, capacity, jobs; by how many percent their shares may differ; calls for each job.
SETUPS: Final = (
    (3, 60.0, 6.0, 1_500, 10, 1.3),
    (3, 60.0, 3.0, 1_500, 10, 1.3),
    (3, 60.0, 1.0, 1_200, 20, 4.5),
    (4, 400.0, 20.0, 6_000, 15, 0.4),
)


#: Of the part without Redis: the rate, and the capacity.
DIVIDED: Final = 60.0, 6.0


def cluster(bench: Bench) -> None:
    """Run several workers on one bucket in a Redis of its own."""
    if "redis" not in bench.brokers:
        return
    broker = bench.server("redis")
    with Redis(bench.directory) as limits:
        second_comes(bench, broker, limits)
        for setup in SETUPS[:1] if bench.short else SETUPS:
            shared(bench, broker, limits, *setup)
        killed(bench, broker, limits)


def second_comes(bench: Bench, broker: Server, limits: Redis) -> None:
    """Let a second worker come and go, beside one that has a backlog."""
    rate, capacity, each = 60, 6, 8
    forget(limits.url)
    options: dict[str, Any] = {"pool": "threads", "slots": 4, "cluster": limits.url, "max_held": 60}
    with Run(broker, rate=rate, capacity=capacity, **options) as run:
        run.send("limited", rate * 60)
        run.start("one")
        begin = run.ready()
        time.sleep(each)
        run.start("two")
        run.ready(2)
        time.sleep(each)
        run.stop("two")
        time.sleep(each)
        seconds = int(time.monotonic() - begin)
        ran = run.ran("limited")
    by = {name: [job.moment - begin for job in ran if job.worker == name] for name in ("one", "two")}
    moments = sorted(by["one"] + by["two"])
    of_all = rate_of([moment for moment in moments if SETTLED <= moment < seconds])
    bench.report(
        "cluster: a second worker comes and goes, 60/s",
        f"{of_all:.2f}/s, {excess(moments, rate) - capacity:+.2f} jobs beyond the bound",
        f"{0.98 * rate:g} .. {1.0034 * rate:g}/s",
        0.98 * rate <= of_all <= 1.0034 * rate,
        jobs_per_second=of_all,
    )
    curves = {name: per_second(moments, 0, seconds) for name, moments in by.items()}
    bench.picture("workers", broker, 0, 1, curves, limit=rate)


class Together(NamedTuple):
    """What workers did that started together, with a backlog for all of them."""

    #: Jobs per second, all of them taking part.
    rate: float
    #: By how many jobs the worst window exceeds the capacity and the rate.
    beyond: float
    #: What each worker ran of it.
    shares: list[int]
    #: Calls of Redis for each job.
    calls_each: float
    #: How many jobs ran twice.
    twice: int


def together(broker: Server, url: str, count: int, rate: float, capacity: float, jobs: int) -> Together:
    """Run so many jobs on several workers whose bucket is on the Redis at a URL."""
    forget(url)
    with Run(broker, rate=rate, capacity=capacity, pool="threads", slots=4, cluster=url) as run:
        names = [f"w{number}" for number in range(count)]
        for name in names:
            run.start(name)
        run.ready(count)
        client = redis.Redis.from_url(url)
        before = calls(client)
        run.send("limited", jobs)
        run.wait("limited", jobs, 60 + jobs / rate, "the jobs did not all run")
        asked = calls(client) - before
        client.close()
        ran = run.ran("limited")
        moments = [each.moment for each in ran]
        window = [each for each in ran if moments[0] + SETTLED <= each.moment <= moments[-1] - SETTLED]
        by = Counter(each.worker for each in window)
        return Together(
            rate_of([each.moment for each in window]),
            excess(moments, rate) - capacity,
            [by[name] for name in names],
            asked / jobs,
            jobs - len({each.number for each in ran}),
        )


def shared(
    bench: Bench,
    broker: Server,
    limits: Redis,
    count: int,
    rate: float,
    capacity: float,
    jobs: int,
    apart: int,
    calls_each: float,
) -> None:
    """Measure whether several workers keep the rate, and have equal shares of it."""
    ran = together(broker, limits.url, count, rate, capacity, jobs)
    name = f"cluster: {count} workers, {rate:g}/s, capacity {capacity:g}"
    near = 0.98 if capacity >= 3 else 0.95
    bench.report(
        f"{name}: rate",
        f"{ran.rate:.2f}/s, {ran.beyond:+.2f} jobs beyond the bound",
        f"{near * rate:g} .. {1.0034 * rate:g}/s",
        near * rate <= ran.rate <= 1.0034 * rate and not ran.twice,
    )
    bench.report(
        f"{name}: shares",
        "/".join(map(str, ran.shares)),
        f"within {apart} %",
        max(ran.shares) <= min(ran.shares) * (1 + apart / 100),
    )
    bench.report(
        f"{name}: calls for each job",
        f"{ran.calls_each:.2f}",
        f"<= {calls_each}",
        ran.calls_each <= calls_each,
    )


def killed(bench: Bench, broker: Server, limits: Redis) -> None:
    """Kill two of four workers at once, with what they hold and were promised."""
    rate, count = 60.0, 4
    forget(limits.url)
    with Run(broker, rate=rate, capacity=6.0, pool="threads", slots=4, cluster=limits.url) as run:
        for number in range(count):
            run.start(f"w{number}")
        run.ready(count)
        run.send("limited", 2_000)
        run.wait("limited", 420, 60, "no jobs ran")
        for name in "w0", "w1":
            run.kill(name)
        gone = time.monotonic()
        time.sleep(7)
        moments = run.moments("limited")

        def between(first: float, last: float) -> float:
            return sum(gone + first <= m < gone + last for m in moments) / (last - first) / rate

        bench.report(
            "cluster: 2 of 4 workers killed -9",
            f"x {between(0, 1):.2f}, {between(1, 3):.2f}, {between(3, 6):.2f} of the rate in s 0-1, 1-3, 3-6",
            ">= 0.95, 0.98",
            between(1, 3) >= 0.95 and between(3, 6) >= 0.98,
        )


def forget(url: str) -> None:
    """Empty a Redis: workers of a run before count as alive for 15 s."""
    with redis.Redis.from_url(url) as client:
        client.flushall()


def calls(client: Any) -> int:
    """Return how many commands of the buckets a Redis has run."""
    stats = client.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {}).get("calls", 0))


def divided(bench: Bench) -> None:
    """Without a Redis let three workers start one after the other, and one each stop and be killed, with a backlog for all."""
    if "rabbitmq" not in bench.brokers:
        return
    rate, capacity = DIVIDED
    with Run(
        bench.server("rabbitmq"),
        rate=rate,
        capacity=capacity,
        pool="threads",
        slots=4,
        gossip=True,
        divided=True,
        max_held=40,
    ) as run:
        run.send("limited", 9_000)
        times: dict[str, float] = {}

        def happens(what: str, act: Any, *arguments: Any) -> None:
            act(*arguments)
            times[what] = time.monotonic()
            time.sleep(18)

        run.start("w1")
        times["w1 starts"] = run.ready(1)
        time.sleep(12)
        for number in 2, 3:
            run.start(f"w{number}")
            happens(f"w{number} starts", run.ready, number)
        happens("w3 stops", run.stop, "w3")
        run.start("w4")
        happens("w4 starts", run.ready, 4)
        happens("w4 killed", run.kill, "w4")
        ran = run.ran("limited")
        moments = [each.moment for each in ran]

        def between(first: float, last: float) -> float:
            return sum(first <= moment < last for moment in moments) / (last - first) / rate

        for what, at in times.items():
            steady = between(at + 9, at + 18) if what != "w1 starts" else between(at + 5, at + 12)
            first = [between(at + second, at + second + 2) for second in range(0, 8, 2)]
            bench.report(
                f"cluster without Redis: {what}",
                f"x {steady:.3f} then; first x " + ", ".join(f"{part:.2f}" for part in first),
                "0.97 .. 1.0034",
                0.97 <= steady <= 1.0034,
            )
        twice = len(ran) - len({each.number for each in ran})
        beyond = excess(moments, rate) - capacity
        bench.must(
            "cluster without Redis: beyond the bound",
            f"{beyond:+.2f} jobs, {twice} twice",
            "<= 3",  # 50 ms: tasks note their start late
            beyond <= 3,
        )
