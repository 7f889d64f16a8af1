"""Calls that are no jobs of their own (inline, chunks, map, starmap) pay, and so does what passes the gate."""

import celery
import pytest
from celery import group
from harness import DEADLINE, Lab, wait_for
from limits import start

from rate_limiter import RateLimitExceeded

SETTINGS = {"rate_limiter_limits": {"in settings": "20/s"}}
PLACES = ["at gate", "in settings", "attribute", "decorated"]


def started(lab, pool, **options):
    return start(lab, pool=pool, module="inline_app", **SETTINGS, **options)


@pytest.fixture(scope="module", params=["prefork", "threads", "solo"])
def shop(request, redis_url, tmp_path_factory):
    """Yield a lab, its worker and the worker's pool."""
    url = redis_url()
    lab = Lab(tmp_path_factory.mktemp("inline"), url, url)
    with started(lab, request.param) as worker:
        yield lab, worker, request.param
    lab.close()


def elements(lab, name, how):
    """Send nine calls of a task that are no jobs of their own; return the results."""
    task = lab.app.signature(name)
    if how == "chunks":  # three jobs with three calls each
        parts = [[(number,) for number in range(first, first + 3)] for first in (0, 3, 6)]
        jobs = [
            lab.app.signature("celery.starmap", kwargs={"task": task, "it": part}) for part in parts
        ]
        found = group(jobs, app=lab.app)().get(DEADLINE)
        return sorted(number for part in found for number in part)
    if how == "starmap":
        options = {"task": task, "it": [(number,) for number in range(9)]}
        return lab.app.send_task("celery.starmap", kwargs=options).get(DEADLINE)
    if how == "map":
        options = {"task": task, "it": list(range(9))}
        return lab.app.send_task("celery.map", kwargs=options).get(DEADLINE)
    return lab.send("caller", name, how, list(range(9))).get(DEADLINE)


@pytest.mark.parametrize("how", ["chunks", "starmap", "map", "call", "run"])
@pytest.mark.parametrize("name", PLACES)
def test_each_call_pays(shop, name, how):
    """Wherever the limit is declared, each element and each inline call takes its tokens, at one rate."""
    lab, _, _ = shop
    before, paid = len(lab.log(name)), len(lab.taken(name))
    assert elements(lab, name, how) == list(range(9))
    runs = sorted(entry.at for entry in lab.log(name)[before:])
    assert len(runs) == 9
    # capacity 2 in the settings: a tenth of a second's worth
    capacity = 1 if name in ("at gate", "decorated") else 2
    for first, start_at in enumerate(runs):
        for count, at in enumerate(runs[first:], 1):
            assert count <= capacity + 20 * (at - start_at + 0.05)
    assert (len(runs) - capacity) / (runs[-1] - runs[0]) > 10
    if name in ("at gate", "decorated"):
        assert lab.taken(name)[paid:] == [1] * 9


def test_a_nested_run_pays_the_gates_limit_too(shop):
    """task.run() in its own body pays the decorator's limit and the gate's."""
    lab, _, _ = shop
    lab.send("twofold", 3).get(DEADLINE)
    assert lab.taken("twofold") == lab.taken("twofold at gate") == [1] * 4


def test_a_limit_of_a_queue_is_for_no_inline_call(shop):
    """What is called inline came from no queue."""
    lab, _, _ = shop
    assert elements(lab, "of the queue", "starmap") == list(range(9))


@pytest.mark.parametrize(("name", "shared"), [("keyed", False), ("picked", True)])
def test_what_is_one_bucket_a_process_is_told_of_once(shop, name, shared):
    """Where inline calls have one rate per pool process, one warning for each limit says so.

    The buckets that a callable picks from exist when the pool forks, so they are shared.
    """
    lab, worker, pool = shop

    def both_have_run():
        elements(lab, name, "chunks")
        return pool != "prefork" or len(set(lab.runs(f"{name} in"))) == 2

    wait_for(both_have_run)
    lines = [line for line in worker.output.splitlines() if f"Limit {name}: calls of {name}" in line]
    assert len(lines) == (pool == "prefork" and not shared)
    for line in lines:
        assert "WARNING" in line
        assert "one rate per pool process" in line


def test_a_job_that_passes_the_gate_pays_in_the_pool(shop):
    """A Strategy that goes straight to the pool is told of at the start; its jobs are at the rate."""
    lab, worker, _ = shop
    results = [lab.send("past", number) for number in range(9)]
    assert sorted(result.get(DEADLINE) for result in results) == list(range(9))
    assert lab.taken("past") == [1] * 9
    lab.assert_bound("past", capacity=1, rate=20)
    (line,) = [line for line in worker.output.splitlines() if "Strategy" in line]
    assert "WARNING" in line
    assert "past has a Strategy of its own" in line


if celery.VERSION >= (5, 7):  # from then on it can spawn

    @pytest.fixture(scope="module")
    def spawned(redis_url, tmp_path_factory):
        """Yield a lab and its worker with spawned pool processes."""
        url = redis_url()
        lab = Lab(tmp_path_factory.mktemp("spawned"), url, url)
        with started(lab, "prefork", worker_pool_start_method="spawn", concurrency=1) as worker:
            yield lab, worker
        lab.close()

    def test_a_spawned_process_obeys_the_gate(spawned):
        """What the gate refuses, or cannot price, fails in the task, whose body does not run."""
        lab, _ = spawned
        results = [lab.send("refused here", number) for number in range(3)]
        assert results[0].get(DEADLINE) == 0
        for result in results[1:]:
            with pytest.raises(RateLimitExceeded, match="rate limit exceeded: refused here"):
                result.get(DEADLINE)
        with pytest.raises(ValueError, match="task poison, limit bad price: tokens=… raised KeyError"):
            lab.send("poison", 1).get(DEADLINE)
        assert lab.runs("refused here") == [0]
        assert not lab.runs("poison")

    def test_a_job_pays_once_in_a_spawned_process(spawned):
        """What the gate was paid is not paid again in the task."""
        lab, _ = spawned
        for number in range(5):
            lab.send("at gate", number).get(DEADLINE)
        assert lab.taken("at gate") == [1] * 5

    @pytest.mark.parametrize("name", PLACES)
    def test_each_call_pays_in_a_spawned_process(spawned, name):
        """Elements of chunks take from a bucket of the process, and a warning says so."""
        lab, worker = spawned
        before = len(lab.log(name))
        assert elements(lab, name, "chunks") == list(range(9))
        runs = sorted(entry.at for entry in lab.log(name)[before:])
        assert (9 - 2) / (runs[-1] - runs[0] + 0.05) <= 20
        lines = [line for line in worker.output.splitlines() if f"Limit {name}: calls of" in line]
        assert len(lines) == 1

    def test_nothing_is_declared_in_a_spawned_process(spawned):
        """Gate() and limit() in a pool process are refused there too."""
        lab, _ = spawned
        first, second = lab.send("too late").get(DEADLINE)
        assert "has a Gate already" in first
        assert "before the worker starts" in second
