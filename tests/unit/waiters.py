"""Threads that wait in a bucket: to start them, to see what they sleep towards, to see them gone."""

import threading
import time
from collections.abc import Callable
from typing import Any

from rate_limiter import TokenBucket
from rate_limiter.testing import ManualClock

#: Seconds after which a test counts as hung. Nothing here asserts that anything is fast.
PATIENCE = 30.0


class Job(threading.Thread):
    """A function that runs in a thread of its own, and what it returned or raised."""

    def __init__(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        super().__init__(daemon=True)
        self._call = (function, args, options)
        self._returned: Any = None
        self._raised: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Call the function."""
        function, args, options = self._call
        try:
            self._returned = function(*args, **options)
        except BaseException as error:  # noqa: BLE001 - `result` raises it again
            self._raised = error

    def result(self) -> Any:
        """Return or raise what the function did; fail if it hangs."""
        self.join(PATIENCE)
        assert not self.is_alive(), "the thread hangs"
        if self._raised is not None:
            raise self._raised
        return self._returned


def eventually(condition: Callable[[], Any]) -> None:
    """Wait until the condition holds, and fail if it never does."""
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        pause.wait(0.0005)


def moments(clock: ManualClock) -> list[float]:
    """Return the moments towards which the waits sleep; infinity: it waits for its turn."""
    with clock._lock:
        return sorted(moment for moment, _ in clock._sleepers)


def line_up(bucket: TokenBucket, *costs: float, **options: Any) -> list[Job]:
    """Let threads wait for these tokens, one behind the other, and return once all are asleep."""
    jobs = []
    for cost in costs:
        asleep = bucket._clock.sleepers
        jobs.append(Job(bucket.wait, cost, **options))
        eventually(lambda asleep=asleep: bucket._clock.sleepers == asleep + 1)
    return jobs


def assert_idle(bucket: TokenBucket) -> None:
    """Assert that nobody waits, and that nothing of a waiter is left behind."""
    assert (bucket._head, bucket._tail, bucket._ahead) == (None, None, 0.0)
    assert bucket._allowed == bucket.capacity
    assert not bucket._lock.locked()
