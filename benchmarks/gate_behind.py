"""The parts of gate.py with unlimited jobs that stand behind limited ones in the same queue."""

import math
import time
from typing import Any, Final

from bench import Bench, finished
from gate_lab import LabError, Ran, Run, Server, rate_of
from gate_park import PARK, QUEUES

__all__ = ["behind", "passing"]


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


def behind(bench: Bench) -> None:
    """Measure how long unlimited jobs wait behind limited ones in the same queue, with the defaults."""
    pools = ("prefork", "threads", "gevent")
    for kind, (name, conf) in QUEUES.items():
        for pool in pools if name in bench.brokers else ():
            server, what = bench.server(name), f"behind {kind} {pool}"
            free, held = behind_limited(server, 200, 15, 4 if bench.short else 20, pool=pool, conf=conf)
            ran, seconds = len(free), last(free)
            bench.report(
                f"{what}: 50 behind 200 at 2/s",
                f"{ran}/50 in {seconds:.2f} s",
                "50 in 1 s",
                ran == 50 and seconds <= 1,
                jobs=ran,
                seconds=seconds,
            )
            numbers = [each.number for each in held]
            # The first one starts with the pool's processes, late.
            rate = rate_of([each.moment for each in held[1:]])
            bench.report(
                "  the limited ones", f"{rate:.3f}/s", "1.95 .. 2.02/s", 1.95 <= rate <= 2.02, rate=rate
            )
            bench.must(
                "  in order, and once each",
                f"{len(numbers)} runs, {len(set(numbers))} jobs",
                "",
                numbers == list(range(len(numbers))),
            )
            # On gevent a worker without a gate runs some ten jobs a second (see `Loop`).
            cut_off = 20 if bench.short else 120
            free, _ = behind_limited(server, 900, cut_off, pool=pool, conf=conf, gate=False)
            without = min(last(free), cut_off)
            free, _ = behind_limited(server, 900, 60, pool=pool, conf=conf)
            ran, seconds = len(free), last(free)
            bench.report(
                f"{what}: 50 behind 900 at 2/s",
                f"{ran}/50 in {seconds:.2f} s, without a gate {without:.2f} s",
                f"50 in {1.5 * without + 1:.2f} s",
                ran == 50 and seconds <= 1.5 * without + 1,
                jobs=ran,
                seconds=seconds,
                without=without,
            )
    if not bench.short:
        server = bench.servers()[0]
        free, _ = behind_limited(server, 200, 30, native="2/s")
        bench.report(f"behind {server.name} prefork, native", f"{len(free)}/50 in 30 s", jobs=len(free))


#: What 2,000 limited jobs are limited by, as options of the `Run`: the others run behind them, or they do not.
PASS: Final[dict[str, dict[str, Any]]] = {
    "none": {"gate": False},
    "park": {"conf": PARK},
    "hold": {"max_held": 3_000},
}
STAND: Final[dict[str, dict[str, Any]]] = {"default": {}, "native": {"native": "2/s"}}


def passing(bench: Bench) -> None:
    """Measure when 50 unlimited jobs run behind 2,000 limited ones, by what limits those."""
    server = bench.servers()[0]
    ran = {name: behind_limited(server, 2_000, 60, **options)[0] for name, options in PASS.items()}
    if not all(ran.values()):
        raise LabError("the jobs behind limited ones did not run")
    seconds = max(10, math.ceil(1.2 * max(map(last, ran.values()))))
    ran |= {
        name: behind_limited(server, 2_000, seconds, **options)[0] for name, options in STAND.items()
    }
    for name, moments in ran.items():
        bench.report(
            f"passing {server.name}: 50 behind 2,000 at 2/s, {name}",
            f"{len(moments)}/50 in {seconds} s"
            + (f", the last after {moments[-1]:.2f} s" if moments else ""),
            jobs=len(moments),
        )
    curves = {name: finished(moments, seconds, 0.1) for name, moments in ran.items()}
    held = PASS["hold"]["max_held"]
    bench.picture("behind", server, 0, 0.1, curves, free=50, limited=2_000, of=2, held=held)
