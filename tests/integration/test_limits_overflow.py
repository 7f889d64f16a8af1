"""How much a worker holds, what becomes of the rest, and where the prefetch window ends up."""

import re
import time

from harness import Worker, wait_for
from limits import (
    SHORT_LEASE,
    break_connections,
    declare,
    limit,
    repeated,
    start,
    stats,
    wait_until_idle,
    waiting,
)

#: The prefetch count of a worker with two slots.
WINDOW = 8

SLOTS = 2

#: Celery 5.7 leaves the count alone on Redis.
REDUCED = "Temporarily reducing the prefetch count|Skipping prefetch count reduction"


def most_held(lab, worker: Worker, count: int, total: int, most: int) -> tuple[int, int]:
    """Ask until ``count`` jobs have run; return the most that was held, and the highest prefetch count."""
    held = prefetch = 0
    while len(lab.log("job")) < count:
        now = stats(lab, worker)
        held = max(held, now["rate_limiter"]["held"].get("job", 0))
        prefetch = max(prefetch, now["prefetch_count"])
        left = waiting(lab)
        given_out = total - left - len(lab.log("job"))
        assert given_out <= most + SLOTS  # jobs that were acknowledged, and have not noted their run
        time.sleep(0.1)
    return held, prefetch


def test_the_broker_keeps_what_is_beyond_the_bound(lab):
    """A worker holds max_held jobs, and a window; the broker has the rest."""
    for number in range(90):
        lab.send("job", number)
    with start(lab, limits=(limit("job", 1, 10, max_held=5),)) as worker:
        held, prefetch = most_held(lab, worker, 15, 90, 5 + WINDOW)
    assert 5 <= held <= 5 + WINDOW
    assert prefetch <= 5 + WINDOW
    lab.assert_bound("job", capacity=1, rate=10)


def test_a_limit_in_the_way_of_others_says_what_would_help(redis_lab):
    """After 10 s beyond its bound, once; not if the user has chosen, nor if it could not be parked."""
    lab = redis_lab
    held = {"rate": 2, "max_held": 4}
    limits = (
        limit(**held),
        limit("other", **held, overflow="hold"),
        limit("total", **held, max_wait=9e9),
    )
    for number in range(40):
        for task in "job", "other", "total":
            lab.send(task, number)
    with start(lab, limits=limits) as worker:
        wait_for(lambda: "jobs are held, more wait in the queue" in worker.output)
        lab.wait_for_runs("job", len(lab.runs("job")) + 5)
    (told,) = re.findall(r"Limit (\w+): (?:\d+) jobs are held, more wait", worker.output)
    assert told == "job"


def test_two_workers_share_the_backlog_of_a_paused_queue(lab):
    """overflow="pause": no worker hoards, both run at their rate, and each job runs once."""
    queue = lab.settings["task_default_queue"]
    bound = limit("queue", 1, 10, queue=queue, max_held=10, overflow="pause")
    with start(lab, limits=(bound,)) as one, start(lab, limits=(bound,)) as other:
        for number in range(50):
            lab.send("job", number)
        lab.wait_for_runs("job", 50)
        shares = [lab.runs("job by").count(worker.node) for worker in (one, other)]
        for worker in one, other:
            wait_until_idle(lab, worker, WINDOW)
            assert f"Paused queue {queue}" in worker.output
            assert f"Resumed queue {queue}" in worker.output
    assert sorted(lab.runs("job")) == list(range(50))
    assert min(shares) >= 10


def test_quorum_queues_are_paused(rabbitmq_lab):
    """While a quorum queue is paused, other queues are consumed; its jobs run in order."""
    lab, name = rabbitmq_lab, rabbitmq_lab.settings["task_default_queue"]
    exchange = f"{name}-jobs"
    queues = tuple(
        (f"{name}-{key}", exchange, "topic", f"{name}.{key}", True) for key in ("slow", "fast")
    )
    declare(lab, *queues)
    (slow, *_), (fast, *_) = queues
    for number in range(40):
        lab.send("job", number, exchange=exchange, routing_key=f"{name}.slow")
    bound = limit("queue", 1, 20, queue=slow, max_held=4, overflow="pause")
    with start(lab, concurrency=1, queues=queues, limits=(bound,)) as worker:
        wait_for(lambda: f"Paused queue {slow}" in worker.output)
        for number in range(20):
            lab.send("other", number, exchange=exchange, routing_key=f"{name}.fast")
        lab.wait_for_runs("other", 20)
        assert len(lab.runs("job")) < 40
        assert lab.wait_for_runs("job", 40) == list(range(40))
        wait_until_idle(lab, worker, WINDOW // 2)
    assert f"Paused queue {fast}" not in worker.output
    lab.assert_bound("queue", capacity=1, rate=20)


def send_jobs(lab, first: int, count: int, **options) -> None:
    for number in range(first, first + count):
        lab.send("job", number, **options)


def test_the_window_under_worker_eta_task_limit(lab):
    """worker_eta_task_limit clamps the window's rise, not its way back."""
    with start(lab, limits=(limit(rate=30),), worker_eta_task_limit=10) as worker:
        send_jobs(lab, 0, 50)  # an ETA lets Celery's own count sink here
        lab.wait_for_runs("job", 50)
        wait_until_idle(lab, worker, WINDOW)
        assert stats(lab, worker)["prefetch_count"] == WINDOW
    assert sorted(lab.runs("job")) == list(range(50))
    lab.assert_bound("job", capacity=1, rate=30)


def test_the_window_after_a_reduced_prefetch_count(lab, request):
    """A reconnect while a job runs cuts the count; it is restored, and then what it was before."""
    with start(lab, limits=(limit(rate=20),), pool="prefork") as worker:
        done = lab.folder / "done"
        lab.send("busy", 60, str(done))
        lab.wait_for_runs("concurrency", 1)
        send_jobs(lab, 0, 40)
        lab.wait_for_runs("job", 5)
        break_connections(lab, request)
        wait_for(lambda: re.search(REDUCED, worker.output))
        done.touch()
        send_jobs(lab, 40, 20)  # rabbitmqctl takes seconds: the first ones may have ended before
        wait_for(lambda: set(lab.runs("job")) == set(range(60)))
        if "Temporarily" in worker.output:
            wait_for(lambda: "Prefetch count has been restored" in worker.output)
        send_jobs(lab, 60, 20)
        wait_for(lambda: set(lab.runs("job")) == set(range(80)))
        wait_until_idle(lab, worker, WINDOW)
    lab.assert_bound("job", capacity=1, rate=20)


def test_a_pool_that_grows_and_shrinks(redis_lab):
    """--autoscale: the limit holds, jobs run once, and the window comes back to where it was."""
    lab = redis_lab
    worker = start(
        lab,
        "--autoscale=4,1",
        pool="prefork",
        limits=(limit(rate=20),),
        environment={"AUTOSCALE_KEEPALIVE": "1"},
    )
    with worker:
        before = stats(lab, worker)["prefetch_count"]
        for _ in range(4):
            lab.send("busy", 1.5)
        send_jobs(lab, 0, 40)
        lab.wait_for_runs("job", 40)
        wait_for(lambda: "Scaling up" in worker.output and "Scaling down" in worker.output)
        wait_until_idle(lab, worker, before)
    assert sorted(lab.runs("job")) == list(range(40))
    lab.assert_bound("job", capacity=1, rate=20)


def test_a_pool_that_is_restarted(redis_lab):
    """control.pool_restart(): what is held runs in the new pool, once, at the limit."""
    lab = redis_lab
    with start(lab, pool="prefork", limits=(limit(rate=20),), worker_pool_restarts=True) as worker:
        send_jobs(lab, 0, 40)
        lab.wait_for_runs("job", 5)
        (reply,) = lab.app.control.pool_restart(destination=[worker.node], reply=True, timeout=20)
        assert "ok" in reply[worker.node]
        lab.wait_for_runs("job", 40)
        wait_until_idle(lab, worker, WINDOW)
    assert sorted(lab.runs("job")) == list(range(40))
    lab.assert_bound("job", capacity=1, rate=20)


def test_held_jobs_keep_their_lease(redis_lab):
    """Redis: what is held three times as long as visibility_timeout runs once."""
    lab = redis_lab
    with start(lab, pool="prefork", limits=(limit(rate=1),), broker_transport_options=SHORT_LEASE):
        send_jobs(lab, 0, 11)
        lab.wait_for_runs("job", 11)
        time.sleep(1.5)  # for a second run of one
    assert repeated(lab.runs("job")) == {}
    lab.assert_bound("job", capacity=1, rate=1)
