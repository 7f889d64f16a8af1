"""What a worker refuses to start with. These need no server."""

import pytest
from harness import Worker, wait_for

APP = """
from celery import Celery
from rate_limiter import TokenBucket
from rate_limiter.celery import Gate, throttle

app = Celery("shop", broker="memory://")
bucket = TokenBucket(5, 1)

@app.task(name="send_email")
@throttle(bucket)
def send_email(): ...
"""
GATE = "gate = Gate(app)\n"


@pytest.fixture
def start(tmp_path):
    """Return what starts a worker for the source of an app."""
    running = []

    def start(source, *arguments):
        (tmp_path / "shop.py").write_text(source)
        running.append(Worker("shop", arguments, tmp_path))
        return running[-1]

    yield start
    for worker in running:
        worker.kill()


@pytest.mark.parametrize(
    ("arguments", "children"),
    [
        (["-c", "4"], 4),
        (["-c", "1", "--autoscale", "3,1"], 3),
        (["-c", "1", "--max-tasks-per-child", "5"], 1),  # one after the other, each with a full bucket
    ],
)
def test_one_bucket_per_child_is_refused(start, arguments, children):
    """A prefork worker in which a limit would run at a multiple of its rate does not start."""
    worker = start(APP, "-P", "prefork", *arguments)
    wait_for(lambda: not worker.running)
    assert worker.process.returncode != 0
    assert (
        f"`send_email`: this bucket would be one per child ({children} × 1/s); add `Gate(app)`"
        in worker.output
    )


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        (APP, ["-P", "prefork", "-c", "1"]),
        (APP, ["-P", "threads", "-c", "4"]),
        (APP + GATE, ["-P", "prefork", "-c", "4"]),
        (APP + "app.conf.rate_limiter_enabled = False", ["-P", "prefork", "-c", "4"]),
    ],
    ids=["one child", "threads", "gate", "lifted"],
)
def test_one_bucket_for_all_is_accepted(start, source, arguments):
    """A worker in which the limit holds starts."""
    start(source, *arguments).wait_until_ready()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (APP + GATE + "gate.limit('send_*', bucket=bucket)", "the same bucket limits it twice"),
        (APP + GATE + "Gate(app)", "has a Gate already"),
    ],
    ids=["bucket declared twice", "second gate"],
)
def test_a_wrong_declaration_is_refused(start, source, message):
    """The same bucket twice for one task, or a second gate: the worker does not start."""
    worker = start(source, "-P", "threads")
    wait_for(lambda: not worker.running)
    assert worker.process.returncode != 0
    assert message in worker.output
