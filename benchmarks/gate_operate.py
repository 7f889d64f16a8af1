"""The part of gate.py that looks at limits and changes them while jobs run, and that measures what looking costs."""

import contextlib
import math
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from bench import Bench
from gate_lab import LabError, Run, Server, cost, rate_of, wait_until

__all__ = ["operate"]

#: Seconds to wait for a worker's reply.
REPLY: Final = 2.0


def operate(bench: Bench) -> None:
    """Change rates with jobs held, forecast when jobs run, and look at everything at once."""
    for server in bench.servers():
        for pool in ("prefork",) if bench.short else ("prefork", "threads", "gevent"):
            steer(bench, server, pool)
        for limits in 1, 2:
            explain(bench, server, limits)
    if "redis" in bench.brokers:
        looked_at(bench, bench.server("redis"))


def ask(run: Run, command: str, **arguments: Any) -> Any:
    """Return the reply of the worker to a command of remote control."""
    replies: Any = []
    for _ in range(5):  # on green pools a worker may listen only a while after it is ready
        replies = replies or run.app.control.broadcast(
            command, arguments=arguments, reply=True, limit=1, timeout=REPLY, destination=[run.node()]
        )
    if not replies or "error" in (reply := replies[0][run.node()]):
        raise LabError(f"{command} {arguments}: {replies}")
    return reply


def held(run: Run) -> int:
    """Return how many jobs all limits hold."""
    return sum(int(limit["held"]) for limit in ask(run, "limits").values())


# -- changes --------------------------------------------------------------------------------------


def steer(bench: Bench, server: Server, pool: str) -> None:
    """Raise the rate of a limit that holds 200 jobs, and lower it again."""
    with Run(server, rate=1, max_held=1_000, pool=pool) as run:
        run.send("limited", 400)
        run.start()
        run.ready()
        if not wait_until(lambda: held(run) >= 200, 30):
            raise LabError("200 jobs were not held")
        raised = time.monotonic()
        ask(run, "limit", name="limited", rate=50)
        time.sleep(4)
        lowered = time.monotonic()
        ask(run, "limit", name="limited", rate=1)
        answered = time.monotonic()
        time.sleep(3)
        moments = run.moments("limited")
        first = [moment for moment in moments if raised <= moment < raised + 1]
        after = [moment for moment in moments if raised + 1 <= moment < lowered]
        rate = rate_of(after)
        then = [moment for moment in moments if answered <= moment < answered + 1]
        bench.report(
            f"operate {server.name}, {pool}: 1/s to 50/s",
            f"{len(first)} jobs in the first second, then {rate:.2f}/s",
            ">= 45, 50/s within 5 %",
            len(first) >= 45 and math.isclose(rate, 50, rel_tol=0.05),
        )
        bench.report(
            f"operate {server.name}, {pool}: 50/s to 1/s",
            f"{len(then)} jobs in the next second",
            "<= 2",
            len(then) <= 2,
        )


def explain(bench: Bench, server: Server, limits: int) -> None:
    """Ask of 20 of 500 held jobs when they will run, and compare it with when they do."""
    second = 15.0 if limits == 2 else None
    with Run(server, rate=20, max_held=1_000, second=second, pool="threads") as run:
        ids = run.send("limited", 520)
        run.start()
        run.ready()
        if not wait_until(lambda: held(run) >= 450, 30):
            raise LabError("450 jobs were not held")
        told = {}
        for number in range(60, 500, 22):
            asked = time.monotonic()
            reply = ask(run, "explain", task_id=ids[number])
            if reply["state"] == "held":
                told[number] = asked, reply["seconds"]
        run.wait("limited", 520, 120, "the jobs did not all run")
        ran = {each.number: each.moment for each in run.ran("limited")}
        errors = [
            abs(ran[number] - asked - seconds) / max(0.5, 0.1 * (ran[number] - asked))
            for number, (asked, seconds) in told.items()
        ]
        worst = max(abs(ran[number] - asked - seconds) for number, (asked, seconds) in told.items())
        bench.report(
            f"operate {server.name}: explain, {limits} limit{'s' * (limits > 1)}",
            f"{len(told)} jobs, off by at most {worst:.2f} s",
            "10 %, or 0.5 s",
            len(told) >= 18 and max(errors) <= 1,
        )


# -- what looking costs -----------------------------------------------------------------------------


def looked_at(bench: Bench, server: Server) -> None:
    """Compare the throughput with signals, metrics and events to that without."""
    jobs, pairs = (1_000, 1) if bench.short else (10_000, 5)
    setups: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
        "signals and metrics": ({}, {"watched": "all"}, 0.95),
        "signals, metrics and events, to Celery's events": (
            {"arguments": ("-E",)},
            {"watched": "all", "arguments": ("-E",)},
            0.95,
        ),
        "all of it, to nothing": ({}, {"watched": "all", "arguments": ("-E",)}, 0.95),
        "Celery's events, to nothing": ({}, {"arguments": ("-E",)}, 0.0),
        "signals without receivers": ({}, {"watched": "none"}, 0.99),
    }
    with listener(server):
        for name, (off, on, target) in setups.items():
            ratios = []
            for number in range(pairs):
                both = [off, on] if number % 2 else [on, off]
                # under a limit that never makes a job wait
                rates = [
                    cost(server, jobs, "limited", rate=1e6, capacity=1e6, **options)[1]
                    for options in both
                ]
                without, with_all = rates if number % 2 else rates[::-1]
                ratios.append(with_all / without)
            ratio = statistics.median(ratios)
            bench.report(
                f"operate: {name}",
                f"x {ratio:.3f} jobs a second ({min(ratios):.3f} .. {max(ratios):.3f})",
                f">= {target}" if target else "",
                ratio >= target if target else None,
            )


@contextlib.contextmanager
def listener(server: Server) -> Iterator[None]:
    """Receive all events meanwhile, as a monitor does."""
    with Run(server) as run, run.app.connection_for_read() as connection:
        receiver = run.app.events.Receiver(connection, handlers={"*": lambda _event: None})
        thread = threading.Thread(target=receiver.capture, kwargs={"wakeup": False})
        thread.start()
        try:
            yield
        finally:
            receiver.should_stop = True
            thread.join()
