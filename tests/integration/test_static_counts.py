"""Workers whose prefetch count is static (quorum queues): what is held takes nothing from the others."""

import time

import pytest
from harness import wait_for
from limits import break_connections, control, declare, held, limit, start, waiting

#: The prefetch count of a worker with two slots.
WINDOW = 8

ALONE = {"x-queue-type": "quorum", "x-single-active-consumer": True}


@pytest.fixture
def quorum(rabbitmq_lab):
    """Return a quorum queue of the lab, declared, as ``start`` takes it."""
    return queue_of(rabbitmq_lab, "quorum", True)


def queue_of(lab, name, options):
    prefix = lab.settings["task_default_queue"]
    queue = f"{prefix}-{name}", f"{prefix}-jobs", "direct", name, options
    declare(lab, queue)
    return queue


def send(lab, task, *numbers, to, **options):
    """Send jobs to a queue."""
    for number in numbers:
        lab.send(task, number, exchange=to[1], routing_key=to[3], **options)


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_jobs_behind_many_held_ones_run(rabbitmq_lab, quorum, pool):
    """With the defaults jobs pass 150 limited ones, and those run in order, once each."""
    lab = rabbitmq_lab
    send(lab, "job", *range(150), to=quorum)
    send(lab, "other", *range(30), to=quorum)
    with start(lab, pool=pool, queues=(quorum,), limits=(limit(rate=4),)):
        assert sorted(lab.wait_for_runs("other", 30)) == list(range(30))
        assert len(lab.runs("job")) < 100
        seen = len(lab.runs("job"))
        assert lab.wait_for_runs("job", seen + 8) == list(range(len(lab.runs("job"))))
    lab.assert_bound("job", capacity=1, rate=4)


def test_running_jobs_are_no_held_ones(rabbitmq_lab, quorum):
    """A worker whose slots are busy gets no more than one and a half counts of jobs beside the held ones."""
    lab = rabbitmq_lab
    for number in range(30):
        send(lab, "job", number, to=quorum)
        send(lab, "busy", 60, to=quorum)
    slow = limit(rate=1e-3, max_held=1000)
    with start(lab, queues=(quorum,), limits=(slow,), task_acks_late=True) as worker:
        wait_for(lambda: held(lab, worker) >= WINDOW)
        time.sleep(1)
        in_hand = 60 - 1 - waiting(lab, quorum[0]) - held(lab, worker)
        assert WINDOW // 2 < in_hand <= WINDOW + WINDOW // 2


def test_jobs_that_were_held_and_run_are_no_held_ones(rabbitmq_lab, quorum):
    """What was let go takes up the count of its worker until it is acknowledged; what waits for a slot is held."""
    lab = rabbitmq_lab
    send(lab, "busy", *[60] * 40, to=quorum)
    fast = limit("busy", rate=20, max_held=4)
    with start(lab, queues=(quorum,), limits=(fast,), task_acks_late=True) as worker:
        wait_for(lambda: waiting(lab, quorum[0]) <= 40 - WINDOW and held(lab, worker))
        time.sleep(0.5)
        assert waiting(lab, quorum[0]) >= 40 - 2 * WINDOW - 4


@pytest.mark.parametrize(("max_held", "eta_limit", "most"), [(20, None, 20 + WINDOW), (1000, 20, 20)])
def test_no_more_is_held_than_the_bound_says(rabbitmq_lab, quorum, max_held, eta_limit, most):
    """Beyond max_held and one prefetch count, or worker_eta_task_limit, the broker keeps the jobs."""
    lab = rabbitmq_lab
    send(lab, "job", *range(60), to=quorum)
    bound = limit(rate=1e-3, max_held=max_held)
    settings = {"worker_eta_task_limit": eta_limit}
    with start(lab, queues=(quorum,), limits=(bound,), **settings) as worker:
        wait_for(lambda: held(lab, worker) > most - WINDOW)
        time.sleep(0.5)
        assert held(lab, worker) <= most
        assert waiting(lab, quorum[0]) >= 60 - 1 - most


def test_jobs_with_an_eta_take_up_no_count(rabbitmq_lab, quorum):
    """Jobs that wait in the worker for their ETA are passed, and run when it has come."""
    lab = rabbitmq_lab
    with start(lab, queues=(quorum,), limits=(limit(rate=100),)):
        began = time.monotonic()
        send(lab, "job", *range(3 * WINDOW), to=quorum, countdown=4)
        send(lab, "other", *range(20), to=quorum)
        lab.wait_for_runs("other", 20)
        assert time.monotonic() < began + 4
        assert sorted(lab.wait_for_runs("job", 3 * WINDOW)) == list(range(3 * WINDOW))
    assert lab.log("job")[0].at >= began + 4


def test_a_queue_can_be_cancelled_and_added(rabbitmq_lab, quorum):
    """control.cancel_consumer stops all, add_consumer takes it up, with 40 jobs held on many consumers."""
    lab, name = rabbitmq_lab, quorum[0]
    send(lab, "job", *range(40), to=quorum)
    with start(lab, queues=(quorum,), limits=(limit(rate=4),)) as worker:
        wait_for(lambda: len(lab.log("job")) + held(lab, worker) == 40)
        lab.app.control.cancel_consumer(name, destination=[worker.node], reply=True)
        wait_for(lambda: lab.inspect(worker, "active_queues") == [])
        send(lab, "other", *range(20), to=quorum)
        seen = len(lab.runs("job"))
        lab.wait_for_runs("job", seen + 4)  # what is held goes on
        assert lab.runs("other") == []
        lab.app.control.add_consumer(name, destination=[worker.node], reply=True)
        lab.wait_for_runs("other", 20)
        send(lab, "job", *range(40, 70), to=quorum)
        send(lab, "other", *range(20, 40), to=quorum)
        lab.wait_for_runs("other", 40)
        assert len(lab.runs("job")) < 60
        assert lab.runs("job") == list(range(len(lab.runs("job"))))


def test_jobs_of_cancelled_consumers_come_back_with_the_connection(rabbitmq_lab, quorum, request):
    """A connection is lost that has many cancelled consumers: each job comes back and runs once."""
    lab = rabbitmq_lab
    send(lab, "job", *range(60), to=quorum)
    with start(
        lab, queues=(quorum,), limits=(limit(rate=0.01, max_held=60),), pool="prefork"
    ) as worker:
        wait_for(lambda: len(lab.log("job")) + held(lab, worker) >= 60)
        assert held(lab, worker) > 2 * WINDOW
        break_connections(lab, request)
        wait_for(lambda: "held jobs back to the broker" in worker.output)
        control(lab, worker, "limit", name="job", rate="20/s")
        wait_for(lambda: set(lab.runs("job")) == set(range(60)))
        send(lab, "other", *range(20), to=quorum)
        lab.wait_for_runs("other", 20)
    # The acknowledgement of a job that was running may have been under way.
    assert len(lab.runs("job")) <= 60 + 2
    lab.assert_bound("job", capacity=1, rate=20)


def test_a_single_active_consumer_is_left_alone(rabbitmq_lab):
    """Another worker would become it: one line says that jobs wait, and all run in order."""
    lab = rabbitmq_lab
    queue = queue_of(lab, "alone", {"queue_arguments": ALONE})
    send(lab, "job", *range(30), to=queue)
    send(lab, "other", *range(3), to=queue)
    with start(lab, queues=(queue,), limits=(limit(rate=20),)) as one:
        with start(lab, queues=(queue,), limits=(limit(rate=20),)) as two:
            lab.wait_for_runs("other", 3)
            assert lab.wait_for_runs("job", 30) == list(range(30))
            assert set(lab.runs("job by")) == {one.node}
        assert one.output.count("is not consumed anew") == 1
        assert "single active consumer" in one.output
        assert "is not consumed anew" not in two.output


def test_auto_delete_queues_survive(rabbitmq_lab, quorum):
    """A queue that goes with its last consumer is consumed by the next before that is cancelled."""
    lab = rabbitmq_lab
    passing = queue_of(lab, "passing", {"auto_delete": True})
    with start(lab, queues=(quorum, passing), limits=(limit(rate=4),)) as worker:
        send(lab, "job", *range(40), to=passing)
        send(lab, "other", *range(20), to=passing)
        lab.wait_for_runs("other", 20)
        assert len(lab.runs("job")) < 30
        wait_for(lambda: len(lab.log("job")) + held(lab, worker) == 40)
        assert lab.runs("job") == list(range(len(lab.runs("job"))))


def test_a_pause_keeps_the_order(rabbitmq_lab, quorum):
    """overflow="pause" cancels a consumer only when nothing is on its way to it."""
    lab = rabbitmq_lab
    bound = limit("queue", 5, 100, queue=quorum[0], max_held=5, overflow="pause")
    send(lab, "job", *range(300), to=quorum)
    with start(
        lab, concurrency=1, queues=(quorum,), limits=(bound,), worker_prefetch_multiplier=20
    ) as worker:
        assert lab.wait_for_runs("job", 300) == list(range(300))
        assert worker.output.count("Resumed queue") >= 3
    assert len(lab.runs("job")) == 300
