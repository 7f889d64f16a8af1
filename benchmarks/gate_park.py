"""The parts of gate.py with parked jobs: what stands behind them, their rates, their order, a worker that stops.

Apart from `park`, because they take long: the memory of a worker with very many jobs, kills, and jobs that wait for
longer than the broker lets a message be unacknowledged.
"""

import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Final

import psutil
import redis
from bench import Bench
from gate_lab import (
    BROKERS,
    SOON,
    LabError,
    Redis,
    Run,
    Server,
    rate_of,
    wait_until,
)

__all__ = ["QUEUES", "park", "parked_kills", "parked_memory", "parked_waits"]

#: The kinds of queue that jobs stand behind each other in: a name, the broker, and settings.
QUEUES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "Redis": ("redis", {}),
    "RabbitMQ classic": ("rabbitmq", {}),
    "RabbitMQ quorum": ("rabbitmq", {"task_default_queue_type": "quorum"}),
}

PARK: Final = {"rate_limiter_overflow": "park"}

#: At most so many seconds for 50 jobs behind so many on Redis; on RabbitMQ so many times the time without a gate.
ON_REDIS: Final = {2_000: 4.0, 20_000: 6.0}
RATIO: Final = 1.5

#: Seconds in which the last worker puts everything back.
PUT_BACK: Final = 10.0


def park(bench: Bench) -> None:
    """Measure limits whose jobs are parked."""
    for kind, server, conf in places(bench):
        behind_parked(bench, server, kind, conf, 2_000)
        if kind == "Redis" and not bench.short:
            behind_parked(bench, server, kind, conf, 20_000)
        for rate in (20,) if bench.short else (2, 20, 100):
            rate_while_parking(bench, server, conf, rate)
        with Redis(bench.directory) as limits:
            rate_while_parking(bench, server, conf, 60, workers=3, cluster=limits.url)
        two_workers(bench, server, conf)
        in_order(bench, server, conf)
        three_limits(bench, server, conf)
        put_back(bench, server, conf)


def places(bench: Bench) -> Iterator[tuple[str, Server, dict[str, Any]]]:
    """Yield each kind of queue, its broker, and the settings with which it parks."""
    for kind, (name, conf) in QUEUES.items():
        if name in bench.brokers:
            yield kind, bench.server(name), conf | PARK


def behind_parked(bench: Bench, server: Server, kind: str, conf: dict[str, Any], limited: int) -> None:
    """Measure 50 unlimited jobs behind many limited ones, with and without a gate."""
    seconds = []
    for gate in False, True:
        with Run(server, rate=2, capacity=1, gate=gate, conf=conf) as run:
            run.send("limited", limited)
            run.send("free", 50)
            run.start()
            ready = run.ready()
            run.wait("free", 50, 120)
            ran = run.moments("free")
            seconds.append(ran[-1] - ready if len(ran) == 50 else math.inf)
    without, parked = seconds
    most = ON_REDIS[limited] if kind == "Redis" else RATIO * without
    bench.report(
        f"park {kind}: 50 behind {limited:,} at 2/s",
        f"{parked:.2f} s, without a gate {without:.2f} s (x {parked / without:.2f})",
        f"{most:.2f} s",
        parked <= most,
        seconds=parked,
        without=without,
    )


# -- rates and order ------------------------------------------------------------------------------


def rate_while_parking(
    bench: Bench, server: Server, conf: dict[str, Any], rate: float, workers: int = 1, **options: Any
) -> None:
    """Measure the rate of a limit from the start, with a backlog that is parked meanwhile."""
    jobs = int(min(2_000, max(60, rate * 15)))
    wanted = int(min(jobs, max(20, rate * 10)))
    with Run(server, rate=rate, conf=conf, **options) as run:
        run.send("limited", jobs)
        for number in range(workers):
            run.start(f"w{number}")
        run.ready(workers)
        run.wait("limited", wanted, 60 + 2 * wanted / rate)
        ran = run.ran("limited")
        measured = rate_of([each.moment for each in ran[int(run.capacity) :]])
    late = sum(one.number > other.number for one, other in pairwise(ran))
    by = "" if workers == 1 else f", {workers} workers, one bucket on Redis"
    bench.report(
        f"  rate while parking, {rate:g}/s{by}",
        f"{measured:.2f}/s, {late} of {len(ran)} out of order",
        f"{0.98 * rate:g} .. {1.02 * rate:g}/s",
        0.98 * rate <= measured <= 1.02 * rate,
        rate=measured,
    )


def two_workers(bench: Bench, server: Server, conf: dict[str, Any]) -> None:
    """Measure two workers that each have a rate of their own, from when both run until the last job."""
    jobs = 100 if bench.short else 400
    with Run(server, rate=5, conf=conf) as run:
        run.send("limited", jobs)
        run.start("one")
        run.start("two")
        run.ready(2)
        run.wait("limited", jobs, 30 + jobs / 5)
        ran = run.ran("limited")
    begin = max(next(each.moment for each in ran if each.worker == name) for name in ("one", "two"))
    both = [each for each in ran if each.moment >= begin]
    rate = rate_of([each.moment for each in both])
    shares = sorted(Counter(each.worker for each in both).values())
    bench.report(
        f"  two workers at 5/s each, {jobs} jobs",
        f"{rate:.2f}/s, shares {shares[0]} and {shares[-1]}",
        "9.5 .. 10.5/s, within 10 %",
        len({each.number for each in ran}) == len(ran) == jobs
        and 9.5 <= rate <= 10.5
        and shares[-1] <= 1.1 * shares[0],
        rate=rate,
        shares=shares,
    )


def in_order(bench: Bench, server: Server, conf: dict[str, Any]) -> None:
    """Count the jobs of one worker that run before one that was sent earlier."""
    jobs, rate = 200 if bench.short else 1_000, 50
    # Two threads may note in another order what the gate has let go in order.
    with Run(server, rate=rate, capacity=1, conf=conf, pool="threads", slots=1) as run:
        run.send("limited", jobs)
        run.start()
        run.ready()
        run.wait("limited", jobs, 30 + 2 * jobs / rate, "the jobs did not all run")
        numbers = [each.number for each in run.ran("limited")]
    late = sum(one > other for one, other in pairwise(numbers))
    bench.report(
        f"  one worker, threads, {jobs:,} jobs at {rate}/s",
        f"{late} out of order, {len(numbers) - jobs} runs too many",
        "0, 0",
        numbers == list(range(jobs)),
        late=late,
    )


def three_limits(bench: Bench, server: Server, conf: dict[str, Any]) -> None:
    """Measure two limits, jobs of which stand behind those of a third one that lets one go in a minute."""
    rates = {"free": 20.0, "busy": 50.0}
    seconds = 8 if bench.short else 20
    limits = {task: {"rate": rate, "burst": rate / 10} for task, rate in rates.items()}
    settings = conf | {"rate_limiter_limits": limits}
    with Run(server, rate=1 / 60, capacity=1, conf=settings, slots=8) as run:
        for _ in range(seconds):  # in turns: each of them stands behind the others
            run.send("limited", 20)
            for task, rate in rates.items():
                run.send_each(task, [0] * int(rate * 1.5))  # how long a busy one takes
        run.start()
        run.ready()
        for task, rate in rates.items():
            run.wait(task, int(rate * seconds), 30 + 2 * seconds)
        measured = {
            task: rate_of(run.moments(task)[int(rate / 10) : int(rate * seconds)])
            for task, rate in rates.items()
        }
        slow = run.count("limited")
    bench.report(
        "  two limits, 20/s and 50/s, beside one of 1/min",
        f"{measured['free']:.2f}/s, {measured['busy']:.2f}/s, {slow} of the slow one",
        "within 2 %",
        all(abs(measured[task] / rate - 1) <= 0.02 for task, rate in rates.items()) and slow <= 2,
        rates=measured,
    )


# -- a worker that stops --------------------------------------------------------------------------


def put_back(bench: Bench, server: Server, conf: dict[str, Any]) -> None:
    """Measure how long the last worker takes to put 5,000 jobs back, and whether all run without a gate."""
    count = 1_000 if bench.short else 5_000
    with Run(server, rate=2, capacity=1, conf=conf, slots=1) as run:
        run.send("limited", count)
        run.send("free", 1)
        run.start()
        run.ready()
        run.wait("free", 1, 60, "the jobs were not parked")
        began = time.monotonic()
        run.stop(seconds=60)
        took = time.monotonic() - began
        before = len(run.ran("limited"))
        run.options["gate"] = False
        run.start("without")
        run.wait("limited", count, 60)
        numbers = [each.number for each in run.ran("limited")]
    bench.report(
        f"  the last worker puts {count - before} back",
        f"in {took:.2f} s",
        f"{PUT_BACK:g} s",
        took <= PUT_BACK,
        seconds=took,
    )
    bench.must(
        "  then all run without a gate, in order",
        f"{len(numbers)} runs, {len(set(numbers))} jobs, in order: {numbers == sorted(numbers)}",
        "",
        numbers == list(range(count)),
    )


# -- kills ----------------------------------------------------------------------------------------

#: What a worker does as it is killed, in turn.
PHASES: Final = "parking", "fetching", "putting back"

#: Jobs of a round: so many that moving them all takes a moment, also inside Redis.
JOBS: Final = {"Redis": 10_000, "RabbitMQ": 1_000}

#: Rounds, if the command line does not say, and how often each phase has its turn in one.
ROUNDS: Final = 7
TURNS: Final = 10


class Backlog:
    """The jobs of a run, where they are in the broker.

    Args:
        run: The run.

    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.names = run.queue, f"{run.queue}.parked.limited"
        self.connection = run.app.connection_for_read()
        self.channel = self.connection.channel()

    def lengths(self) -> tuple[int, int]:
        """Return how many messages wait in the queue, and in the lane."""
        queue, lane = map(self._length, self.names)
        return queue, lane

    def _length(self, name: str) -> int:
        try:
            return int(self.channel.queue_declare(name, passive=True).message_count)
        except self.connection.channel_errors:  # it is not there
            self.channel = self.connection.channel()
            return 0

    def numbers(self) -> Counter[int]:
        """Return how often each job is in a Redis: in the queue, in the lane, or not acknowledged."""
        with redis.Redis.from_url(self.run.server.url) as client:
            messages = [json.loads(text) for name in self.names for text in client.lrange(name, 0, -1)]
            for text in client.hvals("unacked"):
                message, _, queue = json.loads(text)
                messages += [message] if queue in self.names else []
        return Counter(int(message["headers"]["argsrepr"].strip("(),")) for message in messages)


def parked_kills(bench: Bench) -> None:
    """Kill workers while they move jobs aside, fetch them and put them back; count what is lost and doubled."""
    setups = [(kind, True) for kind, (name, _) in QUEUES.items() if name in bench.brokers]
    setups += [("Redis", False)] if ("Redis", True) in setups else []
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(kill_rounds, bench, *setup) for setup in setups]
    results = {setup: future.result() for setup, future in zip(setups, futures, strict=True)}
    for (kind, gate), counts in results.items():
        hit = ", ".join(f"{counts[phase]} {phase}" for phase in (PHASES if gate else ["running"]))
        what = f"parked_kills {kind}{'' if gate else ', no gate'}: {hit}"
        lost = counts["lost"]
        measured = f"{lost} lost, {counts['doubled']} doubled, of {counts['jobs']:,}"
        if kind != "Redis":
            bench.must(what, measured, "0 lost", not lost, **counts)
            continue
        without = results[kind, False]["lost"]
        # No more than chance makes of equal numbers.
        as_many = lost - without <= 2 * math.sqrt(lost + without)
        bench.report(what, measured, f"no gate: {without} lost", as_many if gate else None, **counts)
        if gate:
            # A message is lost that kombu has popped and not noted yet: of the queue, of the lane.
            by_phase = ", ".join(f"{counts[f'lost {phase}']} {phase}" for phase in PHASES)
            bench.must(
                f"  lost: {by_phase}",
                f"at most {counts['most']} by one kill, {counts['twice']} in two places",
                "2, 0",
                counts["most"] <= 2 and not counts["twice"],
            )


def kill_rounds(bench: Bench, kind: str, gate: bool) -> Counter[str]:
    """Return what many rounds of kills come to: see `kill_round`."""
    name, conf = QUEUES[kind]
    counts: Counter[str] = Counter()
    with BROKERS[name](bench.directory) as server:
        for number in range(bench.rounds or (1 if bench.short else ROUNDS)):
            pool = ("threads", "prefork")[number % 2]
            found = kill_round(server, gate, pool, conf | PARK, 2 if bench.short else TURNS)
            most = max(counts["most"], found["most"])
            counts += found
            counts["most"] = most
    return counts


def kill_round(server: Server, gate: bool, pool: str, conf: dict[str, Any], turns: int) -> Counter[str]:
    """Kill workers one after the other, all with the same jobs. The last one puts them back; then all run.

    The jobs are acknowledged after they ran, so that none may get lost with the child that runs it. Without a gate
    they are so long that messages come about as often as while they are parked.

    Returns:
        How often a worker was killed in each phase; the jobs, and how many of them were lost and doubled. On Redis
        also how many were in two places after a kill, how many were lost in each phase, and by one kill at most.

    """
    on_redis, jobs = server.name == "Redis", JOBS[server.name]
    counts: Counter[str] = Counter(jobs=jobs)
    conf |= {"task_acks_late": True, "broker_transport_options": SOON if on_redis else {}}
    with Run(server, rate=10, gate=gate, sleep=0.01, pool=pool, conf=conf) as run:
        run.send("limited", jobs)
        backlog, lost = Backlog(run), 0
        for number in range(3 * turns):
            phase = PHASES[number % 3] if gate else "running"
            run.start()
            run.ready(number + 1)
            counts[phase] += kill_in(run, backlog, phase)
            if on_redis:
                there = backlog.numbers()
                gone = jobs - len(there.keys() | {each.number for each in run.ran("limited")})
                counts[f"lost {phase}"] += gone - lost
                counts["most"], lost = max(counts["most"], gone - lost), gone
                counts["twice"] += sum(times > 1 for times in there.values())
        if on_redis:  # a worker that was killed may have kombu's lock, which keeps others from restoring for 300 s
            with redis.Redis.from_url(server.url) as client:
                client.delete("unacked_mutex")
        run.start("last")
        run.ready(3 * turns + 1)
        time.sleep(20 if on_redis else 2)  # until what killed workers had in hand is there again
        run.stop("last", seconds=60)
        run.start("without", gate=False, sleep=0)
        wait_until(lambda: len({each.number for each in run.ran("limited")}) == jobs - lost, 60, 0.5)
        time.sleep(8 if on_redis else 2)  # for a second run of one
        ran = Counter(each.number for each in run.ran("limited"))
        left = backlog.numbers() if on_redis else {}
    counts["lost"] = jobs - len(ran.keys() | left)
    counts["doubled"] = sum(times > 1 for times in ran.values())
    return counts


def kill_in(run: Run, backlog: Backlog, phase: str) -> bool:
    """Kill a worker in a phase, at a moment that may be any of it. Return whether it was in it."""
    share = random.uniform(0, 0.9)
    if phase == "running":
        run.wait("limited", run.count("limited") + 1, 10)
        time.sleep(share / 3)
    elif phase == "parking":
        queue, lane = backlog.lengths()
        wait_until(lambda: backlog.lengths()[1] >= lane + share * queue, 20, 0.001)
    else:
        if not wait_until(lambda: not backlog.lengths()[0], 30, 0.01):
            raise LabError(f"the jobs of {run.queue} were not all parked")
        time.sleep(share)
    if phase == "putting back":
        _, lane = backlog.lengths()
        run.workers["w"].terminate()
        wait_until(lambda: backlog.lengths()[0] > share * lane or run.ended(), 10, 0.001)
    ended = run.ended()
    run.kill()
    time.sleep(0.3)  # until the broker has noticed
    queue, lane = backlog.lengths()
    # A few jobs of the queue were in hand, and are there again.
    moving = queue > run.slots * 4 and lane > 0
    return phase == "running" or (lane > 0 if phase == "fetching" else moving and not ended)


# -- memory ---------------------------------------------------------------------------------------


def parked_memory(bench: Bench) -> None:
    """Measure what very many parked jobs cost the worker."""
    jobs = 5_000 if bench.short else 100_000
    for kind, (name, conf) in QUEUES.items():
        if name in bench.brokers:
            few, many = (memory_with(bench, name, conf | PARK, count) for count in (100, jobs))
            bench.report(
                f"parked_memory {kind}: {jobs:,} jobs parked, not 100",
                f"{many:.1f} MB, {many - few:+.1f} MB",
                "within +20 MB",
                many - few <= 20,
                megabytes=many - few,
            )


def memory_with(bench: Bench, name: str, conf: dict[str, Any], jobs: int) -> float:
    """Return the most memory that all processes of a worker have, in MB, until so many jobs are parked."""
    with BROKERS[name](bench.directory) as server, Run(server, rate=2, capacity=1, conf=conf) as run:
        run.send("limited", jobs)
        run.send("free", 1)
        run.start()
        run.ready()
        main = psutil.Process(run.workers["w"].pid)
        most, end = 0.0, time.monotonic() + 600
        while not run.wait("free", 1, 0.5) and time.monotonic() < end:
            most = max(most, resident(main))
        run.wait("free", 1, 0, "the jobs were not parked")
        time.sleep(5)
        most = max(most, resident(main))
        run.kill()  # it would put them back
        return most


def resident(main: psutil.Process) -> float:
    """Return the memory of a process and its children, in MB."""
    return sum(each.memory_info().rss for each in (main, *main.children(recursive=True))) / 1e6


# -- jobs that wait for long ----------------------------------------------------------------------


def parked_waits(bench: Bench) -> None:
    """Let jobs wait for longer than the broker lets a message be unacknowledged: all kinds at the same time."""
    with ThreadPoolExecutor() as pool:
        futures = []
        for kind, server, conf in places(bench):
            if kind == "Redis":
                # Eight are in hand, the last of them for a minute.
                rate, seconds, timeout = 8 / 60, 30 if bench.short else 75, 4
                conf |= {"broker_transport_options": SOON | {"visibility_timeout": timeout}}
            else:
                rate, seconds, timeout = 1 / 300, 80 if bench.short else 320, 60
                conf |= {"rate_limiter_longest_hold": timeout / 3}
                timeout_of(server, timeout)
            args = bench, server, kind, conf, rate, timeout, seconds
            futures.append(pool.submit(wait_for_long, *args))
        for future in futures:
            future.result()


def timeout_of(server: Server, seconds: int) -> None:
    """Let a RabbitMQ close channels that keep a message for so long; and look often."""
    server.control("eval", f"application:set_env(rabbit, consumer_timeout, {1000 * seconds}).")
    server.control("eval", "application:set_env(rabbit, channel_tick_interval, 5000).")


def wait_for_long(
    bench: Bench,
    server: Server,
    kind: str,
    conf: dict[str, Any],
    rate: float,
    timeout: int,
    seconds: int,
) -> None:
    """Let 40 jobs of a slow limit wait; then run those that are left without a gate."""
    with Run(server, rate=rate, capacity=1, conf=conf, level="INFO") as run:
        run.send("limited", 40)
        run.start()
        run.ready()
        time.sleep(seconds)
        run.send("free", 20)
        alive = wait_until(lambda: run.count("free") == 20, 10) and not run.ended()
        closed = run.output().count("PRECONDITION_FAILED")
        before = run.count("limited")
        run.stop(seconds=20)
        run.options["gate"] = False
        run.start("without")
        run.wait("limited", 40, 30)
        time.sleep(8)  # for a second run of one
        counts = Counter(each.number for each in run.ran("limited"))
    doubled = sum(times > 1 for times in counts.values())
    bench.must(
        f"parked_waits {kind}: timeout {timeout} s, {60 * rate:g}/min, {seconds} s",
        f"{before} ran, {40 - len(counts)} lost, {doubled} twice, {closed} closed, {'' if alive else 'not '}alive",
        "0, 0, 0, alive",
        len(counts) == 40 and not doubled and not closed and alive,
        ran=before,
    )
