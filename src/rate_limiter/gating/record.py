"""The run-time record of a limit in this process. `limit` has the declaration."""

import math
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
        #: The name of the limit in errors and logs. ``""`` until the task of a limit without ``name=`` is known.
        self.name = name
        #: Whether the warning about a slow callable of the limit was logged.
        self.slow = False
        #: The last change by an operator: ``at`` (ISO 8601), ``what``, ``reason``. ``None``: it is as declared.
        self.changed: dict[str, str] | None = None
        #: For each bucket: when the latest of the jobs that were sent back comes again (monotonic).
        self._latest: WeakKeyDictionary[Bucket, float] = WeakKeyDictionary()

    def next_return(
        self, bucket: Bucket, tokens: float, delay: float, longest: float = math.inf
    ) -> float:
        """Give a job that is sent back to the broker the time at which it comes again.

        Args:
            bucket: The bucket that refused the job.
            tokens: The tokens that the job takes from the bucket.
            delay: The seconds until the bucket has them.
            longest: The most seconds to return. Such a job comes before its time, and is refused again.

        Returns:
            The seconds until that time. Jobs that are sent back come again one after another, at the
            bucket's rate.

        """
        now = monotonic()
        moment = max(now + delay, self._latest.get(bucket, 0.0) + tokens / bucket.tokens_per_second)
        if moment > now + longest:
            return longest
        self._latest[bucket] = moment
        return moment - now


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
