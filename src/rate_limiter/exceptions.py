"""What the library raises, apart from ``ValueError`` and ``TypeError`` for bad arguments."""


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
