"""The part of gate.py with parked jobs: what stands behind them, their rate, and a worker that stops."""

import math
import time
from itertools import pairwise
from typing import Any, Final

from bench import Bench, finished
from gate_lab import Ran, Run, Server, rate_of

__all__ = ["PARK", "QUEUES", "behind_limited", "last", "park"]

#: The kinds of queue that jobs stand behind each other in: a name, the broker, and settings.
QUEUES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "Redis": ("redis", {}),
    "RabbitMQ classic": ("rabbitmq", {}),
    "RabbitMQ quorum": ("rabbitmq", {"task_default_queue_type": "quorum"}),
}

PARK: Final = {"rate_limiter_overflow": "park"}

#: At most so many seconds for 50 jobs behind 2,000 on Redis; on RabbitMQ so many times the time without a gate.
ON_REDIS: Final = 4.0
RATIO: Final = 1.5

#: Seconds that the picture shows.
SEEN: Final = 10

#: Seconds in which the last worker puts everything back.
PUT_BACK: Final = 10.0


def park(bench: Bench) -> None:
    """Measure limits whose jobs are parked."""
    for kind, (name, conf) in QUEUES.items():
        if name in bench.brokers:
            server = bench.server(name)
            behind_parked(bench, server, kind, conf)
            for rate in (20,) if bench.short else (2, 20, 100):
                rate_while_parking(bench, server, kind, conf, rate)
            put_back(bench, server, kind, conf)


def behind_limited(
    server: Server, limited: int, cut_off: float, then: float = 0.0, **options: Any
) -> tuple[list[float], list[Ran]]:
    """Let 50 unlimited jobs stand behind limited ones in the same queue.

    Args:
        server: The broker.
        limited: How many jobs of 2/s are before the others.
        cut_off: Seconds from the worker's start after which no more of the others are waited for.
        then: For so many seconds more limited ones run.
        options: Of the `Run`.

    Returns:
        When the unlimited ones ran, in seconds since the worker was ready, and the limited ones.

    """
    with Run(server, **({"rate": 2, "capacity": 1} | options)) as run:
        run.send("limited", limited)
        run.send("free", 50)
        run.start()
        ready = run.ready()
        run.wait("free", 50, cut_off)
        ran = [moment - ready for moment in run.moments("free")]
        time.sleep(then)
        return ran, run.ran("limited")


def last(moments: list[float]) -> float:
    """Return the last moment; infinity, if there is none."""
    return moments[-1] if moments else math.inf


def behind_parked(bench: Bench, server: Server, kind: str, conf: dict[str, Any]) -> None:
    """Measure 50 unlimited jobs behind 2,000 limited ones, with and without a gate."""
    ran = {
        name: behind_limited(server, 2_000, 60, conf=conf | settings, gate=gate)[0]
        for name, gate, settings in (("none", False, {}), ("park", True, PARK))
    }
    without, parked = (last(ran[name]) for name in ("none", "park"))
    most = ON_REDIS if kind == "Redis" else RATIO * without
    bench.report(
        f"park {kind}: 50 behind 2,000 at 2/s",
        f"{parked:.2f} s, without a gate {without:.2f} s (x {parked / without:.2f})",
        f"{most:.2f} s",
        len(ran["park"]) == 50 and parked <= most,
        seconds=parked,
        without=without,
    )
    if "behind" not in bench.pictures:
        others = {"hold": {"max_held": 3_000}, "default": {}, "native": {"native": "2/s"}}
        for name, options in others.items():
            ran[name], _ = behind_limited(server, 2_000, SEEN, conf=conf, **options)
            bench.report(f"  {name}", f"{len(ran[name])} of 50, the last after {last(ran[name]):.2f} s")
        curves = {name: finished(moments, SEEN, 0.1) for name, moments in ran.items()}
        bench.picture("behind", server, 0, 0.1, curves, free=50, limited=2_000, limit=2)


def rate_while_parking(
    bench: Bench, server: Server, kind: str, conf: dict[str, Any], rate: float
) -> None:
    """Measure the rate of a limit from the start, with a backlog that is parked meanwhile."""
    jobs = int(min(2_000, max(60, rate * 15)))
    wanted = int(min(jobs, max(20, rate * 10)))
    with Run(server, rate=rate, conf=conf | PARK) as run:
        run.send("limited", jobs)
        run.start()
        run.ready()
        run.wait("limited", wanted, 60 + 2 * wanted / rate)
        ran = run.ran("limited")
    measured = rate_of([each.moment for each in ran[1:]])
    late = sum(one.number > other.number for one, other in pairwise(ran))
    bench.report(
        f"  rate while parking, {rate:g}/s",
        f"{measured:.2f}/s, {late} of {len(ran)} out of order",
        f"{0.98 * rate:g} .. {1.02 * rate:g}/s",
        0.98 * rate <= measured <= 1.02 * rate,
        rate=measured,
    )


def put_back(bench: Bench, server: Server, kind: str, conf: dict[str, Any]) -> None:
    """Measure how long the last worker takes to put 5,000 jobs back, and whether all run without a gate."""
    count = 1_000 if bench.short else 5_000
    with Run(server, rate=2, capacity=1, conf=conf | PARK, slots=1) as run:
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
