"""The shipped image on real brokers: limits that hold, and what happens when a container goes."""

import time

import pytest
from celery import chord
from conftest import IMAGE, wait_for

from rate_limiter import RateLimitExceeded

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(400)]

#: A task notes its time a while after its tokens were taken: fork, pool and a busy machine.
LATE = 0.2


def assert_rate(runs, capacity, rate, cost=lambda entry: 1):
    """Never more than capacity + rate × t in any window, and most of that used while there is a backlog."""
    for begin, start in enumerate(runs):
        used = 0.0
        for entry in runs[begin:]:
            used += cost(entry)
            allowed = capacity + rate * (entry.at - start.at + LATE)
            assert used <= allowed, f"{used} tokens where {allowed} were allowed"
    total, time = sum(map(cost, runs)), runs[-1].at - runs[0].at
    assert total - capacity >= 0.8 * rate * (time - LATE), f"only {total} tokens in {time} s"


def values(runs):
    """Return what ran, sorted: each job once, if it equals what was sent."""
    return sorted(entry.value for entry in runs)


def each_worker(runs):
    """Return what each worker ran. How two of them share a queue is up to the broker."""
    workers = sorted({entry.worker for entry in runs})
    return [[entry for entry in runs if entry.worker == worker] for worker in workers]


def send_to_both(setup, task, count):
    """Send every other job to each worker's own queue, and return the results."""
    return [setup.send(task, number, queue=("first", "second")[number % 2]) for number in range(count)]


# -- limits -------------------------------------------------------------------------------------------


def test_a_worker_is_ready_within_five_seconds(celery_setup):
    """From the start of its container, a worker of the shipped image takes at most 5 s."""
    assert celery_setup.first.seconds_to_ready() < 5


def test_each_of_two_workers_holds_the_limit(celery_setup):
    """Two workers with a backlog run at the limit each, at the same time, and each job runs once."""
    send_to_both(celery_setup, "shared", 32)
    runs = celery_setup.wait_for_runs(32)
    assert values(runs) == list(range(32))
    first, second = each_worker(runs)
    for of_one in first, second:
        assert len(of_one) == 16
        assert_rate(of_one, capacity=1, rate=5)
    assert first[0].at < second[8].at < first[-1].at


def test_two_workers_share_one_rate(celery_setup):
    """A limit per cluster: two workers with a backlog run at one rate together, and each job runs once."""
    send_to_both(celery_setup, "one rate", 32)
    runs = celery_setup.wait_for_runs(32)
    assert values(runs) == list(range(32))
    first, second = each_worker(runs)
    assert first[0].at < second[8].at < first[-1].at
    assert_rate(runs, capacity=2, rate=10)


def test_the_children_of_a_worker_share_the_decorators_limit(celery_setup):
    """@throttle under prefork, with a gate: several children run its jobs, at one rate in all."""
    for number in range(25):
        celery_setup.send("prefork", number, queue="first")
    runs = celery_setup.wait_for_runs(25)
    assert values(runs) == list(range(25))
    assert len({run.child for run in runs}) > 1
    assert_rate(runs, capacity=2, rate=10)


def test_the_children_of_a_worker_without_a_gate_share_the_limit(celery_setup, ungated):
    """@throttle under prefork -c 4, and no gate: several children run its jobs, at one rate in all."""
    for number in range(25):
        celery_setup.send("ungated", number, queue="ungated")
    runs = celery_setup.wait_for_runs(25)
    assert values(runs) == list(range(25))
    assert len({run.child for run in runs}) > 1
    assert_rate(runs, capacity=2, rate=10)


def test_unlimited_jobs_pass_a_limited_backlog(celery_setup):
    """Jobs without a limit that stand behind a limited backlog run before most of it."""
    for number in range(14):
        celery_setup.send("backlog", number, queue="first")
    for _ in range(20):
        celery_setup.send("free", "free", queue="first")
    order = [run.value for run in celery_setup.wait_for_runs(34)]
    last = max(index for index, value in enumerate(order) if value == "free")
    assert len(set(order[:last]) - {"free"}) <= 6  # a second's worth, and the capacity


def test_uploads_are_limited_by_their_weight(celery_setup):
    """A bucket of megabytes lets through so many a second, however many jobs that are."""
    sizes = [2, 5, 1, 8, 3, 10, 4, 7, 2, 9, 6, 3]
    for megabytes in sizes:
        celery_setup.send("upload", megabytes, queue="first")
    runs = celery_setup.wait_for_runs(len(sizes))
    assert values(runs) == sorted(sizes)
    assert_rate(runs, capacity=10, rate=20, cost=lambda run: run.value)


def test_each_tenant_has_a_limit_of_its_own(celery_setup):
    """A tenant's backlog runs at that tenant's rate, and keeps no other tenant waiting."""
    for tenant in ["busy"] * 12 + ["calm"] * 2:
        celery_setup.send("for tenant", tenant, queue="first")
    runs = celery_setup.wait_for_runs(14)
    busy, calm = ([run for run in runs if run.value == tenant] for tenant in ("busy", "calm"))
    assert_rate(busy, capacity=1, rate=5)
    assert calm[-1].at < busy[4].at


def test_a_chord_waits_for_its_limited_members(celery_setup):
    """Members run at their limit; then the body runs, once, with all their results."""
    app = celery_setup.app
    header = [
        app.signature("member", (celery_setup.run, number), queue="celery") for number in range(14)
    ]
    body = app.signature("total", (celery_setup.run,), queue="celery")
    assert chord(header, body, app=app)().get(timeout=60) == sum(range(14))
    *members, last = celery_setup.runs
    assert last.value == "total"
    assert values(members) == list(range(14))
    for of_one in each_worker(members):
        assert_rate(of_one, capacity=2, rate=5)


def test_a_refused_job_says_when_to_come_again(celery_setup):
    """when_limited="raise": the error and its retry_after come back through the result backend."""
    first, second = (celery_setup.send("refused", number, queue="first") for number in range(2))
    assert first.get(timeout=60) == 0
    with pytest.raises(RateLimitExceeded) as error:
        second.get(timeout=60)
    assert 90 < error.value.retry_after <= 100
    assert values(celery_setup.runs) == [0]


def test_a_job_that_is_sent_back_takes_its_turn(celery_setup):
    """when_limited="retry": jobs wait in the broker, run once at the limit, and it is no retry."""
    results = [celery_setup.send("sent back", number, queue="first") for number in range(8)]
    assert [result.get(timeout=60) for result in results] == [0] * 8
    runs = celery_setup.runs
    assert values(runs) == list(range(8))
    assert_rate(runs, capacity=1, rate=4)


def test_a_queue_has_a_limit(celery_setup):
    """gate.limit(queue=…): tasks without a limit run at the queue's, in each worker that consumes it."""
    for number in range(40):
        celery_setup.send("free", number, queue="bulk")
    for of_one in each_worker(celery_setup.wait_for_runs(40)):
        assert_rate(of_one, capacity=1, rate=10)


def test_the_settings_have_a_limit(celery_setup):
    """rate_limiter_limits in the app's settings limits a task that declares nothing."""
    for number in range(25):
        celery_setup.send("from settings", number, queue="first")
    assert_rate(celery_setup.wait_for_runs(25), capacity=2, rate=10)


# -- failures -----------------------------------------------------------------------------------------


def test_a_killed_redis_of_a_limit_fails_no_job(celery_setup, limits_redis):
    """It is killed and started again: meanwhile each worker keeps its share, and each job runs once."""
    results = send_to_both(celery_setup, "one rate", 130)
    # Every 5 s a worker says that it lives, and learns how many do.
    wait_for(lambda: (runs := celery_setup.runs) and runs[-1].at - runs[0].at > 6)
    limits_redis.kill()
    killed = time.monotonic()

    def shares():
        """Return what each worker has run since then, once both have run 20 jobs."""
        runs = each_worker([run for run in celery_setup.runs if run.at > killed])
        return len(runs) == 2 and min(map(len, runs)) >= 20 and runs

    for of_one in wait_for(shares):
        assert_rate(of_one, capacity=2, rate=5)
    limits_redis.restart()
    assert [result.get(timeout=60) for result in results] == [None] * 130
    assert values(celery_setup.runs) == list(range(130))
    # The burst, that of the new Redis, and that of the shares.
    assert_rate(celery_setup.runs, capacity=6, rate=10)
    workers = celery_setup.first, celery_setup.second
    wait_for(lambda: all(worker.count("answers again") for worker in workers))
    for text in f"Redis at {limits_redis.hostname}:6379/0 does not answer", "answers again":
        assert [worker.count(text) for worker in workers] == [1, 1]


JOBS = list(range(16))


def start_backlog(setup):
    """Send jobs to the second worker, and wait until it has run two and holds the others."""
    for number in JOBS:
        setup.send("kept", number, queue="second")
    setup.wait_for_runs(2)
    assert setup.held(setup.second) > 0


def test_a_stopped_worker_gives_its_jobs_back(celery_setup):
    """SIGTERM while it holds jobs: the container ends well, and each job runs once."""
    start_backlog(celery_setup)
    worker = celery_setup.second
    worker.end("SIGTERM")
    before = values(celery_setup.runs)
    assert worker.attrs["State"]["ExitCode"] == 0
    assert "held jobs back to the broker" in worker.logs()
    worker.start()
    assert values(celery_setup.wait_for_runs(len(JOBS))) == JOBS
    assert set(before) < set(JOBS)


def test_a_killed_worker_loses_nothing(celery_setup):
    """SIGKILL while it holds jobs: they were not acknowledged, and the broker gives them out again."""
    start_backlog(celery_setup)
    worker = celery_setup.second
    worker.end("SIGKILL")
    before = values(celery_setup.runs)
    worker.start()
    wait_for(lambda: set(values(celery_setup.runs)) == set(JOBS))
    assert set(before) < set(JOBS)
    assert len(celery_setup.runs) <= len(JOBS) + 1  # what the kill cut off runs again


def test_a_restarted_broker_loses_nothing(celery_setup):
    """The broker's container restarts while jobs are held: the workers come back, and all run."""
    start_backlog(celery_setup)
    celery_setup.broker.container.restart(timeout=2)
    before = values(celery_setup.runs)
    wait_for(lambda: set(values(celery_setup.runs)) == set(JOBS))
    assert set(before) < set(JOBS)
    assert len(celery_setup.runs) <= len(JOBS) + 2  # an acknowledgement may have been cut off
    for queue in "first", "second":
        celery_setup.send("free", queue, queue=queue)
    wait_for(lambda: {"first", "second"} <= {run.value for run in celery_setup.runs})


# -- the image ----------------------------------------------------------------------------------------


def test_the_image_is_small_and_not_root(docker_client, smoke_image):
    """The runtime stage is less than 200 MB above its base, and nothing in it runs as root."""
    base, image = (
        docker_client.images.get(name) for name in ("python:3.11-slim-bookworm", f"{IMAGE}:runtime")
    )
    assert image.attrs["Size"] - base.attrs["Size"] < 200e6
    assert {image.attrs["Config"]["User"], smoke_image.attrs["Config"]["User"]} == {"worker"}
