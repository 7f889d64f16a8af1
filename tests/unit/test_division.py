"""One rate for all workers by gossip: a fleet of them on one clock, and a broker that takes its time."""

import heapq
import itertools
import json
import math
import os
import random
from collections import Counter
from types import SimpleNamespace

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured
from kombu.exceptions import DecodeError
from processes import in_child

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate
from rate_limiter.celery.check import problems
from rate_limiter.celery.division import DividedBucket, Division
from rate_limiter.cli.table import Table
from rate_limiter.gating.limit import Limit
from rate_limiter.gating.steering import Order, carry_out, shown
from rate_limiter.shared_bucket import share
from rate_limiter.testing import ManualClock

RATE, CAPACITY = 20.0, 6.0
LATE = 0.1

# -- a fleet ----------------------------------------------------------------------------------------


class Fleet:
    """Workers that send heartbeats every 2 s, and take tokens as fast as they can."""

    def __init__(self, seed=0):
        self.clock = ManualClock()
        self.workers = []
        self.granted = []
        self.random = random.Random(seed)
        self._count = itertools.count()
        self._timers = []

    def at(self, moment, call, *args):
        """Plan a call."""
        heapq.heappush(self._timers, (moment, next(self._count), call, args))

    def run(self, until):
        """Let time pass."""
        while self._timers and self._timers[0][0] <= until:
            moment, _, call, args = heapq.heappop(self._timers)
            self.clock.now = moment
            call(*args)
        self.clock.now = until

    def start(self, name=None, **options):
        """Return a worker that begins."""
        worker = Member(self, name or f"worker{len(self.workers)}", options)
        self.workers.append(worker)
        return worker

    def send(self, event):
        """Bring an event to every worker, its sender too. Each gets all events in their order."""
        for worker in self.workers:
            worker.last = max(worker.last, self.clock.now + self.random.uniform(0, LATE))
            self.at(worker.last, worker.bring, event)

    def rate(self, first, last):
        """Return how many tokens all took in a second, in parts of the rate."""
        return sum(first <= moment < last for moment, _ in self.granted) / (last - first) / RATE

    def excess(self):
        """Return the least ``c`` for which no span of time has more than ``c + rate * t`` tokens."""
        lowest, worst = math.inf, 0.0
        for number, (moment, _) in enumerate(self.granted):
            lowest = min(lowest, number - RATE * moment)
            worst = max(worst, number - RATE * moment - lowest + 1)
        return worst


class Member:
    """A worker: what `Division` sees of it, its heartbeats, and its jobs."""

    def __init__(self, fleet, name, options):
        self.fleet = fleet
        self.hostname = name
        self.conninfo = SimpleNamespace(transport=SimpleNamespace(driver_type="amqp"))
        self.pool = None
        self.gossip = SimpleNamespace(enabled=True, on_message=lambda prepare, message: None)
        self.bucket = DividedBucket(CAPACITY, RATE, least=1, clock=fleet.clock)
        self.limit = Limit(self.bucket, name="mail")
        self.division = Division(self, clock=fleet.clock, **options)
        self.division.add([self.limit])
        self.division.start()
        self.inbox, self.last = [], 0.0
        #: Whether it lives; whether its loop is blocked; whether the broker reaches it.
        self.lives, self.blocked, self.reached = True, False, True
        self.tell("worker-online")
        self._beat_again()
        self._take()

    def tell(self, kind, **fields):
        """Send an event."""
        if self.lives and self.reached:
            name = {"hostname": self.hostname, "pid": os.getpid()}
            self.fleet.send({"type": kind, "freq": 2.0, **name, **fields})

    def bring(self, event):
        """Get an event."""
        if self.lives and self.reached:
            self.inbox.append(event)
            self.read()

    def read(self):
        """Read what has come, unless the loop is blocked."""
        while self.inbox and not self.blocked:
            event = self.inbox.pop(0)
            self.gossip.on_message(None, SimpleNamespace(payload=event))

    def unblock(self):
        """Go on, after a long job: the next job first, then the events."""
        self._take_now()
        self.blocked = False
        self.read()

    def stop(self):
        """Say farewell, and end."""
        self.tell("worker-offline")
        self.lives = False

    def kill(self):
        """End."""
        self.lives = False

    def _beat_again(self):
        if self.lives:
            self.fleet.at(self.fleet.clock.now + 2, self._beat)

    def _beat(self):
        self.tell("worker-heartbeat")
        self._beat_again()

    def _take(self):
        if self.lives:
            if not self.blocked:
                self._take_now()
            self.fleet.at(self.fleet.clock.now + 0.005, self._take)

    def _take_now(self):
        while self.bucket.allow():
            self.fleet.granted.append((self.fleet.clock.now, self.hostname))


def test_a_worker_alone_has_the_whole_rate():
    """It lets nothing go until it knows that it is alone; then it starts full, as any bucket."""
    fleet = Fleet()
    worker = fleet.start()
    fleet.run(2.9)
    assert fleet.granted == []
    fleet.run(30)
    assert worker.bucket.share_of == 1
    assert fleet.excess() == pytest.approx(CAPACITY, abs=1)
    assert fleet.rate(5, 30) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_workers_that_start_together_keep_one_rate(count):
    """Each its part, from the beginning, without a burst."""
    fleet = Fleet()
    for _ in range(count):
        fleet.start()
    fleet.run(40)
    assert {worker.bucket.share_of for worker in fleet.workers} == {count}
    assert fleet.excess() <= max(CAPACITY, count) + 1e-6  # each can do a job
    assert fleet.rate(5, 40) == pytest.approx(1, rel=0.02)
    parts = Counter(name for _, name in fleet.granted)
    assert max(parts.values()) - min(parts.values()) <= 2


def test_one_that_joins_brings_no_burst():
    """Not while it learns of the others, and not then: below the rate for two heartbeats, above it never."""
    fleet = Fleet()
    fleet.start()
    fleet.run(20)
    fleet.start()
    fleet.run(23.2)
    assert fleet.rate(20.2, 23) == pytest.approx(0.5, abs=0.05)
    fleet.run(40)
    assert fleet.rate(23.5, 40) == pytest.approx(1, rel=0.02)
    fleet.start()
    fleet.run(60)
    assert fleet.rate(43.5, 60) == pytest.approx(1, rel=0.02)
    assert fleet.excess() <= CAPACITY + 1


def test_who_restarts_again_and_again_gets_nothing():
    """A worker that crashes as it starts is not a burst each time."""
    fleet = Fleet()
    fleet.start()
    for turn in range(10):
        worker = fleet.start(f"again{turn}")
        fleet.run((turn + 1) * 3.5)
        worker.kill()
    assert fleet.excess() <= CAPACITY + 1


def test_the_part_of_one_that_stops_goes_to_the_others_at_once():
    """It says that it leaves."""
    fleet = Fleet()
    workers = [fleet.start() for _ in range(3)]
    fleet.run(20)
    workers[0].stop()
    fleet.run(40)
    assert fleet.rate(20.3, 40) == pytest.approx(1, rel=0.02)
    assert fleet.excess() <= CAPACITY


def test_the_part_of_one_that_is_killed_goes_to_the_others_soon():
    """After three heartbeats without it; until then the rate is below."""
    for moment in 20.0, 20.7, 21.3, 21.99:
        fleet = Fleet()
        workers = [fleet.start() for _ in range(3)]
        fleet.run(moment)
        workers[0].kill()
        fleet.run(moment + 30)
        assert fleet.rate(moment + 0.2, moment + 4) == pytest.approx(2 / 3, rel=0.04)
        assert fleet.rate(moment + 8.2, moment + 30) == pytest.approx(1, rel=0.02)
        assert fleet.excess() <= CAPACITY


@pytest.mark.parametrize("seed", range(8))
def test_whoever_comes_and_goes_the_sum_is_not_above(seed):
    """Any order of starts, stops and kills."""
    fleet = Fleet(seed)
    fleet.start()
    fleet.run(10)
    for _ in range(25):
        living = [worker for worker in fleet.workers if worker.lives]
        if len(living) < 2 or (len(living) < 6 and fleet.random.random() < 0.5):
            fleet.start()
        else:
            fleet.random.choice((Member.stop, Member.kill))(fleet.random.choice(living))
        fleet.run(fleet.clock.now + fleet.random.uniform(0, 8))
    # At the first it is alone, and each of its tokens may be late by the step of the clock.
    assert fleet.excess() <= CAPACITY + 1


def test_one_whose_loop_is_blocked_keeps_its_part():
    """A long job on the solo pool: it reads no heartbeats of the others, but these live, and so does it."""
    fleet = Fleet()
    workers = [fleet.start() for _ in range(4)]
    fleet.run(20)
    for turn in range(10):
        workers[0].blocked = True
        fleet.run(20 + (turn + 1) * 12)
        workers[0].unblock()
        assert {worker.bucket.share_of for worker in workers} == {4}
    assert fleet.excess() <= CAPACITY + 1


def test_one_that_is_blocked_from_the_beginning():
    """It does not take itself for the only one because it has read nothing."""
    fleet = Fleet()
    fleet.start()
    fleet.run(20)
    late = fleet.start()
    late.blocked = True
    fleet.run(40)
    late.unblock()
    fleet.run(60)
    assert fleet.excess() <= 2 * CAPACITY  # what it gained while it knew of nobody
    assert late.bucket.share_of == 2


def test_one_that_is_cut_off_keeps_its_part():
    """It goes on with what it holds: the others have its part after a while, but it has not theirs."""
    fleet = Fleet()
    workers = [fleet.start() for _ in range(2)]
    fleet.run(20)
    workers[0].reached = False
    fleet.run(40)
    assert [worker.bucket.share_of for worker in workers] == [2, 1]
    workers[0].reached = True
    fleet.run(45)
    assert [worker.bucket.share_of for worker in workers] == [2, 2]


def test_one_that_beats_slowly():
    """Another heartbeat interval counts, whatever else it sends in between."""
    fleet = Fleet()
    worker = fleet.start()
    other = fleet.start()
    other.lives = False
    fleet.run(10)
    other.lives = True
    for _ in range(5):
        other.tell("worker-heartbeat", freq=30.0)
        fleet.run(fleet.clock.now + 1)
        other.tell("worker-held", freq=None)
        fleet.run(fleet.clock.now + 29)
        assert worker.bucket.share_of == 2
    other.lives = False
    fleet.run(fleet.clock.now + 100)
    assert worker.bucket.share_of == 1


def test_a_pause_of_somebody_else_stays():
    """Who is alone starts full, but not into a pause that came meanwhile."""
    fleet = Fleet()
    worker = fleet.start()
    fleet.run(1)
    worker.bucket.pause(60)
    fleet.run(50)
    assert fleet.granted == []


def test_a_new_connection():
    """Whom it knew before it still knows, and it lets jobs go."""
    fleet = Fleet()
    workers = [fleet.start() for _ in range(2)]
    fleet.run(20)
    workers[0].division.start()
    assert workers[0].bucket.share_of == 2
    fleet.run(30)
    assert fleet.rate(20, 30) == pytest.approx(1, rel=0.02)


def test_a_limit_that_is_found_later():
    """Of a task that is imported at its first message: it has its part at once, from empty."""
    fleet = Fleet()
    worker = fleet.start()
    fleet.start()

    def found():
        bucket = DividedBucket(4, 2, least=1, clock=fleet.clock)
        worker.division.add([Limit(bucket, name=f"found at {fleet.clock.now}")])
        return bucket

    fleet.run(1)
    early = found()
    assert early.pause_left == 2
    fleet.run(20)
    late = found()
    assert (late.capacity, late.tokens_per_second, late.tokens, late.pause_left) == (2, 1, 0, 0)
    fleet.workers[1].stop()
    fleet.run(21)
    assert (early.share_of, late.share_of) == (1, 1)
    assert found().tokens == 4


def test_events_that_make_no_sense():
    """Of another version, or of anybody who can write to the broker: they are passed over."""
    fleet = Fleet()
    worker = fleet.start()
    for event in None, [], {}, {"type": 7}, {"type": "task-sent", "hostname": "x", "pid": 1}:
        worker.bring(event)
    assert worker.bucket.share_of == 1
    for number, freq in enumerate(["2", None, [], math.nan, -1]):
        worker.bring({"type": "worker-heartbeat", "hostname": [number], "pid": {}, "freq": freq})
    assert worker.bucket.share_of == 6
    fleet.run(20)
    assert worker.bucket.share_of == 1

    class Broken:
        @property
        def payload(self):
            raise DecodeError

    worker.gossip.on_message(None, Broken())


def test_what_the_log_says(caplog):
    """At start, what a share is; then how many have one."""
    caplog.set_level("INFO", logger="rate_limiter")
    fleet = Fleet()
    fleet.start()
    (start,) = caplog.records
    assert start.levelname == "WARNING"
    assert "Limit mail is divided, because there is no Redis" in start.getMessage()
    assert "of 20 tokens per second and of the capacity 6" in start.getMessage()
    assert "in its first 3 s" in start.getMessage()
    assert "within 8 s when one is killed" in start.getMessage()
    fleet.run(10)
    assert len(caplog.records) == 1
    fleet.start()
    fleet.run(10.2)
    assert "Workers that divide mail: 2" in caplog.messages


def without_gossip(driver):
    """Return the consumer of a worker that does not listen to others."""
    return SimpleNamespace(
        conninfo=SimpleNamespace(transport=SimpleNamespace(driver_type=driver)),
        hostname="w",
        pool=None,
        gossip=SimpleNamespace(enabled=False, on_message=None),
    )


@pytest.mark.parametrize(
    ("driver", "options", "says"),
    [
        ("amqp", {"without_gossip": True}, "this worker is started --without-gossip"),
        ("redis", {"without_heartbeat": True}, "this worker is started --without-heartbeat"),
        ("SQS", {}, "which the transport SQS does not have"),
    ],
)
def test_who_cannot_have_a_share_does_not_start(driver, options, says):
    """Else each worker would have the whole rate. The error says what to do."""
    division = Division(without_gossip(driver), **options)
    division.add([Limit(TokenBucket(1, 1), name="other")])
    with pytest.raises(ImproperlyConfigured) as error:
        division.add([Limit(DividedBucket(1, 1, least=1), name="mail")])
    assert str(error.value).startswith("limit mail: per='cluster' needs rate_limiter_redis")
    assert says in str(error.value)


def test_in_memory_a_worker_is_alone():
    """No other process has its broker: tests of users run with the whole rate, and without waiting."""
    bucket = DividedBucket(3, 2, least=1)
    division = Division(without_gossip("memory"), without_gossip=True, without_heartbeat=True)
    division.add([Limit(bucket, name="mail")])
    division.start()
    assert (bucket.tokens, bucket.tokens_per_second, bucket.pause_left) == (3, 2, 0)


# -- the bucket -------------------------------------------------------------------------------------


def test_a_part_of_the_numbers():
    """Each has an equal part, but no less capacity than a job costs."""
    bucket = DividedBucket(6, 12, least=2, clock=ManualClock())
    seen = []
    for workers in 1, 2, 4, 3:
        bucket.divide(workers)
        seen.append((bucket.capacity, bucket.tokens_per_second))
    assert seen == [(6, 12), (3, 6), (2, 3), (2, 4)]


def test_who_does_not_know_the_cost_has_the_whole_capacity():
    """A job may cost as much as that."""
    bucket = DividedBucket(6, 12, least=math.inf, clock=ManualClock())
    bucket.divide(4)
    assert (bucket.capacity, bucket.tokens_per_second) == (6, 3)
    assert bucket.allow(6)


def test_a_division_makes_no_tokens():
    """The level stays, up to the new capacity; so does a debt."""
    bucket = DividedBucket(6, 12, least=1, clock=ManualClock())
    bucket.divide(3)
    assert bucket.tokens == 2
    bucket.divide(1)
    assert bucket.tokens == 2
    bucket.charge(5)
    bucket.divide(2)
    assert bucket.tokens == -3


def test_an_order_is_for_all_workers():
    """It is divided at once, and stays so when the number of workers changes."""
    bucket = DividedBucket(6, 12, least=1, clock=ManualClock())
    limit = Limit(bucket, name="mail")
    bucket.divide(3)
    what = carry_out(Order(rate="30/m", capacity=3), limit, [limit])
    assert what == "0.5 tokens_per_second (was 12), capacity 3 (was 6), divided by 3 workers"
    assert (bucket.capacity, bucket.tokens_per_second) == (1, 0.5 / 3)
    bucket.divide(2)
    assert (bucket.capacity, bucket.tokens_per_second) == (1.5, 0.25)
    assert bucket.whole == (3, 0.5)


@pytest.mark.parametrize("order", [{"capacity": 0}, {"tokens_per_second": math.nan}])
def test_a_wrong_order_changes_nothing(order):
    """As of any bucket."""
    bucket = DividedBucket(6, 12, least=1, clock=ManualClock())
    bucket.divide(2)
    with pytest.raises(ValueError, match=next(iter(order))):
        bucket.configure(**{"capacity": 5, "tokens_per_second": 5, **order})
    assert (bucket.whole, bucket.capacity, bucket.tokens_per_second) == ((6, 12), 3, 6)


def test_what_is_shown():
    """The worker's own numbers, and of what they are a share."""
    bucket = DividedBucket(6, 12, least=1, clock=ManualClock())
    bucket.divide(3)
    seen = json.loads(json.dumps(shown(Limit(bucket, name="mail"))))
    (part,) = seen["buckets"]
    assert (part["capacity"], part["rate"], part["share_of"]) == (2, 4, 3)
    assert part["whole"] == {"capacity": 6, "rate": 12}
    reply = {"mail": seen | {"tasks": [], "queue": None, "enforced": "at the gate", "held": 0}}
    lines = Table({"a@host": reply}).lines()
    assert "4/s" in lines[1]
    assert lines[1].endswith("1/3 of 12/s")
    assert repr(bucket) == "<DividedBucket: 1/3 of capacity 6, 12 tokens_per_second>"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_processes_of_a_pool():
    """What a task calls itself pays there, by the part that the worker has now."""
    bucket = DividedBucket(6, 12, least=1, clock=ManualClock())
    share(bucket)
    bucket.divide(3)
    assert in_child(lambda: (bucket.allow(3), bucket.allow(2))) == [False, True]
    bucket.configure(capacity=12)
    assert in_child(lambda: bucket.capacity) == 4
    assert bucket.tokens == 0


# -- in the settings --------------------------------------------------------------------------------


def make_app(broker="amqp://nobody.invalid", **settings):
    app = Celery("shop", broker=broker, set_as_current=False)
    app.conf.update(settings)

    @app.task(shared=False, name="mail")
    def mail(size=1): ...

    return app, Gate(app)


def limit_of(per="cluster", **options):
    _, gate = make_app(rate_limiter_limits={"mail": {"rate": "20/s", **options}}, rate_limiter_per=per)
    return next(iter(gate.tasks_of()))


def test_without_a_redis_a_limit_is_divided():
    """Each option stays; the burst is divided down to the cost of a job, if that is known."""
    limit = limit_of(burst=8, tokens=2, max_wait=5)
    assert (limit.bucket.whole, limit.cost, limit.max_wait) == ((8, 20), 2, 5)
    limit.bucket.divide(10)
    assert (limit.bucket.capacity, limit.bucket.tokens_per_second) == (2, 2)
    limit = limit_of(burst=8, tokens="size")
    limit.bucket.divide(10)
    assert (limit.bucket.capacity, limit.bucket.tokens_per_second) == (8, 2)
    assert type(limit_of("worker").bucket) is TokenBucket


def test_keys_are_not_divided():
    """Nor does a share have an outage. The error says what is needed."""
    for option, value in ("key", "size"), ("on_outage", "open"):
        says = f"per='cluster' with {option} needs a Redis: set rate_limiter_redis"
        with pytest.raises(ImproperlyConfigured, match=says):
            limit_of(**{option: value})


@pytest.mark.parametrize(
    ("broker", "found"),
    [
        ("amqp://nobody.invalid", None),
        ("memory://", None),
        ("filesystem://", "Limit mail: per='cluster' needs rate_limiter_redis"),
    ],
)
def test_the_check_on_the_command_line(broker, found):
    """It needs no broker, and tells of one that has no gossip."""
    app, _ = make_app(broker, rate_limiter_limits={"mail": {"rate": 1, "per": "cluster"}})
    lines = problems(app)
    assert [line[: len(found or "")] for line in lines] == ([found] if found else [])
