"""One rate for all workers without a Redis: real workers on RabbitMQ, which learn of each other by gossip."""

import time

import pytest
from celery.contrib.testing.app import setup_default_app
from celery.contrib.testing.worker import start_worker
from harness import Lab, app_here, wait_for
from limits import control, fail_at_start, repeated, start

from rate_limiter.celery import Gate
from rate_limiter.testing import charged

POOLS = ["prefork", "gevent", "solo"]
RATE = 20.0


def worker(lab, *arguments, rate="20/s", gossip=True, **options):
    limits = {"job": {"rate": rate, "max_held": 20}}
    settings = {"rate_limiter_limits": limits, "rate_limiter_per": "cluster"}
    return start(lab, *arguments, gossip=gossip, **settings, **options)


def bucket_of(lab, one):
    return control(lab, one, "limits")["job"]["buckets"][0]


def wait_for_shares(lab, *workers):
    """Wait until each counts all of them, and its first pause is over."""
    for one in workers:
        wait_for(lambda one=one: "share_of" in bucket_of(lab, one))
        wait_for(lambda one=one: bucket_of(lab, one)["share_of"] == len(workers))
        wait_for(lambda one=one: not bucket_of(lab, one)["paused"])


def rate_during(lab, seconds):
    """Return the rate of all workers, in parts of what it should be, and the part of each that had any."""
    before = len(lab.log("job"))
    began = time.monotonic()
    time.sleep(seconds)
    ran = [entry for entry in lab.log("job")[before:] if entry.at >= began]
    took = max(entry.at for entry in ran) - began
    return len(ran) / took / RATE, lab.runs("job by")[before:]


@pytest.mark.parametrize("pool", POOLS)
def test_two_workers_keep_one_rate(rabbitmq_lab, pool):
    """Each has a half, and no job runs twice."""
    lab = rabbitmq_lab
    with worker(lab, pool=pool) as one, worker(lab, pool=pool) as two:
        wait_for_shares(lab, one, two)
        for number in range(120):
            lab.send("job", number)
        lab.wait_for_runs("job", 10)
        rate, by = rate_during(lab, 4)
        assert 0.85 <= rate <= 1.08
        assert 0.4 <= by.count(one.node) / len(by) <= 0.6
        lab.wait_for_runs("job", 120)
        assert not repeated(lab.runs("job"))


def test_workers_come_and_go(rabbitmq_lab):
    """The shares follow one that joins, one that stops and one that is killed; the rate is never above."""
    lab = rabbitmq_lab
    for number in range(1500):
        lab.send("job", number)
    with worker(lab) as one, worker(lab) as two:
        wait_for_shares(lab, one, two)
        with worker(lab) as three:
            assert rate_during(lab, 2)[0] <= 1.1  # while it joins
            wait_for_shares(lab, one, two, three)
            lab.wait_for_runs("job", len(lab.log("job")) + 20)
            rate, by = rate_during(lab, 4)
            assert 0.8 <= rate <= 1.1
            assert len(set(by)) == 3
            three.stop()
            wait_for_shares(lab, one, two)
        rate, by = rate_during(lab, 4)
        assert 0.8 <= rate <= 1.1
        two.kill()
        killed = time.monotonic()
        assert rate_during(lab, 2)[0] <= 0.65
        wait_for_shares(lab, one)
        assert time.monotonic() - killed < 15  # 8 s, and the machine may be slow
        rate, by = rate_during(lab, 4)
        assert 0.8 <= rate <= 1.1
        assert set(by) == {one.node}
    assert "Limit job is divided" in one.output
    assert "Traceback" not in one.output


def test_an_order_is_for_all(rabbitmq_lab):
    """`control limit` gives the rate of all workers; one that stops leaves its share of that."""
    lab = rabbitmq_lab
    with worker(lab) as one, worker(lab) as two:
        wait_for_shares(lab, one, two)
        for each in one, two:
            reply = control(lab, each, "limit", name="job", rate="10/s")
            assert reply == {"ok": "10 tokens_per_second (was 20), divided by 2 workers"}
            assert bucket_of(lab, each)["rate"] == 5
        two.stop()
        wait_for(lambda: bucket_of(lab, one)["rate"] == 10)


def test_a_long_job_on_the_solo_pool(rabbitmq_lab):
    """Its worker reads no heartbeat meanwhile. It does not take itself for the only one."""
    lab = rabbitmq_lab
    with worker(lab, pool="solo") as one, worker(lab, "-Q", "none", pool="solo") as two:
        wait_for_shares(lab, one, two)
        lab.send("busy", 16)
        time.sleep(18)
        assert bucket_of(lab, one)["share_of"] == bucket_of(lab, two)["share_of"] == 2
    for each in one, two:
        assert "Workers that divide job: 1" not in each.output


@pytest.mark.parametrize("flag", ["--without-gossip", "--without-heartbeat"])
def test_a_worker_that_is_on_its_own(tmp_path, flag):
    """It does not start: each of its kind would have the whole rate."""
    lab = Lab(tmp_path, "amqp://nobody.invalid")
    output = fail_at_start(worker(lab, flag))
    assert "limit job: per='cluster' needs rate_limiter_redis, or else Celery's gossip" in output
    assert f"this worker is started {flag}" in output


def test_a_transport_without_gossip(tmp_path):
    """It does not start either."""
    folders = {f"data_folder_{way}": str(tmp_path) for way in ("in", "out")}
    lab = Lab(tmp_path, "filesystem://", broker_transport_options=folders)
    assert "which the transport filesystem does not have" in fail_at_start(worker(lab, pool="solo"))


def test_lifted_limits_need_no_gossip(rabbitmq_lab):
    """With rate_limiter_enabled = False."""
    lab = rabbitmq_lab
    with worker(lab, gossip=False, rate_limiter_enabled=False):
        for number in range(50):
            lab.send("job", number)
        lab.wait_for_runs("job", 50)


def test_in_the_tests_of_a_user():
    """A worker in the same process has no gossip, and needs none: it has the whole rate, and does not wait."""
    app = app_here(rate_limiter_limits={"add": {"rate": "1/h", "burst": 2, "per": "cluster"}})
    Gate(app)

    @app.task(shared=False, name="add")
    def add(x, y):
        return x + y

    (charge,) = charged(add.s(1, 2))
    assert (charge.limit, charge.tokens, charge.bucket.capacity) == ("add", 1, 2)
    assert add(1, 2) == 3
    with setup_default_app(app, use_trap=False), start_worker(app, perform_ping_check=False):
        assert [add.delay(number, 1).get(timeout=20) for number in range(2)] == [1, 2]
        assert charge.bucket.tokens < 1
    app.close()
