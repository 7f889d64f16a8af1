"""What the Celery gate holds, lets through and costs: real workers on real brokers.

uv run benchmarks/gate.py                       # everything, about half an hour
uv run benchmarks/gate.py --short               # everything, roughly
uv run benchmarks/gate.py rates --broker redis  # one part, one broker
uv run benchmarks/gate.py parked_kills          # only by name: parked_kills (40 min), parked_memory (12), parked_waits (6)

It starts a redis-server and a RabbitMQ node of its own. Each line is one measurement, with its target
and whether it is met. The exit status is 1 if a limit ever let more through than it may, or a job was
lost that should not be, or a part could not be measured; a missed target is only printed. run.py draws pictures
of `rates`, `passing`, `cluster` and `cut`.
"""

import contextlib
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import psutil
from bench import Bench, Part, main, per_second
from celery import Celery
from celery.worker.consumer.tasks import Tasks
from gate_behind import behind, passing
from gate_cluster import cluster, divided
from gate_cut import cut, loop
from gate_lab import (
    BROKERS,
    SOON,
    WARM_UP,
    LabError,
    Redis,
    Run,
    Server,
    cost,
    excess,
    rate_of,
    wait_until,
)
from gate_operate import operate
from gate_outage import outage
from gate_park import QUEUES, park, parked_kills, parked_memory, parked_waits

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate, throttle
from rate_limiter.celery.bootstep import GateStep
from rate_limiter.gating.engine import Engine
from rate_limiter.gating.host import Host
from rate_limiter.gating.limit import Limit
from rate_limiter.testing import ManualClock

#: Seconds by which a task may note its start late: the gate lets a job go, and the pool starts it later.
LATE: Final = 0.05


# -- rates ----------------------------------------------------------------------------------------


def ungated_rate(bench: Bench, server: Server) -> float:
    """Measure what the machine runs without a limit."""
    jobs = 1_000 if bench.short else 5_000
    with Run(server, gate=False) as run:
        run.send("free", jobs)
        run.start()
        run.wait("free", jobs, 120, "ungated jobs did not all run")
        rate = rate_of(run.moments("free"))
    bench.report(f"rates {server.name} without a limit", f"{rate:.0f}/s", jobs_per_second=rate)
    return rate


def backlog(run: Run, jobs: int, seconds: float) -> list[float]:
    """Run limited jobs for some seconds, all of them sent before the worker starts.

    Returns:
        When each ran, in seconds since the worker was ready.

    """
    run.send("free", WARM_UP)
    run.send("limited", jobs)
    run.start()
    ready = run.ready()
    run.wait("limited", jobs, seconds - (time.monotonic() - ready))
    return [moment - ready for moment in run.moments("limited")]


def gated_rate(bench: Bench, server: Server, rate: float, seconds: float, judged: bool) -> list[float]:
    """Check a limit against its own rate: what it grants, and when the jobs run."""
    jobs = max(1_000, math.ceil(rate * seconds))
    what = f"rates {server.name} limit {rate:g}/s, {seconds:g} s"
    with Run(server, rate=rate, grants=True) as run:
        ran = backlog(run, jobs, seconds)
        granted = run.moments("grant")
        capacity = run.capacity
    measured = rate_of(ran[int(capacity) :])
    ok = -0.02 <= measured / rate - 1 <= 0.01
    bench.report(
        what,
        f"{measured:.3f}/s ({measured / rate - 1:+.2%})",
        "-2 % .. +1 %" if judged else "(machine too slow)",
        ok if judged else None,
        jobs_per_second=measured,
        relative=measured / rate,
    )
    worst = excess((moment - granted[0] for moment in granted), rate)
    bench.must(
        f"  most granted in any window beyond {rate:g}/s * t",
        f"{worst:.9f} jobs",
        f"capacity {capacity:g}",
        worst <= capacity * (1 + 1e-9) + 1e-6,  # moments are noted in whole nanoseconds
        jobs=worst,
    )
    worst = excess(ran, rate)
    bench.must(
        f"  most run in any window beyond {rate:g}/s * t",
        f"{worst:.2f} jobs",
        f"capacity {capacity:g} + {rate * LATE:g}",
        worst <= capacity + rate * LATE,
        jobs=worst,
    )
    return ran


def native_rate(bench: Bench, server: Server, rate: float, seconds: float) -> list[float]:
    """Let Celery's own ``rate_limit`` do the same."""
    with Run(server, native=f"{rate:g}/s") as run:
        ran = backlog(run, max(1_000, math.ceil(rate * seconds)), seconds)
    measured = rate_of(ran[1:])
    bench.report(
        f"rates {server.name} native rate_limit {rate:g}/s",
        f"{measured:.3f}/s ({measured / rate - 1:+.2%})",
        jobs_per_second=measured,
        relative=measured / rate,
    )
    return ran


def rates(bench: Bench) -> None:
    """Measure limits with a backlog that is there from the start."""
    plan = [(20, 5), (100, 5)] if bench.short else [(2, 60), (20, 30), (100, 30), (400, 30)]
    natively = [(100, 5)] if bench.short else [(20, 30), (100, 30)]
    for server in bench.servers():
        free = ungated_rate(bench, server)
        ours = {
            rate: gated_rate(bench, server, rate, seconds, rate < 400 or free >= rate)
            for rate, seconds in plan
        }
        native = {rate: native_rate(bench, server, rate, seconds) for rate, seconds in natively}
        curves = {"gate": ours[100], "native": native[100]}
        seconds = dict(plan)[100]
        bench.picture(
            *("rate", server, 0, 1),
            {name: per_second(ran, 0, seconds) for name, ran in curves.items()},
            limit=100,
        )


# -- starts, while the pool is busy ----------------------------------------------------------------

#: Pools, and their slots.
BUSY: Final = [(pool, slots) for pool in ("prefork", "threads") for slots in (2, 8)]


def after_a_stall(
    server: Server, pool: str, slots: int, capacity: float = 1, cluster: str | None = None
) -> list[float]:
    """Return when jobs of 2/s started that came while all slots were busy for 12 s."""
    with Run(server, rate=2, capacity=capacity, cluster=cluster, pool=pool, slots=slots) as run:
        run.send_each("busy", [12_000] * slots)
        run.send("limited", 24)
        run.start()
        run.ready()
        run.wait("limited", 24, 60, "the jobs did not all run")
        return run.moments("limited")


def beside_others(server: Server, pool: str, slots: int, seconds: int) -> tuple[list[float], float]:
    """Keep a pool busy with unlimited jobs of 0 to 1 s beside jobs of 2/s.

    Returns:
        When the jobs of 2/s started, in the seconds after the first two; how much of the slots' time the
        others took.

    """
    lengths = random.Random(1)
    with Run(server, rate=2, capacity=1, pool=pool, slots=slots, max_held=1000) as run:
        run.send("limited", 2 * seconds + 20)
        run.send_each("busy", [lengths.randrange(1000) for _ in range(3 * slots * seconds)])
        run.start()
        begin = run.ready() + 2
        time.sleep(max(0.0, begin + seconds - time.monotonic()))
        busy = [ran.number / 1000 for ran in run.ran("busy") if begin < ran.moment < begin + seconds]
        started = [moment for moment in run.moments("limited") if begin < moment < begin + seconds]
        return started, sum(busy) / seconds / slots


def autoscaled(server: Server, seconds: float) -> tuple[int, int]:
    """Return the most pool processes of ``--autoscale=8,1`` with 500 held, and then with 16 others."""
    arguments = ("--autoscale=8,1",)
    with Run(server, rate=2, capacity=1, max_held=1000, arguments=arguments) as run:
        run.send("limited", 500)
        run.start()
        run.ready()
        main = psutil.Process(run.workers["w"].pid)

        def most() -> int:
            counts = []
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                counts.append(len(main.children()))
                time.sleep(0.1)
            return max(counts)

        alone = most()
        run.send_each("busy", [500] * 16)
        return alone, most()


def starts(bench: Bench) -> None:
    """Measure when limited jobs start, by their own clocks, while unlimited ones occupy the pool."""
    seconds = 10 if bench.short else 60
    for server in bench.servers():
        with Redis(bench.directory) as limits:
            for capacity, cluster, what in (
                (1, None, "12 s busy, 24 at 2/s"),
                (4, limits.url, "the same, capacity 4, in Redis"),
            ):
                with ThreadPoolExecutor() as threads:
                    stalls = [
                        threads.submit(after_a_stall, server, *setup, capacity, cluster)
                        for setup in BUSY
                    ]
                for (pool, slots), future in zip(BUSY, stalls, strict=True):
                    worst = excess(future.result(), 2)
                    bench.must(
                        f"starts {server.name} {pool} -c {slots}: {what}",
                        f"{worst:.2f} jobs beyond 2/s * t, {rate_of(future.result()):.3f}/s",
                        f"capacity {capacity} + 1 + {2 * LATE:g}",
                        worst <= capacity + 1 + 2 * LATE,
                        jobs=worst,
                    )
        with ThreadPoolExecutor() as threads:
            mixed = [threads.submit(beside_others, server, *setup, seconds) for setup in BUSY]
        for (pool, slots), each in zip(BUSY, mixed, strict=True):
            started, used = each.result()
            worst, rate = excess(started, 2), len(started) / seconds
            what = f"starts {server.name} {pool} -c {slots}: beside 0 to 1 s"
            bench.must(
                what,
                f"{worst:.2f} jobs beyond 2/s * t",
                f"capacity 1 + 1 + {2 * LATE:g}",
                worst <= 2 + 2 * LATE,
                jobs=worst,
            )
            least = 1.94 if slots == 2 else 1.98
            bench.report(
                what,
                f"{rate:.3f}/s, others used {used:.0%} of the slots",
                f"{least}/s",
                rate >= least,
                jobs_per_second=rate,
            )
        alone, beside = autoscaled(server, 5 if bench.short else 15)
        bench.report(
            f"starts {server.name}: --autoscale=8,1, 500 held",
            f"{alone} processes, {beside} with 16 others",
            "1, 8",
            (alone, beside) == (1, 8),
            alone=alone,
            beside=beside,
        )


# -- the decorator, and keys -----------------------------------------------------------------------


def decorator(bench: Bench) -> None:
    """Measure the rate of `@throttle` alone in a prefork worker with four processes."""
    for server in bench.servers():
        with Run(server, rate=2, capacity=1, gate=None, slots=4) as run:
            run.send("limited", 40)
            run.start()
            run.ready()
            run.wait("limited", 40, 60, "the jobs did not all run")
            rate = rate_of(run.moments("limited"))
        bench.report(
            f"decorator {server.name}: 2/s, prefork -c 4, 40 jobs",
            f"{rate:.3f}/s",
            "1.95 .. 2.02/s",
            1.95 <= rate <= 2.02,
            jobs_per_second=rate,
        )


def tenants(bench: Bench) -> None:
    """Measure how long a tenant with few jobs waits behind the backlog of another."""
    for server in bench.servers():
        with Run(server, rate=5, capacity=1, keyed=10_000, max_held=1100) as run:
            run.send("limited", 1_000)
            run.send("limited", 20, first=10_000)
            run.start()
            ready = run.ready()

            def last() -> list[float]:
                return [ran.moment for ran in run.ran("limited") if ran.number >= 10_000]

            wait_until(lambda: len(last()) == 20, 30)
            ran = last()
            backlog = [ran.moment for ran in run.ran("limited") if ran.number < 10_000]
        seconds = ran[-1] - ready if len(ran) == 20 else math.inf
        bench.report(
            f"tenants {server.name}: 20 behind 1,000 of another",
            f"{len(ran)}/20 in {seconds:.2f} s, the other {rate_of(backlog):.3f}/s",
            "20 in 6 s",
            seconds <= 6,
            seconds=seconds,
        )


# -- asks -----------------------------------------------------------------------------------------


def asks_on_manual_clock(rate: float, jobs: int) -> float:
    """Return how often a bucket is asked per job, by the engine alone, with a backlog."""
    clock = ManualClock()
    asked = 0

    class Bucket(TokenBucket):
        def take_or_delay(self, tokens: float = 1) -> float:
            nonlocal asked
            asked += 1
            return super().take_or_delay(tokens)

    limit = Limit(Bucket(1, rate, clock=clock))
    engine: Engine[int] = Engine(Host(), lambda: (limit,), clock=clock)
    for job in range(jobs):
        engine.offer(job, engine.plan())
    while engine.room.held_by:
        clock.now = max(clock.now, engine.next_due)
        engine.release()
        engine.settle()
    return asked / jobs


def asks_of_keys(bench: Bench, server: Server) -> None:
    """Count how often the buckets of many keys are asked, all of which hold jobs."""
    keys, rate = (200, 0.5) if bench.short else (1_000, 0.1)
    seconds, jobs = 2 / rate, 4 * keys
    with Run(server, rate=rate, capacity=1, keyed=4, max_held=jobs, asks=True, pool="threads") as run:
        run.send("limited", jobs)
        run.start()
        run.ready()
        run.wait("limited", keys, 60, "the keys did not all come")
        begin = time.monotonic()
        time.sleep(seconds)
        turns = [each for each in run.ran("asks") if begin <= each.moment < begin + seconds]
    asked = sum(turn.number for turn in turns) / seconds
    most = max(turn.number for turn in turns)
    bench.report(
        f"asks {server.name}: {keys:,} keys held at {rate:g}/s",
        f"{asked:.0f} a second, at most {most} in one turn",
        "250 a second, 50 a turn",
        asked <= 250 and most <= 50,
        asks_per_second=asked,
        most_in_a_turn=most,
    )


def asks(bench: Bench) -> None:
    """Count how often buckets are asked per job that is let go, with a backlog."""
    plan = [(100, 3), (10, 4)] if bench.short else [(100, 10), (10, 15), (0.5, 31)]
    server = bench.servers()[0]
    for pool in ("prefork", "threads"):
        for rate, seconds in plan:
            with Run(server, rate=rate, capacity=1, max_held=2_000, asks=True, pool=pool) as run:
                jobs = len(backlog(run, math.ceil(rate * seconds * 1.5), seconds))
                asked = sum(turn.number for turn in run.ran("asks"))
            bench.report(
                f"asks {server.name} {pool}: {rate:g}/s, {seconds} s",
                f"{asked / jobs:.2f} a job ({asked} for {jobs})",
                "2 a job",
                asked <= 2 * (jobs + 2),  # some are on their way when the time is up
                asks_per_job=asked / jobs,
            )
        if bench.short:
            break
    for rate, name in ((0.5, "0.5/s"), (1 / 60, "1/min")):
        asked_per_job = asks_on_manual_clock(rate, 100)
        bench.report(
            f"asks on a manual clock: {name}, 100 jobs",
            f"{asked_per_job:.2f} a job",
            "2 a job",
            asked_per_job <= 2,
            asks_per_job=asked_per_job,
        )
    asks_of_keys(bench, server)


# -- several workers ------------------------------------------------------------------------------


def workers(bench: Bench) -> None:
    """Measure whether two workers share a backlog, each at its own rate: also one that starts later."""
    jobs = 250 if bench.short else 400
    for queue, (broker, conf) in QUEUES.items():
        if broker not in bench.brokers:
            continue
        for later in 0, 10:
            with Run(bench.server(broker), rate=5, conf=conf, gossip=True) as run:
                run.send("limited", jobs)
                run.start("one")
                if later:
                    run.ready()
                    time.sleep(later)
                run.start("two")
                run.ready(2)
                run.wait("limited", jobs, jobs / 5)
                ran = run.ran("limited")
            # From when both run, or 5 s later, until the half with fewer jobs may end.
            begin = max(
                next(each.moment for each in ran if each.worker == name) for name in ("one", "two")
            )
            begin += 5 if later else 0
            end = begin + (jobs / 10 - later) * 0.8
            moments = [each.moment for each in ran if begin <= each.moment <= end]
            rate = rate_of(moments)
            shares = Counter(each.worker for each in ran)
            bench.report(
                f"workers {queue}: two at 5/s, the second {later} s later",
                f"{rate:.3f}/s, {shares['one']} and {shares['two']} jobs, all in {ran[-1].moment - ran[0].moment:.1f} s",
                "9.5 .. 10.5/s",
                len({each.number for each in ran}) == len(ran) == jobs and 9.5 <= rate <= 10.5,
                jobs_per_second=rate,
            )


# -- longest hold ---------------------------------------------------------------------------------


def longest(bench: Bench) -> None:
    """Hold jobs for longer than RabbitMQ lets a message be unacknowledged."""
    if "rabbitmq" not in bench.brokers:
        return
    jobs, every = 12, 30
    for queue in "RabbitMQ classic", "RabbitMQ quorum":
        broker, conf = QUEUES[queue]
        server = bench.server(broker)
        server.control("eval", "application:set_env(rabbit, consumer_timeout, 60000).")
        server.control("eval", "application:set_env(rabbit, channel_tick_interval, 5000).")
        server.control(
            "set_policy", "limit", "^bench-", '{"delivery-limit": 3}', "--apply-to", "queues"
        )
        for hold in (20,) if bench.short else (20, 600):
            settings = conf | {"rate_limiter_longest_hold": hold}
            with Run(server, rate=1 / every, capacity=1, conf=settings, level="INFO") as run:
                run.send("limited", jobs)
                run.start()
                run.ready()
                with contextlib.suppress(LabError):
                    run.wait("limited", jobs, jobs * every + 60)
                ended = run.ended()
                counts = Counter(each.number for each in run.ran("limited"))
                run.workers.clear() if ended else None
            doubled = sum(count > 1 for count in counts.values())
            bench.report(
                f"longest hold {queue}: timeout 60 s, hold {hold} s",
                f"{len(counts)} of {jobs}, {doubled} twice, {len(ended)} workers ended",
                f"{jobs}, 0, 0" if hold == 20 else "(ends)",
                (len(counts) == jobs and not doubled and not ended) if hold == 20 else None,
            )


# -- tally ----------------------------------------------------------------------------------------


def tally(bench: Bench) -> None:
    """Count 2,000 jobs of five limits in every pool, and compare with what happened."""
    if "redis" not in bench.brokers:
        return
    jobs = 400 if bench.short else 2_000
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "tests/integration/test_counted.py"]
    environment = {**os.environ, "TALLY_JOBS": str(jobs), "REQUIRE_SERVICES": "1"}
    ended = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    for line in ended.stdout.splitlines():
        outcome, _, test = line.partition(" ")
        if "::" in test and outcome in ("PASSED", "FAILED", "ERROR"):
            name = test.partition("::test_")[2].partition(" ")[0].replace("_", " ")
            exact = outcome == "PASSED"
            words = "exact" if exact else "not exact"
            bench.must(f"tally Redis, {jobs:,} jobs: {name}", words, "exact", exact)
    if ended.returncode:
        print(ended.stdout[-4000:], file=sys.stderr)
        bench.failed = True


# -- memory ---------------------------------------------------------------------------------------


def memory_with(server: Server, jobs: int, seconds: float) -> tuple[float, int]:
    """Return the main process's memory in MB and its prefetch count, with a backlog."""
    with Run(server, rate=2) as run:
        run.send("limited", jobs)
        run.start()
        run.ready()
        time.sleep(seconds)
        memory = psutil.Process(run.workers["w"].pid).memory_info().rss / 1e6
        inspect = run.app.control.inspect(destination=[run.node()], timeout=10)
        stats = inspect.stats() or {}
        if run.node() not in stats:
            raise LabError("the worker did not answer `inspect stats`")
        return memory, stats[run.node()]["prefetch_count"]


def memory(bench: Bench) -> None:
    """Measure what a long backlog costs the worker."""
    jobs, seconds = (5_000, 4) if bench.short else (100_000, 20)
    for server in bench.servers():
        few, _ = memory_with(server, 100, seconds)
        many, prefetch = memory_with(server, jobs, seconds)
        bench.report(
            f"memory {server.name}: {jobs} jobs waiting, not 100",
            f"{many:.1f} MB, {many - few:+.1f} MB; prefetch {prefetch}",
            "within +20 MB",
            many - few <= 20,
            megabytes=many - few,
            prefetch=prefetch,
        )


# -- kills ----------------------------------------------------------------------------------------


def kill_round(server: Server, gate: bool, victim: str, jobs: int) -> tuple[Counter[int], int]:
    """Kill the worker or the broker in the middle.

    Returns:
        How often each job ran, and how often the worker ended by itself and was started again.

    The jobs are acknowledged after they ran, so that none may get lost with the child that runs it.
    Without a gate, they sleep so long that they come at about the same rate.

    """
    redis = server.name == "Redis"
    conf = {"task_acks_late": True, "broker_transport_options": SOON if redis else {}}
    with Run(server, rate=50, gate=gate, sleep=0 if gate else 2 / 50, conf=conf) as run:
        run.send("limited", jobs)
        run.start()
        run.ready()
        run.wait("limited", jobs // 2, 60, "the first half did not run")
        if victim == "worker":
            run.kill()
            run.start()
            run.ready(2)
        else:
            server.kill()
            server.start()
        ended = until_quiet(run, jobs, 8 if redis else 4)
        return Counter(each.number for each in run.ran("limited")), ended


def until_quiet(run: Run, jobs: int, seconds: float) -> int:
    """Wait until nothing has run for a while; three times as long if jobs are missing.

    Starts a worker again that ends by itself, as a supervisor would, and returns how often it did.
    """
    quiet_since, seen, ended = time.monotonic(), -1, 0
    while True:
        for name in run.ended():
            run.kill(name)
            run.start(name)
            quiet_since, ended = time.monotonic(), ended + 1
        count = run.count("limited")
        if count != seen:
            quiet_since, seen = time.monotonic(), count
        patience = seconds if len({each.number for each in run.ran("limited")}) == jobs else 3 * seconds
        if time.monotonic() - quiet_since > patience:
            return ended
        time.sleep(0.25)


def kill_rounds(bench: Bench, name: str, gate: bool, victim: str) -> dict[str, int]:
    """Return how many jobs were lost and doubled, and how many workers ended, in how many rounds."""
    rounds, jobs = (1, 200) if bench.short else (10, 500)
    with BROKERS[name](bench.directory, durable=True) as server:
        results = [kill_round(server, gate, victim, jobs) for _ in range(rounds)]
    return {
        "lost": sum(jobs - len(ran) for ran, _ in results),
        "doubled": sum(times > 1 for ran, _ in results for times in ran.values()),
        "ended": sum(ended for _, ended in results),
        "jobs": rounds * jobs,
        "rounds": rounds,
    }


def kills(bench: Bench) -> None:
    """Count what is lost and doubled. Brokers, and with and without a gate, at the same time."""
    setups = [(name, gate) for name in bench.brokers for gate in (True, False)]
    for victim in ("worker", "broker"):
        with ThreadPoolExecutor() as pool:
            rounds = [pool.submit(kill_rounds, bench, *setup, victim) for setup in setups]
        results = [each.result() for each in rounds]
        for (name, gate), values in zip(setups, results, strict=True):
            what = f"kills {BROKERS[name].name} {victim} killed, {'gate' if gate else 'no gate'}"
            lost, ended = values["lost"], values["ended"]
            measured = f"{lost} lost, {values['doubled']} doubled, of {values['jobs']}"
            measured += f"; {ended} workers ended" if ended else ""
            if not gate:
                bench.report(what, measured, **values)
            elif name == "rabbitmq":
                bench.must(what, measured, "0 lost", lost == 0, **values)
            else:  # kombu takes a job off the list before it books it
                without = results[setups.index((name, False))]["lost"]
                bench.report(what, measured, f"no gate: {without} lost", lost <= without, **values)


# -- leases ---------------------------------------------------------------------------------------


def leases(bench: Bench) -> None:
    """Hold jobs for longer than Redis's visibility timeout."""
    if "redis" not in bench.brokers:
        return
    jobs = 10 if bench.short else 30
    conf = {"broker_transport_options": SOON | {"visibility_timeout": 4}}
    with Run(bench.server("redis"), rate=1, max_held=1000, conf=conf) as run:
        run.send("limited", jobs)
        run.start()
        run.ready()
        run.wait("limited", jobs, jobs + 10)
        time.sleep(2 if bench.short else 6)
        runs = Counter(each.number for each in run.ran("limited"))
    bench.must(
        f"leases Redis: {jobs} jobs at 1/s, timeout 4 s",
        f"{len(runs)} ran, {sum(runs.values()) - len(runs)} runs too many",
        "none lost or doubled",
        len(runs) == jobs and max(runs.values()) == 1,
        ran=len(runs),
        runs=sum(runs.values()),
    )


# -- overhead -------------------------------------------------------------------------------------


class FakeTasks(Tasks):
    """The consumer's step as far as the gate asks it."""

    def __init__(self) -> None:
        """Leave everything undone."""

    def qos_global(self, consumer: Any) -> bool:
        """Say that the prefetch count can be changed."""
        return True


class FakeQoS:
    """A prefetch count that nobody is told."""

    value = 8

    def increment_eventually(self, n: int) -> None:
        """Add."""
        self.value += n

    def decrement_eventually(self, n: int) -> None:
        """Take away."""
        self.value -= n


class FakeConsumer(SimpleNamespace):
    """A consumer without connection or pool."""

    __hash__ = object.__hash__


class FakeRequest(SimpleNamespace):
    """A request that starts as soon as it is handed over."""

    __hash__ = object.__hash__

    def on_accepted(self, *_: Any) -> None:
        """Stand for what Celery does then."""


def nothing(*_: Any) -> None:
    """Stand for what is not measured."""


def run_at_once(request: Any) -> None:
    """Stand for the pool."""
    request.on_accepted(0, 0.0)


def fake_consumer(app: Celery) -> Any:
    """Return what `GateStep` needs of a consumer."""
    amqp = SimpleNamespace(driver_type="amqp")
    return FakeConsumer(
        app=app,
        hub=SimpleNamespace(call_soon=nothing, _waker=None),
        timer=SimpleNamespace(call_at=nothing, call_after=nothing, cancel=nothing),
        pool=SimpleNamespace(is_green=False),
        hostname="bench@alone",
        gossip=SimpleNamespace(enabled=False, on_message=nothing),
        create_task_handler=lambda: nothing,
        call_soon=nothing,
        controller=None,
        event_dispatcher=None,
        qos=FakeQoS(),
        steps=[FakeTasks()],
        initial_prefetch_count=8,
        max_prefetch_count=8,
        connection=SimpleNamespace(transport=amqp),
        conninfo=SimpleNamespace(transport=amqp),
        task_consumer=SimpleNamespace(channel=SimpleNamespace(basic_consume=nothing), queues=[]),
        on_task_request=run_at_once,
        _maximum_prefetch_restored=True,
    )


def best(rounds: int, calls: int, action: Callable[[], None]) -> float:
    """Return the microseconds of a call of ``action`` that makes many, in the best round."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        times.append((time.perf_counter() - began) / calls * 1e6)
    return min(times)


def alone(bench: Bench) -> None:
    """Measure the code of the gate by itself, beyond the call that it stands in for."""
    rounds, calls = (5, 5_000) if bench.short else (25, 20_000)
    clock = ManualClock()
    app = Celery("bench-alone", set_as_current=False)

    def task(name: str, bucket: TokenBucket | None) -> Any:
        def body() -> None:
            pass

        return app.task(name=name)(throttle(bucket)(body) if bucket else body)

    free = task("free", None)
    granted = task("granted", TokenBucket(1e9, 1e9))
    # Due a real 0.1 µs after it was asked, so each wake-up finds one job due, as at usual rates.
    held = task("held", TokenBucket(1, 1e7, clock=clock))
    app.finalize()
    step = GateStep(consumer := fake_consumer(app), Gate(app))
    step.start(consumer)
    handle = consumer.on_task_request

    message = SimpleNamespace(delivery_info={"routing_key": "celery"}, properties={"priority": 0})

    def requests(task: Any) -> list[Any]:
        return [
            FakeRequest(
                task=task, id=str(i), request_dict={}, eta=None, revoked=lambda: False, message=message
            )
            for i in range(calls)
        ]

    def give(to: Callable[[Any], None], jobs: list[Any]) -> Callable[[], None]:
        def action() -> None:
            for job in jobs:
                to(job)

        return action

    jobs = requests(held)

    def hold_and_release() -> None:
        for job in jobs:
            handle(job)
        while step.engine.room.held_by:
            clock.now += 1.5e-7  # never two at once: the capacity is 1
            step.loop._on_timer()

    floor = best(rounds, calls, give(run_at_once, requests(free)))
    for what, target, action in (
        ("an ungated job", 1, give(handle, requests(free))),
        ("a job that goes at once", 5, give(handle, requests(granted))),
        ("a job held, then let go by itself", 5, hold_and_release),
    ):
        micro = best(rounds, calls, action) - floor
        bench.report(
            f"overhead of the gate: {what}",
            f"{micro:.2f} us",
            f"{target} us",
            micro <= target,
            microseconds=micro,
        )


#: What a job costs at most in the main process, as a ratio to a worker without a gate; which job; the
#: options of its run; those of the run without a gate. A job at 400/s is compared with one that two slots
#: run at about that rate: a worker that has pauses has more turns of its event loop for each job.
COSTS: Final[dict[str, tuple[float, str, dict[str, Any], dict[str, Any]]]] = {
    "ungated": (1.03, "free", {"gate": True}, {}),
    "gated, never held": (1.08, "limited", {"rate": 1e6, "capacity": 1e6}, {}),
    "held and released, 400/s": (1.15, "limited", {"rate": 400}, {"sleep": 0.0045}),
}


def overhead(bench: Bench) -> None:
    """Measure what the gate costs as a part of a worker."""
    if "redis" not in bench.brokers:
        return
    server = bench.server("redis")
    jobs, pairs = (1_000, 1) if bench.short else (10_000, 5)
    for name, (target, task, options, without_gate) in COSTS.items():
        costs = []
        for number in range(pairs):
            setups = [(task, {"gate": False} | without_gate), (task, options)]
            both = [
                cost(server, jobs, setup[0], **setup[1]) for setup in setups[:: 1 if number % 2 else -1]
            ]
            costs.append(both[:: 1 if number % 2 else -1])
        ratio = statistics.median(gated[0] / free[0] for free, gated in costs)
        without, micro = (statistics.median(each[k][0] for each in costs) * 1e6 for k in (0, 1))
        rate = statistics.median(each[1][1] for each in costs)
        bench.report(
            f"overhead in a worker, Redis: {name}",
            f"{micro:.0f}, no gate {without:.0f} us CPU a job (x {ratio:.3f}), {rate:.0f}/s",
            f"x {target}",
            ratio <= target,
            microseconds=micro,
            ratio=ratio,
            ratios=[gated[0] / free[0] for free, gated in costs],
            jobs_per_second=rate,
        )


# -------------------------------------------------------------------------------------------------

PARTS: Final[dict[str, Part]] = {
    part.__name__: part
    for part in (
        *(rates, behind, passing, starts, decorator, tenants, asks, workers),
        *(cluster, divided, cut, loop, longest, tally, memory, kills, leases),
        *(operate, outage, alone, overhead, park, parked_memory, parked_kills, parked_waits),
    )
}

#: Take long, and run only if they are named.
LONG: Final = ("parked_memory", "parked_kills", "parked_waits")

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS, LONG))
