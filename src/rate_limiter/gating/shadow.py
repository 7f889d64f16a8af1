"""A limit with ``shadow=True``: it makes no job wait, and counts what it would have done."""

import math
from typing import Any, Final

from ..all_of import members
from ..bucket import Bucket
from .limit import seconds_until
from .tally import tell

__all__ = ["Shadow"]

#: The policies under which a job that finds no tokens comes again.
_WAITING: Final = ("wait", "retry")


class Shadow:
    """Stands in for the bucket of a limit in all demands. It grants everything at once.

    The bucket behind it pays as if the jobs waited their turn: it goes into debt, and the debt is how long the
    next job would have waited. Where jobs do not wait, the bucket is asked, and a refusal is counted.

    Args:
        bucket: The limit's bucket, or one of them.
        limit: The limit.

    """

    #: No cost is too high for it, and no job waits for the start of another one.
    capacity = math.inf

    def __init__(self, bucket: Bucket, limit: Any) -> None:
        self.bucket = bucket
        self.limit = limit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shadow) and (self.bucket, self.limit) == (other.bucket, other.limit)

    def __hash__(self) -> int:
        return hash((self.bucket, self.limit))

    def __repr__(self) -> str:
        return f"Shadow({self.bucket!r})"

    @property
    def tokens_per_second(self) -> float:
        """The rate of the bucket."""
        return self.bucket.tokens_per_second

    @property
    def tokens(self) -> float:
        """The level of the bucket; below 0 while jobs would wait."""
        return self.bucket.tokens

    def take_or_delay(self, tokens: float = 1) -> float:
        """Grant the tokens, and tell the observers if the limit would not have."""
        if self.limit.patience == math.inf or self.limit.when_limited in _WAITING:
            seconds = 0.0
            for each in members(self.bucket):
                each.charge(tokens)
                seconds = max(seconds, seconds_until(each, 0.0))
        elif tokens > self.bucket.capacity:
            seconds = math.inf
        else:
            seconds = self.bucket.take_or_delay(tokens)
        if seconds:
            tell("shadowed", self.limit, seconds)
        return 0.0

    def allow(self, tokens: float = 1) -> bool:
        """Grant the tokens. See `take_or_delay`."""
        return not self.take_or_delay(tokens)

    try_consume = allow

    def wait(self, tokens: float = 1, *, timeout: float | None = None) -> None:
        """Grant the tokens at once. See `take_or_delay`."""
        self.take_or_delay(tokens)

    def refund(self, tokens: float) -> None:
        """Give tokens back to the bucket."""
        self.bucket.refund(tokens)

    def charge(self, tokens: float) -> None:
        """Take tokens from the bucket."""
        self.bucket.charge(tokens)

    def pause(self, seconds: float) -> None:
        """Pause the bucket: the jobs that come meanwhile would have waited."""
        self.bucket.pause(seconds)

    def configure(self, **numbers: float | None) -> None:
        """Change the bucket."""
        self.bucket.configure(**numbers)
