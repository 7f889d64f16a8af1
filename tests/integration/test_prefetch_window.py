"""The prefetch count over held jobs, and the order in which a worker gives jobs back."""

import json
import time

import pytest
import redis
from celery.contrib.testing.app import setup_default_app
from celery.contrib.testing.worker import start_worker
from harness import app_here, wait_for
from limits import SHORT_LEASE, break_connections, held, limit, start, unacknowledged, waiting

from rate_limiter import BucketPerKey
from rate_limiter.broker.redis_channel import stop_reading
from rate_limiter.broker.relay import Relay
from rate_limiter.broker.restore import give_back_at_once, requeue
from rate_limiter.celery import Gate
from rate_limiter.kombu.window import Window

#: Nothing of it comes back while a test runs.
ONCE = limit("job", 1, 1e-4, max_held=50)


def hold(lab, worker, numbers) -> None:
    """Send limited jobs, of which the first runs, and wait until the others are held."""
    for number in numbers:
        lab.send("job", number)
    wait_for(lambda: held(lab, worker, "job") == len(numbers) - 1)


def numbers_in(lab) -> list[int]:
    """Return what the jobs in a queue on Redis are to note, first to be given out first."""
    with redis.Redis.from_url(lab.settings["broker_url"]) as client:
        messages = client.lrange(lab.settings["task_default_queue"], 0, -1)
    return [int(json.loads(m)["headers"]["argsrepr"].strip("(),")) for m in reversed(messages)]


@pytest.mark.parametrize("held", [0, 1, 3])
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_few_held_jobs_reserve_no_others(lab, pool, held):
    """A worker that holds few jobs reserves what it would without them, and not one more."""
    options = {"worker_prefetch_multiplier": 1, "task_acks_late": True}
    with start(lab, pool=pool, concurrency=4, limits=(ONCE,), **options) as worker:
        if held:
            hold(lab, worker, range(held + 1))
        for _ in range(20):
            lab.send("busy", 60)
        lab.wait_for_runs("concurrency", 4)
        time.sleep(1)  # for one more to be given out
        assert waiting(lab) == 20 - 4


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_jobs_go_back_in_order(redis_lab, pool):
    """Redis: what a warm shutdown gives back, limited or not, stands in its queue as it did before."""
    lab = redis_lab
    with start(lab, pool=pool, limits=(ONCE,), worker_prefetch_multiplier=8) as worker:
        lab.send("job", -1)
        lab.wait_for_runs("job", 1)
        if pool == "prefork":  # the others begin all jobs at once
            lab.send("busy", 3)
            lab.send("busy", 3)
            lab.wait_for_runs("concurrency", 2)
        for number in range(20):
            lab.send("other" if number % 2 else "job", number)
        others = [] if pool == "prefork" else list(range(1, 20, 2))
        wait_for(lambda: held(lab, worker, "job") == 10)
        wait_for(lambda: waiting(lab) == 0)  # the last one is no held one
        lab.wait_for_runs("other", len(others))
        worker.stop()
    assert sorted(lab.runs("other")) == others
    assert numbers_in(lab) == [number for number in range(20) if number not in others]
    assert unacknowledged(lab) == 0


def test_jobs_go_back_in_order_with_the_connection(redis_lab):
    """Redis: so they do when the connection breaks, and they run in order afterwards."""
    lab = redis_lab
    slow = limit("job", 1, 3)
    with start(lab, limits=(slow,), broker_transport_options=SHORT_LEASE) as worker:
        for number in range(12):
            lab.send("job", number)
        wait_for(lambda: len(lab.log("job")) >= 3)
        break_connections(lab, None)
        wait_for(lambda: "held jobs back to the broker" in worker.output)
        lab.wait_for_runs("job", 12)
    assert lab.runs("job") == list(range(12))


def test_jobs_for_another_worker_go_back_to_their_place(broker):
    """What is given back while the worker runs goes before what waits in the queue, in order."""
    queue = broker.queue()
    broker.send(queue, *range(6))
    with broker.connection() as connection:
        bound = queue(connection.default_channel)
        messages = [bound.get() for _ in range(4)]
        for message in reversed(messages[1:]):
            requeue(message)
        assert [bound.get().payload for _ in range(5)] == [1, 2, 3, 4, 5]


def test_a_job_that_was_moved_stays_with_the_worker_that_has_it(redis_broker):
    """Redis: it keeps its delivery tag, and the worker that moved it as its last one gives nothing of it back."""
    queue, lane = redis_broker.queue(), redis_broker.queue()
    redis_broker.send(queue, 0)
    with redis_broker.connection() as mine, redis_broker.connection() as other:
        message = queue(mine.default_channel).get()
        Relay(lambda _job: None, lambda _job: None, None).send(0, message, lane.name, as_it_came=True)
        assert lane(other.default_channel).get().delivery_tag == message.delivery_tag
        give_back_at_once(mine.default_channel, lambda _tag: True)
        assert redis_broker.waiting(queue) == redis_broker.waiting(lane) == 0
        assert redis_broker.unacknowledged()


def lower(channel) -> None:
    """Lower the prefetch count to what is in hand."""
    channel.basic_qos(0, 1, False)


@pytest.mark.parametrize("stop", [lower, stop_reading])
def test_a_message_on_its_way_comes_though_no_more_are_wanted(redis_broker, stop):
    """Redis has given it out, and nobody else would get it if the worker were killed; no other one comes."""
    queue, came = redis_broker.queue(), []
    with redis_broker.connection() as connection:
        channel = connection.default_channel
        window, consumer = Window(channel, static=False), connection.Consumer([queue], prefetch_count=2)
        window.add(consumer)
        consumer.register_callback(lambda body, _message: came.append(body))
        consumer.consume()
        redis_broker.send(queue, 0)
        connection.drain_events(timeout=5)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.05)  # it has asked for the next one
        stop(channel)
        redis_broker.send(queue, 1, 2)
        connection.drain_events(timeout=5)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.2)
        assert came == [0, 1]
        assert redis_broker.waiting(queue) == 1


def test_memory_gets_held_jobs_back():
    """memory://: kombu puts nothing back there; held jobs, of several buckets too, wait for the next worker."""
    app = app_here()
    gate, ran = Gate(app), []

    @app.task(name="job")
    def job(number):
        ran.append(number)

    gate.limit("job", bucket=BucketPerKey(1, 1e-4), key=lambda number: number % 2)
    with setup_default_app(app, use_trap=False):
        for number in range(6):
            app.send_task("job", [number])
        with start_worker(app, perform_ping_check=False) as worker:
            step = next(step for step in worker.consumer.steps if step.alias == "Gate")
            wait_for(lambda: step.info(worker.consumer)["rate_limiter"]["held"] == {"job": 4})
        with app.connection_for_read() as connection:
            channel = connection.default_channel
            back = [
                channel.message_to_python(channel.basic_get(app.conf.task_default_queue))
                for _ in range(4)
            ]
    assert ran == [0, 1]
    assert [message.payload[0] for message in back] == [[2], [3], [4], [5]]
    app.close()
