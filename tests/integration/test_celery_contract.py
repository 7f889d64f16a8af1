"""What the gate relies on inside Celery and kombu, checked against a worker in this process.

Where one of these fails with a new Celery, the gate needs a change.
"""

import contextlib
import functools
import inspect
import os
import queue
import threading
import time
from types import SimpleNamespace

import celery.concurrency
import pytest
from billiard.einfo import ExceptionInfo
from celery import bootsteps
from celery._state import _set_task_join_will_block
from celery.app.task import Context
from celery.contrib.testing.app import setup_default_app
from celery.contrib.testing.worker import start_worker
from celery.exceptions import ImproperlyConfigured
from celery.utils.dispatch import Signal
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.consumer.tasks import Tasks
from celery.worker.request import Request
from harness import DEADLINE, app_here, wait_for
from kombu.asynchronous import Hub, set_event_loop
from kombu.common import QoS

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate
from rate_limiter.celery.slots import _ThreadsLine


class Probe:
    """What a step that stands where the gate's does has seen; it can hold jobs."""

    def __init__(self):
        self.hold, self.seen, self.held, self.life, self.drained = False, [], [], [], 0
        self.bodies = []

    def on_task_request(self, request):  # noqa: D102
        self.seen.append(request)
        if self.hold:
            self.held.append(request)
        else:
            self.forward(request)

    def held_job(self, task, *args, **options):
        """Send a job, and return its result and its request, which waits here."""
        self.hold = True
        result = task.apply_async(args, **options)
        wait_for(lambda: self.held)
        return result, self.held.pop()

    def call(self, function, *args):
        """Call something on the consumer's thread, and return what it returns."""
        done = []
        self.consumer.call_soon(lambda: done.append((function(*args), threading.get_ident())))
        (value, thread) = wait_for(lambda: done)[0]
        assert thread == self.thread
        return value


@pytest.fixture(autouse=True)
def _forget_the_worker():
    yield
    # What a worker that ran in this process leaves behind: the next one would take over its event loop,
    # with a timer of its own that nobody else adds to.
    _set_task_join_will_block(False)
    set_event_loop(None)


@pytest.fixture(params=["memory-solo", "memory-threads", "redis-threads"])
def probe(request):
    """Yield the probe in a worker that runs."""
    broker, pool = request.param.split("-")
    url = request.getfixturevalue("redis_url")() if broker == "redis" else "memory://"
    app, probe = app_here(url), Probe()

    class Step(bootsteps.StartStopStep):
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def __init__(self, consumer, **kwargs):
            super().__init__(consumer, **kwargs)
            probe.life.append("init")
            probe.consumer = consumer
            probe.forward = consumer.on_task_request
            consumer.on_task_request = probe.on_task_request
            run = probe.native.run

            def wrapped():
                probe.bodies.append(probe.native.request.id)
                return run()

            probe.native.run = wrapped

        def start(self, consumer):
            probe.life.append("start")
            probe.thread = threading.get_ident()
            # nothing wakes an event loop that another thread calls (kombu/asynchronous/hub.py)
            consumer.timer.call_repeatedly(0.05, lambda: None)
            channel = consumer.task_consumer.channel
            channel.basic_consume = functools.partial(mark_each, channel.basic_consume)
            if consumer.hub is None:
                drain = consumer.connection.drain_events

                def drain_events(timeout=None):
                    probe.drained += 1
                    return drain(timeout=min(timeout or 0.1, 0.1))

                consumer.connection.drain_events = drain_events

        def stop(self, consumer):
            probe.life.append("stop")

        def shutdown(self, consumer):
            probe.life.append("shutdown")

        def info(self, consumer):
            return {"probe": "told"}

    app.steps["consumer"].add(Step)

    @app.task(name="echo", bind=True, shared=False)
    def echo(self, *args, **kwargs):
        return [list(args), kwargs, self.request.__dict__.get("rate_limiter_receipt")]

    @app.task(name="native", rate_limit="100/s", shared=False)
    def native(): ...

    probe.app, probe.echo, probe.native = app, echo, native
    with (
        setup_default_app(app, use_trap=False),
        start_worker(app, pool=pool, concurrency=2, perform_ping_check=False) as probe.worker,
    ):
        yield probe
    app.close()
    assert probe.life == ["init", "start", "stop", "shutdown"]


def mark_each(consume, queue, no_ack=False, consumer_tag="", callback=None, **kwargs):
    def marked(message):
        message.delivery_info["mark"] = queue
        return callback(message)

    return consume(queue=queue, no_ack=no_ack, consumer_tag=consumer_tag, callback=marked, **kwargs)


def test_every_way_to_the_pool_is_on_task_request(probe):
    """A message, an ETA that has come and Celery's own limit all end in consumer.on_task_request."""
    results = [probe.echo.apply_async(countdown=0.3), probe.echo.delay(), probe.native.delay()]
    wait_for(lambda: all(result.ready() for result in results))
    assert {request.id for request in probe.seen} == {result.id for result in results}
    if probe.consumer.hub is None:
        assert probe.drained  # the loop looks drain_events up on the connection
    assert probe.worker.stats()["probe"] == "told"


def test_a_task_can_be_wrapped_while_the_consumer_is_made(probe):
    """task.run that is replaced in a step's constructor is what runs."""
    result = probe.native.delay()
    wait_for(result.ready)
    assert probe.bodies == [result.id]
    assert getattr(probe.consumer.controller, "pool_start_method", "fork") == "fork"
    assert probe.consumer.pool is probe.worker.pool


def test_a_job_with_an_eta_is_known_while_it_waits(probe):
    """state.scheduled_requests has it until its ETA; where Celery has no such thing, the gate looks often."""
    if not hasattr(state, "scheduled_requests"):
        assert celery.VERSION < (5, 6)
        return
    result = probe.echo.apply_async(countdown=0.5)
    wait_for(lambda: [request for request in state.scheduled_requests if request.id == result.id])
    wait_for(result.ready)
    assert not state.scheduled_requests


def test_a_job_with_an_eta_is_in_the_timer(probe):
    """Its request is the first argument of an entry of the timer's queue, until its ETA."""

    def scheduled():
        arguments = [item.entry.args for item in list(probe.consumer.timer.queue)]
        return [each[0].id for each in arguments if each and isinstance(each[0], Request)]

    result = probe.echo.apply_async(countdown=0.5)
    wait_for(lambda: scheduled() == [result.id])
    wait_for(result.ready)
    assert scheduled() == []


def test_the_prefetch_count_after_a_connection_loss(probe):
    """The handler of messages asks the consumer how to restore it; a request tells when it is answered."""
    consumer, asked, answered = probe.consumer, [], []
    assert consumer.prefetch_multiplier == 4
    assert consumer.max_prefetch_count == 4 * consumer.pool.num_processes
    assert callable(consumer._restore_prefetch_count_after_connection_restart)
    consumer._restore_prefetch_count_after_connection_restart = asked.append
    _, request = probe.held_job(probe.echo)
    assert request.on_ack.on_error == request.on_reject.on_error == asked.append
    for answer in request.on_ack, request.on_reject:
        answer.then(lambda *_: answered.append(True))
    probe.call(request.acknowledge)
    wait_for(lambda: answered)
    assert answered == [True]
    assert asked == []


def test_what_a_request_holds(probe):
    """Decoded arguments, headers, delivery; it counts as reserved; what is put into it gets to the task."""
    result, request = probe.held_job(
        probe.echo, 1, kwargs={"key": "value"}, headers={"weight": 3}, countdown=0
    )
    assert (list(request.args), request.kwargs) == ([1], {"key": "value"})
    assert (request.id, request.name) == (result.id, "echo")
    assert request.type == "echo" or request.type.name == "echo"
    assert request.task is probe.app.tasks["echo"]
    assert request.message.delivery_tag
    assert request.message.delivery_info["mark"] == probe.app.conf.task_default_queue
    assert not request.message.acknowledged
    assert request in state.reserved_requests
    assert state.requests[request.id] is request
    assert Context(request.request_dict).headers["weight"] == 3
    assert request._context.retries == 0
    assert request.revoked() is False
    request.request_dict["rate_limiter_receipt"] = "secret"
    probe.consumer.call_soon(probe.forward, request)
    assert result.get(timeout=20) == [[1], {"key": "value"}, "secret"]


def fail(request):
    try:
        raise ValueError("at the gate")
    except ValueError:
        request.on_failure(ExceptionInfo(internal=True))
    request.acknowledge()


def announce(request):
    request._announce_revoked("a reason", False, None, False)


def revoke(request):
    state.revoked.add(request.id)
    assert request.revoked()


def put_aside(request):
    state.task_ready(request)
    request.acknowledge()


@pytest.mark.parametrize(
    ("end", "becomes"),
    [(fail, "FAILURE"), (announce, "REVOKED"), (revoke, "REVOKED"), (put_aside, "PENDING")],
)
def test_a_request_can_be_ended(probe, end, becomes):
    """Celery stores the result, acknowledges the message, and forgets the request."""
    result, request = probe.held_job(probe.echo)
    probe.call(end, request)
    assert result.state == becomes
    wait_for(lambda: request.message.acknowledged)  # the event loop does it next
    assert request not in state.reserved_requests
    assert request.id not in state.requests


def test_the_prefetch_count(probe):
    """It starts at initial_prefetch_count; increments are clamped, decrements reach the broker."""
    consumer = probe.consumer
    count = consumer.initial_prefetch_count
    assert count == 2 * 4
    assert consumer.qos.value == consumer.qos.prev == count
    assert consumer._maximum_prefetch_restored is True
    (tasks,) = [step for step in consumer.steps if isinstance(step, Tasks)]
    assert tasks.qos_global(consumer) in (True, False)
    assert probe.call(consumer.qos.increment_eventually, 3) == count + 3
    probe.call(consumer.qos.update)
    assert consumer.qos.prev == consumer.qos.value == count + 3
    assert probe.call(consumer.qos.decrement_eventually, 3) == count
    if "max_prefetch" in inspect.signature(QoS).parameters:  # from kombu 5.6 on
        limited = QoS(lambda **_: None, 8, max_prefetch=10)
        limited.increment_eventually(9)
        assert limited.value == 10


def test_what_the_event_loop_calls_soon_may_raise():
    """A timer's error is logged, and no more; that of hub.call_soon ends the loop."""
    hub = Hub()

    def fail():
        raise LookupError

    hub.timer.call_after(0, fail)
    hub.timer.call_after(60, fail)
    assert hub.fire_timers() > 1
    hub.call_soon(fail)
    with pytest.raises(LookupError):
        next(hub.create_loop())
    hub.close()


def test_timers_and_calls(probe):
    """timer.call_at counts by the monotonic clock; call_soon runs on the consumer's thread."""
    consumer, fired, repeats = probe.consumer, [], []
    due = time.monotonic() + 0.3
    probe.call(
        consumer.timer.call_at, due, lambda: fired.append((time.monotonic(), threading.get_ident()))
    )
    repeated = probe.call(consumer.timer.call_repeatedly, 0.05, lambda: repeats.append(1))
    cancelled = probe.call(
        consumer.timer.call_at, time.monotonic() + 0.3, lambda: fired.append("cancelled")
    )
    probe.call(consumer.timer.cancel, cancelled)
    wait_for(lambda: fired)
    wait_for(lambda: len(repeats) > 2)
    probe.call(consumer.timer.cancel, repeated)
    time.sleep(0.3)
    ((at, thread),) = fired
    assert at >= due - 0.01
    assert (thread == probe.thread) is (consumer.hub is not None)
    assert consumer.blueprint.state == bootsteps.RUN
    assert consumer.pool.is_green in (True, False)
    assert callable(consumer.perform_pending_operations)
    state.maybe_shutdown()


def test_a_queue_can_be_cancelled_and_added(probe):
    """task_consumer stops consuming a queue, and takes it up again."""
    name, tasks = probe.app.conf.task_default_queue, probe.consumer.task_consumer
    assert name in probe.app.amqp.queues.consume_from
    (queue,) = [queue for queue in tasks.queues if queue.name == name]
    assert tasks._active_tags[name]
    assert callable(tasks._basic_consume)
    assert tasks.consuming_from(name)
    probe.call(tasks.cancel_by_queue, name)
    assert not tasks.consuming_from(name)
    result = probe.echo.delay()
    probe.call(tasks.add_queue, queue)
    probe.call(tasks.consume)
    assert result.get(timeout=20)
    assert tasks.consuming_from(name)


def test_what_is_a_redis_channel(probe):
    """Redis: the channel keeps the time of each delivery in a sorted set, by its tag."""
    channel = probe.consumer.task_consumer.channel
    driver = probe.consumer.connection.transport.driver_type
    assert driver == probe.consumer.conninfo.transport.driver_type
    assert hasattr(channel, "unacked_index_key") is (driver == "redis")
    if driver != "redis":
        return
    before = time.time()
    _, request = probe.held_job(probe.echo)
    assert channel.visibility_timeout == 3600
    lease = channel.unacked_index_key, request.message.delivery_tag
    with channel.conn_or_acquire() as client:
        assert before - 1 <= client.zscore(*lease) <= time.time()
        client.zadd(lease[0], {lease[1]: 1, "no such tag": 1}, xx=True)
        assert client.zscore(*lease) == 1
        assert client.zscore(lease[0], "no such tag") is None
        probe.call(request.acknowledge)
        wait_for(lambda: client.zscore(*lease) is None)


class WithoutHook(Consumer):
    """A consumer of some Celery to come."""

    on_task_request = property(lambda _: None, lambda *_: None)


def test_a_request_can_be_told_of_its_start(probe):
    """What request.on_accepted is replaced by is called when the job starts; then it is active."""
    _, request = probe.held_job(probe.echo)
    told = []

    def accept(*args):
        del request.on_accepted
        request.on_accepted(*args)
        told.append((request in state.reserved_requests, request in state.active_requests))

    request.on_accepted = accept
    assert request not in state.active_requests
    probe.call(probe.forward, request)
    wait_for(lambda: told)
    assert told == [(True, True)]


def test_where_jobs_wait_for_a_slot_of_a_prefork_pool():
    """In the deque of the worker's semaphore, as (callback, (request,), {})."""
    app = app_here("redis://")
    worker = app.WorkController(pool="prefork", concurrency=2)
    assert worker.consumer.on_task_request == worker._process_task_sem
    assert worker.pool_putlocks
    waiting, ran = worker.semaphore._waiting, []
    worker._process_task = ran.append
    for request in "abcd":
        worker.consumer.on_task_request(request)
    assert ran == ["a", "b"]
    assert [entry[1] for entry in waiting] == [("c",), ("d",)]
    waiting.rotate()
    worker._quick_release()
    assert ran == ["a", "b", "d"]
    worker.semaphore.clear()
    assert worker.semaphore._waiting is waiting
    app.close()


def test_where_jobs_wait_for_a_slot_of_a_threads_pool():
    """In a SimpleQueue of the executor, which has no thread yet; a job's future can be cancelled."""
    pool = celery.concurrency.get_implementation("threads")(1)
    executor = pool.executor
    assert type(executor._work_queue) is queue.SimpleQueue
    assert not executor._threads
    executor._work_queue = line = _ThreadsLine()
    ran, began, go = [], threading.Event(), threading.Event()
    pool.start()
    pool.on_apply(lambda: (began.set(), go.wait()), ())
    assert began.wait(DEADLINE)  # else the thread takes "A" first
    futures = {
        name: line.forward(lambda name: pool.on_apply(ran.append, (name,)), name, name.isupper())
        for name in "abAcBd"
    }
    assert futures["c"].cancel()
    assert futures["B"].cancel()
    assert line.qsize() == 6
    go.set()
    wait_for(lambda: len(ran) == 4)
    assert ran == ["A", "a", "b", "d"]
    assert line.empty()
    pool.stop()
    assert not any(thread.is_alive() for thread in executor._threads)


def test_without_the_hook_the_worker_does_not_start():
    """No consumer.on_task_request: the gate cannot attach, and no worker runs without its limits."""
    app = app_here()
    app.conf.worker_consumer = f"{__name__}:WithoutHook"
    Gate(app).limit("echo", bucket=TokenBucket(1, 1))
    with pytest.raises(ImproperlyConfigured, match="no consumer.on_task_request"):
        app.WorkController(pool="solo")
    app.close()


@pytest.mark.parametrize(("autoscale", "most"), [(None, None), ("3,1", 3)])
def test_what_a_worker_tells_of_its_pool(autoscale, most):
    """The check of buckets per child reads these before the pool forks."""
    told = []

    class Step(bootsteps.Step):
        def create(self, worker):
            told.append((worker.concurrency, worker.max_concurrency, worker.pool_cls.__name__))

    app = app_here()
    app.steps["worker"].add(Step)
    app.WorkController(pool="prefork", concurrency=2, autoscale=autoscale)
    assert told[0][1:] == (most, "TaskPool") or (most is None and told[0] == (2, 0, "TaskPool"))
    app.close()


def test_gossip_brings_events_of_other_workers(redis_url):
    """What gossip.update_state is replaced by gets them, ours too; Celery's own state takes those."""
    app = app_here(redis_url())
    consumer = app.WorkController(pool="solo").consumer
    gossip, told = consumer.gossip, []
    update, gossip.update_state = gossip.update_state, lambda event: told.append((event, update(event)))
    now = time.time()
    event = {"type": "worker-held", "hostname": "other", "timestamp": now, "local_received": now}
    event |= {"limits": {"emails": 5}, "asks": True}
    message = SimpleNamespace(
        delivery_info={"routing_key": "worker.held"}, headers={"hostname": "other"}, payload=event
    )
    gossip.on_message(lambda payload: (None, payload), message)
    assert told[0][0]["limits"] == {"emails": 5}
    assert [worker.hostname for worker in gossip.state.alive_workers()] == ["other"]
    app.close()


def test_gossip_hands_what_it_gets_to_on_message(redis_url):
    """Each event, also the worker's own, which it would pass over; and what stands in for the method."""
    app = app_here(redis_url())
    gossip, told = app.WorkController(pool="solo").consumer.gossip, []
    assert gossip.enabled
    gossip.on_message = lambda prepare, message: told.append(message.payload)
    with app.connection() as connection:
        (consumer,) = gossip.get_consumers(connection.default_channel)
        consumer.consume()
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0.5)  # on Redis it subscribes only now
        for name in gossip.hostname, "other":
            app.events.Dispatcher(connection, hostname=name).send("worker-heartbeat", freq=2.0)
        while len(told) < 2:
            connection.drain_events(timeout=5)
    assert [event["hostname"] for event in told] == [gossip.hostname, "other"]
    assert {(event["type"], event["pid"], event["freq"]) for event in told} == {
        ("worker-heartbeat", os.getpid(), 2.0)
    }
    app.close()


def test_what_a_step_is_told_of_the_command_line():
    """Whether the worker listens and is heard, and how often it sends heartbeats."""
    told = []

    class Step(bootsteps.Step):
        requires = ("celery.worker.consumer.gossip:Gossip",)

        def __init__(self, consumer, **options):
            told.append((consumer.gossip.enabled, options))

    app = app_here("redis://")
    app.steps["consumer"].add(Step)
    options = {"without_heartbeat": True, "heartbeat_interval": 7.0}
    app.WorkController(pool="solo", without_gossip=True, **options)
    app.WorkController(pool="solo")
    assert told[0][0] is False
    assert told[0][1] == told[0][1] | options | {"without_gossip": True}
    assert told[1][0] is True
    app.close()


def test_gossip_that_is_off_has_no_state():
    """On brokers that have none, and with --without-gossip."""
    app = app_here()
    assert not hasattr(app.WorkController(pool="solo").consumer.gossip, "update_state")
    app.close()


def test_the_receivers_of_a_signal():
    """A signal can be asked for the receivers that are to be called for a sender."""

    def receive(**_): ...

    one, other = Signal(), Signal()
    one.connect(receive, sender="job")
    assert (one._live_receivers("job"), one._live_receivers("other")) == ([receive], [])
    assert other._live_receivers("job") == []
