"""Each execution pays once: at the gate or in the decorator, never at both, never at neither."""

import pytest
from harness import Lab, wait_for

KEY = "rate_limiter_receipt"


#: Pool, concurrency, gate.
PREFORK = {"prefork-gate": ("prefork", 2, True), "prefork-decorator": ("prefork", 1, False)}
OTHERS = {"threads-gate": ("threads", 2, True), "solo-decorator": ("solo", 1, False)}
WORKERS = PREFORK | OTHERS


@pytest.fixture(scope="module", params=WORKERS)
def lab(request, redis_url, tmp_path_factory):
    """Yield a lab with a worker that has a gate, or has none."""
    pool, concurrency, gate = WORKERS[request.param]
    lab = Lab(tmp_path_factory.mktemp("receipts"), redis_url())
    with lab.worker(pool, concurrency, gate=gate):
        yield lab
    lab.close()


@pytest.mark.parametrize(
    ("how", "times"), [("once", 1), ("retry", 2), ("run", 2), ("call", 2)], ids=lambda value: f"{value}"
)
def test_each_execution_pays_once(lab, how, times):
    """A job pays once; so does its retry, a nested task.run(), and an inline task()."""
    runs, taken = len(lab.runs("again")), len(lab.taken("again"))
    for _ in range(3):
        lab.send("again", how)
    lab.wait_for_runs("again", runs + 3 * times)
    wait_for(lambda: lab.send("free", how) and how in lab.runs("free"))  # for a taking too many
    assert len(lab.runs("again")) == runs + 3 * times
    assert lab.taken("again")[taken:] == [1] * (3 * times)


@pytest.mark.parametrize(("how", "times"), [("retry", 2), ("call that retries", 3)])
def test_nothing_of_ours_gets_into_a_retry(lab, how, times):
    """No run of a job sees anything of ours in its headers, which retry() sends along."""
    runs = len(lab.runs("again"))
    lab.send("again", how)
    wait_for(lambda: len(lab.runs("again")) == runs + times, 10)
    assert not any(lab.runs("again")[runs:])


@pytest.mark.parametrize("forged", ["forged", True, None, []], ids=repr)
def test_a_forged_receipt_is_not_believed(lab, forged):
    """A message with a receipt runs and pays like any other."""
    runs, taken = len(lab.runs("again")), len(lab.taken("again"))
    lab.send("again", "once", headers={KEY: forged})
    wait_for(lambda: len(lab.runs("again")) == runs + 1, 10)
    assert len(lab.taken("again")) == taken + 1


@pytest.mark.parametrize("lab", PREFORK, indirect=True)
def test_a_redelivery_pays(lab):
    """A job that runs again because its process was killed pays again."""
    lab.send("fatal")
    assert lab.wait_for_runs("fatal", 2) == [True, False]
    assert lab.taken("fatal") == [1, 1]


def test_a_stolen_receipt_is_not_believed(redis_lab):
    """The gate strips receipts from messages, even one that this very worker has issued."""
    with redis_lab.worker("threads"):
        redis_lab.send("limited", 0)
        receipt = redis_lab.wait_for_runs("receipt", 1)[0]
        assert receipt
        redis_lab.send("strict", 0, headers={KEY: receipt})
        redis_lab.wait_for_runs("strict", 1)
        assert redis_lab.runs("receipt")[1] is None
        assert redis_lab.taken("strict") == [1]
