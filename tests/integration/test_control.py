"""Limits seen and changed by Celery's remote control, in real workers."""

import time

import pytest
from harness import wait_for
from limits import control, held, limit, start, waiting

POOLS = ["prefork", "threads", "gevent", "solo"]


def limits_of(lab, worker):
    return control(lab, worker, "limits")


@pytest.mark.parametrize("pool", POOLS)
def test_a_new_rate_reaches_held_jobs(lab, pool):
    """At once; the other limits stay; and what was changed is shown, with the reason."""
    for number in range(40):
        lab.send("job", number)
    with start(lab, pool=pool, concurrency=1, limits=(limit(rate=0.01, max_held=100),)) as worker:
        wait_for(lambda: limits_of(lab, worker)["job"]["held"] == 39)
        others = {
            name: each["buckets"] for name, each in limits_of(lab, worker).items() if name != "job"
        }
        reply = control(lab, worker, "limit", name="job", rate="100/s", capacity=5, reason="a test")
        assert reply == {"ok": "100 tokens_per_second (was 0.01), capacity 5 (was 1)"}
        assert lab.wait_for_runs("job", 40) == list(range(40))
        wait_for(lambda: limits_of(lab, worker)["job"]["held"] == 0)
        seen = limits_of(lab, worker)
        assert {name: each["buckets"] for name, each in seen.items() if name != "job"} == others
        job = seen["job"]
        assert (job["tasks"], job["queue"], job["enforced"]) == (["job"], None, "at the gate")
        assert (job["admitted"], job["tokens"], job["buckets"][0]["rate"]) == (40, 40, 100)
        assert job["changed"]["what"] == "100 tokens_per_second (was 0.01), capacity 5 (was 1)"
        assert job["changed"]["reason"] == "a test"
        # and back: what is held follows again
        assert "ok" in control(lab, worker, "limit", name="job", changes=["rate=0.01", "capacity=1"])
        for number in range(40, 45):
            lab.send("job", number)
        wait_for(lambda: limits_of(lab, worker)["job"]["held"] >= 4)
        assert len(lab.runs("job")) <= 41


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_decorator_without_a_gate(redis_lab, pool):
    """Its limit is seen and changed too: the processes of the pool share the bucket."""
    lab = redis_lab
    for number in range(40):
        lab.send("slow", number)
    with lab.worker(pool, gate=False) as worker:
        lab.wait_for_runs("slow", 2)
        seen = limits_of(lab, worker)["slow"]
        assert (seen["tasks"], seen["enforced"], seen["held"]) == (["slow"], "in the task", 0)
        assert "ok" in control(lab, worker, "limit", name="slow", rate="200/s")
        began = time.monotonic()
        lab.wait_for_runs("slow", 40)
        assert time.monotonic() - began < 15  # 19 s at the old rate
        assert limits_of(lab, worker)["slow"]["admitted"] == 40


def test_a_bucket_in_a_pool_process(redis_lab):
    """It cannot be seen or changed from the main process, and nothing says that it was."""
    lab = redis_lab
    with start(lab, pool="prefork", concurrency=1, gate=False, module="charges_app") as worker:
        name, seen = next(
            each for each in limits_of(lab, worker).items() if "tenant's" in each[1]["tasks"]
        )
        assert seen["enforced"] == "in the task, in a process with a bucket of its own"
        reply = control(lab, worker, "limit", name=name, rate="1/h")
        assert "cannot be changed: its tasks take from a bucket of their pool process" in reply["error"]
        assert limits_of(lab, worker)[name]["changed"] is None


def test_a_pause_and_its_end(redis_lab):
    """A paused limit lets nothing go, and its jobs do when it is resumed."""
    lab = redis_lab
    with start(lab, limits=(limit(rate=10),)) as worker:
        assert control(lab, worker, "limit", name="job", pause="10m") == {"ok": "paused for 600 s"}
        for number in range(5):
            lab.send("job", number)
        wait_for(lambda: limits_of(lab, worker)["job"]["held"] == 5)
        assert 500 < limits_of(lab, worker)["job"]["buckets"][0]["paused"] <= 600
        assert control(lab, worker, "limit", name="job", changes=["resume"]) == {"ok": "resumed"}
        assert lab.wait_for_runs("job", 5) == list(range(5))


def test_celerys_rate_limit(redis_lab):
    """`control rate_limit` changes our limit where a task has one, and Celery's where it has none."""
    lab = redis_lab
    shared = {"tasks": ["job", "other"], "bucket": ["both", 1, 0.01], "name": "shared"}
    with start(lab, limits=(shared,)) as worker:
        reply = control(lab, worker, "rate_limit", task_name="job", rate_limit="7/s")
        assert reply == {"ok": "limit shared of job, other: 7 tokens_per_second (was 0.01)"}
        reply = control(lab, worker, "rate_limit", task_name="free", rate_limit="5/s")
        assert reply == {"ok": "new rate limit set successfully"}
        assert "new rate" not in str(control(lab, worker, "rate_limit", task_name="job", rate_limit=0))
        reply = control(lab, worker, "rate_limit", task_name="both", rate_limit="5/s")
        assert reply["error"].startswith("both has the limits ")
        conf = lab.inspect(worker, "registered", "rate_limit")
        assert [task for task in conf if "rate_limit" in task and "cello" not in task] == [
            "doubly [rate_limit=1000/s]",
            "free [rate_limit=5/s]",
        ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "mails"}, "there is no limit 'mails', only: "),
        ({"name": "job"}, "nothing is to change"),
        ({"name": "job", "rate": 0}, "rate must be"),
        ({"name": "job", "rate": None, "changes": ["rate"]}, "rate needs a value"),
        (
            {"name": "job", "changes": ["speed=5"]},
            "unknown option 'speed'; expected one of rate, capacity",
        ),
        ({"name": "job", "changes": ["resume=yes"]}, "resume takes no value, not 'yes'"),
        ({"name": "job", "key": "acme", "rate": 1}, "limit job has no keys"),
        ({"name": "job", "capacity": "many"}, "capacity must be a number of tokens, not 'many'"),
    ],
)
def test_wrong_commands(worker, arguments, says):
    """The reply names what is wrong and what there is."""
    lab, worker = worker
    assert says in control(lab, worker, "limit", **arguments)["error"]
    assert limits_of(lab, worker)["job"]["changed"] is None


@pytest.fixture(scope="module")
def worker(redis_url, tmp_path_factory):
    """Yield a worker with a limit, and its lab."""
    from harness import Lab  # noqa: PLC0415

    lab = Lab(tmp_path_factory.mktemp("control"), redis_url())
    with start(lab, limits=(limit(rate=0.01),)) as worker:
        yield lab, worker
    lab.close()


def test_a_worker_whose_limits_are_closed(redis_lab):
    """rate_limiter_control = False: nothing is shown or changed, and Celery's own command works as ever."""
    lab = redis_lab
    with start(lab, limits=(limit(),), rate_limiter_control=False) as worker:
        for command in (
            ("limits", {}),
            ("limit", {"name": "job", "rate": 5}),
            ("explain", {"task_id": "x"}),
        ):
            reply = control(lab, worker, command[0], **command[1])
            assert reply["error"].startswith("rate_limiter_control is false")
        reply = control(lab, worker, "rate_limit", task_name="job", rate_limit="5/s")
        assert reply == {"ok": "new rate limit set successfully"}


def test_explain(redis_lab):
    """Where a job is: held, for how long and why; running; waiting for a slot or its ETA; or unknown."""
    lab = redis_lab
    slow = limit(rate=0.5, max_held=100)
    with start(lab, pool="prefork", concurrency=1, limits=(slow,)) as worker:
        lab.send("job", 0)
        lab.wait_for_runs("job", 1)
        jobs = [lab.send("job", number) for number in range(1, 11)]
        wait_for(lambda: held(lab, worker, "job") >= 9)
        told = [control(lab, worker, "explain", task_id=job.id) for job in jobs[-3:]]
        assert [each["before"] for each in told] == [told[0]["before"] + n for n in range(3)]
        assert {(each["state"], each["limit"], each["task"]) for each in told} == {
            ("held", "job", "job")
        }
        at = time.monotonic() + told[-1]["seconds"]
        lab.wait_for_runs("job", 11)
        assert abs(lab.log("job")[-1].at - at) < 1
        assert control(lab, worker, "explain", task_id="no such") == {"state": "unknown"}
        busy, later = lab.send("busy", 30), lab.send("other", 1)
        scheduled = lab.send("other", 2, countdown=60)
        lab.wait_for_runs("concurrency", 1)
        wait_for(lambda: not waiting(lab))
        states = [control(lab, worker, "explain", task_id=job.id) for job in (busy, later, scheduled)]
        assert [each["state"] for each in states] == [
            "runs",
            "waits for a slot of the pool",
            "waits for its ETA",
        ]
