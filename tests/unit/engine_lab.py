"""An engine for one limit, with a host that notes what it is asked for."""
# ruff: noqa: D102 - the methods are documented at Host

from rate_limiter import TokenBucket
from rate_limiter.gating.engine import Engine
from rate_limiter.gating.host import Host
from rate_limiter.gating.limit import Call, Limit
from rate_limiter.gating.tally import tally_of
from rate_limiter.testing import ManualClock


class Gate(Host):
    """Notes what it is asked for."""

    def __init__(self):
        self.asked = []
        self.room = (0, 0)
        self.takes_back = True
        self.raises = ()

    def call_of(self, job, asks_headers):
        return Call("task job", (job,), {}, None, None)

    def refuse(self, job, demand, delay):
        if "refuse" in self.raises:
            raise OSError("no broker")
        if self.takes_back:
            self.asked.append(("refuse", job))
        return self.takes_back

    def fail(self, job, error):
        if "fail" in self.raises:
            raise OSError("no broker")
        self.asked.append(("fail", job, str(error)))

    def send_back(self, job):
        if "send_back" in self.raises:
            raise OSError("no broker")
        if self.takes_back:
            self.asked.append(("send_back", job))
        return self.takes_back

    def gone(self, job):
        if "gone" in self.raises:
            raise OSError("no broker")
        return job == "revoked"

    def follow(self, held, most):
        self.room = held, most

    def pause(self, queue, limit):
        self.asked.append(("pause", queue))

    def resume(self, queue):
        self.asked.append(("resume", queue))

    def stuck(self, limit, held):
        self.asked.append(("stuck", held))


class Lab:
    """An engine for one limit, on a manual clock."""

    def __init__(self, capacity=1, rate=1, *, max_held=None, bucket=TokenBucket, **options):
        self.clock = ManualClock()
        self.bucket = bucket(capacity, rate, clock=self.clock)
        self.limit = Limit(self.bucket, name="limit", **options)
        self.gate = Gate()
        self.engine = Engine(self.gate, lambda _: (self.limit,), max_held=max_held, clock=self.clock)
        self.engine.room.window = lambda _limit: 4

    def offer(self, *jobs):
        """Return what the engine says of each job."""
        plan = self.engine.plan("job")
        return [self.engine.offer(job, plan, "queue")[0] for job in jobs]

    def run(self, until):
        """Return the jobs that go until a moment, each when it is due."""
        ran = []
        while (due := self.engine.next_due) <= until:
            self.clock.now = max(due, self.clock.now)
            ran += [held.job for held in self.engine.release()]
            self.engine.settle()
        return ran

    def numbers(self):
        """Return what was counted and is not 0."""
        return numbers(self.limit)


def numbers(limit):
    """Return what was counted under a limit and is not 0."""
    return {name: value for name, value in tally_of(limit).snapshot().items() if value}
