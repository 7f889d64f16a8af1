"""Held jobs that go back to their queues before their turn: held too long, or for another worker."""

import pytest
from engine_lab import Lab
from hypothesis import given
from hypothesis import strategies as st

from rate_limiter import BucketPerKey, TokenBucket
from rate_limiter.gating.engine import Engine
from rate_limiter.gating.limit import Limit

HOLD = 20


@pytest.fixture
def lab():
    """Return an engine for one job in 30 s, which holds each for 20 s."""
    lab = Lab(1, 1 / 30)
    lab.engine.longest_hold = HOLD
    return lab


def sent_back(lab):
    """Return the jobs that were sent back since the last call."""
    jobs = [job for what, job in lab.gate.asked if what == "send_back"]
    lab.gate.asked.clear()
    return jobs


def test_what_is_held_for_long_goes_back_in_order(lab):
    """After longest_hold all go but the one whose turn comes within half of it; they cost nothing."""
    lab.offer(*"abcd")
    assert lab.run(HOLD - 0.1) == []
    assert sent_back(lab) == []
    lab.run(HOLD)
    assert sent_back(lab) == ["c", "d"]
    assert len(lab.engine) == 1
    assert lab.gate.room[0] == 1
    assert lab.run(30) == ["b"]
    assert lab.numbers() == {
        "admitted": 2,
        "tokens": 2,
        "returned": 2,
        "waited": 30,
        "longest": 30,
    }


def test_jobs_that_came_later_stay(lab):
    """Each job has its own time."""
    lab.offer("a", "b", "c")
    lab.clock.advance(15)
    lab.offer("d")
    lab.run(HOLD)
    assert sent_back(lab) == ["c"]
    lab.run(15 + HOLD)
    assert sent_back(lab) == ["d"]


def test_a_turn_that_is_put_off_sends_back(lab):
    """A job that stayed because its turn was near goes when the bucket is paused."""
    lab.offer("a", "b")
    lab.run(HOLD)
    assert sent_back(lab) == []
    lab.bucket.pause(100)
    lab.run(HOLD + 1)
    assert sent_back(lab) == ["b"]
    assert len(lab.engine) == 0


class AlmostThere(TokenBucket):
    """Always has the token in half a second."""

    __slots__ = ()

    def take_or_delay(self, tokens=1):  # noqa: D102 - see Bucket
        return 0.5


def test_no_job_is_held_for_longer_than_half_as_long_again():
    """Even one that is always about to go."""
    lab = Lab(bucket=AlmostThere)
    lab.engine.longest_hold = HOLD
    lab.offer("a")
    assert lab.run(1.5 * HOLD - 0.1) == []
    assert sent_back(lab) == []
    lab.run(1.5 * HOLD + HOLD / 20)
    assert sent_back(lab) == ["a"]


@pytest.mark.parametrize("raises", [(), ("send_back",)])
def test_what_cannot_be_sent_back_stays_held(lab, raises):
    """It is tried again, and runs when its turn comes."""
    lab.gate.takes_back, lab.gate.raises = False, raises
    lab.offer("a", "b", "c")
    assert lab.run(58) == ["b"]
    lab.gate.takes_back, lab.gate.raises = True, ()
    lab.run(60 - 1e-6)
    assert sent_back(lab) == ["c"]


def test_without_a_longest_hold_nothing_goes_back():
    """By default jobs are held for as long as it takes, and nobody looks at them."""
    lab = Lab(1, 1 / 3600)
    lab.offer("a", "b")
    assert lab.engine.next_due == pytest.approx(10)  # the next line of the log
    assert lab.run(3600) == ["b"]
    assert sent_back(lab) == []


def test_a_claim_is_opened_by_the_job_that_goes_back():
    """A job that goes back frees the other bucket, which it has claimed."""
    lab = Lab(1, 1)
    slow = type(lab.bucket)(1, 1 / 50, clock=lab.clock)
    both = (lab.limit, Limit(slow, name="slow"))
    engine = Engine(lab.gate, lambda job: both if job == "both" else (lab.limit,), clock=lab.clock)
    engine.longest_hold = HOLD
    slow.allow()
    engine.offer("both", engine.plan("both"))
    lab.engine = engine
    lab.run(HOLD)
    assert sent_back(lab) == ["both"]
    assert engine.offer("one", engine.plan("one"))[0] == "go"


def test_a_share_goes_back_latest_first():
    """Half stays, in order; no more is held for some seconds, though more arrives."""
    lab = Lab(max_held=100)
    lab.offer(*"abcdefghi")  # a goes
    assert lab.engine.share({lab.limit: 4}, 5, send_back=False) == ["i", "h", "g", "f"]
    lab.engine.settle()
    assert lab.gate.room == (4, 4)
    assert not lab.engine.room.has_room(lab.limit)
    lab.offer("x")
    assert not lab.engine.room.takes_more_of("queue")
    assert lab.run(5) == ["b", "c", "d", "e", "x"]
    assert lab.engine.room.has_room(lab.limit)
    lab.offer("y")
    assert lab.gate.room == (1, 100)
    assert lab.numbers()["returned"] == 4


def test_a_share_is_sent_back_in_order():
    """With a static prefetch count it is sent back, as fast as the broker takes it; not what came since."""
    lab = Lab(1, 0.1, max_held=100)
    lab.engine.longest_hold = 600
    lab.offer(*"abcdefghi")
    lab.gate.takes_back = False
    assert lab.engine.share({lab.limit: 4}, 5, send_back=True) == []
    lab.run(1)
    assert len(lab.engine) == 8
    lab.gate.takes_back = True
    lab.clock.advance(0.05)
    lab.offer("x")
    lab.run(2)
    assert sent_back(lab) == ["f", "g", "h", "i"]
    assert len(lab.engine) == 5


def test_a_share_is_that_of_a_limit():
    """The keys of a limit count together, the latest go first; other limits keep what they hold."""
    lab = Lab()
    per_key = BucketPerKey(1, 1, clock=lab.clock)
    limits = {
        "one": (lab.limit,),
        "many": (Limit(per_key, key=lambda job: job[0], name="per key"),),
    }
    lab.engine = engine = Engine(lab.gate, lambda kind: limits[kind], clock=lab.clock)
    for job in "a", "b":
        engine.offer(job, engine.plan("one"))
    for job in ("x1", "y1", "x2", "x3", "y2", "x4"):
        engine.offer(job, engine.plan("many"))
    assert engine.share({limits["many"][0]: 2}, 5, send_back=False) == ["x4", "y2"]
    assert lab.run(60) == ["b", "x2", "x3"]


@given(
    rate=st.sampled_from([0.01, 0.1, 1, 10]),
    gaps=st.lists(st.sampled_from([0, 0.5, 7, 30]), min_size=1, max_size=30),
    takes=st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_each_job_goes_or_goes_back(rate, gaps, takes):
    """None is lost or doubled, those that go keep their order, and what is held is counted."""
    lab = Lab(1, rate)
    lab.engine.longest_hold = HOLD
    went = []
    for number, gap in enumerate(gaps):
        lab.gate.takes_back = takes[number % len(takes)]
        went += lab.run(lab.clock() + gap)
        lab.clock.now = max(lab.clock.now, lab.clock())
        if lab.offer(number) == ["go"]:
            went.append(number)
    lab.gate.takes_back = True
    went += lab.run(lab.clock() + 2 * HOLD)
    back = sent_back(lab)
    assert sorted(went + back) == list(range(len(gaps)))
    assert went == sorted(went)
    assert lab.engine.room.held_by.total() == len(lab.engine) == 0
    assert lab.gate.room == (0, 0)
