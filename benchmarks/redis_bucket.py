"""How fast, exact and fair `RedisTokenBucket` is, beside its peers in the same run.

uv run benchmarks/run.py redis_bucket               # everything, with the peers, about ten minutes
uv run benchmarks/run.py redis_bucket.speed         # one part
uv run benchmarks/redis_bucket.py --short           # everything, roughly, with the peers that are there

uv installs the peers for run.py alone. It starts a redis-server of its own, or $REDIS_SERVER. Speeds are ratios
within this run; a busy machine misses some targets all the same. The exit status is 1 if a bucket of ours ever granted
more than ``capacity + rate * t`` by Redis's clock, or left keys behind, or a part could not be measured.
"""

import contextlib
import json
import math
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from timeit import timeit
from typing import Any, Final

import redis
from bench import Bench, Part, main
from core import interleaved
from gate_cluster import calls, forget, together
from gate_lab import LabError, Proxy, Redis, wait_until
from redis_askers import Gate
from redis_takers import OURS, PEERS

from rate_limiter import BucketPerKey
from rate_limiter.gating.engine import Engine
from rate_limiter.gating.limit import Call, Limit
from rate_limiter.redis_bucket import RedisTokenBucket

HERE: Final = Path(__file__).parent

# -- speed ----------------------------------------------------------------------------------------


def speed(bench: Bench) -> None:
    """Let one thread take what is always there, and compare with the least that a script costs."""
    with Redis(bench.directory) as server, redis.Redis.from_url(server.url) as client:
        nothing = client.script_load("return 1")
        empty = RedisTokenBucket("empty", 1, 1e-6, url=server.url)
        contestants: dict[str, Callable[[], Any]] = {
            "EVALSHA return 1": lambda: client.evalsha(nothing, 0),
            "RedisTokenBucket.allow": RedisTokenBucket("full", 1e9, 1e5, url=server.url).allow,
            "RedisTokenBucket.allow, refused": empty.allow,
        }
        for name, make in PEERS.items():
            with bench.left_out(f"speed: {name}"):
                contestants[name] = make(server.url, 1_000_000, 1_000_000)
        for take in contestants.values():
            if not take() and take != empty.allow:
                raise LabError(f"speed: {take} granted nothing")
        measures = [lambda take=take: timeit(take, number=100) for take in contestants.values()]
        (least, *_), *others = interleaved(20 if bench.short else 100, *measures)
        bench.report("speed: EVALSHA return 1", f"{least * 1e4:.0f} us")
        for name, (best, *_) in zip(list(contestants)[1:], others, strict=True):
            is_ours = name == "RedisTokenBucket.allow"
            bench.report(
                f"speed: {name}",
                f"x {least / best:.2f} of its speed ({best * 1e4:.0f} us)",
                ">= 0.6" if is_ours else "",
                least / best >= 0.6 if is_ours else None,
            )


# -- bound ----------------------------------------------------------------------------------------

PROCESSES, THREADS, RATE = 4, 2, 500


def bound(bench: Bench) -> None:
    """Let threads of several processes ask all the time; then the same with clocks an hour apart."""
    seconds = 3 if bench.short else 10
    with Redis(bench.directory) as server:
        for clocks in (0, 0, 0, 0), (0, 0, 3600, 3600):
            for kind in OURS:
                took(bench, server, kind, 20, seconds, clocks)
            for kind in OURS | PEERS:
                if kind != "RedisTokenBucket.wait":
                    with bench.left_out(f"bound: {kind}"):
                        took(bench, server, kind, RATE, seconds, clocks)


def took(
    bench: Bench, server: Redis, kind: str, capacity: int, seconds: float, clocks: tuple[int, ...]
) -> None:
    """Measure what processes were granted: in all, and in the worst window by Redis's clock."""
    if make := PEERS.get(kind):
        make(server.url, RATE, capacity)  # is it installed?
    forget(server.url)
    options = {"kind": kind, "url": server.url, "rate": RATE, "capacity": capacity}
    options |= {"seconds": seconds, "threads": THREADS}
    each = [options | {"clock": clock} for clock in clocks]
    with started("redis_takers.py", each) as processes:
        ends = [result(process) for process in processes]
    by = [len(end["granted"]) for end in ends]
    granted = sorted(tuple(between) for end in ends for between in end["granted"])
    beyond = excess_between(granted, RATE / 1e6) - capacity
    whole = (max(end["last"] for end in ends) - min(end["first"] for end in ends)) / 1e6
    used = len(granted) / (capacity + RATE * whole)
    ours = kind in OURS
    bench.report(
        f"bound: {kind}, capacity {capacity}{', 1 h apart' * any(clocks)}",
        f"{beyond:+.2f} tokens beyond, {used:.3f} used, by {min(by)} to {max(by)} a process",
        "<= 0, >= 0.98" if ours else "",
        beyond <= 1e-6 and used >= 0.98 if ours else None,
    )
    bench.failed = bench.failed or (ours and beyond > 1e-6)


def excess_between(granted: list[tuple[int, ...]], rate: float) -> float:
    """Return the least ``c`` for which no window has surely more than ``c + rate * t`` grants.

    Args:
        granted: Of each the moment before it and the moment after it, in order.
        rate: By the unit of the moments.

    """
    if not granted:
        return 0.0
    origin, lowest, worst = granted[0][0], math.inf, 0.0
    for number, (before, after) in enumerate(granted):
        lowest = min(lowest, number - rate * (before - origin))
        worst = max(worst, number + 1 - rate * (after - origin) - lowest)
    return worst


# -- late -----------------------------------------------------------------------------------------


def late(bench: Bench) -> None:
    """Let the answers of Redis come late to gates."""
    broker = bench.server("redis")
    jobs = 3_600 if bench.short else 6_000
    with Redis(bench.directory) as limits:
        for milliseconds, workers, capacity in (10, 1, 20.0), (60, 4, 20.0), (60, 1, 40.0):
            with Proxy(bench.directory, limits, milliseconds) as proxy:
                ran = together(broker, proxy.url, workers, 400.0, capacity, jobs)
            bench.report(
                f"late by {milliseconds} ms: {workers} at 400/s, capacity {capacity:g}",
                f"{ran.rate:.1f}/s, {ran.calls_each:.2f} calls for each job",
                "392 .. 408/s",
                392 <= ran.rate <= 408 and not ran.twice,
            )


# -- askers ---------------------------------------------------------------------------------------

#: Processes, rate, capacity; calls for each job; the share of the rate that is used.
ASKERS: Final = (
    (20, 50.0, 10.0, 1.3, 0.98),
    (20, 50.0, 3.0, 1.3, 0.98),
    (20, 50.0, 1.0, 4.5, 0.95),
    (4, 400.0, 20.0, 0.4, 0.98),
    (4, 2_000.0, 100.0, 0.1, 0.98),
)

#: The rates of a bucket, of another one in Redis, and of one in each of two processes that a job takes from too.
TOGETHER: Final = ((60.0, 40.0, 0.0), (40.0, 60.0, 0.0), (60.0, 0.0, 20.0), (40.0, 0.0, 30.0))


def askers(bench: Bench) -> None:
    """Let gates without a worker ask all the time; then kill half of those that are many."""
    with Redis(bench.directory) as server:
        for setup in ASKERS:
            asked(bench, server, *setup)
        for rates in TOGETHER:
            all_of(bench, server, *rates)


def asked(
    bench: Bench,
    server: Redis,
    count: int,
    rate: float,
    capacity: float,
    calls_each: float,
    share: float,
) -> None:
    """Measure what processes ask, use and give back, and what is left of the rate when half are killed."""
    seconds = 4.0 if bench.short else 8.0
    kills = count // 2 if count > 4 else 0
    forget(server.url)
    log = server.directory / f"{count}-{rate:g}-{capacity:g}"
    options = {"url": server.url, "rate": rate, "capacity": capacity, "backlog": 300}
    options["seconds"] = seconds + (7 if kills else 1)
    each = [options | {"log": f"{log}-{number}"} for number in range(count)]
    with redis.Redis.from_url(server.url) as client, started("redis_askers.py", each) as processes:
        began = time.monotonic()
        before = calls(client)
        time.sleep(began + seconds - time.monotonic())
        called = calls(client) - before
        gone = time.monotonic()
        for process in processes[:kills]:
            process.kill()
        ends = [result(process) for process in processes[kills:]]
    moments = [ran_at(Path(of["log"])) for of in each]

    def ran(first: float, last: float) -> int:
        return sum(first <= moment < last for ran in moments for moment in ran)

    jobs = ran(began, gone)
    turns = [len(ran) for ran in moments]
    used = jobs / (capacity + rate * (gone - began))
    name = f"askers: {count} at {rate:g}/s, capacity {capacity:g}"
    bench.report(f"{name}: used", f"{used:.3f} of the rate", f">= {share}", used >= share)
    each_job = called / jobs
    bench.report(
        f"{name}: calls", f"{each_job:.2f} for each job", f"<= {calls_each}", each_job <= calls_each
    )
    came = sum(end["came"] for end in ends)
    back = came - sum(end["ran"] + end["left"] for end in ends)
    if came < sum(turns[kills:]):
        raise LabError(f"askers: {came:g} tokens came for {sum(turns[kills:])} jobs")
    bench.report(
        f"{name}: given back",
        f"{100 * back / came:.1f} % of {came:g} tokens",
        "< 2 %",
        back < 0.02 * came,
    )
    if kills:
        first, second, third = (
            ran(gone + start, gone + end) / (end - start) / rate
            for start, end in ((0, 1), (1, 3), (3, 6))
        )
        bench.report(
            f"{name}: {kills} killed -9",
            f"x {first:.2f}, {second:.2f}, {third:.2f} of the rate in s 0-1, 1-3, 3-6",
            ">= 0.95, 0.98",
            second >= 0.95 and third >= 0.98,
        )


def all_of(bench: Bench, server: Redis, rate: float, second: float, local: float) -> None:
    """Measure what two processes use and give back whose jobs take from two buckets each."""
    seconds = 5.0 if bench.short else 10.0
    forget(server.url)
    options = {"url": server.url, "rate": rate, "second": second, "local": local, "capacity": 6.0}
    log = server.directory / f"{rate:g}-{second:g}-{local:g}"
    each = [
        options | {"backlog": 300, "seconds": seconds, "log": f"{log}-{number}"} for number in range(2)
    ]
    with redis.Redis.from_url(server.url) as client, started("redis_askers.py", each) as processes:
        before = calls(client)
        ends = [result(process) for process in processes]
        called = calls(client) - before
    jobs = sum(end["ran"] for end in ends)
    most = min(rate, second or rate, 2 * local or rate)
    used = jobs / (6 * (2 if most < min(rate, second or rate) else 1) + most * seconds)
    came = sum(end["came"] for end in ends)
    back = came - jobs - sum(end["left"] for end in ends)
    beside = f"{second:g}/s in Redis" if second else f"{local:g}/s in each process"
    bench.report(
        f"askers: 2 at {rate:g}/s and {beside}",
        f"{used:.3f} used, {called / jobs:.2f} calls for each job, {100 * back / came:.1f} % given back",
        ">= 0.98, < 2 %",
        used >= 0.98 and back < 0.02 * came,
    )


def ran_at(log: Path) -> list[float]:
    """Return when each job of a process ran."""
    return [moment for (moment,) in struct.iter_unpack("d", log.read_bytes())] if log.exists() else []


# -- keys -----------------------------------------------------------------------------------------


def keys(bench: Bench) -> None:
    """Take from very many buckets, and wait until they are full again."""
    number, full_after = (100_000, 30.0) if bench.short else (1_000_000, 150.0)
    with Redis(bench.directory) as server, redis.Redis.from_url(server.url) as client:
        command = command_of(server.url, full_after)
        forget(server.url)
        before = client.info("memory")["used_memory"]
        first = time.monotonic()
        for start in range(0, number, 1000):
            pipeline = client.pipeline(transaction=False)
            for each in range(start, start + 1000):
                pipeline.execute_command(*command(f"tenant-{each:07}"))
            pipeline.execute()
        last = time.monotonic()
        if last - first > full_after:
            raise LabError(f"keys: {number:,} took {last - first:.0f} s, the first are full again")
        there = client.dbsize()
        size = (client.info("memory")["used_memory"] - before) / there
        bench.report(f"keys: {there:,} that are not full", f"{size:.0f} bytes for each in Redis")
        time.sleep(last + full_after - time.monotonic())
        wait_until(lambda: client.dbsize() == 0, 10)
        after, left = time.monotonic() - last - full_after, client.dbsize()
        bench.must("keys: left when they are full", f"{left} after {after:.1f} s", "0", left == 0)


def command_of(url: str, full_after: float) -> Callable[[str], list[Any]]:
    """Return what makes the command by which a bucket takes a token that comes back after some seconds."""
    sent: list[tuple[Any, ...]] = []

    class Client(redis.Redis):
        def execute_command(self, *arguments: Any, **options: Any) -> Any:
            sent.append(arguments)
            return super().execute_command(*arguments, **options)

    RedisTokenBucket("a-name-to-replace", 10, 1 / full_after, client=Client.from_url(url)).allow()
    command = next(arguments for arguments in sent if "a-name-to-replace" in str(arguments))

    def replaced(argument: Any, name: str) -> Any:
        return argument.replace("a-name-to-replace", name) if isinstance(argument, str) else argument

    return lambda name: [replaced(argument, name) for argument in command]


# -- held -----------------------------------------------------------------------------------------

HELD: Final = 1000


class Keyed(Gate):
    """A gate whose jobs are numbers: the number says whose job it is."""

    def call_of(self, job: int, asks_headers: bool) -> Call:
        """Give the number."""
        return Call("job", (job,), {})


def held(bench: Bench) -> None:
    """Hold jobs of a thousand keys in one gate: first none of them is due, then each key's every ten seconds."""
    with Redis(bench.directory) as server, redis.Redis.from_url(server.url) as client:
        client.config_set("slowlog-log-slower-than", 2000)
        for rate, seconds in (1 / 600, 10.0), (0.1, 20.0):
            tenants = BucketPerKey(1, rate, redis=server.url, name=f"held {rate:g}", max_keys=2 * HELD)
            limit = Limit(tenants, key=lambda number: number % HELD, name="tenant")
            host = Keyed()
            engine = Engine(host, lambda _, limit=limit: (limit,), max_held=10 * HELD)
            plan = engine.plan("job")
            for number in range(5 * HELD):
                engine.offer(number, plan)
            # The first of each key goes, and the moments of the others are known.
            run(engine, host, 5.0)
            client.slowlog_reset()
            called, used = calls(client), time.process_time()
            jobs = run(engine, host, seconds)
            called, used = calls(client) - called, time.process_time() - used
            name = f"held: {HELD} keys at {rate:.3g}/s"
            if not jobs:
                called, used = called / seconds, used / seconds
                bench.report(f"{name}: calls a second", f"{called:.1f}", "<= 5", called <= 5)
                bench.report(f"{name}: of a core", f"{100 * used:.1f} %", "<= 5 %", used <= 0.05)
            else:
                each = called / jobs
                bench.report(
                    f"{name}: {jobs} jobs", f"{each:.2f} calls for each", "<= 1.6", each <= 1.6
                )
            slow = len(client.slowlog_get(1000))
            bench.report(f"{name}: calls that took Redis over 2 ms", f"{slow}", "0", not slow)


def run(engine: Engine[int], host: Gate, seconds: float) -> int:
    """Let an engine release jobs for some time; return how many went."""
    went, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        host.woken.wait(max(0.0, min(engine.next_due, end) - time.monotonic()))
        host.woken.clear()
        went += len(engine.release())
    return went


# -- all of it ------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(program: str, each: list[dict[str, Any]]) -> Iterator[list["subprocess.Popen[str]"]]:
    """Start a process for each of some options, let all begin at once, and end them."""
    with contextlib.ExitStack() as running:
        processes = []
        for options in each:
            process = subprocess.Popen(
                [sys.executable, HERE / program, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            running.callback(process.wait)
            running.callback(process.kill)
            processes.append(process)
        for process in processes:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise LabError(f"{program} did not start")
        for process in processes:
            if process.stdin is not None:
                process.stdin.write("\n")
                process.stdin.flush()
        yield processes


def result(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Wait for what a process reports."""
    text, _ = process.communicate(timeout=60)
    if process.returncode:
        raise LabError(f"a process ended with {process.returncode}")
    reported: dict[str, Any] = json.loads(text)
    return reported


PARTS: Final[dict[str, Part]] = {
    part.__name__: part for part in (speed, bound, askers, late, keys, held)
}

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
