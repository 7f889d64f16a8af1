"""The app of tests about calls that are no jobs of their own, and jobs that pass the gate."""

from multiprocessing import current_process

from celery.worker.strategy import default
from tests.integration.app import NotedBucket, app, gate, note

from rate_limiter import BucketPerKey, TokenBucket
from rate_limiter.celery import Gate, throttle


def note_run(name, number):
    note(name, number)
    note(f"{name} in", current_process().name)
    return number


@app.task(name="at gate")
def at_gate(number):
    return note_run("at gate", number)


@app.task(name="in settings", autoretry_for=(OSError,))
def in_settings(number):
    return note_run("in settings", number)


@app.task(name="attribute", rate_limiter_limit="20/s")
def attribute(number):
    return note_run("attribute", number)


@app.task(name="decorated")
@throttle(NotedBucket("decorated", 1, 20))
def decorated(number):
    return note_run("decorated", number)


@app.task(name="caller")
def caller(name, how, numbers):
    """Call a task inline."""
    task = app.tasks[name]
    return [task.run(number) if how == "run" else task(number) for number in numbers]


@app.task(name="keyed")
def keyed(number):
    return note_run("keyed", number)


@app.task(name="picked")
def picked(number):
    return note_run("picked", number)


@app.task(name="of the queue")
def of_the_queue(number):
    return note_run("of the queue", number)


@app.task(name="twofold", bind=True)
@throttle(NotedBucket("twofold", 100, 100))
def twofold(self, number):
    if number:
        twofold.run(number - 1)


class _PastTheGate:
    """A consumer whose jobs go straight to the pool."""

    def __init__(self, consumer):
        self.consumer = consumer
        self.on_task_request = consumer.controller.process_task

    def __getattr__(self, name):
        return getattr(self.consumer, name)


def past_the_gate(task, app, consumer, **options):
    return default(task, app, _PastTheGate(consumer), **options)


@app.task(name="past", Strategy=f"{__name__}:past_the_gate")
def past(number):
    return note_run("past", number)


@app.task(name="refused here")
def refused_here(number):
    return note_run("refused here", number)


@app.task(name="poison")
def poison(number):
    return note_run("poison", number)


@app.task(name="too late")
def too_late():
    errors = []
    for declare in (lambda: Gate(app), lambda: gate.limit("free", bucket="1/s")):
        try:
            declare()
        except RuntimeError as error:
            errors.append(str(error))
    return errors


buckets = BucketPerKey(1, 20)
one, other = TokenBucket(1, 20), TokenBucket(1, 20)
if gate:
    gate.limit("at gate", bucket=NotedBucket("at gate", 1, 20))
    gate.limit("keyed", bucket=buckets, key="number")
    gate.limit("picked", bucket=lambda number: other if number % 2 else one)
    gate.limit("of the queue", queue="nobody's", bucket="1/h")
    gate.limit("twofold", bucket=NotedBucket("twofold at gate", 100, 100))
    gate.limit("past", bucket=NotedBucket("past", 1, 20))
    gate.limit("refused here", bucket=TokenBucket(1, 1e-6), when_limited="raise")
    gate.limit("poison", bucket=TokenBucket(1, 20), tokens=lambda number: {}[number], name="bad price")
