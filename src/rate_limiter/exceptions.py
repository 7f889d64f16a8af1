"""The exceptions of the library, apart from ``ValueError`` and ``TypeError`` for bad arguments."""

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from .checks import zero_or_more


class RateLimitExceeded(Exception):  # noqa: N818 - the documented name
    """A rate limit does not let this happen now.

    Raised by ``wait(timeout=…)`` of a bucket, and by tasks that a limit refuses (``when_limited="raise"``,
    ``timeout``, ``max_wait``). Raise it in your own code where that fits.

    Args:
        message: The text of the exception, as ``str()`` gives it.
        retry_after: Seconds until asking again makes sense, or ``None`` if that is not known.

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

    For the time of the pause, all buckets that the job was paid from grant nothing to any job; then
    they start from empty. The job itself runs again after the pause, unless it has expired. This does not
    count as one of its retries. It may happen ten times for a job: the next time this error is its result.

    Args:
        seconds: How long the pause is, from now. 0 or more; 0 empties the buckets, and the job runs
            again as soon as they allow it. Or the text of the ``Retry-After`` header: a number of
            seconds (``"120"``) or an HTTP date (``"Wed, 21 Oct 2026 07:28:00 GMT"``; one in the past
            is 0 seconds).

    Raises:
        ValueError: ``seconds`` is below 0, is not finite, or is a text that is neither a number nor an
            HTTP date.
        TypeError: ``seconds`` is neither a number nor a text: ``None``, for example, for an answer
            without the header.

    `retry_after` and the only element of ``args`` are the seconds, as a float.

    """

    def __init__(self, seconds: float | str) -> None:
        pause = _seconds_of(seconds) if isinstance(seconds, str) else zero_or_more("seconds", seconds)
        super().__init__(f"the remote asks for a pause of {pause:g} s", pause)
        self.args = (pause,)


def timed_out(tokens: float, delay: float) -> RateLimitExceeded:
    """Return the error of a `wait` whose tokens are there in ``delay`` seconds only."""
    return RateLimitExceeded(f"rate limit exceeded: {tokens:g} tokens only in {delay:.3g} s", delay)


def _seconds_of(header: str) -> float:
    """Return the seconds that the text of a ``Retry-After`` header asks for."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            moment = parsedate_to_datetime(header)
        except Exception:  # noqa: BLE001 - the parser of the standard library raises whatever it stumbles on
            seconds = math.nan
        else:
            if moment.tzinfo is None:  # "-0000": UTC, of an unknown place
                moment = moment.replace(tzinfo=UTC)
            return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    if not 0.0 <= seconds < math.inf:
        raise ValueError(
            f"seconds must be 0 or more, or an HTTP date such as 'Wed, 21 Oct 2026 07:28:00 GMT', not {header!r}"
        )
    return seconds
