"""RedisTokenBucket under faults and bad input: the result is defined, and taking tokens raises nothing.

Faults come in two kinds. A server that fails is down for all its buckets; one bucket that cannot be used leaves
the others of its server alone. Each is logged once as it begins and once as it ends.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
import redis
from harness import DEADLINE, ROOT, Lab, wait_for
from limits import fail_at_start, start

from rate_limiter import AllOf, RateLimitExceeded, outage, redis_bucket, redis_server
from rate_limiter.gating import host
from rate_limiter.gating.engine import Engine
from rate_limiter.gating.limit import Call, Limit
from rate_limiter.redis_bucket import RedisTokenBucket

POLICIES = ("open", "closed", "local")


@pytest.fixture(autouse=True)
def forget_servers(monkeypatch):
    """Let each test begin without the servers of another one, wait briefly, and not fail by load."""
    redis_server._servers.clear()
    monkeypatch.setitem(RedisTokenBucket.__init__.__kwdefaults__, "timeout", 10)
    monkeypatch.setattr(outage, "_PAUSE", 0.1)
    monkeypatch.setattr(outage, "_LONGEST_PAUSE", 0.2)


@pytest.fixture
def admin(own):
    """Yield a client with all rights; its connection is open."""
    with redis.Redis.from_url(own.url, decode_responses=True, single_connection_client=True) as client:
        client.ping()
        yield client


def url_of(server, password):
    return server.url.replace("//", f"//:{password}@")


def key_of(bucket):
    return f"rate_limiter:bucket:{bucket.name}"


def state_keys(server):
    return [state.key for state in server._states.values()]


def error_of(call):
    """Return what a call raises."""
    try:
        call()
    except redis.RedisError as error:
        return error


def lines(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelname == level]


def one_of_each(url, capacity=4, rate=0.001, **options):
    """Return a bucket of each policy, from which one token was taken if the server lets it."""
    buckets = {
        policy: RedisTokenBucket(
            f"{policy}-{uuid4().hex}", capacity, rate, url=url, on_outage=policy, **options
        )
        for policy in POLICIES
    }
    for bucket in buckets.values():
        bucket.allow()
    return buckets


def assert_policies_hold(buckets, known=3):
    """Use each bucket in every way: nothing raises but what is documented, for as long as it lasts.

    ``known`` is the last known level, with which "local" begins.
    """
    granted = {policy: [bucket.allow() for _ in range(8)] for policy, bucket in buckets.items()}
    assert granted["open"] == [True] * 8
    assert granted["closed"] == [False] * 8
    assert granted["local"] == [True] * known + [False] * (8 - known)
    until = time.monotonic() + 0.5  # several times as long as it takes to ask again
    while time.monotonic() < until:
        for policy, bucket in buckets.items():
            assert bucket.tokens <= 4  # a server may well answer what is only a look
            assert bucket.known.is_outage
            assert (bucket.take_or_delay() == 0.0) is (policy == "open")
            bucket.charge(0.001)
            bucket.refund(0.001)
            assert bucket.pause_left == 0
        time.sleep(0.02)
    buckets["open"].wait(2, timeout=0)
    for policy in "closed", "local":
        with pytest.raises(RateLimitExceeded):
            buckets[policy].wait(timeout=0.01)
    for bucket in buckets.values():
        for change in (lambda bucket=bucket: bucket.configure(capacity=9)), bucket.restore:
            with pytest.raises(redis.RedisError) as error:
                change()
            assert "secret" not in "".join(traceback.format_exception(error.value))
        bucket.pause(0)
        bucket.resume()


def assert_well_again(buckets):
    """Find that the server is asked, that what it says counts, and that it is told what it has missed."""

    def is_well(bucket):
        bucket.allow(0.001)
        return not bucket.known.is_outage and not bucket._state.has_missed

    for bucket in buckets.values():
        wait_for(lambda bucket=bucket: is_well(bucket))
    assert buckets["closed"].allow()
    assert -2 < buckets["open"].tokens < 0  # what was granted is charged, up to the capacity
    buckets["closed"].configure(capacity=9)
    assert buckets["closed"].capacity == 9
    buckets["closed"].restore()


# -- the server --------------------------------------------------------------------------------------


def fill(admin):
    admin.set("big", "x" * 2_000_000)
    admin.config_set("maxmemory-policy", "noeviction")
    admin.config_set("maxmemory", "1mb")


def hang(admin):
    """Run somebody's script that does not end."""
    admin.config_set("lua-time-limit", 10)
    options = admin.connection_pool.connection_kwargs
    other = redis.Redis(port=options["port"])

    def run():
        with other, contextlib.suppress(redis.RedisError):
            other.eval("while true do end", 0)

    threading.Thread(target=run).start()

    def is_busy():
        try:
            admin.ping()
        except redis.ResponseError:
            return True

    wait_for(is_busy)


def set_password(admin):
    admin.config_set("requirepass", "secret")
    admin.client_kill_filter(skipme=True)


def rights(*rules):
    return lambda admin: admin.execute_command("ACL", "SETUSER", "default", *rules)


OF_SERVER = {
    "out of memory": (fill, lambda admin: admin.config_set("maxmemory", 0), "OutOfMemoryError"),
    "busy": (hang, lambda admin: admin.script_kill(), "BUSY"),
    "a password": (
        set_password,
        lambda admin: admin.config_set("requirepass", ""),
        "AuthenticationError",
    ),
    "no right for the keys": (rights("resetkeys"), rights("~*"), "NoPermissionError"),
    "no right for scripts": (rights("-evalsha"), rights("+evalsha"), "'evalsha'"),
    "no writes": (
        lambda admin: admin.config_set("min-replicas-to-write", 1),
        lambda admin: admin.config_set("min-replicas-to-write", 0),
        "NOREPLICAS",
    ),
}


def assert_fault_of_server(url, begin, end, says, caplog):
    """Let a server fail, after the first call to it; ``None``: it fails from the start."""
    caplog.set_level("INFO", "rate_limiter")
    buckets = one_of_each(url)
    if begin is not None:
        begin()
    try:
        assert_policies_hold(buckets, 0 if begin is None else 3)
        (error,) = lines(caplog, "ERROR")
        assert error.startswith(f"Redis at {buckets['open'].server.where} does not answer: ")
        assert says in error
        assert ".. " not in error  # whatever the text of the server ends with
        assert "each bucket there grants this process's share of its rate" in error
        assert lines(caplog, "INFO") == []
    finally:
        end()
    assert_well_again(buckets)
    assert lines(caplog, "INFO") == [f"Redis at {buckets['open'].server.where} answers again"]
    assert len(caplog.records) == 2
    assert "secret" not in caplog.text + repr(buckets)


@pytest.mark.parametrize(("begin", "end", "says"), OF_SERVER.values(), ids=OF_SERVER)
def test_a_server_that_fails(own, admin, caplog, begin, end, says):
    """Each policy holds, whatever the server still answers; it is logged once; then all is as before."""
    assert_fault_of_server(own.url, lambda: begin(admin), lambda: end(admin), says, caplog)


def test_a_replica(own, admin, own_redis, caplog):
    """It answers those who are refused, and who look. It is down all the same, until it is the primary."""
    admin.config_set("repl-diskless-sync-delay", 0)
    replica = own_redis("--replicaof", "127.0.0.1", str(own.port))
    with redis.Redis.from_url(replica.url) as other:
        wait_for(lambda: other.info("replication")["master_link_status"] == "up")

        def end():
            other.replicaof("NO", "ONE")

        assert_fault_of_server(replica.url, None, end, "ReadOnlyError", caplog)


def test_a_node_of_a_cluster(own_redis, caplog):
    """It is down while slots belong to nobody, or to another node: a plain client follows no MOVED."""
    one, other = [own_redis("--cluster-enabled", "yes") for _ in range(2)]
    with (
        redis.Redis.from_url(one.url, decode_responses=True) as admin,
        redis.Redis.from_url(other.url) as elsewhere,
    ):

        def end():
            elsewhere.execute_command("CLUSTER ADDSLOTS", *range(16384))
            admin.execute_command("CLUSTER MEET", "127.0.0.1", other.port)
            wait_for(lambda: isinstance(error_of(bucket.restore), redis.exceptions.MovedError))
            node = admin.execute_command("CLUSTER MYID")
            for key in "rate_limiter:workers", *state_keys(bucket.server):
                slot = admin.execute_command("CLUSTER KEYSLOT", key)
                for each in elsewhere, admin:  # else the other node goes on to claim it
                    each.execute_command("CLUSTER SETSLOT", slot, "NODE", node)

        bucket = RedisTokenBucket("b", 1, 1, url=one.url)
        assert_fault_of_server(one.url, None, end, "ClusterDownError", caplog)


def test_a_server_that_loads(own_redis, caplog):
    """It is down until it has read its dump."""
    server = own_redis()
    with redis.Redis.from_url(server.url) as admin:
        admin.mset({f"key{number}": "x" * 50 for number in range(20_000)})
        admin.save()
    server.kill()
    server.start("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024")
    with redis.Redis.from_url(server.url) as admin:
        assert_fault_of_server(
            server.url,
            None,
            lambda: admin.config_set("key-load-delay", 0),
            "BusyLoadingError",
            caplog,
        )


@pytest.mark.parametrize("is_first", [True, False], ids=["at first", "while connections are open"])
def test_a_wrong_password(own, admin, caplog, is_first):
    """Open connections go on; a new one is refused, until the password is right. It is shown nowhere."""
    url = url_of(own, "secret")
    admin.config_set("requirepass", "another" if is_first else "secret")
    if not is_first:
        bucket = RedisTokenBucket("b", 2, 0.001, url=url)
        assert bucket.allow()

    def begin():
        admin.config_set("requirepass", "another")
        assert [bucket.allow(), bucket.allow()] == [True, False]
        admin.client_kill_filter(skipme=True)

    def end():
        admin.config_set("requirepass", "secret")

    assert_fault_of_server(url, None if is_first else begin, end, "AuthenticationError", caplog)


def test_the_rights_that_it_needs(own, admin):
    """No more than the docs say."""
    (rules,) = re.findall(r"`(~rate_limiter:\* [^`]*)`", (ROOT / "docs/howto/cluster.md").read_text())
    admin.execute_command("ACL", "SETUSER", "limiter", "on", ">secret", *rules.split())
    url = own.url.replace("//", "//limiter:secret@")
    bucket = RedisTokenBucket("b", 2, 100, url=url, on_outage="closed")
    assert bucket.allow()
    bucket.configure(capacity=3)
    bucket.pause(0.01)
    bucket.restore()
    asked = bucket.for_gate()
    asked.jobs_wait(1)
    wait_for(lambda: asked.take_or_delay() == 0.0)
    assert not bucket.known.is_outage


def test_a_connection_that_the_server_has_closed(own, admin, caplog):
    """Another one is made, as after some idle minutes: that is no outage."""
    bucket = RedisTokenBucket("b", 4, 0.001, url=own.url, on_outage="closed")
    for _ in range(3):
        assert bucket.allow()
        admin.client_kill_filter(skipme=True)
        time.sleep(0.05)
    assert caplog.records == []


def test_data_lost_at_a_restart(own):
    """At most one burst more, and what waits goes on."""
    bucket = RedisTokenBucket("b", 3, 4, url=own.url, on_outage="closed")
    assert bucket.allow(3)
    with ThreadPoolExecutor(2) as threads:
        waiters = [threads.submit(bucket.wait, 3) for _ in range(2)]
        time.sleep(0.1)
        began = time.monotonic()
        own.kill()
        own.start()
        for waiter in waiters:
            waiter.result(DEADLINE)
    assert time.monotonic() - began > 0.7  # the burst, and three more at 4/s
    assert not bucket.allow(3)


class Proxy:
    """Stands before a server, and cuts a connection after so many bytes of an answer."""

    def __init__(self, port):
        self._server = "127.0.0.1", port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        #: The bytes that are let through. ``None``: all.
        self.left = None
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(self._server)
                for source, target in (client, server), (server, client):
                    pump = threading.Thread(target=self._pump, args=(source, target, target is client))
                    pump.daemon = True
                    pump.start()

    def _pump(self, source, target, answers):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if answers and self.left is not None:
                    data, self.left = data[: self.left], max(0, self.left - len(data))
                target.sendall(data)
                if answers and self.left == 0:
                    break
        for end in source, target:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        """Take no more connections."""
        self._listener.close()


@pytest.fixture
def proxy(own):
    proxy = Proxy(own.port)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("length", [0, 1, 6, 15])
def test_a_connection_that_ends_within_an_answer(own, proxy, caplog, length):
    """What was asked for may be taken, and is not granted; no later answer is taken for this one."""
    bucket = RedisTokenBucket("b", 10, 0.001, url=proxy.url, on_outage="closed")
    assert bucket.allow()
    asked = bucket.for_gate()
    for number in range(2):
        proxy.left = length
        if number:
            asked.jobs_wait(1)
            wait_for(lambda: asked.take_or_delay() and bucket.known.is_outage)
            asked.jobs_wait(0)
        else:
            assert not bucket.allow()
        proxy.left = None
        wait_for(lambda: bucket.tokens and not bucket.known.is_outage)
        tokens = bucket.tokens
        assert bucket.allow()
        assert bucket.tokens == pytest.approx(tokens - 1, abs=0.1)
    assert tokens >= 10 - 5
    assert len(lines(caplog, "ERROR")) == 2


# -- one bucket --------------------------------------------------------------------------------------


def hash_of(**fields):
    """Put these in the fields of a bucket that has been used."""
    return lambda admin, key: admin.hset(key, mapping=fields)


def drop(admin, key):
    admin.delete(key)


OF_BUCKET = {
    "another type": (lambda admin, key: (admin.delete(key), admin.set(key, "text")), drop),
    "text": (hash_of(l="?"), drop),
    "nan": (hash_of(l="nan"), drop),
    "infinite": (hash_of(t="inf"), drop),
    "a pause without a number": (hash_of(p=""), drop),
    "a field that is gone": (lambda admin, key: admin.hdel(key, "t"), drop),
    "no capacity": (hash_of(c="0", r="1", v="5"), drop),
    "a negative rate": (hash_of(c="4", r="-1", v="5"), drop),
    "no version": (hash_of(c="4", r="1", v="x"), drop),
    "a version of no time": (hash_of(c="4", r="1", v="1e300"), drop),
    "no right for its key": (
        lambda admin, key: rights("resetkeys", "~rate_limiter:workers", "~*neighbour")(admin),
        lambda admin, key: rights("~*")(admin),
    ),
}


@pytest.mark.parametrize(("begin", "end"), OF_BUCKET.values(), ids=OF_BUCKET)
def test_a_bucket_that_cannot_be_used(own, admin, caplog, begin, end):
    """Its policy holds until it can be; the other buckets of the server know nothing of it."""
    caplog.set_level("INFO", "rate_limiter")
    neighbour = RedisTokenBucket("neighbour", 10_000, 1, url=own.url, on_outage="closed")
    bucket = RedisTokenBucket("b", 4, 0.001, url=own.url, on_outage="closed")
    both = AllOf(neighbour, bucket)
    assert both.allow()
    begin(admin, key_of(bucket))
    for _ in range(3):
        until = time.monotonic() + 0.15
        while time.monotonic() < until:
            assert not bucket.allow()
            assert bucket.tokens <= 4
            assert not both.allow()
            assert neighbour.allow()
            assert not neighbour.known.is_outage
        with pytest.raises(RateLimitExceeded):
            bucket.wait(timeout=0.01)
    for change in bucket.restore, bucket.configure:
        with pytest.raises(redis.RedisError):
            change()
    assert bucket.known.is_outage
    (error,) = [record.getMessage() for record in caplog.records]
    where = bucket.server.where
    assert error.startswith(f"rate_limiter:bucket:b on Redis at {where} cannot be used: ")
    end(admin, key_of(bucket))
    wait_for(lambda: both.allow(2))
    assert lines(caplog, "INFO") == [f"rate_limiter:bucket:b on Redis at {where} can be used again"]


def test_no_right_for_a_command_of_the_script(own, admin, caplog):
    """Each bucket that is used finds out for itself."""
    bucket = RedisTokenBucket("b", 4, 0.001, url=own.url, on_outage="open")
    rights("-hset")(admin)
    assert [bucket.allow() for _ in range(9)] == [True] * 9
    assert bucket.known.is_outage
    rights("+hset")(admin)
    wait_for(lambda: bucket.tokens <= 4 and not bucket.known.is_outage)
    assert len(lines(caplog, "ERROR")) == 1
    assert "can't run this command" in caplog.text


def test_beside_a_bucket_that_cannot_be_used(own, admin):
    """The others of an AllOf are still taken from on the server, and not if that one refuses."""
    good, bad = (
        RedisTokenBucket(name, 5, 0.001, url=own.url, on_outage=policy)
        for name, policy in (("good", "closed"), ("bad", "local"))
    )
    assert bad.allow(0.1)
    admin.set(key_of(bad), "text")
    both = AllOf(good, bad)
    assert [both.allow(), both.allow(2), both.allow(4)] == [True, True, False]
    assert good.tokens == pytest.approx(2, abs=0.1)
    assert good.allow(2)
    assert not both.allow()  # the good one refuses: the other has what it took back
    both.refund(1)
    assert both.allow()
    with pytest.raises(ValueError, match="at most the capacity 5"):
        both.wait(6)


def test_keys_that_go_while_they_are_used(own, admin, monkeypatch):
    """Evicted or deleted: a burst more, the numbers of the code, and those who wait are served."""
    monkeypatch.setattr(redis_bucket, "_LOOK", 0.1)
    bucket = RedisTokenBucket("b", 4, 20, url=own.url, on_outage="closed")
    bucket.configure(capacity=2, tokens_per_second=0.001)
    assert bucket.allow(2)
    with ThreadPoolExecutor(6) as threads:
        waiters = [threads.submit(bucket.wait) for _ in range(6)]
        time.sleep(0.2)
        admin.delete(key_of(bucket))
        for waiter in waiters:
            waiter.result(DEADLINE)
    assert (bucket.capacity, bucket.tokens_per_second) == (4, 20)


def test_a_clock_that_is_set_back(own, admin):
    """By an hour: the level and the rest of a pause stay, and tokens come at the rate from then on."""
    bucket = RedisTokenBucket("b", 4, 20, url=own.url, on_outage="closed")
    bucket.wait(4)
    hour = 3600 * 10**6

    def set_back():
        level, paused = map(int, admin.hmget(key_of(bucket), "t", "p"))
        admin.hset(key_of(bucket), mapping={"t": level + hour, "p": paused and paused + hour})

    set_back()
    assert not bucket.allow(2)
    time.sleep(0.12)
    assert bucket.allow(2)
    assert not bucket.allow(3)
    bucket.pause(0.3)
    set_back()
    assert 0.1 < bucket.pause_left <= 0.3
    assert not bucket.allow()
    wait_for(bucket.allow, 1)
    with redis.Redis.from_url(own.url) as other:
        moment = other.time()[0]
        other.zadd("rate_limiter:workers", {"gone": moment + 3600})
    bucket.server._beat_at = 0.0
    bucket.allow()
    assert bucket.workers == 1  # one that showed a sign of life before, and none since, has gone


@pytest.mark.parametrize("amount", [1e18, 1e300])
def test_amounts_beyond_all_bounds(own, amount):
    """A pause and a debt that last longer than the clock are just long."""
    bucket = RedisTokenBucket("b", 4, 1e-9, url=own.url, on_outage="closed")
    bucket.charge(amount)
    assert 1e9 < bucket.take_or_delay() <= 1e10
    bucket.refund(amount)
    bucket.pause(amount)
    assert 1e9 < bucket.pause_left <= 1e10
    assert 1e9 < bucket.take_or_delay() <= 1e10
    bucket.resume()
    assert not bucket.known.is_outage


# -- a gate ------------------------------------------------------------------------------------------


class Host(host.Host):
    """A gate of the engine, without a worker."""

    def call_of(self, job, asks_headers):
        """Give the job as its argument."""
        return Call("job", (job,), {})

    def fail(self, job, error):
        """Fail the test: no job is to."""
        raise AssertionError(f"{job} was failed") from error


class Jobs:
    """Jobs at a gate of the engine. Those that went are in `ran`."""

    def __init__(self, bucket, count, **options):
        limit = Limit(bucket, name="limit", **options)
        self._engine = Engine(Host(), lambda _: (limit,))
        self.count = count
        self.ran = []
        for number in range(count):
            if self._engine.offer(number, self._engine.plan("job"))[0] == "go":
                self.ran.append(number)

    def work(self):
        """Let those go that may."""
        self.ran += [held.job for held in self._engine.release()]
        return len(self.ran)

    def all_went(self):
        """Tell whether all went, in order."""
        return self.work() == self.count and self.ran == list(range(self.count))


@pytest.mark.parametrize("policy", ["closed", "open"])
def test_a_script_that_is_gone(own, admin, caplog, policy):
    """As after a failover: jobs that are held go on at their rate, nothing is lost, and it is no outage."""
    bucket = RedisTokenBucket("b", 2, 50, url=own.url, on_outage=policy)
    jobs = Jobs(bucket, 30)
    began = time.monotonic()
    while not jobs.all_went():
        admin.script_flush()
        time.sleep(0.01)
    assert 27 / 50 < time.monotonic() - began < 10
    assert caplog.records == []
    wait_for(lambda: bucket.tokens == 2)
    admin.script_flush()
    assert bucket.allow()


def test_a_gate_whose_bucket_cannot_be_used(own, admin, caplog):
    """Its jobs wait, and go when it can be used again; those of other buckets go meanwhile."""
    caplog.set_level("INFO", "rate_limiter")
    bad, good, local = (
        RedisTokenBucket(name, 2, 40, url=own.url, on_outage=policy)
        for name, policy in (("bad", "closed"), ("good", "closed"), ("local", "local"))
    )
    for bucket in bad, local:
        assert bucket.allow(0.1)
        admin.set(key_of(bucket), "text")
    waiting, going = Jobs(bad, 20), Jobs(good, 20)
    alone, both = Jobs(local, 20), Jobs(AllOf(good, local), 20)
    every = waiting, going, alone, both
    wait_for(lambda: [jobs.work() for jobs in every][1:] == [20] * 3)
    assert waiting.ran == []
    admin.delete(key_of(bad))
    wait_for(waiting.all_went)
    assert all(jobs.all_went() for jobs in every)
    own_errors = [line for line in lines(caplog, "ERROR") if "cannot be used" in line]
    assert len(own_errors) == len(lines(caplog, "ERROR")) == 2
    assert sum("can be used again" in line for line in lines(caplog, "INFO")) == 1


def test_a_gate_goes_on_beside_a_bucket_that_cannot_be_used(own, admin, monkeypatch):
    """No job of another bucket waits until that one is asked again."""
    monkeypatch.setattr(outage, "_PAUSE", DEADLINE)
    bad, good = (
        RedisTokenBucket(name, 2, 40, url=own.url, on_outage="closed") for name in ("bad", "good")
    )
    admin.set(key_of(bad), "text")
    waiting = Jobs(bad, 1)
    wait_for(lambda: bad.known.is_outage)
    going = Jobs(good, 20)
    wait_for(going.all_went, DEADLINE / 2)
    assert waiting.work() == 0


def test_a_gate_whose_answer_makes_no_sense(own, monkeypatch, caplog):
    """No job of it, or of another bucket in the same call, waits for ever."""
    bad, good = (
        RedisTokenBucket(name, 2, 50, url=own.url, on_outage="closed") for name in ("bad", "good")
    )
    with monkeypatch.context() as broken:
        broken.setattr(bad._state, "learn", int)  # raises TypeError for what it is given
        waiting, going = Jobs(bad, 10), Jobs(good, 10)
        wait_for(lambda: waiting.work() == 0 and going.all_went())
        assert len(lines(caplog, "ERROR")) == 1
    wait_for(waiting.all_went)


@pytest.fixture
def cluster(redis_lab, own):
    """Return a lab whose limits are in a Redis of their own."""
    redis_lab.settings["limits_url"] = f"{own.url}?socket_timeout=10"
    return redis_lab


def assert_jobs_hold_out(lab, admin, begin, end):
    """Send jobs of all policies, before a fault and with it: each runs once. Return the worker's output."""
    counts = {"shared": 60, "closed": 5, "open": 5}
    with start(lab, module="cluster_app", environment={"PYTHONWARNINGS": "ignore"}) as one:
        for number in range(60):
            lab.send("shared", number)
        if begin is not None:
            lab.wait_for_runs("shared", 5)
            begin(admin)
        time.sleep(0.2)
        for number in range(5):
            lab.send("closed", number)
            lab.send("open", number)
        lab.wait_for_runs("open", 5)
        lab.wait_for_runs("shared", 30)
        time.sleep(1.2)  # it is asked again, in vain
        assert len(lab.runs("closed")) <= 1
        end(admin)
        for task, count in counts.items():
            assert sorted(lab.wait_for_runs(task, count)) == list(range(count))
        assert one.running
        output = one.output
    assert output.count("does not answer") == 1
    assert output.count("answers again") == 1
    assert "Traceback" not in output
    assert "secret" not in output
    for task, count in counts.items():
        assert len(lab.runs(task)) == count
    return output


def test_a_worker_without_memory_in_redis(cluster, admin):
    """A real one, with jobs held."""
    begin, end, says = OF_SERVER["out of memory"]
    assert says in assert_jobs_hold_out(cluster, admin, begin, end)


def test_a_worker_with_a_wrong_password(cluster, own, admin):
    """It starts, and has the right one later."""
    cluster.settings["limits_url"] = f"{url_of(own, 'secret')}?socket_timeout=10"
    admin.config_set("requirepass", "another")

    def end(admin):
        admin.config_set("requirepass", "secret")

    assert "AuthenticationError" in assert_jobs_hold_out(cluster, admin, None, end)


# -- the process -------------------------------------------------------------------------------------


@pytest.fixture
def stopped(own):
    """Return what stops the server, and what lets it go on."""
    yield (
        lambda: own.process.send_signal(signal.SIGSTOP),
        lambda: own.process.send_signal(signal.SIGCONT),
    )
    own.process.send_signal(signal.SIGCONT)


def in_a_child(call):
    """Fork; return the child, which ends well if the call returns something true."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        try:
            os._exit(0 if call() else 1)
        except BaseException:  # noqa: BLE001 - the child of a test must not go on with other tests
            traceback.print_exc()
        os._exit(2)
    return child


@pytest.mark.parametrize("own_client", [False, True], ids=["url", "client"])
def test_a_fork_with_a_call_out(own, stopped, own_client):
    """A child may use the bucket at once: neither locks nor connections are shared, nor what was asked."""
    stop, go_on = stopped
    options = {"url": own.url}
    if own_client:
        options = {"client": redis.Redis.from_url(own.url, socket_timeout=20, retry=None)}
    bucket = RedisTokenBucket("b", 100, 0.001, on_outage="closed", **options)
    assert bucket.allow()
    with ThreadPoolExecutor(4) as threads:
        stop()
        calls = [threads.submit(bucket.allow) for _ in range(4)]
        wait_for(lambda: sum(each.running() for each in calls) == 4)
        time.sleep(0.1)
        children = [in_a_child(lambda: bucket.allow(5) and bucket.tokens < 95) for _ in range(3)]
        time.sleep(0.1)
        go_on()
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
        assert all(call.result(DEADLINE) for call in calls)
    assert bucket.tokens == pytest.approx(100 - 1 - 4 - 15, abs=0.5)


def test_a_fork_while_a_gate_asks(own, stopped):
    """The child asks for itself; what the parent has asked for is the parent's."""
    stop, go_on = stopped
    bucket = RedisTokenBucket("b", 100, 0.001, url=own.url, on_outage="closed")
    asked = bucket.for_gate()

    def take():
        asked.jobs_wait(1)
        wait_for(lambda: asked.take_or_delay() == 0.0, 20)
        asked.jobs_wait(0)
        return True

    assert take()
    stop()
    asked.jobs_wait(2)
    asked.take_or_delay(2)
    wait_for(lambda: asked._asker._sent)
    child = in_a_child(take)
    go_on()
    assert os.waitpid(child, 0)[1] == 0
    wait_for(lambda: asked.take_or_delay(2) == 0.0)
    asked.jobs_wait(0)
    wait_for(lambda: bucket.tokens == pytest.approx(100 - 1 - 1 - 2, abs=0.5))


class TimeIsUpError(Exception):
    """Like Celery's ``SoftTimeLimitExceeded``."""


@contextlib.contextmanager
def time_limit(seconds):
    """Raise an error in the midst of what runs after so many seconds."""

    def end(*_):
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_time_limit_within_a_wait(own, admin):
    """What was promised is given up, and nothing is taken: the next caller does not wait for it."""
    bucket = RedisTokenBucket("b", 2, 1, url=own.url, on_outage="closed")
    bucket.wait(2)
    with pytest.raises(TimeIsUpError), time_limit(0.1):
        bucket.wait(2)
    level, promised = map(float, admin.hmget(key_of(bucket), "l", "o"))
    assert promised == 0
    assert 0 <= level < 0.5
    assert bucket.take_or_delay(1) <= 1


def test_a_time_limit_within_a_call(own, stopped):
    """The answer that still comes is nobody else's, and no caller waits behind the one that has left."""
    stop, go_on = stopped
    bucket = RedisTokenBucket("b", 30, 0.001, url=own.url, on_outage="closed")
    assert bucket.allow()
    for number in range(22):  # more than the calls that may be out
        stop()
        with pytest.raises(TimeIsUpError), time_limit(0.01):
            bucket.wait(1 + number / 100)
        go_on()
    assert bucket.allow()
    assert bucket.tokens == pytest.approx(float(own_level(own, bucket)), abs=0.01)


def own_level(own, bucket):
    with redis.Redis.from_url(own.url) as client:
        return client.hget(key_of(bucket), "l")


GREENLETS = """
from gevent import monkey; monkey.patch_all()
import logging, sys, gevent
from rate_limiter.redis_bucket import RedisTokenBucket
logging.basicConfig(level="INFO")
bucket = RedisTokenBucket("b", 600, 1000, url=sys.argv[1], on_outage="closed")
def use(number):
    if number % 2:
        return bucket.allow()
    bucket.wait()
    return True
calls = [gevent.spawn(use, number) for number in range(1000)]
gevent.joinall(calls, timeout=40, raise_error=True)
print(sum(bool(call.value) for call in calls), all(call.successful() for call in calls))
"""


def test_a_thousand_greenlets(own, admin):
    """They come through few connections, each in its turn, and that is no outage."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", GREENLETS, f"{own.url}?socket_timeout=10"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.stderr == ""
    granted, all_ended = done.stdout.split()
    assert all_ended == "True"
    assert 600 <= int(granted) <= 1000
    assert admin.info("clients")["maxclients"] > 1000
    assert admin.info("stats")["total_connections_received"] < 40


@pytest.mark.parametrize("most", [1, 3])
def test_a_client_with_few_connections(own, most, caplog):
    """Calls wait for one another, and that is no outage."""
    client = redis.Redis.from_url(own.url, max_connections=most)
    bucket = RedisTokenBucket("b", 1000, 0.001, client=client, on_outage="closed")
    asked = bucket.for_gate()
    asked.jobs_wait(200)
    with ThreadPoolExecutor(20) as threads:
        assert all(threads.map(lambda _: bucket.allow(), range(200)))
        wait_for(lambda: asked.take_or_delay() == 0.0)
    assert caplog.records == []


# -- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"client": "redis://:secret@localhost"}, "client must be a redis.Redis, not a builtins.str"),
        (
            {"client": redis.asyncio.Redis(password="secret")},
            "client must be a redis.Redis, not a redis",
        ),
        ({"url": b"redis://:secret@localhost"}, "url must be text, not a bytes"),
        ({"url": ["redis://:secret@localhost"]}, "url must be text, not a list"),
        ({"url": "x://:secret@localhost"}, "url must be the URL of a Redis: Redis URL must specify"),
        ({"url": "redis://:sec/ret@localhost"}, "see redis.Redis.from_url"),
        ({"url": "redis://:secret/scheme@localhost"}, "see redis.Redis.from_url"),
        ({"url": "redis://:secret@localhost?visibility_timeout=1"}, "visibility_timeout"),
        ({"url": "redis://:secret@localhost:port"}, "see redis.Redis.from_url"),
    ],
)
def test_wrong_places_show_no_password(arguments, says):
    """The error says what was expected, in all of its traceback."""
    with pytest.raises((TypeError, ValueError), match="^(url|client) must be ") as error:
        RedisTokenBucket("b", 1, 1, **arguments)
    assert says in str(error.value)
    assert "sec/" not in str(error.value)
    text = "".join(traceback.format_exception(error.value))
    assert "secret" not in text.replace("**arguments", "")


SETTINGS = {"rate_limiter_limits": {"free": {"rate": "100/s", "per": "cluster"}}}


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("x://:secret@localhost", "url must be the URL of a Redis: "),
        (
            ":secret@localhost",
            "rate_limiter_redis must be a URL such as 'redis://localhost/1', or the name of an environment ",
        ),
        ("NO_SUCH_VARIABLE", "rate_limiter_redis must be "),
        ("redis://:secret@localhost:port", "url must be the URL of a Redis: "),
    ],
)
def test_a_wrong_setting_at_start(tmp_path, setting, says):
    """The worker does not start, says why, and shows no password."""
    lab = Lab(tmp_path, "amqp://nobody.invalid")
    lab.settings["limits_url"] = "redis://nobody.invalid"
    worker = start(lab, module="cluster_app", rate_limiter_redis=setting, **SETTINGS)
    output = fail_at_start(worker)
    assert f"rate_limiter_limits['free']: {says}" in output
    assert ("and NO_SUCH_VARIABLE is not set" in output) is setting.isidentifier()
    assert "secret" not in output


def test_a_password_in_the_environment(redis_lab, own, admin):
    """`celery report` shows the name of the variable. The worker has the URL."""
    admin.config_set("requirepass", "secret")
    redis_lab.settings["limits_url"] = redis_lab.settings["broker_url"]
    settings = {"rate_limiter_redis": "LIMITS_URL", **SETTINGS}
    variables = {"LIMITS_URL": url_of(own, "secret")}
    with start(redis_lab, module="cluster_app", environment=variables, **settings) as one:
        redis_lab.send("free", 1)
        redis_lab.wait_for_runs("free", 1)
        conf = redis_lab.inspect(one, "conf")
        report = redis_lab.inspect(one, "report")["ok"]
    assert admin.keys("rate_limiter:*")
    assert conf["rate_limiter_redis"] == "LIMITS_URL"
    assert "LIMITS_URL" in report
    assert "secret" not in report + json.dumps(conf)
