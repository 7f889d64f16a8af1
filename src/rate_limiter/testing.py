"""For tests: a clock that stands still until it is moved, and what a call of a task would cost::

    clock = ManualClock()
    bucket = TokenBucket(1, 2, clock=clock)
    assert bucket.allow()
    assert not bucket.allow()
    clock.advance(0.5)
    assert bucket.allow()

    (charge,) = charged(upload.s("a.bin", megabytes=12))
    assert charge.tokens == 12

The pytest fixture ``rate_limits`` is in `rate_limiter.pytest_plugin`; pytest finds it by itself.
"""

import contextlib
import math
import threading
from typing import Any, NamedTuple

from .bucket import Bucket

__all__ = ["Charged", "ManualClock", "charged"]

#: A sleeper is woken up to this many seconds early, because ten steps of 0.1 s add up to slightly less than
#: 1 s. The bucket decides whether the moment has come.
_ALMOST = 1e-6


class ManualClock:
    """A clock for buckets under test: ``TokenBucket(…, clock=ManualClock())``.

    Args:
        now: The time that it shows at first, in seconds.
        auto_advance: Whether a bucket's ``wait`` moves the clock on, so that a test with one thread
            gets through a wait at once. With ``False`` a wait blocks until another thread calls
            `advance`.

    """

    def __init__(self, now: float = 0.0, *, auto_advance: bool = True) -> None:
        self.now = float(now)
        self.auto_advance = auto_advance
        self._lock = threading.Lock()
        #: What each thread has read last: by that it has worked out how long to sleep.
        self._readings = threading.local()
        self._sleepers: list[tuple[float, threading.Lock]] = []

    def __call__(self) -> float:
        """Return the time that the clock shows."""
        now: float = self.now
        self._readings.now = now
        return now

    def __repr__(self) -> str:
        return f"ManualClock({self.now!r})"

    def advance(self, seconds: float) -> None:
        """Move the clock on by some seconds, and wake the waits whose moment has come.

        Args:
            seconds: How far. Below 0: the clock is set back.

        """
        with self._lock:
            self.now += float(seconds)
            almost = self.now + _ALMOST
            due = [alarm for moment, alarm in self._sleepers if moment <= almost]
            self._sleepers = [sleeper for sleeper in self._sleepers if sleeper[0] > almost]
        for alarm in due:
            with contextlib.suppress(RuntimeError):  # woken already, by the bucket
                alarm.release()

    def wait_for(self, alarm: threading.Lock, seconds: float) -> None:
        """Sleep until the moment has come or ``alarm`` is released. Buckets call this."""
        if self.auto_advance and seconds < math.inf:
            if not alarm.acquire(blocking=False):
                self.advance(seconds)
            return
        began = getattr(self._readings, "now", self.now)
        sleeper = (began + seconds, alarm)
        with self._lock:
            # Another thread may have moved the clock since this one has read it.
            if began != self.now and sleeper[0] <= self.now + _ALMOST:
                return
            self._sleepers.append(sleeper)
        try:
            alarm.acquire()
        finally:
            with self._lock:
                if sleeper in self._sleepers:
                    self._sleepers.remove(sleeper)

    @property
    def sleepers(self) -> int:
        """How many waits are asleep (``auto_advance=False``)."""
        with self._lock:
            return len(self._sleepers)


class Charged(NamedTuple):
    """What a job would take from one bucket."""

    #: The name of the limit.
    limit: str
    bucket: Bucket
    tokens: float


def charged(call: Any, queue: str | None = None) -> list[Charged]:
    """Return what a job would take, and from which buckets. It takes nothing, and asks no broker.

    The limits are those of the task's decorators, of its attribute, and of its app's gate, without those
    with ``shadow=True``.

    Args:
        call: A signature, ``upload.s("a.bin", megabytes=12)``; or a task, for a job without arguments.
        queue: The queue that the job would come from, for the limits of a queue. ``None``: the one that
            Celery would send it to.

    Returns:
        One item for each bucket, in the order in which they are declared; none: no limit covers the job.

    Raises:
        ValueError: The cost, the key or the bucket cannot be computed, or the cost is above the capacity.
            In a worker the job fails with this error.
        TypeError: ``call`` is neither a signature nor a task.

    """
    from .celery.pricing import price_of  # noqa: PLC0415 - the clock is for those without Celery too

    return [Charged(*each) for each in price_of(call, queue)]
