"""What happens to a limit at run time, in this process: its name and turns. What was declared stands in `limit`."""

from collections.abc import Iterable
from time import monotonic
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from ..bucket import Bucket

if TYPE_CHECKING:
    from .limit import Limit

__all__ = ["Record", "listed", "record_of"]

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
    return record


def listed(names: Iterable[str], most: int = 20) -> str:
    """Return names for a message: the first ones, and how many others there are."""
    names = list(names)
    others = [f"{len(names) - most} others"] if len(names) > most else []
    return ", ".join([*names[:most], *others]) or "none"
