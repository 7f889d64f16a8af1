"""The part of gate.py with parked jobs: what stands behind them, their rate, and a worker that stops."""

import math
import time
from itertools import pairwise
from typing import Any, Final

from gate_lab import Run, Server, rate_of

__all__ = ["QUEUES", "park"]

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

#: Seconds in which the last worker puts everything back.
PUT_BACK: Final = 10.0


def park(bench: Any) -> None:
    """Measure limits whose jobs are parked."""
    for kind, (name, conf) in QUEUES.items():
        if name in bench.brokers:
            server = bench.server(name)
            behind_parked(bench, server, kind, conf)
            for rate in (20,) if bench.short else (2, 20, 100):
                rate_while_parking(bench, server, kind, conf, rate)
            put_back(bench, server, kind, conf)


def behind_parked(bench: Any, server: Server, kind: str, conf: dict[str, Any]) -> None:
    """Measure 50 unlimited jobs behind 2,000 limited ones, with and without a gate."""
    seconds = []
    for gate in False, True:
        with Run(server, rate=2, capacity=1, gate=gate, conf=conf | PARK) as run:
            run.send("limited", 2_000)
            run.send("free", 50)
            run.start()
            ready = run.ready()
            run.wait("free", 50, 60)
            ran = run.moments("free")
            seconds.append(ran[-1] - ready if len(ran) == 50 else math.inf)
    without, parked = seconds
    most = ON_REDIS if kind == "Redis" else RATIO * without
    bench.report(
        f"park {kind}: 50 behind 2,000 at 2/s",
        f"{parked:.2f} s, without a gate {without:.2f} s (x {parked / without:.2f})",
        f"{most:.2f} s",
        parked <= most,
        seconds=parked,
        without=without,
    )


def rate_while_parking(
    bench: Any, server: Server, kind: str, conf: dict[str, Any], rate: float
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


def put_back(bench: Any, server: Server, kind: str, conf: dict[str, Any]) -> None:
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
