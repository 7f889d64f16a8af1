"""Monitors beside a gated worker: what Celery's events say of its jobs, and what Flower makes of them."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections import Counter

import pytest
from celery.events.state import State
from harness import DEADLINE, ROOT, wait_for
from limits import limit, start
from port_for import get_port


@contextlib.contextmanager
def listening(lab):
    """Yield the events that come in, and Celery's own state made of them."""
    events, state, ready = [], State(), threading.Event()

    def take(event):
        state.event(event)
        task = state.tasks.get(event.get("uuid"))
        events.append((event, task and task.state))

    with lab.app.connection_for_read() as connection:
        receiver = lab.app.events.Receiver(connection, handlers={"*": take})
        receiver.on_consume_ready = lambda *_, **__: ready.set()
        thread = threading.Thread(target=receiver.capture, kwargs={"wakeup": False})
        thread.start()
        ready.wait(DEADLINE)
        try:
            yield events, state
        finally:
            receiver.should_stop = True
            thread.join()


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_events_of_held_jobs(lab, pool):
    """-E: one event for each job that waits; Celery's monitors go on showing it as received."""
    with (
        listening(lab) as (events, state),
        start(lab, "-E", pool=pool, limits=(limit(rate=4),)),
    ):
        for number in range(6):
            lab.send("job", number)
        lab.wait_for_runs("job", 6)
        wait_for(lambda: Counter(task.state for task in state.tasks.values()) == {"SUCCESS": 6})
    told = [(event, task) for event, task in events if event["type"].startswith("limit-")]
    assert {event["type"] for event, _ in told} == {"limit-throttled"}
    assert 5 <= len({event["uuid"] for event, _ in told}) == len(told) <= 6
    for event, seen in told:
        assert event["limit"] == "job"
        assert event["reason"] == ("tokens" if event["wait"] else "slot")
        assert 0 <= event["wait"] <= 0.26
        assert seen in ("RECEIVED", None)  # its own events may come later
    counts = Counter(event["type"] for event, _ in events)
    assert (counts["task-received"], counts["task-started"], counts["task-succeeded"]) == (6, 6, 6)


def test_without_events_nothing_is_sent(redis_lab):
    """As none of Celery's own."""
    with listening(redis_lab) as (events, _), start(redis_lab, limits=(limit(rate=20),)):
        for number in range(4):
            redis_lab.send("job", number)
        redis_lab.wait_for_runs("job", 4)
    assert {event["type"] for event, _ in events} <= {"worker-online", "worker-offline"}


@pytest.fixture
def flower(redis_lab):
    """Start Flower, and return what reads a page of its API."""
    port = get_port(None)
    with (redis_lab.folder / "flower.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "celery", "-b", redis_lab.settings["broker_url"]),
                *("flower", f"--port={port}", "--address=127.0.0.1"),
            ],
            env={**os.environ, "FLOWER_UNAUTHENTICATED_API": "1", "PYTHONPATH": str(ROOT)},
            cwd=redis_lab.folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def read(page):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=DEADLINE) as answer:
            return answer.read().decode()

    def is_up():
        with contextlib.suppress(OSError):
            return read("healthcheck")

    try:
        wait_for(is_up)
        yield read
    finally:
        process.terminate()
        process.wait(DEADLINE)
    assert "Traceback" not in (redis_lab.folder / "flower.log").read_text()


def test_flower(redis_lab, flower):
    """It shows held jobs as received, and the others as they end; its own numbers are right."""
    with start(redis_lab, "-E", pool="prefork", limits=(limit(rate=0.5),)) as worker:

        def states():
            tasks = json.loads(flower("api/tasks"))
            return Counter((task["name"], task["state"]) for task in tasks.values())

        for number in range(4):
            redis_lab.send("job", number)
        redis_lab.send("other", 1)
        redis_lab.wait_for_runs("other", 1)
        wait_for(lambda: states()["other", "SUCCESS"] == 1)
        assert states()["job", "RECEIVED"] >= 2
        redis_lab.wait_for_runs("job", 4)
        wait_for(lambda: states() == {("job", "SUCCESS"): 4, ("other", "SUCCESS"): 1})
        metrics = [line for line in flower("metrics").splitlines() if worker.node in line]
        counted = {
            kind: sum(
                float(line.split()[-1])
                for line in metrics
                if line.startswith("flower_events_total") and f'type="task-{kind}"' in line
            )
            for kind in ("received", "started", "succeeded")
        }
        assert counted == {"received": 5, "started": 5, "succeeded": 5}
