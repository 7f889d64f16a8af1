"""What the library raises, apart from ``ValueError`` and ``TypeError`` for bad arguments."""

from .checks import positive


class RateLimitExceeded(Exception):  # noqa: N818 - the documented name
    """A rate limit does not let this happen now.

    Raised by ``wait(timeout=…)`` of a bucket and by tasks with ``when_limited="raise"``; raise it in
    your own code where that fits.

    Args:
        message: What ``str()`` of the exception gives.
        retry_after: Seconds until asking again makes sense, or ``None`` where nobody knows.

    Both are passed to ``Exception`` by position, so they survive every Celery result backend (JSON
    and pickle rebuild an exception from its ``args``).

    """

    def __init__(self, message: str = "rate limit exceeded", retry_after: float | None = None) -> None:
        super().__init__(message, retry_after)
        self.message = message
        self.retry_after = retry_after

    def __str__(self) -> str:
        return str(self.message)


class RetryAfter(RateLimitExceeded):
    """The remote asks for a pause: raise it in a task when an API answers 429.

    Every bucket that the job was paid from grants nothing for so long, to anybody, and then starts from
    empty. The job itself runs again after that. This does not count as one of its retries, and happens
    until it expires, or ten times.

    Args:
        seconds: How long the pause is to be, from now. Above 0.

    Raises:
        ValueError: ``seconds`` is not above 0, or is not finite.
        TypeError: ``seconds`` is not a number.

    """

    def __init__(self, seconds: float) -> None:
        pause = positive("seconds", seconds)
        super().__init__(f"the remote asks for a pause of {pause:g} s", pause)
        self.args = (seconds,)
