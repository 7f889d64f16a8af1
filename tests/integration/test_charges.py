"""One rate per worker whatever the pool, per key, settled after the run, and paused by the remote."""

import celery
import pytest
from harness import DEADLINE, Lab, wait_for
from limits import start

from rate_limiter import RateLimitExceeded, RetryAfter

#: Pool, gate.
WAYS = {
    "prefork-gate": ("prefork", True),
    "prefork-decorator": ("prefork", False),
    "threads-gate": ("threads", True),
    "threads-decorator": ("threads", False),
}


@pytest.fixture(scope="module", params=WAYS)
def way(request, redis_url, tmp_path_factory):
    """Yield a lab, a worker on each pool, with and without gate, and whether there is one."""
    pool, gate = WAYS[request.param]
    url = redis_url()
    lab = Lab(tmp_path_factory.mktemp("charges"), url, url)
    with start(lab, pool=pool, gate=gate, module="charges_app") as worker:
        yield lab, worker, gate
    lab.close()


@pytest.mark.parametrize("settings", [{}, {"worker_max_tasks_per_child": 4}], ids=["", "replaced"])
def test_a_decorator_is_one_rate_for_a_prefork_worker(redis_lab, settings):
    """Four pool processes, each job in any of them, replaced or not: together they hold the rate."""
    with redis_lab.worker("prefork", 4, gate=False, **settings) as worker:
        for number in range(30):
            redis_lab.send("limited", number)
        redis_lab.wait_for_runs("limited", 30)
        assert "Shared with all pool processes" in worker.output
    assert sorted(redis_lab.runs("limited")) == list(range(30))
    taken = sorted(redis_lab.log("limited taken"), key=lambda entry: entry.at)
    for count, entry in enumerate(taken):
        assert entry.at - taken[0].at >= (count + 1 - 2) / 20 - 1e-6


def test_a_charge_is_settled_in_both_directions(way):
    """settle(actual) gives back what was not used, and takes what was used beyond; the last one counts."""
    lab, *_ = way
    for actual in ([2], [0], [5, 3, 1], []):
        assert lab.send("estimated", 5, *actual).get(DEADLINE) is None
    tokens = [10 - 2, 10 - 2, 10 - 3, 10 - 8]
    charged = [2, 0, 1, 5]
    assert lab.runs("estimated") == [
        [cost, left, left + 90] for cost, left in zip(charged, tokens, strict=True)
    ]
    assert lab.send("estimated", 1, 4).get(DEADLINE) is None
    assert lab.runs("estimated")[-1] == [4, -2, 88]  # in debt


def test_a_task_that_only_the_gate_limits_can_settle(way):
    """current_charge() knows what the gate was paid; without a gate it says that nothing was charged."""
    lab, _, gate = way
    if gate:
        for actual, left in ([0], 10), ([1], 9), ([], 4):
            lab.send("loose", *actual).get(DEADLINE)
            assert lab.runs("loose")[-1] == left
    else:
        with pytest.raises(RuntimeError, match="loose was charged nothing: no limit is declared"):
            lab.send("loose", 1).get(DEADLINE)


def test_what_the_gate_was_paid_is_given_back_where_the_decorator_refuses(way):
    """A job whose second limit refuses it in the task costs the first one nothing."""
    lab, *_ = way
    for count in range(1, 9):  # "easy" has 5 tokens
        lab.send("twice").get(DEADLINE)
        assert lab.runs("twice") == ["ran"] + ["instead"] * (count - 1)


def test_what_is_called_inline_settles_its_own_charge(way):
    """task.run() and task() in a task pay and settle for themselves, the caller for itself."""
    lab, *_ = way
    assert lab.send("outer").get(DEADLINE) is None
    assert lab.runs("inner tank refunded") == [49, 49]
    assert lab.runs("outer tank refunded") == [6]


def test_what_the_gate_was_paid_is_given_back_after_a_timeout(way):
    """A job whose second limit lets it wait for too long costs the first one nothing."""
    lab, *_ = way
    lab.send("late").get(DEADLINE)
    for _ in range(7):  # "late" has 5 tokens
        with pytest.raises(RateLimitExceeded):
            lab.send("late").get(DEADLINE)
    assert lab.runs("late") == ["ran"]
    assert lab.runs("late refunded") == [1] * 7


def test_a_pause_that_the_remote_wants(way):
    """RetryAfter: nobody is granted anything meanwhile, the job runs again, and it is no retry."""
    lab, *_ = way
    first = lab.send("remote", 1)
    lab.wait_for_runs("remote tried", 1)
    paused_at = lab.log("remote tried")[-1].at
    wait_for(lambda: any("Sent back" in line for line in way[1].output.splitlines()))
    later = lab.send("remote", 2, 0)
    assert first.get(DEADLINE) == 1
    assert later.get(DEADLINE) == 2
    assert [entry.value for entry in lab.log("remote tried")].count([1, 0]) == 2
    for entry in lab.log("remote"):
        assert entry.at - paused_at >= 1.0


def test_a_pause_is_no_failure_that_celery_retries(way):
    """autoretry_for=(Exception,) of a task that only the gate limits does not take RetryAfter for one."""
    lab, _, gate = way
    if gate:
        assert lab.send("loose remote", 5).get(DEADLINE) == 5
        assert lab.runs("remote tried").count([5, 0]) == 2


def test_a_remote_that_never_ends_its_pauses(way):
    """After ten pauses RetryAfter is the job's result."""
    lab, *_ = way
    with pytest.raises(RetryAfter) as error:
        lab.send("remote", 3, 99, 0.01).get(DEADLINE)
    assert error.value.retry_after == 0.01
    assert lab.runs("remote tried").count([3, 0]) == 11


def test_a_paused_job_expires(way):
    """A pause that outlasts a job's ``expires`` ends it as any expired job ends."""
    lab, *_ = way
    result = lab.app.send_task("remote", (4, 99, 0.3), expires=0.7)
    wait_for(lambda: result.state == "REVOKED")
    assert 2 <= lab.runs("remote tried").count([4, 0]) <= 4


def test_a_change_reaches_waiting_jobs(way):
    """configure() in a task: jobs that wait at the old rate, for a minute and more, go at the new one."""
    lab, _, gate = way
    count = 8 if gate else 2  # without a gate the one that waits keeps a pool slot
    for number in range(count):
        lab.send("changed", number)
    lab.wait_for_runs("changed", 1)
    lab.send("faster", 50.0).get(DEADLINE)
    runs = lab.wait_for_runs("changed", count)
    assert (runs if gate else sorted(runs)) == list(range(count))  # two slots may race for the first


def test_what_cannot_be_reached_is_told(way):
    """settle() of what the main process was paid from a BucketPerKey: an error in a pool process."""
    lab, worker, gate = way
    if "prefork" not in worker.output.split("concurrency:")[1].splitlines()[0]:
        assert lab.send("tenant's", "acme", 1, 0.5).get(DEADLINE) is None
    elif gate:
        with pytest.raises(RuntimeError, match="settle\\(\\) needs a TokenBucket"):
            lab.send("tenant's", "acme", 1, 0.5).get(DEADLINE)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_tenants_backlog_stands_before_nobody(lab, pool):
    """One FIFO per key: another tenant's jobs do not wait behind a backlog, and each key holds its rate."""
    for number in range(60):
        lab.send("tenant's", "big", number)
    for number in range(5):
        lab.send("tenant's", "small", number)
    with start(lab, pool=pool, module="charges_app"):
        wait_for(lambda: ["small", 4] in lab.runs("tenant's"))
    ran = lab.runs("tenant's")
    assert [number for tenant, number in ran if tenant == "small"] == list(range(5))
    big = [number for tenant, number in ran if tenant == "big"]
    assert big == list(range(len(big)))
    assert len(big) <= 20
    for tenant in "big", "small":
        taken = lab.log(f"tenant {tenant} taken")
        assert len(taken) >= 5
        for count, entry in enumerate(taken):
            assert entry.at - taken[0].at >= count / 5 - 1e-6


def test_a_bad_key_fails_its_job_alone(redis_lab):
    """A key that is none, or a missing one, is that job's result; the others go on."""
    lab = redis_lab
    with start(lab, module="charges_app"):
        with pytest.raises(
            ValueError, match="limit tenant's: key must be a str, an int, a UUID or a tuple"
        ):
            lab.send("tenant's", 1.5, 1).get(DEADLINE)
        with pytest.raises(ValueError, match="key=… raised"):
            lab.send("tenant's").get(DEADLINE)
        assert lab.send("tenant's", "acme", 1).get(DEADLINE) is None


if celery.VERSION >= (5, 7):  # from then on it can spawn pool processes

    def test_spawned_processes_believe_the_gate(redis_lab):
        """What shares no memory with the gate pays nothing again, and says that it cannot settle."""
        lab = redis_lab
        settings = {"worker_pool_start_method": "spawn"}
        with start(lab, pool="prefork", module="charges_app", **settings):
            for number in range(6):
                lab.send("limited", number)
            lab.wait_for_runs("limited", 6)
            assert lab.send("estimated", 1).get(DEADLINE) is None
            with pytest.raises(RuntimeError, match="settle\\(\\) needs a TokenBucket"):
                lab.send("estimated", 5, 1).get(DEADLINE)
        assert lab.taken("limited") == [1] * 6
        lab.assert_bound("limited", capacity=2, rate=20)
        assert lab.taken("tank") == [1, 5]
