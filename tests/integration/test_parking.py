"""Jobs of limits with overflow="park" wait in the broker, aside, and come back when their tokens do."""

import json
import math
import re
import time
from collections import Counter

import pytest
import redis
from harness import wait_for
from lanes_lab import PARKED, is_redis, lanes, parked, run, send
from limits import (
    SHORT_LEASE,
    celery,
    control,
    declare,
    fail_at_start,
    limit,
    repeated,
    run_example,
    start,
    unacknowledged,
    waiting,
)

from rate_limiter.broker.amqp_lanes import AmqpLanes
from rate_limiter.broker.redis_lanes import RedisLanes
from rate_limiter.celery.unparking import adopt


@pytest.mark.parametrize(
    ("place", "pool"),
    [
        *(("redis", pool) for pool in ("prefork", "threads", "gevent")),
        ("rabbitmq", "prefork"),
        ("rabbitmq", "gevent"),
        ("quorum", "threads"),
    ],
    indirect=["place"],
)
def test_jobs_behind_parked_ones_run(place, pool):
    """Unlimited jobs pass many limited ones; these run in order, once each, at their rate."""
    lab, _ = place
    send(place, "job", *range(200))
    send(place, "other", *range(30))
    with run(place, pool=pool) as worker:
        assert sorted(lab.wait_for_runs("other", 30)) == list(range(30))
        seen = len(lab.runs("job"))
        assert seen < 100
        assert lab.wait_for_runs("job", seen + 12) == list(range(len(lab.runs("job"))))
    lab.assert_bound("job", capacity=1, rate=4)
    assert "Traceback" not in worker.output


def test_the_last_worker_puts_everything_back(place):
    """After a warm stop all jobs are in their queue, in order, before newer ones; no lane is left."""
    lab, queue = place
    send(place, "job", *range(300))
    send(place, "other", 0)
    with run(place, concurrency=1) as worker:  # two slots may run neighbours the other way round
        lab.wait_for_runs("other", 1)
        wait_for(lambda: parked(place) > 250)
        worker.stop()
    ran = lab.runs("job")
    assert lanes(place) == {}
    if is_redis(lab):
        with redis.Redis.from_url(lab.settings["broker_url"]) as client:
            assert client.keys("*.parked*") == []
    assert waiting(lab, queue[0]) == 300 - len(ran)
    send(place, "job", *range(300, 310))
    with start(lab, gate=False, queues=(queue,), concurrency=1):
        assert lab.wait_for_runs("job", 310) == list(range(310))


@pytest.mark.parametrize("place", ["redis", "quorum"], indirect=True)
def test_a_worker_that_is_not_the_last_leaves_the_lanes(place):
    """While another worker is there, jobs stay parked, and it runs them."""
    lab, _ = place
    limits = (limit(rate=10, overflow="park"),)
    with run(place, limits=limits) as other:
        with run(place, limits=limits) as worker:
            send(place, "job", *range(120))
            wait_for(lambda: worker.node in lab.runs("job by") and parked(place))
            worker.stop()
            assert parked(place)
        lab.wait_for_runs("job", 120)
        assert sorted(lab.runs("job")) == list(range(120))
        assert "Put " not in worker.output
        other.stop()
    assert lanes(place) == {}


@pytest.mark.parametrize("place", ["redis", "quorum"], indirect=True)
def test_two_workers_share_a_lane(place):
    """Nobody hoards: both run at their rate, each job once."""
    lab, _ = place
    limits = (limit(rate=10, overflow="park"),)
    with run(place, limits=limits) as one, run(place, limits=limits) as other:
        send(place, "job", *range(100))
        lab.wait_for_runs("job", 100)
        shares = [lab.runs("job by").count(worker.node) for worker in (one, other)]
    assert sorted(lab.runs("job")) == list(range(100))
    assert min(shares) >= 25


@pytest.mark.parametrize("place", ["quorum"], indirect=True)
def test_notes_and_signs_are_in_classic_queues(place, rabbitmq):
    """Whatever kind RabbitMQ makes by default: a quorum queue would drop a note that was read 20 times."""
    name = place[1][0]
    with run(place, limits=(limit(rate=20, overflow="park"),)):
        rows = rabbitmq.rabbitctl_output("-q", "list_queues", "name", "arguments")
    kinds = dict(row.split("\t") for row in rows.splitlines() if row.startswith(f"{name}.parked"))
    lane = kinds.pop(f"{name}.parked.job")
    assert len(kinds) == 3
    assert all("classic" in kind for kind in kinds.values())
    assert "quorum" in lane


def test_parked_jobs_keep_their_lease(redis_lab):
    """Redis: jobs that wait in hand for three times visibility_timeout run once."""
    lab = redis_lab
    limits = (limit(rate=1, overflow="park"),)
    for number in range(11):
        lab.send("job", number)
    with start(lab, pool="prefork", limits=limits, broker_transport_options=SHORT_LEASE):
        lab.wait_for_runs("job", 11)
        time.sleep(1.5)  # for a second run of one
        wait_for(lambda: not unacknowledged(lab))
    assert repeated(lab.runs("job")) == {}
    lab.assert_bound("job", capacity=1, rate=1)


def test_what_arrives_goes_behind_what_is_parked(place):
    """First parked, first run: a stream of jobs behind a backlog, one slot, runs in order."""
    lab, _ = place
    send(place, "job", *range(40))
    with run(place, concurrency=1, limits=(limit(rate=16, overflow="park"),)):
        for number in range(40, 80):
            send(place, "job", number)
            time.sleep(0.06)
        assert lab.wait_for_runs("job", 80) == list(range(80))
    lab.assert_bound("job", capacity=1, rate=16)


def test_each_set_of_limits_has_its_lane(place):
    """Jobs that wait for a slow limit stand in nobody's way who has another one."""
    lab, _ = place
    limits = (
        limit("job", rate=0.1, overflow="park"),
        limit("other", rate=20, overflow="park"),
    )
    for number in range(60):
        send(place, "job", number)
        send(place, "other", number)
    with run(place, limits=limits):
        began = time.monotonic()
        assert lab.wait_for_runs("other", 60) == list(range(60))
        assert time.monotonic() - began < 10
        assert len(lab.runs("job")) < 5


def test_priorities_are_kept(redis_lab):
    """Redis, with priorities and a prefix: urgent jobs come back first; and none is left anywhere."""
    lab = redis_lab
    options = {
        "global_keyprefix": "x:",
        "priority_steps": [0, 5, 9],
        "queue_order_strategy": "priority",
    }
    lab.app.conf.broker_transport_options = options
    limits = (limit(rate=20, overflow="park"),)
    for number in range(40):
        lab.send("job", number, priority=9)
    with start(lab, concurrency=1, limits=limits, broker_transport_options=options) as worker:
        lab.wait_for_runs("job", 2)
        for number in range(40, 50):
            lab.send("job", number, priority=0)
        ran = lab.wait_for_runs("job", 40)
        assert set(range(40, 50)) < set(ran)
        worker.stop()
    with redis.Redis.from_url(lab.settings["broker_url"], decode_responses=True) as client:
        assert not [key for key in client.keys("*") if "parked" in key and not key.endswith("s.parked")]
        queue = f"x:{lab.settings['task_default_queue']}"
        rest = sum(client.llen(key) for key in client.keys(f"{queue}*"))
    assert rest + len(lab.runs("job")) == 50
    assert Counter(lab.runs("job")).most_common(1)[0][1] == 1


def consumers(place):
    """Return how many consumers the lane of task job has, on RabbitMQ."""
    with place[0].app.connection_for_read() as connection:
        name = f"{place[1][0]}.parked.job"
        return connection.default_channel.queue_declare(name, passive=True).consumer_count


def test_a_lane_is_consumed_while_its_tokens_come_soon(place):
    """At one job in ten minutes none is in hand in between; a higher rate brings them at once."""
    lab, _ = place
    send(place, "job", *range(40))
    with run(place, limits=(limit(rate=1 / 600, overflow="park"),)) as worker:
        # One has run, one is held. On Redis another one was on its way when the first had taken the token.
        in_lane = (37, 38) if is_redis(lab) else (38,)
        wait_for(lambda: parked(place) in in_lane)
        time.sleep(1.5)
        assert parked(place) in in_lane
        if not is_redis(lab):
            assert consumers(place) == 0
        assert "ok" in control(lab, worker, "limit", name="job", rate="20/s")
        assert lab.wait_for_runs("job", 40) == list(range(40))


def test_every_limit_that_can_is_parked(place):
    """rate_limiter_overflow = "park": also one of a decorator; a limit per key holds."""
    lab, queue = place
    for number in range(30):
        send(place, "slow", number)
    send(place, "other", *range(20))
    with run(place, limits=(), rate_limiter_overflow="park") as worker:
        lab.wait_for_runs("other", 20)
        wait_for(lambda: lanes(place).get(f"{queue[0]}.parked.slow", 0) > 10)
    assert "Limit tiered: its jobs are held, not parked: its bucket depends on the job" in worker.output


def test_a_limit_that_cannot_be_parked_is_an_error(redis_lab):
    """Asked for by name: the worker does not start."""
    worker = start(redis_lab, limits=({**PARKED[0], "max_wait": 5},))
    assert "overflow must be 'hold' or 'pause', not 'park': max_wait" in fail_at_start(worker)


def test_parked_jobs_are_shown(place):
    """`limits` has the lane, its jobs, their age, and how many were moved; `explain` knows where a job is."""
    lab, queue = place
    lane = f"{queue[0]}.parked.job"
    for number in range(30):
        last = lab.send("job", number, exchange=queue[1], routing_key=queue[3])
    with run(place, limits=(limit(rate=0.05, overflow="park"),)) as worker:
        wait_for(lambda: parked(place) > 10)
        time.sleep(0.3)
        seen = control(lab, worker, "limits")["job"]
        shown = seen["lanes"][lane]
        assert shown["jobs"] > 10
        assert 0 < shown["seconds"] < 30
        assert shown["jobs"] <= seen["parked"] <= 30
        if not is_redis(lab):  # which has moved most jobs without the worker
            told = control(lab, worker, "explain", task_id=last.id)
            assert told == {"state": "parked", "lane": lane}
        told = (
            rf"{last.id} is parked in {lane}, {'(1.|2.) jobs before it' if is_redis(lab) else 'unless'}"
        )
        assert re.search(told, celery(lab, "explain", last.id, "-Q", queue[0])[1])
        assert f" parked in {lane} for up to " in celery(lab, limits=(PARKED[0],))[1]


def test_the_example(redis_url):
    """Pictures pass 2,000 emails; in the end these are all in their queue."""
    lines = run_example("parking", redis_url())
    pictures, parked, stopped = [line for line in lines if "emails" in line]
    sent = int(re.search(r"(\d+) emails? (is|are) sent", pictures)[1])
    assert 1 <= sent < 60
    assert int(parked.split()[0].replace(",", "")) > 1_900
    assert re.search(r"stopped: 1,9\d\d emails wait in their queue, and none in a lane", stopped)


@pytest.mark.parametrize("place", ["redis", "quorum"], indirect=True)
def test_lanes_can_be_emptied_by_hand(place):
    """`limits purge` asks before it deletes; `limits unpark` puts jobs back; each for one limit or for all."""
    lab, queue = place
    options = ("-Q", queue[0])
    send(place, "job", *range(60))
    with run(place) as worker:
        wait_for(lambda: parked(place) > 10)
        worker.kill()
    time.sleep(0.5)  # RabbitMQ has to notice
    count = parked(place)
    assert celery(lab, "unpark", "other", *options) == (0, "Put 0 jobs back from 0 lanes.\n")
    status, text = celery(lab, "purge", *options)
    assert (status, parked(place)) == (1, count)
    assert f"{queue[0]}.parked.job: {count} jobs" in text
    there = waiting(lab, queue[0])
    assert celery(lab, "unpark", "job", *options)[0] == 0
    wait_for(lambda: waiting(lab, queue[0]) >= there + count)
    with run(place) as worker:
        wait_for(lambda: parked(place) > 10)
        worker.kill()
    time.sleep(0.5)
    _, text = celery(lab, "purge", "--force", *options)
    listed, deleted = re.findall(r"(\d+) jobs", text)
    assert int(listed) == int(deleted) > 10
    assert parked(place) == 0


def test_putting_back_ends_though_a_worker_parks(place):
    """What a worker parks again while a lane is put back is not put back once more, and again."""
    lab, queue = place
    send(place, "job", *range(200))
    with run(place, limits=(limit(rate=1, overflow="park"),)):
        wait_for(lambda: parked(place) > 150)
        text = celery(lab, "unpark", "job", "-Q", queue[0])[1]
        assert 100 < int(re.findall(r"Put (\d+) jobs back", text)[0]) <= 200


def test_redis_moves_only_what_is_parked(redis_lab):
    """Inside the server: jobs of these tasks without ETA, at any priority, as they were; the others stay in order."""
    lab = redis_lab
    queue = lab.settings["task_default_queue"]
    lane = f"{queue}.parked.job"
    for number in range(5):
        lab.send("job", number)
        lab.send("other", number)
    lab.send("job", 5, priority=9)
    lab.send("job", 6, countdown=100)
    with (
        redis.Redis.from_url(lab.settings["broker_url"]) as client,
        lab.app.connection_for_write() as connection,
    ):
        client.lpush(queue, "no JSON", "[]", '{"headers": 5}', '{"headers": {"task": ["job"]}}')
        before = client.lrange(queue, 0, -1)
        jobs = [each for each in before if b'"task": "job"' in each and b'"eta": null' in each]
        assert len(jobs) == 5
        lanes = RedisLanes(connection.default_channel, "worker")
        assert lanes.sweep(queue, lane, ["job", "none"], 4) == 2 + 1
        assert client.lrange(lane, 0, -1) == jobs[-2:]
        assert lanes.sweep(queue, lane, ["job", "none"], 400) == 3
        assert lanes.sweep(queue, lane, ["job", "none"], 400) == 0
        assert client.lrange(lane, 0, -1) == jobs
        assert client.lrange(queue, 0, -1) == [each for each in before if each not in jobs]
        assert client.llen(f"{lane}\x06\x169") == 1
        assert lanes.put_back(lane, queue) == 6
        assert client.lrange(queue, 0, -1) == [each for each in before if each not in jobs] + jobs


@pytest.mark.parametrize("end", ["", "-größer"])
def test_a_lane_is_kept_while_somebody_has_jobs_of_it(redis_lab, end):
    """Redis puts the jobs of a killed worker back into the lane late: a worker that parks nothing waits for that."""
    lab, queue = redis_lab, redis_lab.settings["task_default_queue"] + end
    lane = f"{queue}.parked.job"
    url = lab.settings["broker_url"]
    with (
        redis.Redis.from_url(url) as client,
        lab.app.connection_for_write() as connection,
        lab.app.connection_for_read() as killed,
    ):
        client.hset(f"{queue}.parked", lane, '["job"]')
        lab.send("job", 1, queue=queue)
        client.rename(queue, lane)
        channel = killed.channel()
        assert channel.basic_get(lane).delivery_info["routing_key"] == queue
        (tag,) = client.hkeys("unacked")
        entry = client.hget("unacked", tag)
        message, exchange, _ = json.loads(entry)
        in_hand = json.dumps([message, exchange, lane])  # as a lane's channel notes it
        client.hset("unacked", tag, in_hand)
        lanes = RedisLanes(connection.default_channel, "worker")
        assert adopt(lanes, [queue], {}) == 60
        assert client.hexists(f"{queue}.parked", lane)
        client.hdel("unacked", tag)
        client.lpush(lane, json.dumps(json.loads(in_hand)[0]))
        assert adopt(lanes, [queue], {}) == math.inf
        assert client.llen(queue) == 1
        assert not client.exists(f"{queue}.parked")
        channel.qos._delivered.clear()


def test_few_jobs_are_in_hand_while_they_are_put_back(rabbitmq_lab):
    """RabbitMQ: an original is acknowledged when its copy is confirmed: a killed worker doubles 50 at most."""
    lab, name = rabbitmq_lab, rabbitmq_lab.settings["task_default_queue"]
    declare(lab, (f"{name}-from", name, "direct", "from", False))
    declare(lab, (f"{name}-to", name, "direct", "to", False))
    for number in range(400):
        lab.send("job", number, exchange=name, routing_key="from")
    got, most = [], 0

    def messages(channel):
        nonlocal most
        while message := channel.basic_get(f"{name}-from"):
            got.append(channel.message_to_python(message))
            most = max(most, sum(not each.acknowledged for each in got))
            yield got[-1]

    with lab.app.connection_for_write() as connection:
        assert AmqpLanes._move(messages(connection.channel()), f"{name}-to") == 400
    assert most <= 51
    assert waiting(lab, f"{name}-to") == 400


def test_thousands_are_moved_aside_inside_redis(redis_lab):
    """Jobs of two tasks stand behind 5,000 limited ones, and run soon; these run in order."""
    lab = redis_lab
    with lab.app.connection_for_write() as connection:
        producer = lab.app.amqp.Producer(connection)
        for number in range(5_000):
            lab.send("job", number, producer=producer)
        for number in range(20):
            lab.send("other", number, producer=producer)
    with start(lab, concurrency=1, limits=PARKED) as worker:
        assert lab.wait_for_runs("other", 20) == list(range(20))
        assert lab.wait_for_runs("job", 20) == list(range(len(lab.runs("job"))))
        # Most were not read before they were moved.
        assert worker.output.count("Task job[") < 1_000
