"""What both gates decide alike, with a host that notes what it is asked for."""
# ruff: noqa: D102 - the methods are documented at Host

import logging

import pytest
from engine_lab import Gate, Lab

from rate_limiter import TokenBucket
from rate_limiter.gating.engine import Engine
from rate_limiter.gating.limit import Limit
from rate_limiter.gating.tally import Observer, observers, tally_of
from rate_limiter.testing import ManualClock


class Counting(TokenBucket):
    """Counts how often it is asked."""

    __slots__ = ("asked",)

    def take_or_delay(self, tokens=1):
        self.asked = getattr(self, "asked", 0) + 1
        return super().take_or_delay(tokens)


def test_says_what_becomes_of_a_job():
    """A job goes while there are tokens, else it is held, and goes in its turn; all is counted."""
    lab = Lab()
    assert lab.offer("a", "b", "c") == ["go", "held", "held"]
    assert lab.gate.room == (2, 600)
    assert lab.run(5) == ["b", "c"]
    assert lab.gate.room == (0, 0)
    assert lab.numbers() == {"admitted": 3, "tokens": 3, "waited": 3, "longest": 2}


def test_a_limit_that_does_not_wait_ends_the_job():
    """The host ends it as when_limited says; where it cannot, the job is held."""
    lab = Lab(when_limited="drop")
    assert lab.offer("a", "b") == ["go", "ended"]
    assert lab.gate.asked == [("refuse", "b")]
    lab.gate.takes_back = False
    assert lab.offer("c") == ["held"]
    assert lab.run(5) == ["c"]
    assert lab.numbers() == {"admitted": 2, "tokens": 2, "refused": 1, "waited": 1, "longest": 1}


@pytest.mark.parametrize("cost", [0, -1, 2, "2", None, float("nan")])
def test_a_poison_job_fails_alone(cost):
    """A job whose cost can never be granted fails with a text that says why; the next one goes."""
    lab = Lab(tokens=lambda job: cost if job == "poison" else 1)
    assert lab.offer("poison", "a") == ["ended", "go"]
    ((what, job, error),) = lab.gate.asked
    assert (what, job) == ("fail", "poison")
    assert "task job, limit limit: tokens is" in error
    assert lab.numbers() == {"admitted": 1, "tokens": 1, "failed": 1}


def test_a_held_job_that_can_never_be_granted_fails_in_its_turn():
    """A capacity that was lowered below a job's cost fails that job alone."""
    lab = Lab(capacity=2, tokens=lambda job: 2 if job == "heavy" else 1)
    assert lab.offer("first", "heavy", "light") == ["go", "held", "held"]
    lab.bucket.configure(capacity=1)
    assert lab.run(5) == ["light"]
    assert [asked[:2] for asked in lab.gate.asked] == [("fail", "heavy")]


def test_a_job_that_is_gone_costs_nothing():
    """A revoked job is skipped when its turn comes."""
    lab = Lab()
    lab.offer("a", "revoked", "b")
    assert lab.run(1) == ["b"]
    assert lab.numbers()["skipped"] == 1


def test_what_is_forgotten_is_told():
    """clear() returns what was held, and observers hear of it."""
    lab, heard = Lab(), []

    class Listener(Observer):
        def forgotten(self, jobs):
            heard.extend(jobs)

    observers.append(listener := Listener())
    try:
        lab.offer("a", "b", "c")
        assert lab.engine.clear() == heard == ["b", "c"]
        assert lab.engine.clear() == []
    finally:
        observers.remove(listener)
    assert (dict(lab.engine.room.held_by), lab.run(9)) == ({}, [])


def test_a_queue_is_paused_at_the_bound_and_resumed_at_half():
    """overflow="pause": the queue that brought the last job is left alone until half of them are gone."""
    lab = Lab(overflow="pause", max_held=4)
    lab.offer(*"abcde")
    assert lab.gate.asked == [("pause", "queue")]
    assert lab.run(1) == ["b"]
    assert lab.gate.asked == [("pause", "queue")]
    lab.run(2)
    assert lab.gate.asked == [("pause", "queue"), ("resume", "queue")]


@pytest.mark.parametrize("overflow", ["hold", "pause"])
def test_more_of_a_queue_may_come_until_a_bound_is_exceeded(overflow):
    """No more of the queue whose jobs exceed a bound; paused, it is left alone before that."""
    lab = Lab(overflow=overflow, max_held=4)
    takes = lab.engine.room.takes_more_of
    assert takes("queue")
    lab.offer(*"abcd")
    assert takes("queue")
    lab.offer("e")
    assert takes("queue") is (overflow == "hold")
    lab.offer("f")
    assert (takes("queue"), takes("another")) == (False, True)
    lab.run(1 if overflow == "hold" else 3)
    assert takes("queue")
    lab.offer(*"abcdefg")
    lab.engine.clear()
    assert takes("queue")


def test_a_limit_that_keeps_others_waiting_is_told_of_once():
    """Once it was beyond its bound for 10 s without a break, and not if it only was at its bound."""
    lab = Lab(max_held=4)

    def told():
        return [each for each in lab.gate.asked if each[0] == "stuck"]

    lab.offer(*range(5))
    lab.run(1)
    lab.offer(5, 6)
    lab.run(2)  # down to its bound
    lab.offer(7)
    lab.clock.now = 11
    lab.offer(8)
    assert told() == []
    lab.clock.now = 13
    lab.offer(9)
    assert told() == [("stuck", 7)]
    lab.clock.now = 30
    lab.offer(10)
    lab.engine.clear()
    lab.offer(*range(8))
    lab.clock.now = 50
    lab.offer(11)
    assert len(told()) == 1


def test_jobs_that_the_host_keeps_take_room():
    """What waits to be sent back counts towards the window and the bound, as a held job does."""
    lab = Lab(max_held=2)
    lab.engine.room.keep("kept", lab.limit)
    lab.offer("a", "b")
    assert lab.gate.room == (2, 2)
    assert not lab.engine.room.has_room(lab.limit)


def test_jobs_that_only_wait_for_their_end_take_room_beyond_the_bound():
    """They count towards the window until they are acknowledged, and towards the bound of no limit."""
    lab = Lab(max_held=2)
    ends = [f"end {number}" for number in range(20)]
    for job in ends:
        lab.engine.room.keep(job)
    lab.offer("a", "b")
    assert lab.gate.room == (21, 22)
    assert lab.engine.jobs() == ["b", *ends]
    assert lab.engine.room.has_room(lab.limit)
    assert all(lab.engine.room.let_go(job) for job in ends)
    assert not lab.engine.room.let_go(ends[0])
    lab.engine.settle()
    assert lab.gate.room == (1, 2)


@pytest.mark.parametrize("rate", [100, 10, 0.5, 1 / 60])
def test_a_bucket_is_asked_twice_a_job(rate):
    """With a backlog a job costs two questions, whatever the rate: one is granted, one forecasts."""
    lab = Lab(rate=rate, bucket=Counting)
    jobs = range(100)
    lab.offer(*jobs)
    assert lab.run(101 / rate) == list(jobs)[1:]
    assert lab.bucket.asked <= 2 * len(jobs)


@pytest.mark.parametrize("event", ["refund", "configure", "pause"])
def test_a_changed_bucket_wakes_its_jobs(event):
    """A bucket that is refunded or configured is asked at once; nobody looks at it before."""
    lab = Lab(rate=0.01, bucket=Counting)
    lab.offer("a", "b")
    lab.bucket.asked = 0
    assert lab.run(50) == []
    assert lab.bucket.asked == 0
    if event == "refund":
        lab.bucket.refund(1)
        assert lab.run(50) == ["b"]
    elif event == "configure":
        lab.bucket.configure(tokens_per_second=10)
        assert lab.run(51) == ["b"]
    else:
        lab.bucket.pause(1000)
        assert lab.run(1000) == []
        assert lab.bucket.asked == 1


def test_few_buckets_are_asked_in_one_turn():
    """However many keys are due at once, a turn of the loop asks 50 times at most."""
    lab = Lab()
    buckets = [Counting(1, 0.1, clock=lab.clock) for _ in range(1000)]
    for bucket in buckets:
        bucket.allow()
    limits = {number: (Limit(bucket),) for number, bucket in enumerate(buckets)}
    engine = Engine(lab.gate, lambda number: limits[number], clock=lab.clock)
    for number in limits:
        engine.offer(number, engine.plan(number))
    for bucket in buckets:
        bucket.asked = 0
    lab.clock.now = 10.5
    turns = 0
    while engine.next_due <= lab.clock.now:
        before = sum(bucket.asked for bucket in buckets)
        engine.release()
        assert sum(bucket.asked for bucket in buckets) - before <= 50
        turns += 1
    assert (turns, len(engine.room.held_by)) == (20, 0)


def test_waiting_is_told_once_and_its_end_once(caplog):
    """One INFO line when a limit begins to make jobs wait, one when it has stopped for 10 s."""
    caplog.set_level(logging.INFO, "rate_limiter")
    lab = Lab()
    lab.offer("a", "b", "c")
    lab.run(5)
    lab.offer("d", "e")
    lab.run(12)
    assert len(caplog.records) == 1
    lab.run(30)
    first, last = (record.getMessage() for record in caplog.records)
    assert first == "Limit limit: jobs begin to wait, the first for 1 s"
    assert last == "Limit limit: no job has waited for 10 s"
    assert lab.engine.next_due == float("inf")


def test_each_held_job_is_told_at_debug(caplog):
    """A DEBUG line for each held job names it, its limit and the delay."""
    caplog.set_level(logging.DEBUG, "rate_limiter")
    lab = Lab()
    lab.offer("a", "b")
    lines = [record.getMessage() for record in caplog.records if record.levelname == "DEBUG"]
    assert lines == ["Held b: limit limit has tokens for it in 1 s"]


@pytest.mark.parametrize(("took", "lines"), [(0.06, 1), (0.04, 0)])
def test_a_slow_callable_is_told_of_once(monkeypatch, caplog, took, lines):
    """A callable that takes over 50 ms is logged, once a limit, however many jobs it prices."""
    readings = iter(range(100))
    monkeypatch.setattr("rate_limiter.gating.engine.perf_counter", lambda: next(readings) * took)
    lab = Lab(capacity=9, tokens=lambda job: 1)
    lab.offer("a", "b", "c")
    assert len(caplog.records) == lines
    assert all("Limit limit: its callable took 60 ms" in each.getMessage() for each in caplog.records)


@pytest.mark.parametrize("policy", ["drop", "wait"])
def test_a_host_that_raises_loses_no_job(policy, caplog):
    """What a host raises is logged: the job is held or goes, and the jobs behind it go too."""
    lab = Lab(when_limited=policy, tokens=lambda job: 2 if job == "poison" else 1)
    lab.gate.raises = "refuse", "fail", "gone"
    assert lab.offer("a", "poison", "b", "c") == ["go", "ended", "held", "held"]
    assert lab.run(5) == ["b", "c"]
    assert all("OSError: no broker" in record.exc_text for record in caplog.records)
    told = {record.getMessage().partition(",")[0].partition(";")[0] for record in caplog.records}
    assert "Could not end poison" in told
    assert ("Could not refuse c" in told) == (policy == "drop")


def test_an_observer_that_raises_changes_nothing(caplog):
    """It is logged, the observers after it are told, and the jobs go their way."""
    told = []

    class Broken(Observer):
        def admitted(self, *_):
            raise ZeroDivisionError

        held = refused = failed = skipped = forgotten = admitted

    class Listener(Observer):
        def admitted(self, job, *_):
            told.append(job)

    both = Broken(), Listener()
    observers.extend(both)
    try:
        lab = Lab(when_limited="drop", tokens=lambda job: 2 if job == "poison" else 1)
        assert lab.offer("a", "b", "poison") == ["go", "ended", "ended"]
        lab.gate.takes_back = False
        assert lab.offer("revoked", "c", "d") == ["held"] * 3
        assert lab.run(1) == ["c"]
        assert lab.engine.clear() == ["d"]
    finally:
        for each in both:
            observers.remove(each)
    assert told == ["a", "c"]
    assert all("Broken object" in record.getMessage() for record in caplog.records)


def test_a_job_that_can_never_be_granted_fails_under_the_right_limit():
    """Of several limits the one is told whose capacity is too small, here and after a wait."""
    clock = ManualClock()
    small, large = TokenBucket(1, 1, clock=clock), TokenBucket(9, 1, clock=clock)
    first, second = limits = Limit(large, tokens=2), Limit(small)
    engine = Engine(Gate(), lambda _: limits, clock=clock)
    offer = lambda job: engine.offer(job, engine.plan("job"))[0]  # noqa: E731
    assert [offer("a"), offer("b")] == ["go", "held"]
    second.bucket.configure(capacity=0.5)
    clock.now = 2
    assert engine.release() == []
    assert offer("c") == "ended"
    assert [tally_of(limit).snapshot()["failed"] for limit in (first, second)] == [0, 2]


@pytest.mark.parametrize("limits", [20, 2000])
def test_a_job_costs_the_same_however_many_limits_hold_jobs(limits):
    """What is summed up over limits is kept, not counted anew for each job."""
    lab = Lab()
    bounds = []

    def window(limit):  # asked for each bound
        bounds.append(limit)
        return 4

    buckets = [TokenBucket(1, 0.001, clock=lab.clock) for _ in range(limits)]
    all_limits = [Limit(bucket, max_held=2) for bucket in buckets]
    engine = Engine(lab.gate, lambda number: (all_limits[number],), clock=lab.clock)
    engine.room.window = window
    for number in range(limits):
        for job in "abcd":
            engine.offer(f"{job}{number}", engine.plan(number))
    assert lab.gate.room == (2 * limits, 2 * limits)
    assert len(bounds) == 3 * limits
    bounds.clear()
    buckets[7].refund(1)
    assert [held.job for held in engine.release()] == ["b7"]
    engine.settle()
    assert lab.gate.room == (2 * limits, 2 * limits)
    assert len(bounds) == 1
    for each in buckets:
        each.configure(capacity=5, tokens_per_second=1)
    for lab.clock.now in range(1, 100 * limits):
        if not engine.room.held_by:
            break
        while engine.next_due <= lab.clock.now:
            engine.release()
        engine.settle()
    assert lab.gate.room == (0, 0)


def test_a_job_is_not_older_than_the_moment_of_its_release():
    """A loop that fixes the moment before it takes in messages sees no wait below 0."""
    lab = Lab()
    before = lab.clock.now
    lab.clock.now = 0.5
    lab.offer("a", "b")
    lab.bucket.refund(1)
    assert [held.job for held in lab.engine.release(now=before)] == ["b"]
    assert lab.numbers() == {"admitted": 2, "tokens": 2}


def test_kinds_of_jobs_do_not_pile_up():
    """A queue may be named by a routing key, of which there is no end."""
    lab = Lab()
    for number in range(25_000):
        lab.engine.plan(number)
    assert len(lab.engine._plans) <= 10_000
