"""The app of the test of the tally: five limits, one of each kind, that admit little until they are opened."""

import json
import os
import signal
import time

from celery import Celery, current_task
from celery.worker.control import control_command

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate, current_charge, throttle
from rate_limiter.gating.tally import tally_of

CONFIG = json.loads(os.environ["LAB"])

app = Celery("tally")
app.conf.update(CONFIG["settings"])
if CONFIG["gate"]:
    Gate(app, max_held=10_000)

#: The buckets of jobs that wait. Without a gate these wait in the slots of the pool, so they are open.
SLOW = 0.001 if CONFIG["gate"] else 30.0
sizes = TokenBucket(20, SLOW)
tiers = {name: TokenBucket(5, SLOW) for name in ("free", "basic", "premium")}


def note(name, tokens):
    """Append a line to the run log, whole."""
    value = [current_task.request.id, tokens]
    file = os.open(CONFIG["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (json.dumps([name, value, time.monotonic()]) + "\n").encode())
    os.close(file)


@control_command(name="open_buckets")
def open_buckets(state):
    """Let the jobs go that wait."""
    for bucket in (sizes, *tiers.values()):
        bucket.configure(tokens_per_second=200)
    return "open"


@app.task(name="sized")
@throttle(sizes, tokens="size")
def sized(size, used=None, kill=False):
    note("sized", size if used is None else used)
    if used is not None:
        current_charge().settle(used)
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="tiered")
@throttle(lambda tier: tiers[tier], buckets=tiers.values())
def tiered(tier):
    note("tiered", 1)


@app.task(name="raised")
@throttle(TokenBucket(30, 0.001), tokens=2, when_limited="raise")
def raised():
    note("raised", 2)


@app.task(name="dropped")
@throttle(TokenBucket(10, 0.001), when_limited="drop")
def dropped():
    note("dropped", 1)


@app.task(name="retried")
@throttle(TokenBucket(1, 10), when_limited="retry")
def retried():
    note("retried", 1)


@app.task(name="counted")
def counted():
    """Return what has been counted, in all processes."""
    tasks = sized, tiered, raised, dropped, retried
    return {task.name: tally_of(*task.run.__rate_limits__).snapshot() for task in tasks}
