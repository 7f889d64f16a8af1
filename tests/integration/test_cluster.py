"""Several workers on one RedisTokenBucket: one rate for all, and nothing that waits for its server."""

import contextlib
import signal
import time

import pytest
import redis
from harness import DEADLINE, Lab, excess, wait_for
from kombu_lab import Worker, running
from limits import control, fail_at_start, run_example, start, stats

from rate_limiter import RateLimitExceeded
from rate_limiter.kombu import Gate
from rate_limiter.redis_bucket import RedisTokenBucket

POOLS = ["prefork", "threads", "gevent", "solo"]


@pytest.fixture
def cluster(lab, redis_url):
    """Return a lab whose limits are in a Redis of their own database."""
    lab.settings["limits_url"] = redis_url()
    return lab


@pytest.fixture
def redis_cluster(redis_lab, redis_url):
    """Return the same with Redis as the broker."""
    redis_lab.settings["limits_url"] = redis_url()
    return redis_lab


def worker(lab, **options):
    return start(lab, **{"pool": "threads", "module": "cluster_app", **options})


def assert_bound(entries, capacity, rate, late=0.15):
    """Never more than capacity + rate × t, by the tasks' clock: each notes its start a little late."""
    assert excess(sorted(entry.at for entry in entries), rate) <= capacity + rate * late + 1


@pytest.mark.parametrize("pool", POOLS)
def test_two_workers_share_one_rate(cluster, pool):
    """All jobs run, once each, at the rate of the bucket, and both workers have a part in it."""
    with worker(cluster, pool=pool), worker(cluster, pool=pool):
        for number in range(90):
            cluster.send("shared", number)
        assert sorted(cluster.wait_for_runs("shared", 90)) == list(range(90))
    assert_bound(cluster.log("shared"), 3, 30)
    runs = cluster.runs("shared by")
    assert len(set(runs)) == 2


def test_one_worker_keeps_the_order_and_lets_others_pass(cluster):
    """As with a bucket of its own."""
    for number in range(30):
        cluster.send("shared", number)
    for number in range(20):
        cluster.send("free", number)
    with worker(cluster, concurrency=1):
        assert cluster.wait_for_runs("shared", 30) == list(range(30))
    free = cluster.log("free")
    assert free[-1].at < cluster.log("shared")[15].at


def test_weights(cluster):
    """Heavy jobs get their tokens, and what they cost is charged."""
    costs = [1, 8, 2, 10, 1, 1, 8, 3]
    for number, cost in enumerate(costs):
        cluster.send("heavy", number, cost)
    with worker(cluster, concurrency=1):
        assert cluster.wait_for_runs("heavy", len(costs)) == list(range(len(costs)))
    moments = [entry.at for entry in cluster.log("heavy")]
    late = 0.25  # the first job of a worker notes its start late
    assert moments[-1] - moments[0] > (sum(costs) - 10) / 40 - late


def test_beside_a_local_bucket(cluster):
    """In an AllOf: the slower one of both counts."""
    for number in range(30):
        cluster.send("both", number)
    with worker(cluster, concurrency=1):
        assert cluster.wait_for_runs("both", 30) == list(range(30))
    assert_bound(cluster.log("both"), 1, 20)


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_two_buckets_of_one_job(redis_cluster, pool):
    """Both in Redis, at the gates of two workers: the slower one of both counts."""
    cluster = redis_cluster
    with worker(cluster, pool=pool), worker(cluster, pool=pool):
        for number in range(60):
            cluster.send("two", number)
        assert sorted(cluster.wait_for_runs("two", 60)) == list(range(60))
    assert_bound(cluster.log("two"), 3, 30)


@pytest.mark.parametrize(
    ("pool", "gate"), [("prefork", True), ("threads", True), ("gevent", True), ("prefork", False)]
)
def test_a_bucket_for_each_key(redis_cluster, pool, gate):
    """Of all workers together, at the gate and in pool processes; what a job settles is refunded there too."""
    cluster, tenants = redis_cluster, ("acme", "globex")
    with worker(cluster, pool=pool, gate=gate), worker(cluster, pool=pool, gate=gate):
        for number in range(30):
            for tenant in tenants:
                cluster.send("tenant", number, tenant)
        for tenant in tenants:
            assert sorted(cluster.wait_for_runs(f"tenant {tenant}", 30)) == list(range(30))
        for tenant in tenants:
            assert_bound(cluster.log(f"tenant {tenant}"), 2, 20)
        cluster.send("tenant", 99, "initech", 2, 0)
        cluster.wait_for_runs("tenant initech", 1)
        with redis.Redis.from_url(cluster.settings["limits_url"], decode_responses=True) as client:
            key = "rate_limiter:bucket:tenants:initech"
            wait_for(lambda: float(client.hget(key, "l") or 2) > 1.9)


def test_orders_are_stored(redis_cluster):
    """A change reaches every worker, those that start later too, until it is restored; it is seen who made it."""
    cluster = redis_cluster

    def limits(one):
        return control(cluster, one, "limits")

    with worker(cluster) as one:
        cluster.send("shared", 0)
        cluster.wait_for_runs("shared", 1)
        order = {"rate": "50/s", "capacity": 7, "reason": "a test", "who": "anna"}
        reply = control(cluster, one, "limit", name="shared", **order)
        assert reply == {"ok": "50 tokens_per_second (was 30), capacity 7 (was 3)"}
        assert "ok" in control(
            cluster, one, "limit", name="tenant", key="acme", rate="1/h", reason="one"
        )
        assert "ok" in control(cluster, one, "limit", name="tenant", rate="40/s", reason="all")
    with worker(cluster) as one:
        (bucket,) = wait_for(
            lambda: [each for each in limits(one)["shared"]["buckets"] if each["stored"] is not None]
        )
        assert (bucket["rate"], bucket["capacity"]) == (50, 7)
        assert bucket["declared"] == {"rate": 30, "capacity": 3}
        assert (bucket["stored"]["reason"], bucket["stored"]["who"]) == ("a test", "anna")
        assert bucket["stored"]["at"].startswith("20")
        (bucket,) = limits(one)["tenant"]["buckets"]
        assert (bucket["stored"]["rate"], bucket["stored"]["reason"]) == (40, "all")
        for number in range(6):
            cluster.send("tenant", number, "acme")
            cluster.send("tenant", number, "globex")
        cluster.wait_for_runs("tenant globex", 6)
        assert len(cluster.runs("tenant acme")) == 2
        for name in "shared", "tenant":
            assert "ok" in control(cluster, one, "limit", name=name, changes=["restore"])
        wait_for(lambda: limits(one)["shared"]["buckets"][0]["stored"] is None)
        assert "ok" in control(cluster, one, "limit", name="tenant", key="acme", changes=["restore"])
        cluster.wait_for_runs("tenant acme", 6)
        reply = control(cluster, one, "limit", name="both", changes=["restore"])
        assert "has no stored numbers" in reply["error"]


def test_an_order_does_not_hold_up_the_worker(redis_cluster, own):
    """Where Redis accepts and never answers: the reply says so in time, and other jobs go on."""
    cluster = redis_cluster
    cluster.settings["limits_url"] = own.url
    with worker(cluster) as one:
        cluster.send("shared", 0)
        cluster.wait_for_runs("shared", 1)
        own.process.send_signal(signal.SIGSTOP)
        try:
            for order in {"rate": "5/s"}, {"changes": ["restore"]}:
                assert "error" in control(cluster, one, "limit", name="shared", **order)
            cluster.send("shared", 1)
            wait_for(lambda: control(cluster, one, "limits")["shared"]["buckets"][0]["outage"])
            cluster.send("free", 1)
            cluster.wait_for_runs("free", 1)
        finally:
            own.process.send_signal(signal.SIGCONT)
        wait_for(lambda: "ok" in control(cluster, one, "limit", name="shared", rate="5/s"))


def test_a_job_that_is_not_to_wait_is_refused(redis_lab, redis_url):
    """The gate waits for the server's answer before it refuses."""
    redis_lab.settings["limits_url"] = redis_url()
    with worker(redis_lab):
        results = [redis_lab.send("refused", number) for number in range(5)]
        outcomes = []
        for result in results:
            try:
                outcomes.append(result.get(DEADLINE))
            except RateLimitExceeded as error:
                outcomes.append(error.retry_after)
    assert outcomes[:2] == [0, 1]
    assert all(100 < each <= 3000 for each in outcomes[2:])


def test_what_is_not_used_goes_back(cluster):
    """Of a worker that ends, and of jobs that were revoked: the others get it."""
    with worker(cluster, concurrency=1) as one:
        for number in range(40):
            cluster.send("shared", number)
        cluster.wait_for_runs("shared", 5)
        wait_for(lambda: stats(cluster, one)["rate_limiter"]["held"].get("shared", 0) > 5)
        one.stop()
    with worker(cluster):
        wait_for(lambda: set(cluster.runs("shared")) == set(range(40)))
        with redis.Redis.from_url(cluster.settings["limits_url"], decode_responses=True) as client:
            key = "rate_limiter:bucket:shared"
            wait_for(lambda: not client.exists(key))  # it is full, and nothing is promised


@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_an_outage_fails_no_job(cluster, own, pool):
    """Redis is killed and started empty: local jobs go on, closed ones wait, open ones all go; none is lost."""
    cluster.settings["limits_url"] = own.url
    with worker(cluster, pool=pool) as one:
        for number in range(60):
            cluster.send("shared", number)
        cluster.wait_for_runs("shared", 10)
        own.kill()
        ran = len(cluster.runs("shared"))
        for number in range(5):
            cluster.send("closed", number)
            cluster.send("open", number)
        cluster.wait_for_runs("open", 5)
        cluster.wait_for_runs("shared", ran + 10)
        assert len(cluster.runs("closed")) <= 1
        own.start()
        assert sorted(cluster.wait_for_runs("shared", 60)) == list(range(60))
        assert sorted(cluster.wait_for_runs("closed", 5)) == list(range(5))
        assert one.running
    assert one.output.count("does not answer") <= 2  # one for each process that asks
    assert "answers again" in one.output
    assert "Traceback" not in one.output


def test_a_change_reaches_held_jobs(cluster):
    """From anywhere, within a second or so: a rate, and a pause."""
    with worker(cluster, concurrency=1) as one:
        control(cluster, one, "limit", name="shared", rate=0.01)
        for number in range(30):
            cluster.send("shared", number)
        wait_for(lambda: stats(cluster, one)["rate_limiter"]["held"].get("shared", 0) > 3)
        other = RedisTokenBucket("shared", 3, 30, url=cluster.settings["limits_url"])
        other.configure(tokens_per_second=100)
        assert cluster.wait_for_runs("shared", 30) == list(range(30))
        other.restore()


def test_a_pause_reaches_all_workers(cluster):
    """Whoever pauses the bucket, and whatever the workers hold; and they go on when it is over."""
    with worker(cluster) as one, worker(cluster) as two:
        for number in range(100):
            cluster.send("shared", number)
        wait_for(lambda: len(set(cluster.runs("shared by"))) == 2)
        bucket = RedisTokenBucket("shared", 3, 30, url=cluster.settings["limits_url"])
        bucket.pause(600)
        time.sleep(1.5)  # those that were granted before
        ran = len(cluster.runs("shared"))
        assert ran < 100
        time.sleep(1)
        assert len(cluster.runs("shared")) == ran
        bucket.resume()
        assert sorted(cluster.wait_for_runs("shared", 100)) == list(range(100))
        assert one.running
        assert two.running


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_in_the_decorator(cluster, pool):
    """Without a gate the processes of a pool share it, and so do workers."""
    for number in range(60):
        cluster.send("shared", number)
    with worker(cluster, pool=pool, gate=False), worker(cluster, pool=pool, gate=False):
        assert sorted(cluster.wait_for_runs("shared", 60)) == list(range(60))
    assert_bound(cluster.log("shared"), 3, 30)


def test_a_server_that_is_not_there(cluster):
    """The worker starts, and its jobs go as on_outage says."""
    cluster.settings["limits_url"] = "redis://127.0.0.1:1/0"
    with worker(cluster) as one:
        for number in range(3):
            cluster.send("shared", number)
            cluster.send("open", number)
        cluster.wait_for_runs("open", 3)
        cluster.wait_for_runs("shared", 3)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: cluster.runs("closed"), 0.5)
        assert one.running
    assert one.output.count("does not answer") == 1


def test_the_example(redis_url):
    """Three workers send all emails together, at one rate."""
    *workers, total = run_example("cluster", redis_url())[-4:]
    assert sum(int(line.split()[1]) for line in workers) == 100
    assert total.endswith("the limit is 10/s")
    assert float(total.split()[4].removesuffix("/s;")) < 10.5


def test_in_the_settings(redis_lab):
    """Two lines: per="cluster" for a limit, on the Redis of the broker."""
    options = {"rate_limiter_limits": {"free": {"rate": "20/s", "burst": 2, "per": "cluster"}}}
    redis_lab.settings["limits_url"] = redis_lab.settings["broker_url"]
    with worker(redis_lab, **options), worker(redis_lab, **options):
        for number in range(50):
            redis_lab.send("free", number)
        assert sorted(redis_lab.wait_for_runs("free", 50)) == list(range(50))
    assert_bound(redis_lab.log("free"), 2, 20)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rate_limiter_limits": {"free": {"rate": 1, "per": "world"}}}, "per must be one of 'worker'"),
        (
            {"rate_limiter_limits": {"free": {"rate": 1, "per": "cluster", "key": "number"}}},
            "per='cluster' with key needs a Redis",
        ),
    ],
)
def test_wrong_settings(tmp_path, settings, says):
    """The worker does not start, and says which setting is wrong."""
    lab = Lab(tmp_path, "amqp://nobody.invalid")
    lab.settings["limits_url"] = "redis://nobody.invalid"
    output = fail_at_start(worker(lab, **settings))
    assert "rate_limiter_limits['free']: " in output
    assert says in output


def test_in_a_kombu_consumer(broker, redis_url):
    """Two consumers share the rate; messages without a limit do not wait for Redis."""
    queue, other = broker.queue(), broker.queue("other")
    bucket = RedisTokenBucket("consumers", 3, 40, url=redis_url())

    def gated():
        gate = Gate()
        gate.limit(queue.name, bucket=bucket, name="limit")
        return running(Worker(broker, gate, queue, other))

    with gated() as one, gated() as two:
        broker.send(queue, *range(60))
        broker.send(other, "passes")
        wait_for(lambda: len(one.ran + two.ran) == 61)
        assert sorted(each for each in one.ran + two.ran if each != "passes") == list(range(60))
    assert excess(sorted(one.at + two.at), 40) <= 3 + 40 * 0.15 + 2
