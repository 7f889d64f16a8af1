"""The pytest fixture `rate_limits`: lifts all limits for a test, or makes them refuse::

    def test_signup(rate_limits):
        rate_limits.lift()
        for _ in range(100):
            send_mail("acme")  # decorated with @throttle("1/s")

    def test_signup_is_limited(rate_limits):
        rate_limits.refuse(retry_after=30)
        with pytest.raises(RateLimitExceeded):
            send_mail("acme")

pytest finds it in every environment that has this package installed.
"""

from collections.abc import Iterator
from typing import Final
from weakref import WeakSet

import pytest

from .checks import positive
from .exceptions import RateLimitExceeded
from .gating import limit
from .token_bucket import TokenBucket

__all__ = ["RateLimits", "rate_limits"]

#: More tokens, and tokens per second, than any test takes.
_NO_END: Final = 1e12


class _Refusing(TokenBucket):
    """A bucket that grants nothing, and makes nobody wait in vain."""

    __slots__ = ("delay",)

    def __init__(self, delay: float) -> None:
        super().__init__(_NO_END, 1 / delay)
        self.delay = delay

    def take_or_delay(self, tokens: float = 1) -> float:
        return self.delay

    def wait(self, tokens: float = 1, *, timeout: float | None = None) -> None:
        if self.delay:
            raise RateLimitExceeded("rate limit exceeded: the fixture rate_limits refuses", self.delay)

    def grant(self) -> None:
        """Grant everything from now on, also to those that a gate holds."""
        self.delay = 0.0
        self.configure(tokens_per_second=_NO_END)


class RateLimits:
    """All limits of this process: of the decorator and of both gates. Buckets that your code asks itself do not change.

    Processes that a worker forks while limits are lifted, or made to refuse, keep that.
    """

    def __init__(self) -> None:
        self._refusing: WeakSet[_Refusing] = WeakSet()

    def lift(self) -> None:
        """Let every job go, until the test ends or another method is called."""
        self.restore()
        limit.stand_in = lambda: TokenBucket(_NO_END, _NO_END)

    def refuse(self, retry_after: float = 60.0) -> None:
        """Let no job go: each ends as its ``when_limited`` says, until the test ends.

        With ``"wait"`` a gate holds the job, and the decorator raises `RateLimitExceeded` at once, so that no
        test hangs.

        Args:
            retry_after: The seconds until each bucket has tokens, as tasks and callbacks are told. Above 0.

        Raises:
            TypeError: It is no number.
            ValueError: It is 0, below 0, or not finite.

        """
        seconds = positive("retry_after", retry_after)
        self.restore()

        def refusing() -> TokenBucket:
            bucket = _Refusing(seconds)
            self._refusing.add(bucket)
            return bucket

        limit.stand_in = refusing

    def restore(self) -> None:
        """Put the limits in force again. Jobs that were held because of `refuse` go."""
        limit.stand_in = None
        for bucket in list(self._refusing):
            bucket.grant()
        self._refusing.clear()


@pytest.fixture
def rate_limits() -> Iterator[RateLimits]:
    """Yield `RateLimits`, with which a test lifts all limits or makes them refuse."""
    limits = RateLimits()
    yield limits
    limits.restore()
