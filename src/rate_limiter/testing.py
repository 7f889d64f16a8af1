"""For tests: a clock that stands still until it is told to move.

clock = ManualClock()
bucket = TokenBucket(1, 2, clock=clock)
assert bucket.allow()
assert not bucket.allow()
clock.advance(0.5)
assert bucket.allow()
"""

import contextlib
import math
import threading

__all__ = ["ManualClock"]


class ManualClock:
    """A clock for buckets under test: ``TokenBucket(…, clock=ManualClock())``.

    Args:
        now: What it shows at first, in seconds.
        auto_advance: Whether a bucket's ``wait`` moves it on by itself, so that a test with one thread
            gets through a wait at once. With ``False`` a wait blocks until another thread calls
            `advance`.

    """

    def __init__(self, now: float = 0.0, *, auto_advance: bool = True) -> None:
        self.now = now
        self.auto_advance = auto_advance
        self._lock = threading.Lock()
        self._sleepers: list[tuple[float, threading.Lock]] = []

    def __call__(self) -> float:
        """Return what the clock shows."""
        return self.now

    def __repr__(self) -> str:
        return f"ManualClock({self.now!r})"

    def advance(self, seconds: float) -> None:
        """Move the clock on, and wake the waits whose moment has come. Below 0: set it back."""
        with self._lock:
            self.now += seconds
            due = [turn for moment, turn in self._sleepers if moment <= self.now]
            self._sleepers = [s for s in self._sleepers if s[0] > self.now]
        for turn in due:
            with contextlib.suppress(RuntimeError):  # woken already, by the bucket
                turn.release()

    def wait_for(self, turn: threading.Lock, seconds: float) -> None:
        """Sleep until the moment has come or ``turn`` is released. Buckets call this."""
        if self.auto_advance and seconds < math.inf:
            if not turn.acquire(blocking=False):
                self.advance(seconds)
            return
        sleeper = (self.now + seconds, turn)
        with self._lock:
            self._sleepers.append(sleeper)
        try:
            turn.acquire()
        finally:
            with self._lock:
                if sleeper in self._sleepers:
                    self._sleepers.remove(sleeper)

    @property
    def sleepers(self) -> int:
        """How many waits are asleep (``auto_advance=False``)."""
        with self._lock:
            return len(self._sleepers)
