"""What is counted under each limit, in one process and in several."""

import gc
import logging
import os
import signal
import tempfile
import weakref

import pytest
from engine_lab import numbers

from rate_limiter import TokenBucket
from rate_limiter.gating import tally
from rate_limiter.gating.limit import Demand, Limit
from rate_limiter.gating.tally import Observer, observers, share_tallies, tally_of
from rate_limiter.testing import ManualClock

bucket = TokenBucket(100, 100)


@pytest.fixture
def limit():
    return Limit(bucket)


def tell(name, *arguments):
    for observer in observers:
        getattr(observer, name)(*arguments)


def in_child(action):
    """Fork, and return the child's process id."""
    pid = os.fork()
    if not pid:
        try:
            action()
        finally:
            os._exit(0)
    return pid


def test_counts_each_outcome(limit):
    """Every outcome has its number; what an admitted job paid and waited is added up."""
    demand = Demand(bucket, 3, limit)
    tell("admitted", "job", [demand], 0.0, None)
    tell("admitted", "job", [demand], 2.0, limit)
    tell("admitted", "job", [demand], 1.5, limit)
    tell("refused", "job", demand, 9.0, "raise")
    tell("failed", "job", limit, ValueError())
    tell("skipped", "job", limit)
    tell("given_back", limit, 2)
    assert numbers(limit) == {
        "admitted": 3,
        "tokens": 7,
        "refused": 1,
        "failed": 1,
        "skipped": 1,
        "waited": 3.5,
        "longest": 2.0,
    }


def test_counts_a_job_once_for_a_limit_of_several_buckets(limit):
    """A limit that takes from several buckets counts the job, and its tokens, once."""
    tell("admitted", "job", [Demand(bucket, 2, limit), Demand(TokenBucket(9, 1), 2, limit)], 0, None)
    assert numbers(limit) == {"admitted": 1, "tokens": 2}


def test_every_observer_hears_every_outcome():
    """An observer's methods do nothing unless they are overridden, so one may override a single one."""
    for name in ("held", "admitted", "refused", "skipped", "failed", "forgotten", "given_back"):
        assert callable(getattr(Observer(), name))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_processes_count_together(limit):
    """Once shared, what forked processes count is in one sum, and what came before the sharing too."""
    demand, other = Demand(bucket, 2, limit), Limit(bucket)
    tell("admitted", "job", [demand], 5.0, limit)
    share_tallies([limit, other])
    share_tallies([limit])  # stays as it is

    def count():
        for _ in range(1000):
            tell("admitted", "job", [demand], 1.0, limit)

    for child in [in_child(count) for _ in range(4)]:
        os.waitpid(child, 0)
    tell("skipped", "job", other)
    assert numbers(limit) == {
        "admitted": 4001,
        "tokens": 8002,
        "waited": 4005.0,
        "longest": 5.0,
    }
    assert numbers(other) == {"skipped": 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_nothing_is_lost_with_a_killed_process(limit):
    """A process that is killed leaves its numbers, and the next one goes on in its row."""
    share_tallies([limit])
    demand = Demand(bucket, 1, limit)

    def count_and_die():
        for _ in range(10):
            tell("admitted", "job", [demand], 0.0, None)
        os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(50):
        os.waitpid(in_child(count_and_die), 0)
    assert numbers(limit) == {"admitted": 500, "tokens": 500}
    table = tally_of(limit)._table
    assert sum(table._memory[:256]) <= 3  # rows are used again


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_descriptor_that_belongs_to_another_file_now_is_let_alone():
    """Where a daemon has closed all descriptors, and opened files of its own, these stay open and unlocked."""
    limit = Limit(TokenBucket(10, 10))
    share_tallies([limit])
    table = weakref.ref(tally_of(limit)._table)
    number = table()._file
    with tempfile.TemporaryFile() as theirs:
        os.dup2(theirs.fileno(), number)
        assert not table()._lock(7)
        del limit
        gc.collect()
        assert table() is None
        assert os.path.sameopenfile(theirs.fileno(), number)
    os.close(number)


def test_an_observer_that_fails_or_is_slow_is_logged_once(caplog, monkeypatch):
    """Not at each job; and the others are told all the same."""
    clock = ManualClock()
    monkeypatch.setattr(tally, "perf_counter", clock)
    caplog.set_level(logging.WARNING, "rate_limiter")
    told = []

    class Bad(Observer):
        def skipped(self, job, limit):
            clock.advance(0.06)
            raise ValueError(job)

    class Good(Observer):
        def skipped(self, job, limit):
            told.append(job)

    bad, good = Bad(), Good()
    observers.extend([bad, good])
    try:
        for number in range(3):
            tally.tell("skipped", number, Limit(TokenBucket(1, 1), name="limit"))
    finally:
        observers.remove(bad)
        observers.remove(good)
    assert told == [0, 1, 2]
    failed, slow = [record.getMessage() for record in caplog.records]
    assert "failed. Further failures are not logged" in failed
    assert "holds up all jobs" in slow
