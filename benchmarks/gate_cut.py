"""The parts of gate.py in which a worker does not reach the Redis of its limits.

`loop` measures how late a timer fires in the worker's event loop, without limits, with them, and while their Redis
does not answer: by the loop itself, and in brackets with the time in which it waited for a CPU. `cut` measures what
several workers run while all or one of them cannot reach it, and afterwards.
"""

import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from bench import Bench, per_second
from gate_cluster import forget
from gate_lab import Proxy, Redis, Run, Server, excess

__all__ = ["cut", "loop"]


def none_lost(bench: Bench, run: Run, jobs: int, missed: int = 0) -> None:
    """Report what became of so many jobs, and of the connections to the broker.

    Args:
        bench: The benchmark.
        run: What ran them.
        jobs: How many jobs there were.
        missed: How many connections the broker has closed for want of a heartbeat.

    """
    numbers = [each.number for each in run.ran("limited")]
    ran = len(set(numbers))
    twice = len(numbers) - ran
    logs = "".join(run.output(name) for name in run.workers)
    errors = logs.count("Traceback")
    closed = max(missed, logs.count("onnection to broker lost"))
    bench.must(
        "  its jobs",
        f"{ran} of {jobs}, {twice} twice, {errors} errors, {closed} disconnected",
        f"{jobs}, 0, 0, 0",
        ran == jobs and not (twice or errors or closed),
    )


# -- the event loop -------------------------------------------------------------------------------

#: The most milliseconds by which the timer may be late: 99 % of the times, and ever.
LATE_P99: Final = 10.0
LATE_EVER: Final = 25.0

#: A name that takes long to be looked up, see `gate_app`.
SLOW: Final = "slow.invalid"

#: What the loop is measured with while everything answers: the limit, the rate, options of the run. Without a limit
#: two slots run about as many jobs.
SETUPS: Final = (
    ("no limit", 60.0, {"gate": False, "sleep": 2 / 60}),
    ("no limit", 400.0, {"gate": False, "sleep": 0.0045}),
    ("TokenBucket", 60.0, {}),
    ("RedisTokenBucket", 60.0, {"capacity": 6.0}),
    ("RedisTokenBucket", 400.0, {"capacity": 20.0}),
)


def loop(bench: Bench) -> None:
    """Measure how late a timer of 10 ms fires; where there is RabbitMQ, with a heartbeat of 2 s."""
    server = bench.server(bench.brokers[-1])
    with Redis(bench.directory) as limits:
        for pool, setups in (("prefork", SETUPS), ("threads", SETUPS[-1:])):
            for limit, rate, options in setups[-1:] if bench.short else setups:
                url = limits.url if limit == "RedisTokenBucket" else None
                turns(bench, server, pool, f"{limit}, {rate:g}/s", rate=rate, cluster=url, **options)
            look_up(bench, server, limits, pool)
            silence(bench, server, pool)
            for policy in ("local",) if bench.short else ("local", "open"):
                stop(bench, server, limits, pool, policy)
            if bench.short:
                break


def turns(
    bench: Bench,
    server: Server,
    pool: str,
    name: str,
    meanwhile: Callable[[], None] = lambda: None,
    *,
    rate: float = 60.0,
    seconds: float = 0.0,
    **options: Any,
) -> None:
    """Measure the loop of a worker with a backlog.

    Args:
        bench: The benchmark.
        server: The broker.
        pool: The pool.
        name: What is measured.
        meanwhile: Called once the worker is ready.
        rate: The rate of the jobs.
        seconds: For how long there are jobs, at that rate.
        options: Of the `Run`.

    """
    jobs = int(rate * (seconds or (4 if bench.short else 10)))
    missed = missed_heartbeats(server)
    conf = {"broker_heartbeat": 2}
    with Run(server, rate=rate, pool=pool, conf=conf, lateness=True, **options) as run:
        run.send("limited", jobs)
        run.start()
        ready = run.ready()
        meanwhile()
        run.wait("limited", jobs, 60, "the jobs did not all run")
        moments = run.moments("limited")
        late, behind, full = (
            sorted(each.number / 1000 for each in run.ran(kind)) for kind in ("late", "behind", "full")
        )
        p99, longest = late[int(0.99 * len(late))], late[-1]
        bench.report(
            f"loop {server.name} {pool}: {name}",
            f"p99 {p99:.1f}, max {longest:.1f} ms ({behind[int(0.99 * len(behind))]:.1f}, {behind[-1]:.1f})"
            + (f", {len(full)} collections to {full[-1]:.0f} ms" if full else "")
            + f"; x {(jobs - run.capacity) / (moments[-1] - ready) / rate:.2f}",
            f"{LATE_P99:g}, {LATE_EVER:g} ms",
            (p99 <= LATE_P99 and longest <= LATE_EVER) if options.get("gate", True) else None,
            p99=p99,
            longest=longest,
        )
        none_lost(bench, run, jobs, missed_heartbeats(server) - missed)


def missed_heartbeats(server: Server) -> int:
    """Return how often a broker has closed a connection without a heartbeat."""
    logs = (server.directory / "logs").glob("*.log")
    return sum(path.read_text(errors="replace").count("missed heartbeats") for path in logs)


def look_up(bench: Bench, server: Server, limits: Redis, pool: str) -> None:
    """Let the look-up of the Redis's name take 10 s, each time and in vain."""
    seconds = 4 if bench.short else 10
    url = f"redis://{SLOW}:{limits.port}/0"
    what = f"look-up of {seconds} s"
    turns(bench, server, pool, what, seconds=seconds + 3, cluster=url, look_up=(SLOW, seconds))


def silence(bench: Bench, server: Server, pool: str) -> None:
    """Let a server accept connections, and never answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        turns(bench, server, pool, "never answers", cluster=url)


def stop(bench: Bench, server: Server, limits: Redis, pool: str, policy: str) -> None:
    """Stop the Redis in mid-run. With ``on_outage="open"`` all jobs go then."""
    seconds = 4 if bench.short else 10

    def meanwhile() -> None:
        time.sleep(2)
        with limits.stopped():
            time.sleep(seconds)

    forget(limits.url)
    options = {"seconds": seconds + 4, "cluster": limits.url, "on_outage": policy}
    turns(bench, server, pool, f"stopped {seconds} s, {policy}", meanwhile, **options)


# -- outages --------------------------------------------------------------------------------------

#: Workers, rate, capacity.
WORKERS: Final = 3
RATE: Final = 60
CAPACITY: Final = 6.0

#: Jobs before: until each worker has heard of the others, which tell every 5 s that they live. And after it.
BEFORE: Final = 420
AFTER: Final = 240

#: A worker holds no more, lest the others run out of jobs.
HELD: Final = 60

#: Seconds of an outage; what the picture shows before and after it.
AWAY: Final = 10
SEEN: Final = 5

#: Seconds within which the full rate is to be back: each worker asks once a second whether its Redis is.
BACK: Final = 2.0


def cut(bench: Bench) -> None:
    """Stop the Redis of several workers, kill it, and cut off one of them."""
    server = bench.servers()[0]
    policies = "local", "closed", "open"
    with Redis(bench.directory) as limits:
        curves = {
            policy: outage(bench, server, limits, "stopped", policy, limits.stopped())
            for policy in policies
        }
        bench.picture("outage", server, -SEEN, 1, curves, limit=RATE, workers=WORKERS, away=AWAY)
        for policy in () if bench.short else policies:
            outage(bench, server, limits, "killed", policy, killed(limits))
        with Proxy(bench.directory, limits) as proxy:
            outage(bench, server, limits, "1 of 3 cut off", "local", proxy.stopped(), proxy.url)


@contextlib.contextmanager
def killed(server: Server) -> Iterator[None]:
    """Kill a Redis; it starts again, empty."""
    server.kill()
    yield
    server.start()


def outage(
    bench: Bench,
    server: Server,
    limits: Redis,
    how: str,
    policy: str,
    away: contextlib.AbstractContextManager[None],
    url_of_one: str | None = None,
) -> list[float]:
    """Measure what workers run during an outage, and afterwards.

    Args:
        bench: The benchmark.
        server: The broker.
        limits: The Redis of the limit.
        how: What happens.
        policy: The ``on_outage`` of the bucket.
        away: Enter it for the outage.
        url_of_one: The URL that one of the workers has, if it alone is cut off.

    Returns:
        What they run in each second, from `SEEN` before the outage to as long after it.

    """
    forget(limits.url)
    # Each has its share. If one alone is cut off, the others have the whole rate.
    local = 1.0 if url_of_one is None else 1 + 1 / WORKERS
    share = {"open": math.inf, "closed": 0.0, "local": local}[policy]
    options: dict[str, Any] = {"cluster": limits.url, "on_outage": policy, "max_held": HELD}
    with Run(server, rate=RATE, capacity=CAPACITY, pool="threads", slots=4, **options) as run:
        jobs = BEFORE + WORKERS * HELD + int(RATE * AWAY * (share if share < math.inf else 1))
        run.send("limited", jobs)
        for number in range(WORKERS):
            one = url_of_one is not None and not number
            run.start(f"w{number}", **({"cluster": url_of_one} if one else {}))
        run.ready(WORKERS)
        run.wait("limited", BEFORE, 60, "no jobs ran")
        gone = time.monotonic()
        with away:
            left = jobs - run.count("limited")
            time.sleep(AWAY)
            back = time.monotonic()
        if share == math.inf:  # what comes before it asks again goes at once
            time.sleep(max(0.0, back + BACK - 0.5 - time.monotonic()))
        run.send("limited", AFTER, jobs)
        jobs += AFTER
        run.wait("limited", jobs, 60, "the jobs did not all run")
        time.sleep(0.5)  # for a second run of one
        moments = run.moments("limited")
        tell(bench, f"cut: {how}, {policy}", moments, (gone, back), share, left)
        none_lost(bench, run, jobs)
    return per_second((moment - gone for moment in moments), -SEEN, AWAY + SEEN)


def tell(
    bench: Bench, what: str, moments: list[float], outage: tuple[float, float], share: float, left: int
) -> None:
    """Report what ran during an outage, and after it.

    Args:
        bench: The benchmark.
        what: What it was.
        moments: When the jobs ran.
        outage: When it began, and when it ended.
        share: What is to run during it, as a part of the rate; infinity: all.
        left: How many jobs there were as it began.

    """
    gone, back = outage

    def between(first: float, last: float) -> float:
        return sum(first <= moment < last for moment in moments) / (last - first) / RATE

    if share == math.inf:
        ran = [moment - gone for moment in moments if gone <= moment < back]
        measured = f"{len(ran)} of {left} jobs in {max(ran):.1f} s"
        target, ok = "all", len(ran) == left
    else:
        first, then = between(gone, gone + 2), between(gone + 2, back)
        measured = f"x {first:.2f} of the rate in s 0-2, {then:.3f} then"
        target, ok = f"{share:.2f}", abs(then - share) <= 0.03 * share
    bench.report(f"{what}: for {back - gone:.0f} s", measured, target, ok)
    after = between(back + BACK, back + BACK + 3)
    bench.report(
        f"{what}: after it",
        f"x {between(back, back + BACK):.2f} in s 0-2, {after:.3f} in s 2-5",
        ">= 0.98",
        after >= 0.98,
    )
    if share <= 1:  # not if one alone is cut off: the others have the whole rate, and it has its share
        beyond = excess(moments, RATE) - CAPACITY
        late = RATE * 0.05  # tasks note their start late
        bench.report(
            f"{what}: beyond its bound",
            f"{beyond:+.2f} jobs",
            f"<= {CAPACITY:g} + {late:g}",
            beyond <= CAPACITY + late,
        )
