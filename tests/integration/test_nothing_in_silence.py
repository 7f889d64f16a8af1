"""What a worker says at its start of each limit: enforced, and where; or not. These need no server."""

import celery
import pytest
from celery.contrib.testing.app import setup_default_app
from celery.contrib.testing.worker import start_worker
from harness import DEADLINE, Worker, app_here, wait_for

from rate_limiter.celery import Gate

APP = """
from celery import Celery, signals
from rate_limiter import TokenBucket
from rate_limiter.celery import Gate, throttle

app = Celery("shop", broker="memory://")

@app.task(name="send_email")
def send_email(): ...

def sms(): ...
"""
GATE = "\ngate = Gate(app)\n"
POOLS = ["prefork", "threads", "solo", "gevent"]


@pytest.fixture
def start(tmp_path):
    """Return what runs a worker for the source of an app until it is ready, and returns it."""
    running = []

    def start(source, *arguments, **modules):
        for name, text in {"shop": source, **modules}.items():
            (tmp_path / f"{name}.py").write_text(text)
        running.append(Worker("shop", arguments, tmp_path))
        running[-1].wait_until_ready()
        return running[-1]

    yield start
    for worker in running:
        worker.kill()


def lines(worker, text):
    """Return the lines of a worker's output that have a text."""
    return [line for line in worker.output.splitlines() if text in line]


UNUSED = {
    "queue": (
        "gate.limit(queue='bluk', bucket='1/h')",
        "Limit queue bluk matches no queue that is consumed, so it limits nothing; there are: bulk, fast",
    ),
    "tasks in queue": (
        "gate.limit('send_*', queue='bluk', bucket='1/h')",
        "Limit send_* in queue bluk matches no queue that is consumed, so it limits nothing; there are: bulk",
    ),
    "tasks": (
        "gate.limit('sned_*', bucket='1/h')",
        "Limit sned_* matches no registered task, so it limits nothing; there are: send_email",
    ),
    "settings": (
        "app.conf.rate_limiter_limits = {'*': {'rate': '1/h', 'queue': 'bluk', 'name': 'bulky'}}",
        "Limit bulky matches no queue that is consumed, so it limits nothing; there are: bulk, fast",
    ),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_a_limit_for_nothing_is_told_of(start, kind):
    """One warning names what there is; nothing says that the limit is enforced."""
    source, message = UNUSED[kind]
    worker = start(APP + GATE + source, "-P", "threads", "-Q", "bulk,fast")
    (line,) = lines(worker, "Limit ")
    assert "WARNING" in line
    assert message in line
    assert "enforced" not in worker.output


def test_a_limit_of_a_consumed_queue_is_enforced(start):
    """Its line names the queue, and not each task that there is."""
    source = "gate.limit(queue='bulk', bucket='1/h')\ngate.limit('send_*', queue='fast', bucket='1/h')"
    worker = start(APP + GATE + source, "-P", "threads", "-Q", "bulk,fast")
    first, second = lines(worker, "Limit ")
    assert first.endswith("for all tasks from queue bulk, enforced at the gate")
    assert second.endswith("for send_email from queue fast, enforced at the gate")


DECORATED = """
mails = throttle("1/h", name="mails")

@app.task(name="a")
@mails
def a(): ...

@app.task(name="b")
@mails
@throttle("2/h", timeout=5)
def b(): ...
"""


@pytest.mark.parametrize("gate", [False, True], ids=["decorator", "gate"])
@pytest.mark.parametrize("pool", POOLS)
def test_each_limit_has_one_line(start, pool, gate):
    """Whatever the pool, one line for each limit says for which tasks it is, and where it is enforced."""
    worker = start(APP + DECORATED + GATE * gate, "-P", pool, "-c", "2")
    found = [line.split(": ", 2)[1:] for line in lines(worker, "Limit ")]
    place = "enforced at the gate" if gate else "enforced in the task"
    assert all("INFO" in line for line in lines(worker, "Limit "))
    assert sorted((name, rest.partition(" for ")[2]) for name, rest in found) == [
        ("INFO/MainProcess] Limit b", "b, enforced in the task"),
        ("INFO/MainProcess] Limit mails", f"a, b, {place}"),
    ]


GATELESS = {
    "settings": "app.conf.rate_limiter_limits = {'send_*': '1/h'}",
    "wrong settings": "app.conf.rate_limiter_limit = {'send_*': '1/h'}",
    "attribute": "app.task(rate_limiter_limit='1/h', name='sms')(sms)",
    "wrong attribute": "app.task(rate_limiter_limits='1/h', name='sms')(sms)",
    "annotation": "app.conf.task_annotations = {'send_email': {'rate_limiter_limit': '1/h'}}",
}
NAMED = {
    "settings": "rate_limiter_limits",
    "wrong settings": "rate_limiter_limit",
    "attribute": "rate_limiter_limit of sms",
    "wrong attribute": "rate_limiter_limits of sms",
    "annotation": "rate_limiter_limit of send_email",
}


@pytest.mark.parametrize("kind", GATELESS)
def test_what_only_a_gate_reads_is_told_of_without_one(start, kind):
    """Limits in the settings, or as a task's attribute, and no Gate: a warning names them, and the cure."""
    worker = start(APP + GATELESS[kind], "-P", "threads")
    (line,) = lines(worker, "no gate")
    assert "WARNING" in line
    assert f"nothing obeys {NAMED[kind]}: add Gate(app)" in line


@pytest.mark.parametrize(
    "source",
    ["", GATELESS["settings"] + GATE, GATELESS["settings"] + "\napp.conf.rate_limiter_enabled = False"],
    ids=["no limits", "gate", "lifted"],
)
def test_nothing_is_told_where_nothing_is_wrong(start, source):
    """No warning without limits, with a gate, or where limits are lifted."""
    worker = start(APP + source, "-P", "threads")
    assert not lines(worker, "no gate")


LATE = """
@signals.{signal}.connect
def handler(**_):
    Gate(app)
"""


@pytest.mark.parametrize(
    ("signal", "pool"),
    [("worker_ready", "threads"), ("worker_ready", "solo"), ("worker_process_init", "prefork")],
)
def test_a_gate_that_comes_too_late_is_refused(start, signal, pool):
    """A Gate made once the worker runs, or in a pool process: an error in the log says where to make it."""
    worker = start(APP + LATE.format(signal=signal), "-P", pool, "-c", "1")
    wait_for(lambda: "comes too late" in worker.output)
    found = lines(worker, "raised: RuntimeError")
    assert len(found) == 1
    assert "ERROR" in found[0]
    assert "Construct the Gate where the app is made" in worker.output


IN_TIME = {
    "imports": ("app.conf.imports = ['late']", ""),
    "include": ("app.conf.include = ['late']", ""),
    "autodiscovery": ("app.autodiscover_tasks(['late'], related_name=None)", ""),
    "worker_init": (LATE.format(signal="worker_init"), None),
}


@pytest.mark.parametrize("kind", IN_TIME)
def test_a_gate_that_comes_with_the_tasks_is_in_time(start, kind):
    """A Gate in a module that the worker imports as it starts, or in worker_init, enforces its limits."""
    source, module = IN_TIME[kind]
    modules = {} if module is None else {"late": "from shop import app, Gate\nGate(app)\n"}
    settings = "\napp.conf.rate_limiter_limits = {'send_*': '1/h'}\n"
    worker = start(APP + settings + source, "-P", "threads", **modules)
    (line,) = lines(worker, "Limit ")
    assert line.endswith("for send_email, enforced at the gate")
    assert "RuntimeError" not in worker.output


if celery.VERSION >= (5, 7):  # from then on it can spawn
    APART = """
from celery import Celery
from rate_limiter.celery import Gate

app = Celery("shop", broker="memory://", include=["jobs"])
app.conf.worker_pool_start_method = "spawn"
Gate(app).limit("job", bucket="1/h")
"""
    JOBS = """
import rate_limiter.celery
from celery import shared_task

@shared_task(name="job")
def job(): ...
"""

    def test_a_gate_that_spawned_processes_do_not_know_is_told_of(start):
        """They import the modules of the tasks only; where the gate is in none of them, an error says so."""
        worker = start(APART, "-P", "prefork", "-c", "1", jobs=JOBS)
        (line,) = wait_for(lambda: lines(worker, "is not known in this pool process"))
        assert "ERROR" in line


def nothing():
    """Do nothing."""


@pytest.mark.parametrize(
    "options", [{"rate_limiter_limt": "5/s"}, {"rate_limiter_limit": "5/y"}], ids=["unknown", "wrong"]
)
def test_a_wrong_declaration_of_a_task_that_is_known_later_fails_its_jobs(options):
    """Known as a connection begins anew, say: the job's result is the error, and the worker goes on."""
    app = app_here()
    Gate(app)
    app.task(name="good", shared=False)(nothing)
    with (
        setup_default_app(app, use_trap=False),
        start_worker(app, pool="threads", perform_ping_check=False) as worker,
    ):
        app.task(name="late", shared=False, **options)(nothing)
        worker.consumer.update_strategies()
        with pytest.raises(ValueError, match=next(iter(options))):
            app.send_task("late").get(timeout=DEADLINE)
        assert app.send_task("good").get(timeout=DEADLINE) is None
    app.close()
