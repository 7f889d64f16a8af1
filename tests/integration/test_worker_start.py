"""What a worker refuses to start with. These need no server."""

import celery
import pytest
from harness import Worker, wait_for

APP = """
from celery import Celery
from rate_limiter import BucketPerKey, TokenBucket
from rate_limiter.celery import Gate, throttle

app = Celery("shop", broker="memory://")
bucket = TokenBucket(5, 1)

def pay(): ...

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


TENANTS = APP.replace("TokenBucket(5, 1)", "BucketPerKey(5, 1)").replace(
    "throttle(bucket)", "throttle(bucket, key=lambda: 'acme')"
)
CALLABLE = APP.replace("throttle(bucket)", "throttle(lambda: bucket)")
NAMED = APP.replace("throttle(bucket)", "throttle(lambda: bucket, buckets=[bucket])")
STRICT = TENANTS.replace("key=", "timeout=5, key=")


@pytest.mark.parametrize(
    ("source", "arguments", "reason"),
    [
        (TENANTS, ["-c", "4"], "a BucketPerKey cannot be shared between processes; add `Gate(app)`"),
        (CALLABLE, ["-c", "4"], "buckets=[…] names it; add `Gate(app)`"),
        (CALLABLE, ["-c", "1", "--autoscale", "3,1"], "add `Gate(app)`"),
        # one after the other, each with a full bucket
        (CALLABLE, ["-c", "1", "--max-tasks-per-child", "5"], "`-c 1` without replacing children"),
        (STRICT + GATE, ["-c", "2"], "cannot be shared between processes; use the threads pool"),
    ],
)
def test_what_cannot_be_shared_is_refused(start, source, arguments, reason):
    """A prefork worker in which a limit would run at a multiple of its rate does not start."""
    worker = start(source, "-P", "prefork", *arguments)
    wait_for(lambda: not worker.running)
    assert worker.process.returncode != 0
    assert "`send_email`: this bucket would be one per pool process" in worker.output
    assert reason in worker.output


SPAWN = "app.conf.worker_pool_start_method = 'spawn'\n"


if celery.VERSION >= (5, 7):  # from then on it can spawn

    def test_spawned_processes_need_a_gate(start):
        """Spawned pool processes share no memory: without a gate the worker does not start."""
        worker = start(APP + SPAWN, "-P", "prefork", "-c", "4")
        wait_for(lambda: not worker.running)
        assert "(4 × 1/s), for spawned processes share no memory; add `Gate(app)`" in worker.output


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        (APP, ["-P", "prefork", "-c", "4"]),
        (APP, ["-P", "prefork", "-c", "1", "--max-tasks-per-child", "5"]),
        (NAMED, ["-P", "prefork", "-c", "4"]),
        (APP, ["-P", "threads", "-c", "4"]),
        (TENANTS, ["-P", "threads", "-c", "4"]),
        (TENANTS, ["-P", "prefork", "-c", "1"]),
        (APP + GATE, ["-P", "prefork", "-c", "4"]),
        (TENANTS + GATE, ["-P", "prefork", "-c", "4"]),
        (TENANTS + "app.conf.rate_limiter_enabled = False", ["-P", "prefork", "-c", "4"]),
    ],
)
def test_one_rate_for_the_worker_is_accepted(start, source, arguments):
    """A worker in which the limit holds starts; in a prefork pool a TokenBucket becomes shared."""
    worker = start(source, "-l", "INFO", *arguments)
    worker.wait_until_ready()
    shared = "prefork" in arguments and "BucketPerKey(" not in source
    assert ("Shared with all pool processes" in worker.output) is shared


SPARE = APP + "spare = [TokenBucket(1, 2) for _ in range(3)]\n"
MANY = APP + "spare = [TokenBucket(1, 2) for _ in range(300)]\n"
CLUSTER = (
    APP
    + GATE
    + """
app.conf.rate_limiter_redis = "redis://nobody.invalid"
app.conf.rate_limiter_limits = {"send_sms": {"rate": "1/s", "per": "cluster"}}
app.task(pay, name="send_sms")
"""
)
ALONE = "so each of the 4 pool processes has its own, with the whole rate"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (SPARE, "3 buckets that no limit of a task names"),
        (SPARE + GATE, "3 buckets that no limit of a task names"),
        (MANY + GATE, "and 299 other buckets, " + ALONE),
        (APP + GATE + "spare = BucketPerKey(5, 1)\nspare['x'].allow()\n", ALONE),
        (TENANTS + GATE, ""),
        (CLUSTER, ""),
    ],
    ids=["throttle", "gate", "too many", "per key", "per key at the gate", "cluster"],
)
def test_a_bucket_that_no_limit_names_is_shared_too(start, source, told):
    """A task may wait for it in its body: it is shared before the pool forks, or the worker warns."""
    worker = start(source, "-l", "INFO", "-P", "prefork", "-c", "4")
    worker.wait_until_ready()
    assert told in worker.output
    assert ("so each of the" in worker.output) is (ALONE in told)
    assert ("that no limit of a task names" in worker.output) is bool(told and ALONE not in told)


TWICE = """
from celery import Celery
from rate_limiter.celery import Gate, throttle

app = Celery("shop", broker="memory://")

@app.task(name="send_email")
@throttle("1/s", name="mails")
def send_email(): ...

@app.task(name="send_sms")
@throttle("1/s", name="mails")
def send_sms(): ...
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (APP + GATE + "gate.limit('send_*', bucket=bucket)", "the same bucket limits it twice"),
        (APP + GATE + "Gate(app)", "has a Gate already"),
        (TWICE, "name must be different for each limit: 'mails' is the name of two"),
        (TWICE + GATE, "name must be different for each limit: 'mails' is the name of two"),
        (
            APP + GATE + "gate.limit('send_*', bucket='1/s', key='tenant')",
            "not 'tenant': the parameters",
        ),
        (
            APP + GATE + "app.task(rate_limiter_limits='5/s', name='x')(pay)",
            "rate_limiter_limits of x: unk",
        ),
    ],
    ids=["bucket declared twice", "second gate", "name without gate", "name", "parameter", "attribute"],
)
def test_a_wrong_declaration_is_refused(start, source, message):
    """A bucket or a name that is given twice, a name of no parameter: the worker does not start."""
    worker = start(source, "-P", "threads")
    wait_for(lambda: not worker.running)
    assert worker.process.returncode != 0
    assert message in worker.output
