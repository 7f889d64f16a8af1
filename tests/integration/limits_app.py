"""The app of `limits.start`: limits, queues and tasks beyond those of `tests.integration.app`."""

import gc
import time
from collections import Counter
from multiprocessing import current_process
from pathlib import Path

from celery import signals
from celery.backends.base import Backend
from celery.worker import state
from celery.worker.control import inspect_command
from tests.integration.app import CONFIG, NotedBucket, app, gate, note
from tests.integration.queue_specs import entity

from rate_limiter.celery import throttle
from rate_limiter.celery.loop import Loop
from rate_limiter.celery.parking import Parking
from rate_limiter.celery.returning import Returning
from rate_limiter.celery.window import Window

for limit in CONFIG["limits"]:
    options = {**limit, "bucket": NotedBucket(*limit["bucket"])}
    gate.limit(*options.pop("tasks", ()), **options)

if CONFIG["queues"]:
    app.conf.task_queues = [entity(spec) for spec in CONFIG["queues"]]


@inspect_command()
def alive(_state):
    """Return how many objects there are of each class that the gate has one of for a connection."""
    gc.collect()
    classes = Loop, Parking, Returning, Window
    return Counter(type(each).__name__ for each in gc.get_objects() if isinstance(each, classes))


@signals.task_prerun.connect
def note_run(task, task_id, **_):
    note("in pool", [task.name, task_id])


@signals.task_received.connect
def end_cold(**_):
    """End the worker cold as a job comes, if there is a file that says so."""
    if Path(CONFIG["log"] + ".cold").exists():
        state.should_terminate = 1


@signals.task_failure.connect
def note_failure(sender, exception, **_):
    note("failed", [sender.name, type(exception).__name__, current_process().name])


_store_result = Backend.store_result


def store_result(*args, **kwargs):
    """Fail while there is a file that says so."""
    if Path(CONFIG["log"] + ".down").exists():
        raise ConnectionError("the result backend is down")
    return _store_result(*args, **kwargs)


Backend.store_result = store_result


@app.task(name="job", bind=True, ignore_result=True)
def job(self, number):
    note("job", number)
    note("job by", self.request.hostname)


@app.task(name="other", ignore_result=True)
def other(number):
    note("other", number)


@app.task(name="total", ignore_result=False)
def total(values):
    return values


@app.task(name="sent back", bind=True, max_retries=0)
@throttle(NotedBucket("sent back", 1, 1), when_limited="retry")
def sent_back(self, number):
    note("sent back", number)
    return [number, self.request.retries]


@app.task(name="dropped")
@throttle(NotedBucket("dropped", 2, 0.01), when_limited="drop")
def dropped(number):
    note("dropped", number)


@app.task(name="refused")
@throttle(NotedBucket("refused", 2, 0.01), when_limited="raise")
def refused(number):
    note("refused", number)


TIERS = {"premium": NotedBucket("premium", 10, 100), "free": NotedBucket("free tier", 3, 6)}


@app.task(name="tiered")
@throttle(
    lambda customer, _number: TIERS[customer],
    tokens=lambda *_, headers: headers.get("weight", 1),
)
def tiered(customer, number):
    note("tiered", [customer, number])


def think(_number):
    time.sleep(0.08)
    return 1


@app.task(name="sluggish")
@throttle(NotedBucket("sluggish", 10, 100), tokens=think)
def sluggish(number):
    note("sluggish", number)
