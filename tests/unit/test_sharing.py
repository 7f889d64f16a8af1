"""How workers share what they hold: a fleet of them, on one clock, with events that take their time."""

import heapq
import itertools
import random

import pytest

from rate_limiter.celery.sharing import SHARE_SECONDS, Sharing

LATE = 0.1


class Fleet:
    """Workers that hear each other's events. What one gives back, those that hold the least get."""

    def __init__(self, seed=0):
        self.now = 0.0
        self.sent = 0
        self.shares = []
        self.workers = []
        self._count = itertools.count()
        self._timers = []
        self._random = random.Random(seed)

    def at(self, seconds, call, *args):
        """Plan a call."""
        heapq.heappush(self._timers, (self.now + seconds, next(self._count), call, args))

    def run(self, until):
        """Let time pass."""
        while self._timers and self._timers[0][0] <= until:
            self.now, _, call, args = heapq.heappop(self._timers)
            call(*args)
        self.now = until

    def start(self, **held):
        """Return a worker that begins, and holds so many jobs of each limit."""
        worker = Worker(self, held)
        self.workers.append(worker)
        return worker

    def send(self, sender, event):
        """Deliver an event to all others, soon."""
        self.sent += 1
        for worker in self.workers:
            if worker is not sender:
                self.at(self._random.uniform(0, LATE), worker.gossip.update_state, event)

    def gave_back(self, sender, name, jobs):
        """Let those that hold the least get the jobs."""
        for _ in range(jobs):
            others = [worker for worker in self.workers if worker is not sender]
            least = min(others, key=lambda worker: worker.held[name] + worker.coming)
            self.at(0.5, least.take, name)
            least.coming += 1


class Worker:
    """What `Sharing` sees of a worker: gossip, a timer, a dispatcher of events."""

    def __init__(self, fleet, held):
        self.fleet = fleet
        self.name = f"worker{len(fleet.workers)}"
        self.held = held
        self.coming = 0
        self.gossip = self.timer = self.event_dispatcher = self
        self.sharing = Sharing(self, lambda: dict(self.held), self.share, lambda: fleet.now)

    def update_state(self, event):
        """Stands for Celery's own."""

    def call_after(self, seconds, call, args):
        """Stand for the timer's method."""
        self.fleet.at(seconds, call, *args)

    def call_soon(self, call, *args):
        """Stand for the consumer's method."""
        self.fleet.at(0, call, *args)

    def send(self, kind, **fields):
        """Stand for the dispatcher's method."""
        self.fleet.send(self, {"type": kind, "hostname": self.name, **fields})

    def take(self, name):
        """Get a job."""
        self.coming -= 1
        self.held[name] += 1

    def share(self, shares):
        """Keep no more than the shares."""
        self.fleet.shares.append((self.name, dict(shares)))
        for name, share in shares.items():
            back, self.held[name] = self.held[name] - share, share
            self.fleet.gave_back(self, name, back)


@pytest.mark.parametrize("apart", [0.0, 0.1, 0.45, 1.0, 3.0, 7.0])
@pytest.mark.parametrize("seed", range(5))
def test_two_that_join_get_their_share(seed, apart):
    """Each once, however far apart they start: none gives back what others count on."""
    random.seed(seed)
    fleet = Fleet(seed)
    first = fleet.start(mail=300)
    fleet.run(10)
    fleet.start(mail=0)
    fleet.run(10 + apart)
    fleet.start(mail=0)
    fleet.run(60)
    held = sorted(worker.held["mail"] for worker in fleet.workers)
    assert sum(held) == 300
    assert held[2] <= held[0] * 1.15
    assert first.held["mail"] >= 85


def test_a_fleet_that_starts_at_once_sends_a_few_events():
    """After a restart of the broker: a handful for each worker, not one for each pair of workers."""
    fleet = Fleet()
    for _ in range(60):
        fleet.start(mail=5)
    fleet.run(30)
    assert fleet.sent <= 6 * 60
    assert fleet.shares == []


def test_a_worker_that_holds_no_more_than_others_keeps_it():
    """A difference of some percent is none; and a limit that the others have not is nobody else's."""
    fleet = Fleet()
    fleet.start(mail=105, own=500)
    fleet.start(mail=100)
    fleet.run(2 * SHARE_SECONDS)
    assert fleet.shares == []


def test_workers_that_are_gone_are_forgotten():
    """What a worker has told counts for two seconds: it is not kept for each name that there ever was."""
    fleet = Fleet()
    first = fleet.start(mail=0)
    for pod in range(50):
        event = {"type": "worker-held", "hostname": f"pod{pod}", "limits": {"mail": 1}, "asks": True}
        first.sharing._on_event(event)
        fleet.run(fleet.now + 10)
    assert len(first.sharing._others) <= 1


def test_events_that_make_no_sense():
    """Of another version, or of anybody who can write to the broker: they are passed over."""
    fleet = Fleet()
    worker = fleet.start(mail=50)
    for limits in None, [], {"mail": "many"}, {"mail": None}, {7: 1.5}:
        event = {"type": "worker-held", "hostname": str(limits), "limits": limits, "asks": True}
        worker.gossip.update_state(event)
    fleet.run(10)
    assert worker.held == {"mail": 50}
