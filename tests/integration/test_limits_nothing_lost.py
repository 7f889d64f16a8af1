"""Whatever happens to a worker, each of its jobs runs; where nothing was cut off, it runs once."""

import signal
import time

import pytest
from harness import DEADLINE, wait_for
from kombu.transport.redis import Channel
from limits import SHORT_LEASE, break_connections, limit, start, unacknowledged, waiting

#: Slow enough for a test to do something while no job runs, and nothing of one is under way.
RATE = 8

JOBS = set(range(24))


def after_a_run(lab, more: int = 1) -> None:
    """Wait for some more jobs to run, and a little longer."""
    lab.wait_for_runs("job", len(lab.log("job")) + more)
    time.sleep(0.03)


def end(worker, number: int) -> None:
    worker.process.send_signal(number)
    worker.process.wait(DEADLINE)


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_no_job_is_lost_by_a_worker_that_ends(lab, late):
    """Warm shutdown, cold shutdown (soft first where late), kill -9: the next worker runs what was held."""
    redis = lab.settings["broker_url"].startswith("redis")
    options = {
        "pool": "prefork",
        "limits": (limit(rate=RATE),),
        "task_acks_late": late,
        "broker_transport_options": SHORT_LEASE if redis else {},
    }
    soft = {"worker_soft_shutdown_timeout": 0.5, "worker_enable_soft_shutdown_on_idle": True}
    for number in JOBS:
        lab.send("job", number)
    with start(lab, **options) as warm:
        after_a_run(lab, 2)
        end(warm, signal.SIGTERM)
        assert warm.process.returncode == 0
    with start(lab, **options, **(soft if late else {})) as cold:
        after_a_run(lab, 2)
        end(cold, signal.SIGQUIT)
    assert ("Initiating Soft Shutdown" in cold.output) is late
    assert len(lab.runs("job")) == len(set(lab.runs("job"))) < 20
    if not redis or hasattr(Channel, "unacked_restore_interval"):  # kombu 5.5 restores every 100 s
        with start(lab, **options) as killed:
            after_a_run(lab, 2)
            killed.kill()
    before = lab.runs("job")
    with start(lab, **options):
        wait_for(lambda: set(lab.runs("job")) == JOBS)
    assert set(before) < JOBS
    assert len(lab.runs("job")) <= len(JOBS) + 2  # what the kill cut off
    for worker in warm, cold:
        assert "held jobs back to the broker" in worker.output


def test_what_comes_in_a_cold_shutdown_is_the_brokers(rabbitmq_lab):
    """Celery speaks to RabbitMQ in the signal handler: a message that is read then may have another one's body."""
    lab, cold = rabbitmq_lab, rabbitmq_lab.folder / "runs.cold"
    with start(lab, limits=(limit(rate=1 / 3600),)) as worker:
        lab.send("job", 0)
        lab.wait_for_runs("job", 1)
        cold.touch()
        lab.send("job", 1)
        worker.process.wait(DEADLINE)
    assert "jobs begin to wait" not in worker.output
    assert lab.runs("job") == [0]
    cold.unlink()
    with start(lab, limits=(limit(rate=5),)):
        assert lab.wait_for_runs("job", 2) == [0, 1]


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_no_job_is_lost_with_the_connection(lab, late, request):
    """The connection breaks while jobs are held and their queue is paused: each job runs once."""
    queue = lab.settings["task_default_queue"]
    bound = limit("job", 1, 10, queue=queue, max_held=12, overflow="pause")
    with start(lab, pool="prefork", limits=(bound,), task_acks_late=late) as worker:
        for number in range(40):
            lab.send("job", number)
        wait_for(lambda: f"Paused queue {queue}" in worker.output)
        after_a_run(lab)
        break_connections(lab, request)
        # While the queue is paused the worker may not notice: its next command connects again.
        wait_for(lambda: set(lab.runs("job")) == set(range(40)))
        assert f"Resumed queue {queue}" in worker.output
        time.sleep(0.3)  # for a second run of one
    # rabbitmqctl takes seconds: the acknowledgement of a job may be under way as it strikes.
    slack = 0 if lab.settings["broker_url"].startswith("redis") else 1
    assert len(lab.runs("job")) <= 40 + slack
    lab.assert_bound("job", capacity=1, rate=10)


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_held_jobs_do_not_wait_for_one_that_runs(redis_lab, pool):
    """Redis: a worker that stops warm puts them back at once, in order; another one runs them meanwhile."""
    lab, count = redis_lab, 30
    limits = (limit(rate=0.01, max_held=50),)
    with start(lab, pool=pool, limits=limits) as worker:
        lab.send("busy", 8)
        lab.wait_for_runs("concurrency", 1)
        for number in range(count):
            lab.send("job", number)
        wait_for(lambda: len(lab.runs("job")) == 1 and waiting(lab) == 0)
        worker.process.send_signal(signal.SIGTERM)
        wait_for(lambda: waiting(lab) == count - 1)
        assert worker.running
        assert lab.runs("concurrency") == ["begin"]
        with start(lab, gate=False, concurrency=1):
            assert lab.wait_for_runs("job", count) == list(range(count))
            worker.process.wait(DEADLINE)
            wait_for(lambda: not unacknowledged(lab))
    assert lab.runs("concurrency") == ["begin", "end"]
    assert lab.runs("job") == list(range(count))
