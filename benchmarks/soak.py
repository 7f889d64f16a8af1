"""Random load and faults for an hour: no job is lost, runs twice or goes too early, no worker's memory grows.

uv run benchmarks/soak.py                                      # an hour on each broker, one after the other
uv run benchmarks/soak.py --broker redis --minutes 5 --seed 7  # shorter, with the choices of an earlier run

Two workers (prefork and threads, two slots each) run jobs under each kind of limit, and jobs without one.
Each time that one starts, it parks the jobs of all limits that can be parked, or of none, at random.
Meanwhile workers are killed and restarted, the broker and the Redis of the limits are restarted, connections
are closed, and limits are changed by remote control. What has to hold, or the exit status is 1:

- Each job that was sent has ended. On Redis kombu takes a job off the list before it books it, with or without
  a gate, and loses it with its worker: there one job for each fault may be missing. It is one that no worker
  has received, or one that may have been moved and has not run: moved jobs are new ones for kombu.
- A job runs again only if a fault hit while a worker had it, from its receipt to `SAFE` seconds after its end:
  that worker was killed, or the broker was restarted or cut off. A warm restart explains a job of a prefork worker
  that began within `SAFE` seconds of it: Celery forgets what a pool process has got and not confirmed, and that runs
  again (docs/what_happens.md).
  A job that was moved has been in two places for a moment: there a fault while an earlier worker had it counts
  too, until it was received again. On Redis jobs are parked, and put back, in one step: there this is for `back`.
- Jobs are parked, and when both workers have stopped warm, nothing of parking is left in the broker.
- In any window a bucket lets go its capacity + its rate over that time, + `LATE` seconds of twice its rate for
  what starts late, + one job for each worker, which waits for a slot. The rate is the largest that may be in
  force: a higher one from when it is asked for; a lower one, or a pause, from when the worker has answered (in
  Redis: `REACHED` seconds later). A bucket in a worker counts for that worker alone, from its start. One in
  Redis may let go its capacity once more when Redis goes away, and when it comes back.
- No worker ends by itself. On Redis, Celery ends a worker of its own accord if a job of it ends while Redis is
  away, also without a gate; such a worker counts as killed.
- The memory of a worker's processes grows by 5 % at most: in each half of the run one of the two workers is
  spared, and a line is fitted to its memory after the first third of that time. On Redis kombu keeps a part of
  each lost connection, with or without a gate (its poller stays in the event loop, kombu #2492): so much more.
"""

import argparse
import contextlib
import itertools
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
import redis
from gate_lab import BROKERS, SOON, Ran, Redis, Run, Server, excess, wait_until

SAFE: Final = 1.0
LATE: Final = 0.25
REACHED: Final = 1.0

#: Seconds after which Redis gives out again what a killed worker had. (A warm restart may take 30 s: billiard.)
VISIBLE: Final = 60
#: MB that kombu's Redis transport keeps of each lost connection: 2.3 to 2.9 of 20 in a worker without a gate.
KEPT: Final = 0.15
LEASES: Final = SOON | {
    "visibility_timeout": VISIBLE,
    "unacked_mutex_expire": 10,  # a worker may be killed while it has the mutex
}

POOLS: Final = ("prefork", "threads")


class Kind(NamedTuple):
    """A limit: the numbers of its buckets; whether each key has one; whether they are in Redis."""

    capacity: float
    rate: float
    keyed: bool = False
    in_redis: bool = False


LIMITS: Final = {
    "local": Kind(2, 1),
    "weighted": Kind(5, 4),
    "keyed": Kind(1, 0.5, keyed=True),
    "back": Kind(1, 1),
    "shared": Kind(1, 4),
    "redis": Kind(2, 1, in_redis=True),
    "redis_keyed": Kind(1, 0.5, keyed=True, in_redis=True),
    "parked": Kind(1, 2),
    "parked_redis": Kind(1, 2, in_redis=True),
}

#: Those with a backlog; and those whose jobs are moved in the broker, sent back or parked: they are received anew.
BUSY: Final = ("parked", "parked_redis")
MOVED: Final = ("back", "local", "weighted", "redis", *BUSY)

#: What may happen, each as likely as another.
EVENTS: Final = (
    *["change"] * 10,
    *["kill worker"] * 3,
    *["restart worker", "restart broker", "cut broker", "restart limits"] * 2,
    "cut limits",
)

#: Those that may make a job run again.
BREAKING: Final = ("kill worker", "ended worker", "restart broker", "cut broker")


class Fault(NamedTuple):
    """What was done to a worker or a server, from when to when."""

    what: str
    worker: str
    began: float
    ended: float


class Change(NamedTuple):
    """An order to a limit, and when which worker has answered it; infinite: who knows what it did."""

    limit: str
    order: dict[str, Any]
    asked: float
    answered: dict[str, float]


class Execution(NamedTuple):
    """One run of a job; one that never ended ends at infinity."""

    worker: str
    began: float
    ended: float


def key_of(number: int) -> str:
    return "abc"[number % 3]


def size_of(number: int) -> int:
    return number % 5 + 1


class Allowance:
    """The tokens that may come into a bucket until a moment."""

    def __init__(self, rate: float) -> None:
        self.rates = [(0.0, rate)]
        self.pauses: list[tuple[float, float]] = []
        self.bursts: list[tuple[float, float]] = []

    def change(self, kind: Kind, order: dict[str, Any], asked: float, answered: float) -> None:
        """Take note of an order."""
        if "pause" in order:
            start = max([answered, *(end for _, end in self.pauses)])
            end = asked + order["pause"]
            self.pauses += [(start, end)] if start < end else []
        elif "resume" in order:
            self.pauses = [(start, min(end, asked)) for start, end in self.pauses if start < asked]
        else:
            at, before = self.rates[-1]
            rate = order.get("rate", kind.rate)
            moment = max(at, asked if rate > before else answered)
            self.rates += [(moment, rate)] if moment < math.inf else []

    def until(self, moment: float) -> float:
        """Return how many."""
        total = sum(tokens for at, tokens in self.bursts if at <= moment)
        for (start, rate), (next_start, _) in itertools.pairwise([*self.rates, (math.inf, 0.0)]):
            end = max(start, min(next_start, moment))
            paused = sum(max(0.0, min(end, b) - max(start, a)) for a, b in self.pauses)
            total += rate * (end - start - paused)
        return total


class Soak:
    """Two workers, their broker and the Redis of their limits, and all that happens to them."""

    def __init__(self, run: Run, limits: Redis, chance: random.Random, seconds: float) -> None:
        self.run, self.limits, self.chance, self.seconds = run, limits, chance, seconds
        self.is_redis = run.server.name == "Redis"
        self.tasks: list[str] = []  # of the jobs, by their numbers
        self.faults: list[Fault] = []
        self.changes: list[Change] = []
        self.memory: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.workers = ["", ""]
        self.started = itertools.count(1)
        self.in_lanes: Counter[str] = Counter()  # the most that were seen in each
        self.unexpected: list[str] = []
        self.missed = False
        self.began = time.monotonic()

    # -- what happens -----------------------------------------------------------------------------

    def go_on(self) -> None:
        """Send jobs and disturb until the time is over; then let all jobs run."""
        for slot in 0, 1:
            self.start(slot)
        next_fault = next_line = time.monotonic() + 10
        while (now := time.monotonic()) < self.began + self.seconds:
            self.send()
            self.look_after()
            self.in_lanes |= self.parked()
            if now >= next_line:
                sizes = ", ".join(f"{name} {self.memory[name][-1][1]:.0f} MB" for name in self.workers)
                self.tell(f"{len(self.tasks)} sent, {self.ended()} ended, {sizes}")
                next_line += 60
            time.sleep(self.chance.uniform(0.3, 1.7))
            if now >= next_fault:
                self.disturb(self.chance.choice(EVENTS))
                next_fault = time.monotonic() + self.chance.uniform(2, 15)
        for name, kind in LIMITS.items():
            self.order(name, {"restore": True} if kind.in_redis else {"rate": kind.rate})
        seen, since = -1, time.monotonic()
        while (ended := self.ended()) < len(self.tasks) and time.monotonic() < since + 2 * VISIBLE:
            seen, since = (ended, time.monotonic()) if ended != seen else (seen, since)
            self.look_after()
            time.sleep(1)
        time.sleep(VISIBLE + 5)  # for what would run once more
        self.look_after()
        for worker in self.workers:
            self.stop(worker, warm=True)

    def tell(self, what: str) -> None:
        """Print what happens."""
        print(f"{time.monotonic() - self.began:5.0f} s: {what}", flush=True)

    def ended(self) -> int:
        """Return how many jobs have ended."""
        return len({ran.number for ran in self.run.ran("ended")})

    def start(self, slot: int) -> None:
        """Start a worker, and wait until it is ready. The first one parks."""
        name = self.workers[slot] = f"w{slot}-{next(self.started)}"
        self.run.pool = POOLS[slot]
        overflow = "park" if name == "w0-1" else self.chance.choice(["park", "hold"])
        self.tell(f"start {name}: {overflow}")
        self.run.start(name, conf=self.run.conf | {"rate_limiter_overflow": overflow})
        wait_until(lambda: any(ran.worker == name for ran in self.run.ran("ready")), 60)
        self.look_after()

    def send(self) -> None:
        """Send some jobs of one kind."""
        task = self.chance.choice([*LIMITS, "unlimited"])
        with self.run.app.connection_for_write() as connection:
            for _ in range(self.chance.randint(1, 7) * (4 if task in BUSY else 1)):
                number = len(self.tasks)
                self.tasks.append(task)
                arguments = (number, key_of(number), size_of(number))
                self.run.app.send_task(task, arguments, task_id=str(number), connection=connection)

    def disturb(self, what: str) -> None:
        """Make a fault, or change a limit."""
        if what == "change":
            self.change()
            return
        began, worker = time.monotonic(), ""
        slot = 1 if began < self.began + self.seconds / 2 else 0
        how, whom = what.split()
        server = self.run.server if whom == "broker" else self.limits
        if whom == "worker":
            worker = self.workers[slot]
            self.stop(worker, warm=how == "restart")
        elif how == "cut":
            server.close_connections()
        else:
            self.restart(server)
        self.faults.append(Fault(what, worker, began, time.monotonic()))
        self.tell(f"{what} {worker} ({time.monotonic() - began:.1f} s)")
        if worker:
            time.sleep(self.chance.uniform(0, 3))
            self.start(slot)

    def stop(self, worker: str, *, warm: bool) -> None:
        """Stop a worker, or kill it."""
        if warm:
            self.run.workers[worker].terminate()
            try:
                self.run.workers[worker].wait(60)
            except subprocess.TimeoutExpired:
                self.unexpected.append(f"{worker} did not stop within 60 s")
        self.run.kill(worker)

    def restart(self, server: Server) -> None:
        """Stop a server, or kill it, and start it again."""
        if self.chance.random() < 0.5:
            os.killpg(server.process.pid, signal.SIGTERM)
            wait_until(lambda: server.process.poll() is not None, 30)
        server.kill()
        time.sleep(self.chance.uniform(0, 4))
        server.start()

    def change(self) -> None:
        """Change a limit."""
        name = self.chance.choice([*LIMITS])
        kind = LIMITS[name]
        orders: list[dict[str, Any]] = [{"rate": kind.rate * factor} for factor in (2, 0.5, 1)]
        orders += [] if kind.keyed else [{"pause": self.chance.uniform(2, 9)}, {"resume": True}]
        orders += [{"restore": True}] if kind.in_redis else []
        self.order(name, self.chance.choice(orders))

    def order(self, limit: str, order: dict[str, Any]) -> None:
        """Have both workers change a limit."""
        names = {self.run.node(name): name for name in self.workers}
        asked, answered = time.monotonic(), dict.fromkeys(self.workers, math.inf)
        options: dict[str, Any] = {"destination": list(names), "reply": True, "limit": 2, "timeout": 3}
        with self.run.app.connection_for_write() as options["connection"]:
            replies = self.run.app.control.broadcast("limit", {"name": limit, **order}, **options)
        for node, reply in (pair for each in replies or () for pair in each.items()):
            if "ok" in reply:
                answered[names[node]] = time.monotonic()
            elif "Redis has not answered" not in str(reply):
                self.unexpected.append(f"{limit} {order}: {reply}")
        self.changes.append(Change(limit, order, asked, answered))
        silent = [name for name, moment in answered.items() if moment == math.inf]
        self.tell(f"limit {limit}: {order}{', not answered by ' if silent else ''}{', '.join(silent)}")

    def look_after(self) -> None:
        """Start a worker again that ended by itself; note the memory of both."""
        for name in self.run.ended():
            now = time.monotonic()
            self.faults.append(Fault("ended worker", name, now - 15, now))
            self.tell(f"{name} ended by itself")
            error = self.run.output(name).rpartition("Unrecoverable error")[2]
            if not self.is_redis or "/rate_limiter/" in error:
                self.unexpected.append(f"{name} ended by itself")
            self.run.kill(name)
            self.start(self.workers.index(name))
        for name, worker in self.run.workers.items():
            series = self.memory[name]
            if not series or time.monotonic() > series[-1][0] + 10:
                with contextlib.suppress(psutil.Error):
                    main = psutil.Process(worker.pid)
                    each = [main, *main.children(recursive=True)]
                    size = sum(process.memory_info().rss for process in each)
                    series.append((time.monotonic(), size / 1e6))

    def parked(self) -> Counter[str]:
        """Return what there is of parking in the broker, and how many jobs are in each lane."""
        found: Counter[str] = Counter()
        if self.is_redis:
            with redis.Redis.from_url(self.run.server.url, decode_responses=True) as client:
                for key in client.keys("*.parked*"):
                    found[key] = client.llen(key) if client.type(key) == "list" else 0
            return found
        with self.run.app.connection_for_write() as connection:
            for end in "", ".workers", *(f".{name}" for name in LIMITS):
                name = f"{self.run.queue}.parked{end}"
                with contextlib.suppress(connection.channel_errors):  # there is none
                    there = connection.channel().queue_declare(name, passive=True)
                    found[name] = there.message_count if end else 0
        return found

    # -- what came of it --------------------------------------------------------------------------

    def report(self, what: str, measured: str, target: str, ok: bool | None) -> None:
        """Print a result, and keep in mind whether it is missed."""
        verdict = {None: "", True: "ok", False: "MISS"}[ok]
        print(f"{what:<28} {measured:<62} {target:<24} {verdict}".rstrip(), flush=True)
        self.missed = self.missed or ok is False

    def judge(self) -> None:
        """Compare what ran with what was sent, and when with what was allowed."""
        ends = defaultdict(list)
        for ran in self.run.ran("ended"):
            ends[ran.number, ran.worker].append(ran.moment)
        runs: dict[int, list[Execution]] = {number: [] for number in range(len(self.tasks))}
        for ran in self.run.ran("began"):
            mine = ends[ran.number, ran.worker]
            runs[ran.number].append(
                Execution(ran.worker, ran.moment, mine.pop(0) if mine else math.inf)
            )
        receipts = defaultdict(list)
        for ran in self.run.ran("received"):
            receipts[ran.number].append(ran)
        self.losses(runs, receipts)
        self.duplicates(runs, receipts)
        most = {name: self.in_lanes[f"{self.run.queue}.parked.{name}"] for name in BUSY}
        measured = "at most " + ", ".join(f"{count} of {name}" for name, count in most.items())
        self.report("in lanes", measured, "some of each", all(most.values()))
        left = self.parked()
        self.report("left of parking", ", ".join(left) or "none", "none", not left)
        for task, kind in LIMITS.items():
            mine = {number: each for number, each in runs.items() if self.tasks[number] == task}
            self.windows(task, kind, mine)
        for slot, pool in enumerate(POOLS):
            self.growth(f"memory {pool}", slot)
        self.report(
            "unexpected", "; ".join(self.unexpected) or "nothing", "nothing", not self.unexpected
        )
        silent = sum(math.inf in change.answered.values() for change in self.changes)
        faults = Counter(fault.what for fault in self.faults)
        faults["changes"], faults["not answered"] = len(self.changes), silent
        print(", ".join(f"{count} {what}" for what, count in faults.items()))

    def losses(self, runs: dict[int, list[Execution]], receipts: dict[int, list[Ran]]) -> None:
        """Count the jobs that have not ended."""
        lost = [
            number for number, each in runs.items() if not any(run.ended < math.inf for run in each)
        ]
        for number in lost:
            print(f"    {number}, {self.tasks[number]}: lost; {receipts[number]}")
        kombus = [
            number
            for number in lost
            if not receipts[number] or (self.tasks[number] in MOVED and not runs[number])
        ]
        most = sum(fault.what in BREAKING for fault in self.faults) if self.is_redis else 0
        measured = f"{len(self.tasks)} sent, {len(self.tasks) - len(lost)} ended"
        target = "all" + f" but {most} (kombu)" * self.is_redis
        self.report("jobs", measured, target, lost == kombus and len(lost) <= most)

    def duplicates(self, runs: dict[int, list[Execution]], receipts: dict[int, list[Ran]]) -> None:
        """Look for the fault because of which a job ran again."""
        why: Counter[str] = Counter()
        for number, each in runs.items():
            for first, again in itertools.pairwise(each):
                before = [ran for ran in receipts[number] if ran.moment <= first.began]
                hands = [(first.worker, before[-1].moment, first.ended)]
                if self.tasks[number] in (["back"] if self.is_redis else MOVED):
                    hands += [
                        (one.worker, one.moment, by.moment) for one, by in itertools.pairwise(before)
                    ]
                found = [
                    fault.what
                    for fault, (worker, since, until) in itertools.product(self.faults, hands)
                    if fault.what in BREAKING
                    and fault.worker in ("", worker)
                    and since <= fault.ended + SAFE  # it was read already when the connection broke
                    and fault.began <= until + SAFE
                ]
                found += [
                    f"{fault.what} (prefork)"
                    for fault in self.faults
                    if (fault.what, fault.worker) == ("restart worker", first.worker)
                    and fault.worker.startswith("w0-")
                    and abs(first.began - fault.began) <= SAFE
                ]
                why[found[0] if found else "UNEXPLAINED"] += 1
                if not found:
                    print(f"    {number}, {self.tasks[number]}: {first}, {again}; {receipts[number]}")
        measured = ", ".join(f"{count}: {what}" for what, count in why.items()) or "none"
        self.report("ran again", measured, "all explained", "UNEXPLAINED" not in why)

    def windows(self, task: str, kind: Kind, runs: dict[int, list[Execution]]) -> None:
        """Compare what each bucket of a limit let go with what it may in any window."""
        starts: dict[tuple[str, str], list[float]] = defaultdict(list)
        for number, each in runs.items():
            for run in each:
                bucket = key_of(number) if kind.keyed else "", "" if kind.in_redis else run.worker
                starts[bucket] += [run.began] * (size_of(number) if task == "weighted" else 1)
        worst = 0.0
        for (_, worker), moments in starts.items():
            allowance = self.allowance(task, kind, worker)
            worst = max(worst, excess(map(allowance.until, sorted(moments)), 1))
        late = 2 * kind.rate * LATE
        waiting = (5 if task == "weighted" else 1) * (len(POOLS) if kind.in_redis else 1)
        tokens = sum(map(len, starts.values()))
        measured = f"{tokens} tokens, {len(starts)} buckets; {worst:.2f} beyond the rate"
        target = f"{kind.capacity:g} + {late:g} + {waiting}"
        self.report(f"limit {task}", measured, target, worst <= kind.capacity + late + waiting)

    def allowance(self, limit: str, kind: Kind, worker: str) -> Allowance:
        """Return what may go through a bucket. No worker: it is in Redis."""
        allowance = Allowance(kind.rate)
        for change in self.changes:
            moments = [at for name, at in change.answered.items() if worker in ("", name)]
            if change.limit == limit and moments:
                reached = min(moments) + (REACHED if kind.in_redis else 0.0)
                allowance.change(kind, change.order, change.asked, reached)
        for fault in self.faults:
            if kind.in_redis and "limits" in fault.what:
                allowance.bursts += [(fault.began, kind.capacity), (fault.ended, kind.capacity)]
        return allowance

    def growth(self, what: str, slot: int) -> None:
        """Fit a line to the memory of the worker that lived longest."""
        mine = [each for name, each in self.memory.items() if name.startswith(f"w{slot}-")]
        series = max(mine, key=lambda each: each[-1][0] - each[0][0])
        moments, sizes = zip(*series[len(series) // 3 :], strict=True)
        slope, level = statistics.linear_regression([at - moments[0] for at in moments], sizes)
        span = moments[-1] - moments[0]
        grown, judged = slope * span, span >= 300
        lost = sum(
            fault.what in ("restart broker", "cut broker") and moments[0] < fault.ended < moments[-1]
            for fault in self.faults
        )
        most = 0.05 * level + KEPT * lost * self.is_redis
        measured = (
            f"{level:.1f} MB, {grown / level:+.2%} in {span / 60:.1f} minutes, {lost} connections lost"
        )
        target = f"5 %{f' + {KEPT * lost:.1f} MB' * self.is_redis}" if judged else "(too short)"
        self.report(what, measured, target, grown <= most if judged else None)


def soak(name: str, minutes: float, seed: int) -> bool:
    """Do all of it on one broker; return whether something is missed. If so, the logs are kept."""
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"{name}, {minutes:g} minutes, --seed {seed}; logs in {directory}", flush=True)
    conf = {"task_acks_late": True, "task_reject_on_worker_lost": True}
    conf |= {"broker_transport_options": LEASES} if name == "redis" else {}
    options: dict[str, Any] = {"app": "soak_app", "gossip": True, "max_held": 1000, "conf": conf}
    with (
        BROKERS[name](directory, durable=True) as server,
        Redis(directory, durable=True) as limits,
        Run(server, cluster=limits.url, **options) as run,
    ):
        if name == "rabbitmq":  # a job counts as sent when it is on disk
            run.app.conf.broker_transport_options = {"confirm_publish": True}
        soaked = Soak(run, limits, random.Random(seed), minutes * 60)
        soaked.go_on()
        soaked.judge()
    if not soaked.missed:
        shutil.rmtree(directory, ignore_errors=True)
    return soaked.missed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=60, help="for each broker; default: 60")
    parser.add_argument("--broker", choices=[*BROKERS, "both"], default="both")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(10**6), help="of the random choices"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave by way of the clean-up
    names = [name for name in BROKERS if options.broker in (name, "both")]
    missed = [soak(name, options.minutes, options.seed) for name in names]
    return int(any(missed))


if __name__ == "__main__":
    sys.exit(main())
