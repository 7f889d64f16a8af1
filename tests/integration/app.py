"""The app that the subprocess workers run. `harness.Lab` configures it by the environment."""
# ruff: noqa: D102 - the tasks are named for what they do

import json
import os
import signal
import time
from pathlib import Path

from celery import Celery, signals

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate, throttle

CONFIG = json.loads(os.environ["LAB"])

#: Then only the gate can limit.
SPAWNED = CONFIG["settings"].get("worker_pool_start_method") == "spawn"

app = Celery("lab")
app.conf.update(CONFIG["settings"])
gate = Gate(app) if CONFIG["gate"] else None


def note(name, value, at=None):
    """Append a line to the run log, whole."""
    line = json.dumps([name, value, at or time.monotonic()], default=str) + "\n"
    file = os.open(CONFIG["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)


class NotedBucket(TokenBucket):
    """Notes what is taken, with the reading of the clock on which it was granted."""

    def __init__(self, name, capacity, rate):
        super().__init__(capacity, rate, clock=self.read_clock)
        self.name = name

    def read_clock(self):
        self.read = time.monotonic()
        return self.read

    def take_or_delay(self, tokens=1):
        delay = super().take_or_delay(tokens)
        if not delay:
            note(f"{self.name} taken", tokens, self.read)
        return delay

    def wait(self, tokens=1, *, timeout=None):
        super().wait(tokens, timeout=timeout)
        note(f"{self.name} taken", tokens, self.read)

    def refund(self, tokens):
        super().refund(tokens)
        note(f"{self.name} refunded", tokens)


@signals.task_prerun.connect
def note_receipt(task, **_):
    note("receipt", task.request.get("rate_limiter_receipt"))


@app.task(name="free")
def free(number):
    note("free", number)


@app.task(name="limited")
@throttle(NotedBucket("limited", 2, 20))
def limited(number):
    note("concurrency", "begin")
    note("limited", number)
    time.sleep(0.01)
    note("concurrency", "end")


@app.task(name="busy")
def busy(seconds, until=None):
    """Run for so long, or until a file is there."""
    note("concurrency", "begin")
    end = time.monotonic() + seconds
    if until is None:
        time.sleep(seconds)
    while time.monotonic() < end and not Path(until).exists():
        time.sleep(0.05)
    note("concurrency", "end")


@app.task(name="slow")
@throttle(NotedBucket("slow", 1, 2))
def slow(number):
    note("slow", number)


@app.task(name="hourly")
@throttle(NotedBucket("hourly", 1, 1 / 3600))
def hourly(number):
    note("hourly", number)


@app.task(name="upload")
@throttle(NotedBucket("upload", 10, 40), tokens=lambda _name, size: size, name="megabytes")
def upload(name, size):
    note("upload", name)


COSTS = {
    "raises": lambda: {}["no price"],
    "zero": lambda: 0,
    "negative": lambda: -1,
    "nan": lambda: float("nan"),
    "text": lambda: "many",
    "none": lambda: None,
    "too many": lambda: 11,
    "one": lambda: 1,
}


@app.task(name="priced")
@throttle(NotedBucket("priced", 10, 100), tokens=lambda kind: COSTS[kind](), name="price list")
def priced(kind):
    note("priced", kind)
    return kind


@app.task(name="doubly", rate_limit="1000/s")
@throttle(NotedBucket("doubly", 1, 10))
def doubly(number):
    note("doubly", number)


@app.task(name="both")
@throttle(NotedBucket("both", 2, 20))
def both(number):
    note("both", number)


@app.task(name="mail.send")
def send_mail(number):
    note("mail", number)


@app.task(name="mail.print")
def print_mail(number):
    note("mail", number)


@app.task(name="cello")
def cello():
    note("cello", None)


@app.task(name="again", bind=True)
@throttle(NotedBucket("again", 100, 100))
def again(self, how):
    """Run again: in this job, in another, or in both."""
    note("again", self.request.headers)
    if how == "run":
        again.run(None)
    elif how == "call":
        again(None)
    elif how == "call that retries":
        again("retry")
    elif how == "retry" and not self.request.retries:
        raise self.retry(countdown=0)


if not SPAWNED:

    @app.task(name="strict")
    @throttle(NotedBucket("strict", 100, 100), timeout=5)
    def strict(number):
        note("strict", number)


@app.task(name="fatal", acks_late=True, reject_on_worker_lost=True)
@throttle(NotedBucket("fatal", 100, 100))
def fatal():
    trace = Path(CONFIG["log"] + ".fatal")
    first = not trace.exists()
    note("fatal", first)
    if first:
        trace.touch()
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="declare")
def declare():
    try:
        gate.limit("free", bucket=TokenBucket(1, 1))
    except RuntimeError as error:
        return str(error)
    return None


if gate:
    gate.limit("mail.*", bucket=NotedBucket("mail", 1, 10))
    gate.limit("ce*", bucket=NotedBucket("cello", 1, 10))
    gate.limit("both", bucket=NotedBucket("both by name", 4, 100))
