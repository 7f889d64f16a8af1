"""A bucket that is changed while jobs are held for it lets them go soon, whoever has changed it."""

import statistics

import kombu
import pytest
from harness import wait_for
from limits import held, start

#: Whether a thread can interrupt the event loop.
WAKES = tuple(map(int, kombu.__version__.split(".")[:2])) >= (5, 7)

#: Seconds, with what a busy machine adds; and where the gate looks twice a second.
SOON, LATER = 0.25, 1.0


def in_main(lab, worker, how):
    lab.app.control.broadcast("change", {"how": how}, destination=[worker.node])


def in_a_thread(lab, worker, how):
    lab.app.control.broadcast("change_in_thread", {"how": how}, destination=[worker.node])


def in_a_task(lab, worker, how):
    lab.send("change", how)


def latency(lab, worker, number, change, how):
    """Return how many seconds after the change a held job runs."""
    lab.send("poked", number)
    wait_for(lambda: held(lab, worker, "poked") == 1)
    changes = len(lab.log("changed"))
    change(lab, worker, how)
    lab.wait_for_runs("poked", number + 1)
    return lab.log("poked")[number].at - lab.log("changed")[changes].at


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_a_change_reaches_held_jobs(redis_lab, pool):
    """refund(), configure() and pause() in the main thread, another thread and a task: at once, or soon."""
    soon = {
        "prefork": {in_main, in_a_thread} if WAKES else {in_main},
        "threads": {in_main, in_a_thread, in_a_task} if WAKES else {in_main},
        "solo": {in_main, in_a_task},
        "gevent": set(),
    }[pool]
    with start(redis_lab, pool=pool, module="poked_app") as worker:
        redis_lab.send("poked", 0)
        redis_lab.wait_for_runs("poked", 1)
        number = 1
        for change in (in_main, in_a_thread, in_a_task):
            took = []
            for how in ("refund", "configure", "refund"):
                took.append(latency(redis_lab, worker, number, change, how))
                number += 1
            assert statistics.median(took) < (SOON if change in soon else LATER)
        took = latency(redis_lab, worker, number, in_a_task, "pause")
        assert 0.5 <= took < 0.5 + LATER
