"""Parked jobs when a broker refuses, is lost, or is restarted, and when workers end or differ: none is lost."""

import contextlib
import re
import signal
import subprocess
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import redis
from celery.app.task import Context
from conftest import KEEPS_DATA, REDIS, answers
from harness import DEADLINE, wait_for
from lanes_lab import PARKED, is_redis, lanes, parked, place_in, run, send
from limits import (
    SHORT_LEASE,
    break_connections,
    control,
    declare,
    limit,
    repeated,
    unacknowledged,
    waiting,
)
from port_for import get_port

from rate_limiter.broker.lane import Lane, lane_entity
from rate_limiter.broker.relay import Relay
from rate_limiter.celery.outbox import Outbox
from rate_limiter.celery.parked import Parked


def test_parked_jobs_run_after_a_crash(place):
    """Workers are killed, nothing new arrives: the next worker runs what is parked."""
    lab, _ = place
    options = {"broker_transport_options": SHORT_LEASE} if is_redis(lab) else {}
    send(place, "job", *range(60))
    for _ in range(2):
        with run(place, **options) as worker:
            seen = len(lab.runs("job"))
            lab.wait_for_runs("job", seen + 4)
            wait_for(lambda: parked(place) > 20)
            worker.kill()
    with run(place, limits=(limit(rate=50, overflow="park"),), **options):
        wait_for(lambda: set(lab.runs("job")) == set(range(60)))
    assert sum(repeated(lab.runs("job")).values()) <= 4  # what the kills cut off


@pytest.mark.parametrize("lifted", [False, True], ids=["renamed", "lifted"])
@pytest.mark.parametrize("place", ["redis", "quorum"], indirect=True)
def test_lanes_of_limits_that_are_gone_are_adopted(place, lifted):
    """A limit has another name, none parks any more, or all are lifted: a worker that starts puts its jobs back."""
    lab, queue = place
    options = {"broker_transport_options": SHORT_LEASE} if is_redis(lab) else {}
    send(place, "job", *range(40))
    with run(place, limits=({**PARKED[0], "name": "old"},), **options) as worker:
        wait_for(lambda: lanes(place).get(f"{queue[0]}.parked.old", 0) > 20)
        time.sleep(0.5)  # kombu loses a message of Redis that a killed worker has just taken
        worker.kill()
    options["rate_limiter_enabled"] = not lifted
    with run(place, limits=(limit(rate=50),), **options) as worker:
        wait_for(lambda: set(lab.runs("job")) == set(range(40)))
        assert re.search(r"Put \d+ jobs back into queue .*: no limit parks in", worker.output)
    assert not lanes(place).get(f"{queue[0]}.parked.old")


def test_jobs_that_the_broker_does_not_take_are_held(rabbitmq_lab, rabbitmq):
    """A lane is full: its jobs are held, that is said once, and others go on; each runs once."""
    lab = rabbitmq_lab
    place = place_in(lab)
    send(place, "job", *range(60))
    send(place, "other", *range(30))
    policy = '{"max-length": 5, "overflow": "reject-publish"}'
    rabbitmq.rabbitctl_output("set_policy", "short", f"{place[1][0]}.parked.job", policy)
    try:
        with run(place, limits=(limit(rate=10, overflow="park"),)) as worker:
            lab.wait_for_runs("other", 30)
            lab.wait_for_runs("job", 60)
            time.sleep(0.3)
    finally:
        rabbitmq.rabbitctl_output("clear_policy", "short")
    assert sorted(lab.runs("job")) == list(range(60))
    assert worker.output.count("the broker does not take them there") == 1
    assert "Traceback" not in worker.output


def test_a_worker_without_the_rights_holds(rabbitmq_lab, rabbitmq):
    """RabbitMQ refuses to declare lanes: the limit holds as without parking, and that is said once."""
    lab = rabbitmq_lab
    place = place_in(lab)
    send(place, "job", *range(40))
    send(place, "other", *range(30))
    rabbitmq.rabbitctl_output("add_user", "poor", "poor")
    rights = r"^(?!.*parked).*$"
    rabbitmq.rabbitctl_output("set_permissions", "poor", rights, rights, rights)
    try:
        url = lab.settings["broker_url"].replace("guest:guest", "poor:poor")
        with run(place, limits=(limit(rate=20, overflow="park"),), broker_url=url) as worker:
            lab.wait_for_runs("other", 30)
            assert lab.wait_for_runs("job", 40) == list(range(40))
    finally:
        rabbitmq.rabbitctl_output("delete_user", "poor")
    assert worker.output.count("the broker does not take them there") == 1
    assert "Unrecoverable" not in worker.output


def test_redis_without_the_rights_holds(own, redis_lab):
    """Redis refuses to write lanes: nothing is lost, the limit holds, and that is said once."""
    lab = redis_lab
    client = redis.Redis.from_url(own.url)
    client.acl_setuser(
        "poor", enabled=True, passwords=["+poor"], commands=["+@all"], channels=["*"],
        keys=["lab*-q", "lab*-q\x06\x16*", "_kombu*", "unacked*", "celery*", "worker*"],
    )  # fmt: skip
    client.close()
    url = own.url.replace("redis://", "redis://poor:poor@")
    lab.settings["broker_url"] = lab.app.conf.broker_url = own.url
    place = place_in(lab)
    send(place, "job", *range(40))
    send(place, "other", *range(30))
    with run(place, limits=(limit(rate=20, overflow="park"),), broker_url=url) as worker:
        lab.wait_for_runs("other", 30)
        assert lab.wait_for_runs("job", 40) == list(range(40))
    assert worker.output.count("the broker does not take them there") == 1
    assert "Unrecoverable" not in worker.output


def test_a_lane_that_is_deleted_is_made_again(rabbitmq_lab, rabbitmq):
    """Its jobs are gone with it; those that come later run."""
    lab = rabbitmq_lab
    place = place_in(lab)
    send(place, "job", *range(40))
    with run(place, limits=(limit(rate=10, overflow="park"),)):
        wait_for(lambda: parked(place) > 10)
        rabbitmq.rabbitctl_output("delete_queue", f"{place[1][0]}.parked.job")
        send(place, "job", *range(100, 140))
        wait_for(lambda: set(range(100, 140)) <= set(lab.runs("job")))
    assert repeated(lab.runs("job")) == {}


def test_parking_outlives_a_lost_connection(place, request):
    """All connections break while jobs are parked: each runs; those under way may run twice."""
    lab, _ = place
    send(place, "job", *range(80))
    with run(place, pool="prefork", limits=(limit(rate=20, overflow="park"),)) as worker:
        wait_for(lambda: parked(place) > 20)
        lab.wait_for_runs("job", 5)
        break_connections(lab, request)
        wait_for(lambda: set(lab.runs("job")) == set(range(80)))
        assert worker.running
    assert sum(repeated(lab.runs("job")).values()) <= 4


def test_a_broker_short_of_memory(rabbitmq_lab, rabbitmq):
    """RabbitMQ takes nothing for a while: jobs and the limit go on, and each runs once in the end."""
    lab = rabbitmq_lab
    place = place_in(lab)
    send(place, "job", *range(60))
    send(place, "other", *range(30))
    rabbitmq.rabbitctl_output("set_vm_memory_high_watermark", "0.00001")
    try:
        with run(place, pool="prefork", limits=(limit(rate=5, overflow="park"),)) as worker:
            lab.wait_for_runs("other", 30)
            lab.wait_for_runs("job", len(lab.runs("job")) + 10)
            rabbitmq.rabbitctl_output("set_vm_memory_high_watermark", "0.9")
            lab.wait_for_runs("job", 60)
            time.sleep(0.5)
    finally:
        rabbitmq.rabbitctl_output("set_vm_memory_high_watermark", "0.9")
    assert sorted(lab.runs("job")) == list(range(60))
    assert "Traceback" not in worker.output


def everything_runs(place, count):
    """Let a worker that parks nothing run what is left; each job has run then, and no lane is there."""
    lab, _ = place
    limits = (limit(rate=1000, capacity=1000),)
    options = {"broker_transport_options": SHORT_LEASE} if is_redis(lab) else {}
    with run(place, limits=limits, **options) as worker:
        wait_for(lambda: set(lab.runs("job")) == set(range(count)))
        wait_for(lambda: not sum(lanes(place).values()))
        worker.stop()
    assert "Traceback" not in worker.output


@pytest.mark.parametrize("how", ["warm", "soft", "cold"])
def test_a_worker_that_ends_while_it_parks_loses_nothing(place, how):
    """Warm, soft and cold shutdown in the middle of moving; what is under way may run twice on RabbitMQ."""
    lab, _ = place
    options = {"worker_soft_shutdown_timeout": 1.0} if how == "soft" else {}
    send(place, "job", *range(600))
    with run(place, pool="prefork", **options) as worker:
        wait_for(lambda: parked(place))
        worker.process.send_signal(signal.SIGTERM if how == "warm" else signal.SIGQUIT)
        if how == "warm":
            worker.process.wait(DEADLINE)
        else:
            # Celery cancels its consumer in the signal handler (celery/apps/worker.py, on_cold_shutdown). If the
            # signal comes while the worker writes to RabbitMQ, that waits for ever for py-amqp's lock.
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(5)
            worker.kill()
    everything_runs(place, 600)
    assert sum(repeated(lab.runs("job")).values()) <= 2 * 8  # a prefetch window


@pytest.mark.parametrize("place", ["redis", "quorum"], indirect=True)
def test_workers_that_declare_differently_lose_nothing(place):
    """One parks the jobs of a limit and the other holds them: each job runs once, and no lane is left."""
    lab, _ = place
    send(place, "job", *range(80))
    with (
        run(place, limits=(limit(rate=10, overflow="park"),)) as one,
        run(place, limits=(limit(rate=10, overflow="hold", max_held=4),)) as other,
    ):
        lab.wait_for_runs("job", 80)
        one.stop()
        other.stop()
    assert sorted(lab.runs("job")) == list(range(80))
    assert not sum(lanes(place).values())


@pytest.mark.parametrize("place", ["redis", "rabbitmq"], indirect=True)
def test_a_lane_that_rests_is_its_workers(place):
    """It is not consumed while its next token is far: a worker that knows no such limit leaves it alone."""
    send(place, "job", *range(40))
    with run(place, limits=(limit(rate=1 / 600, overflow="park"),)):
        wait_for(lambda: parked(place) >= 37)
        with run(place, limits=(limit("other", overflow="park"),)) as stranger:
            time.sleep(2)  # it looks for lanes when it starts
            assert "Put " not in stranger.output
            assert parked(place) >= 37
            stranger.stop()
        assert parked(place) >= 37


@pytest.mark.parametrize("place", ["redis", "rabbitmq"], indirect=True)
def test_lanes_of_two_apps_are_their_own(place):
    """The same names of limits in two apps with queues of their own: each runs its own jobs."""
    lab, queue = place
    name = f"{queue[0]}2"
    second = (lab, (name, f"{name}-jobs", "direct", "key", False))
    declare(lab, second[1])
    send(place, "job", *range(30))
    send(second, "job", *range(100, 130))
    limits = (limit(rate=20, overflow="park"),)
    with run(place, limits=limits) as one, run(second, limits=limits) as other:
        lab.wait_for_runs("job", 60)
        assert Counter(lab.runs("job by")) == {one.node: 30, other.node: 30}
    assert sorted(lab.runs("job")) == [*range(30), *range(100, 130)]


def test_a_body_that_cannot_be_read_stands_in_no_ones_way(place):
    """Celery logs and drops it, as it does without a gate; the jobs behind it run."""
    lab, queue = place
    send(place, "job", *range(20))
    with lab.app.connection_for_write() as connection:
        connection.Producer().publish(
            b"{",
            exchange=queue[1],
            routing_key=queue[3],
            content_type="application/json",
            content_encoding="utf-8",
            headers={"task": "job", "id": "unreadable", "lang": "py"},
            serializer=None,
        )
    send(place, "job", *range(20, 40))
    with run(place, limits=(limit(rate=20, overflow="park"),)) as worker:
        assert lab.wait_for_runs("job", 40) == list(range(40))
        worker.stop()
    assert "decode message body" in worker.output
    assert not sum(lanes(place).values())
    assert waiting(lab, queue[0]) == 0


def test_parking_outlives_a_restart_of_redis(own_redis, redis_lab):
    """What is parked on a Redis that keeps its data is there again after it was killed, and runs."""
    server = own_redis(*KEEPS_DATA)
    redis_lab.settings["broker_url"] = redis_lab.app.conf.broker_url = server.url
    place = place_in(redis_lab)
    options = {"broker_transport_options": SHORT_LEASE}
    send(place, "job", *range(80))
    with run(place, pool="prefork", limits=(limit(rate=10, overflow="park"),), **options) as worker:
        wait_for(lambda: parked(place) > 20)
        redis_lab.wait_for_runs("job", 5)
        server.restart()
        wait_for(lambda: set(redis_lab.runs("job")) >= set(range(60)))
        assert worker.running
        worker.stop()
    everything_runs(place, 80)
    assert sum(repeated(redis_lab.runs("job")).values()) <= 4


@pytest.mark.parametrize("quorum", [False, True])
def test_parking_outlives_a_restart_of_rabbitmq(rabbitmq_lab, rabbitmq, quorum):
    """What is parked is on disk: it is there again after RabbitMQ was stopped and started, and runs."""
    place = place_in(rabbitmq_lab, quorum=quorum)
    send(place, "job", *range(80))
    with run(place, pool="prefork", limits=(limit(rate=10, overflow="park"),)) as worker:
        wait_for(lambda: parked(place) > 20)
        rabbitmq_lab.wait_for_runs("job", 5)
        rabbitmq.rabbitctl_output("stop_app")
        rabbitmq.rabbitctl_output("start_app")
        wait_for(lambda: set(rabbitmq_lab.runs("job")) >= set(range(60)))
        assert worker.running
        worker.stop()
    everything_runs(place, 80)


@pytest.fixture
def sentinel(own, tmp_path):
    """Yield the URL of a Redis Sentinel that watches a Redis."""
    port = get_port(None)
    config = tmp_path / "sentinel.conf"
    config.write_text(f"port {port}\ndir {tmp_path}\nsentinel monitor shop 127.0.0.1 {own.port} 1\n")
    process = subprocess.Popen([REDIS, config, "--sentinel"], stdout=subprocess.DEVNULL)
    with redis.Redis(port=port) as client:
        wait_for(lambda: answers(client))
    yield f"sentinel://127.0.0.1:{port}"
    process.kill()
    process.wait(DEADLINE)


def test_lanes_are_where_sentinel_says(sentinel, own, redis_lab):
    """Through Redis Sentinel as on one Redis: jobs are parked, come back, and are put back."""
    lab = redis_lab
    options = {"master_name": "shop"}
    lab.app.conf.update(broker_url=sentinel, broker_transport_options=options)
    place = place_in(lab)
    send(place, "job", *range(80))
    send(place, "other", *range(10))
    settings = {"broker_url": sentinel, "broker_transport_options": options}
    lab.settings["broker_url"] = own.url  # for those who look at it
    with run(place, concurrency=1, **settings) as worker:
        lab.wait_for_runs("other", 10)
        assert parked(place) > 40
        lab.wait_for_runs("job", 12)
        worker.stop()
    ran = lab.runs("job")
    assert ran == list(range(len(ran)))
    assert lanes(place) == {}
    assert waiting(lab, place[1][0]) == 80 - len(ran)


def test_one_slot_of_a_redis_cluster_is_enough(own_redis, redis_lab):
    """Where a hash tag puts all of kombu's keys in one slot, jobs are parked on a Redis Cluster too."""
    lab, server = redis_lab, own_redis("--cluster-enabled", "yes")
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_for(lambda: "cluster_state:ok" in client.execute_command("CLUSTER", "INFO").decode())
    settings = {"broker_url": server.url, "broker_transport_options": {"global_keyprefix": "{shop}"}}
    lab.app.conf.update(settings)
    lab.settings.update(settings)
    place = place_in(lab)
    send(place, "job", *range(60))
    send(place, "other", *range(10))
    with run(place, concurrency=1) as worker:
        lab.wait_for_runs("other", 10)
        with redis.Redis.from_url(server.url) as client:
            assert client.llen(f"{{shop}}{place[1][0]}.parked.job") > 20
        lab.wait_for_runs("job", 12)
        worker.stop()
    assert lab.runs("job") == list(range(len(lab.runs("job"))))
    assert lanes(place) == {}


def test_a_job_that_comes_as_its_lane_is_left_alone_is_not_lost(redis_lab):
    """Redis gives it to the worker at once: it is held there, and another worker gets it if this one is killed."""
    lab = redis_lab
    place = place_in(lab)
    with run(place, limits=(limit(rate=1 / 600, overflow="park"),)):
        time.sleep(1.5)  # until the worker waits for jobs in the lane
        send(place, "job", *range(4))
        wait_for(lambda: parked(place) and unacknowledged(lab) + parked(place) == 3)


def test_however_many_jobs_wait_for_the_broker_they_are_parked(rabbitmq_broker, monkeypatch):
    """Green pools: RabbitMQ confirms nothing for a while, then all that has piled up is sent, one after another."""
    queue, lane = rabbitmq_broker.queue(), rabbitmq_broker.queue("lane")
    rabbitmq_broker.declare(lane)
    rabbitmq_broker.send(queue, *range(300))
    refused = []
    with rabbitmq_broker.connection() as connection:
        consumer = SimpleNamespace(
            hub=None, connection=connection, connection_errors=connection.connection_errors
        )
        outbox = Outbox(consumer, lambda *args: refused.append(args), lambda: None)
        plan = SimpleNamespace(limits=())
        target = Parked(plan, lane, queue.name)
        with monkeypatch.context() as patch:
            patch.setattr(Relay, "full", True)
            for number in range(300):
                message = queue(connection.default_channel).get()
                outbox.put(target, Context(id=number, message=message))
        outbox.tend()
        wait_for(lambda: outbox.tend() or not target.leaving)
        outbox.stop()
    assert not refused
    assert rabbitmq_broker.waiting(lane) == 300


def test_a_lane_that_rests_often_keeps_nothing_of_it(rabbitmq_broker):
    """RabbitMQ: each time it is consumed by another consumer, and the ones before are forgotten."""
    queue, came = rabbitmq_broker.queue(), []
    entity = lane_entity(queue, f"{queue.name}.parked.job")
    rabbitmq_broker.declare(entity)
    with rabbitmq_broker.connection() as connection:
        lane = Lane(connection, entity, queue.name, came.append)
        for number in range(5):
            lane.consume(10)
            rabbitmq_broker.send(entity, number)
            lane.rest()
        lane.consume(10)
        while len(came) < 5:
            connection.drain_events(timeout=5)
        assert len(lane.channel.callbacks) == 1


def test_a_long_pause_gives_back_what_is_in_hand(place):
    """All but the first go back to the lane, but for a quorum queue, which has no place for them; order is kept."""
    lab, queue = place
    is_quorum = queue[4]
    send(place, "job", *range(80))
    with run(place, concurrency=1, limits=(limit(rate=20, overflow="park"),)) as worker:
        lab.wait_for_runs("job", 10)
        assert "ok" in control(lab, worker, "limit", name="job", pause=600)
        seen = len(lab.runs("job"))
        if not is_quorum:  # on Redis those that were on their way come a second later
            wait_for(lambda: parked(place) >= 80 - seen - 2)
        time.sleep(1.5)
        assert (parked(place) >= 80 - seen - 2) is not is_quorum
        assert "ok" in control(lab, worker, "limit", name="job", resume=True)
        assert lab.wait_for_runs("job", 80) == list(range(80))
