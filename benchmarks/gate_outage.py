"""The part of gate.py that takes away what a worker depends on: the broker, its connections, its memory.

Times count from what the limit allows: each second that the broker was away is a second more.
"""

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from bench import Bench
from gate_lab import LabError, RabbitMQ, Redis, Run, Server, wait_until

__all__ = ["outage"]

#: Seconds that a restarted broker is away.
AWAY: Final = 1.5

#: For Redis to give out again soon what was not acknowledged, if nobody renews its lease.
SHORT: Final = {"visibility_timeout": 4, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}


def outage(bench: Bench) -> None:
    """Take away Redis, connections, the result backend, and RabbitMQ's memory."""
    if "redis" in bench.brokers:
        with Redis(bench.directory, durable=True) as server:
            for how in restart, stop_for_a_while, kill_clients:
                for pool in ("prefork",) if bench.short else ("prefork", "threads", "gevent"):
                    redis_away(bench, server, pool, how)
        random_faults(bench)
        sent_back(bench)
    if "rabbitmq" in bench.brokers:
        for pool in "prefork", "threads":
            connections_closed(bench, pool)
        for task in "limited", "later":
            memory_alarm(bench, task)
    for name in bench.brokers:
        for refusal in "drop", "raise":
            backend_down(bench, bench.server(name), refusal)


# -- Redis ----------------------------------------------------------------------------------------


def restart(server: Server) -> float:
    """Restart Redis. Return for how many seconds it was away."""
    server.kill()
    time.sleep(AWAY)
    server.start()  # which takes longer to find out that it answers than it takes to answer
    return AWAY


def stop_for_a_while(server: Server) -> float:
    """Let Redis answer nobody for 10 s."""
    with server.stopped():
        time.sleep(10)
    return 10


def kill_clients(server: Server) -> float:
    """Close all connections to Redis."""
    server.close_connections()
    return 0


def redis_away(bench: Bench, server: Server, pool: str, how: Callable[[Server], float]) -> None:
    """Take Redis away three times (stopped: once) while jobs are held."""
    jobs, rate = (20, 4) if bench.short else (40, 2)
    times = 1 if how is stop_for_a_while else 3
    away = 0.0
    with Run(server, rate=rate, capacity=1, pool=pool, level="INFO", max_held=1000) as run:
        run.send("limited", jobs)
        run.start()
        began = run.ready()
        ended: list[str] = []
        for _ in range(times):
            time.sleep(jobs / rate / 10)
            run.wait("limited", run.count("limited") + 1, 5)
            time.sleep(0.2 / rate)  # between two jobs, so that no acknowledgement is under way
            connected = run.output().count("Connected to")
            away += how(server)
            wait_until(
                lambda n=connected: run.output().count("Connected to") > n or run.ended(), AWAY + 2
            )
            ended += run.ended()
        unfinished = jobs - run.count("limited")
        allowed = (jobs - 1) / rate + away
        wait_until(
            lambda: len({ran.number for ran in run.ran("limited")}) == jobs or run.ended(),
            began + allowed + 30 - time.monotonic(),
        )
        time.sleep(1)  # for a second run of one
        ended += run.ended()
        ran = run.ran("limited")
        late = max(each.moment for each in ran) - began - allowed
        log = run.output()
        run.workers.clear() if ended else None
    counts = Counter(each.number for each in ran)
    doubled = sum(count > 1 for count in counts.values())
    in_order = sorted(counts) == list(counts)
    measured = f"{len(counts)} of {jobs}, {doubled} twice, {late:+.1f} s, {len(ended)} workers ended"
    if not unfinished:
        raise LabError("all jobs had run before the last outage")
    bench.must(
        f"outage Redis {how.__name__}, {times} times, {pool}",
        measured + ("" if in_order else ", not in order"),
        f"{jobs}, 0, +5 s, 0",
        len(counts) == jobs and not doubled and late <= 5 and not ended,
        doubled=doubled,
        late=late,
        put_back=log.count("jobs back into their queues"),
    )


def random_faults(bench: Bench) -> None:
    """Let faults of all kinds hit the same Redis under workers with and without a gate."""
    rounds, jobs = (8, 200) if bench.short else (40, 1_000)
    setups = [(gate, pool) for gate in (True, False) for pool in ("prefork", "threads")]
    chance = random.Random(7)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Redis(bench.directory, durable=True))
        runs = []
        for gate, pool in setups:
            options: dict[str, Any] = {"gate": gate, "pool": pool, "sleep": 0 if gate else 1}
            run = stack.enter_context(Run(server, rate=2, capacity=1, max_held=1000, **options))
            run.send("limited", jobs)
            run.start()
            runs.append(run)
        for run in runs:
            run.ready()
        ended = [0] * len(runs)
        for _ in range(rounds):
            time.sleep(chance.uniform(0.2, 3))
            fault = chance.choice((restart, kill_clients, kill_clients, stop_shortly, flicker))
            fault(server)
            time.sleep(chance.uniform(0.2, 3))
            for number, run in enumerate(runs):
                if run.ended():
                    ended[number] += 1
                    run.kill()
                    run.start()
        time.sleep(5)
        ran = [Counter(each.number for each in run.ran("limited")) for run in runs]
    for (gate, pool), times, counts in zip(setups, ended, ran, strict=True):
        bench.report(
            f"outage Redis {rounds} random faults, {pool}, {'gate' if gate else 'no gate'}",
            f"{times} workers ended; {len(counts)} jobs, {counts.total() - len(counts)} runs too many",
            "0 ended" if gate else "",
            not times if gate else None,
        )


def stop_shortly(server: Server) -> None:
    """Let Redis answer nobody for a second, and close all connections then."""
    with server.stopped():
        time.sleep(1)
    server.close_connections()


def flicker(server: Server) -> None:
    """Close all connections again while workers connect anew."""
    for _ in range(6):
        server.close_connections()
        time.sleep(0.02)


def sent_back(bench: Bench) -> None:
    """Send jobs back for longer than Redis's visibility timeout, at the gate and by RetryAfter."""
    jobs, rate, pause = (10, 1, 6) if bench.short else (30, 2, 10)
    conf = {"broker_transport_options": SHORT}
    options = {"when_limited": "retry", "pause": pause}
    with Run(bench.server("redis"), rate=rate, capacity=1, conf=conf, **options) as run:
        run.send("limited", jobs)
        run.send("later", 5)
        run.start()
        run.ready()
        run.wait("limited", jobs, jobs / rate + 20)
        run.wait("later", 10, 2 * pause)
        time.sleep(6)
        limited, later = (
            Counter(each.number for each in run.ran(kind)) for kind in ("limited", "later")
        )
    bench.must(
        f"outage Redis timeout 4 s: {jobs} sent back, 5 RetryAfter",
        f"{len(limited)} in {limited.total()} runs, {len(later)} in {later.total()}",
        f"{jobs} in {jobs}, 5 in 10",
        (len(limited), limited.total(), len(later), later.total()) == (jobs, jobs, 5, 10),
    )


# -- RabbitMQ -------------------------------------------------------------------------------------


def connections_closed(bench: Bench, pool: str) -> None:
    """Close all connections while a job runs and six are held; then send 20 unlimited jobs."""
    rounds = 3 if bench.short else 10
    took = []
    with Run(bench.server("rabbitmq"), rate=1 / 60, capacity=1, pool=pool, level="INFO") as run:
        run.send("busy", 1, 1000 * (60 + 15 * rounds))
        run.send("limited", 7)
        run.start()
        run.ready()
        run.wait("busy", 1, 10, "the busy job did not start")
        time.sleep(1)
        for number in range(rounds):
            connected = run.output().count("Connected to")
            run.server.close_connections()
            wait_until(lambda n=connected: run.output().count("Connected to") > n, 30, 0.01)
            began = time.monotonic()
            run.send("free", 20, 20 * number)
            came = run.wait("free", 20 * (number + 1), 20)
            took.append(time.monotonic() - began if came else 20.0)
        free = Counter(each.number for each in run.ran("free"))
    bench.must(
        f"outage RabbitMQ connections closed {rounds} times, {pool}",
        f"20 jobs behind 6 held within {max(took):.2f} s, {free.total() - len(free)} twice",
        "2 s",
        max(took) <= 2 and len(free) == 20 * rounds,
        seconds=max(took),
    )


def memory_alarm(bench: Bench, task: str) -> None:
    """Send 20 jobs back while RabbitMQ is short of memory, and kill it."""
    with (
        RabbitMQ(bench.directory) as server,
        Run(server, rate=20, capacity=1, when_limited="retry", pause=1, level="INFO") as run,
    ):
        run.send(task, 21)
        server.control("set_vm_memory_high_watermark", "0.0000001")
        run.start()
        run.ready()
        time.sleep(5)
        before = run.count(task)
        server.kill()
        server.start()
        again = 2 if task == "later" else 1

        def all_ran() -> bool:
            counts = Counter(each.number for each in run.ran(task))
            return len(counts) == 21 and min(counts.values()) >= again

        wait_until(all_ran, 60)
        counts = Counter(each.number for each in run.ran(task))
        ended = run.ended()
        run.workers.clear() if ended else None
    lost = 21 - sum(count >= again for count in counts.values())
    more = counts.total() - sum(min(count, again) for count in counts.values())
    bench.must(
        f"outage RabbitMQ memory alarm, killed, {'RetryAfter' if again == 2 else 'retry'}",
        f"{lost} of 21 lost, {more} runs too many, {before} before, {len(ended)} workers ended",
        "0 lost",
        not lost and not ended,
    )


# -- the result backend ---------------------------------------------------------------------------


def backend_down(bench: Bench, server: Server, how: str) -> None:
    """Refuse jobs while the result backend is down; unlimited jobs are behind them."""
    with Redis(bench.directory) as backend:
        conf = {"result_backend": backend.url, "task_ignore_result": False}
        options: dict[str, Any] = {"when_limited": how, "level": "INFO"}
        with Run(server, rate=0.001, capacity=1, conf=conf, **options) as run:
            run.send("limited", 1)
            run.start()
            run.ready()
            run.wait("limited", 1, 10, "the first job did not run")
            time.sleep(1)
            backend.kill()
            run.send("limited", 20, 1)
            began = time.monotonic()
            run.send("free", 20)
            came = run.wait("free", 20, 30)
            took = time.monotonic() - began
            time.sleep(max(0.0, 30 - took))
            backend.start()
            ends = "Dropped limited" if how == "drop" else "raised"
            ended = wait_until(lambda: run.output().count(ends) >= 20, 30)
    bench.must(
        f"outage {server.name} result backend down, 20 with {how!r}",
        f"{'20' if came else 'not all'} free within {took:.1f} s; {'' if ended else 'not '}all ended",
        "1 s",
        came and took <= 1 and ended,
        seconds=took,
    )
