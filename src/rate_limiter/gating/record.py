"""What happens to a limit at run time, in this process: its name, number and turns. What was declared stands in `limit`."""

import itertools
from time import monotonic
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary, WeakValueDictionary

from ..bucket import Bucket

if TYPE_CHECKING:
    from .limit import Limit

__all__ = ["Record", "limit_numbered", "record_of"]

_numbers: Final = itertools.count()
_limits: "Final[WeakValueDictionary[int, Limit]]" = WeakValueDictionary()
_records: "Final[WeakKeyDictionary[Limit, Record]]" = WeakKeyDictionary()


class Record:
    """The record of one limit.

    Args:
        name: See `name`.

    """

    def __init__(self, name: str) -> None:
        #: What messages and logs call the limit; ``""`` until the task of an unnamed one is known.
        self.name = name
        #: Whether the log has said that a callable of the limit is slow.
        self.slow = False
        #: Tells limits apart across a fork.
        self.number = next(_numbers)
        self._turns: WeakKeyDictionary[Bucket, float] = WeakKeyDictionary()

    def turn(self, bucket: Bucket, tokens: float, delay: float) -> float:
        """Return in how many seconds a job is to come again that is sent back to the broker.

        Args:
            bucket: The bucket that refused the job.
            tokens: What the job costs there.
            delay: In how many seconds the bucket has that many tokens.

        Jobs that are sent back come again one after another, at the bucket's rate.

        """
        now = monotonic()
        turn = max(now + delay, self._turns.get(bucket, 0.0) + tokens / bucket.tokens_per_second)
        self._turns[bucket] = turn
        return turn - now


def record_of(limit: "Limit") -> Record:
    """Return the record of a limit."""
    record = _records.get(limit)
    if record is None:
        record = _records.setdefault(limit, Record(limit.name))
        _limits[record.number] = limit
    return record


def limit_numbered(number: int) -> "Limit | None":
    """Return the limit whose record has a ``number``, if this process has one."""
    return _limits.get(number)
