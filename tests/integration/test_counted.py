"""What is counted under each limit is what happened, to the last job."""

import os
import random
import time
from collections import Counter

import pytest
from harness import wait_for
from limits import control, start, stats, waiting

#: How many jobs. `benchmarks/gate.py tally` takes 2,000.
JOBS = int(os.environ.get("TALLY_JOBS", "400"))

LIMITS = "sized", "tiered", "raised", "dropped", "retried"

#: Seconds after which some of the held jobs expire.
EXPIRES = 4.0

#: How many of the held jobs expire; as many are revoked.
GONE = 20

#: How many children of a prefork pool a job kills.
KILLED = 20


class Jobs:
    """Jobs of all kinds, and what became of them."""

    def __init__(self, lab):
        self.lab = lab
        self.results = {name: [] for name in LIMITS}

    def send(self, name, *arguments, **options):
        """Send one job."""
        self.results[name].append(self.lab.send(name, *arguments, **options))

    def send_all(self, pool):
        """Send them: some cost too much or nothing, some use more or less than they cost, some kill."""
        choose = random.Random(7).choice
        kills = KILLED if pool == "prefork" else 0
        for number in range(JOBS):
            name = LIMITS[number % len(LIMITS)]
            if name == "sized" and kills and number > JOBS // 8:
                self.send(name, 1, None, True)
                kills -= 1
            elif name == "sized":
                self.send(name, choose([1, 2, 3, 4, 5, 0, 21, "much"]), choose([None, None, 0, 1, 7]))
            elif name == "tiered":
                self.send(name, choose(["free", "basic", "premium", "premium", "unknown"]))
            else:
                self.send(name)
        assert not kills

    def truth(self, worker, *, gate):
        """Wait until every job has ended; return what has happened, by results, run log and output."""
        truth = {}
        for name, results in self.results.items():
            for result in results:
                wait_for(result.ready, 120)
            ends = Counter(
                type(result.result).__name__ if result.failed() else result.state for result in results
            )
            assert set(ends) <= {
                *("SUCCESS", "REVOKED", "ValueError", "RateLimitExceeded", "WorkerLostError")
            }
            runs = self.lab.runs(name)
            # The pool gives a job of a killed child to another one, where it has not heard of its begin.
            jobs = dict(runs)
            assert len(jobs) == ends["SUCCESS"] + ends["WorkerLostError"]
            paid = list(jobs.values()) if gate else [tokens for _, tokens in runs]
            refused = {
                "raised": ends["RateLimitExceeded"],
                "dropped": ends["REVOKED"],
                "retried": worker.output.count("Sent back retried["),
            }
            truth[name] = {
                "admitted": len(paid),
                "tokens": sum(paid),
                "refused": refused.get(name, 0),
                "failed": ends["ValueError"],
                "skipped": 0 if name in refused else ends["REVOKED"],
                "returned": 0,
                "parked": 0,
                "shadowed": 0,
            }
        return truth


def without_times(counted):
    """Return what is counted, but for the seconds."""
    return {
        name: {what: number for what, number in each.items() if what not in ("waited", "longest")}
        for name, each in counted.items()
    }


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent"])
def test_a_gate_counts_what_happens(redis_lab, pool):
    """Admitted, refused, failed, skipped and tokens are exact: with revoked, expired and killed jobs."""
    jobs = Jobs(redis_lab)
    with start(redis_lab, pool=pool, module="counted_app") as worker:
        jobs.send("sized", 20)  # takes all that is there at first
        for _ in range(GONE):
            jobs.send("sized", 1, expires=EXPIRES)
        sent_at = time.monotonic()
        jobs.send_all(pool)
        wait_for(lambda: not waiting(redis_lab))
        revoked = [result.id for result in jobs.results["sized"][-GONE:]]
        redis_lab.app.control.revoke(revoked, destination=[worker.node])
        assert stats(redis_lab, worker)["rate_limiter"]["held"].keys() >= {"sized", "tiered"}
        time.sleep(max(0.0, sent_at + EXPIRES + 0.1 - time.monotonic()))
        assert control(redis_lab, worker, "open_buckets")
        truth = jobs.truth(worker, gate=True)
        gate = stats(redis_lab, worker)["rate_limiter"]
    assert without_times(gate["limits"]) == truth
    assert gate["held"] == {}
    sized = gate["limits"]["sized"]
    assert EXPIRES / 2 < sized["longest"] < sized["waited"] < sized["longest"] * sized["admitted"]
    assert truth["sized"]["skipped"] > GONE
    assert all(truth[name]["refused"] for name in ("raised", "dropped", "retried"))


def test_prefork_counts_what_happens_without_a_gate(redis_lab):
    """The decorator counts in shared memory, so that nothing is lost with a child that is killed."""
    jobs = Jobs(redis_lab)
    with start(redis_lab, pool="prefork", concurrency=4, gate=False, module="counted_app") as worker:
        jobs.send_all("prefork")
        truth = jobs.truth(worker, gate=False)
        counted = redis_lab.send("counted").get(timeout=40)
    assert without_times(counted) == truth
    assert all(truth[name]["refused"] for name in ("raised", "dropped", "retried"))
    assert counted["sized"]["failed"]
    assert 0 < counted["sized"]["longest"] < counted["sized"]["waited"]
