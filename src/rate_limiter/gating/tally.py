"""What happened under each limit: observers learn every outcome of a job, and a tally counts them.

Observers are called by the engine of a gate, by the decorator as it pays and settles, by `steering` for changes, and
by `celery.parked` for jobs that were moved. Nothing else calls them.
"""

import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from mmap import mmap
from time import perf_counter
from typing import Any, Final

from ..private_file import is_open, open_private_file
from .limit import Demand, Limit

try:
    from fcntl import LOCK_EX, LOCK_NB, lockf
except ImportError:  # Windows
    lockf = None  # type: ignore[assignment]

__all__ = ["Observer", "Tally", "observers", "share_tallies", "tally_of", "tell"]

logger = logging.getLogger("rate_limiter")


class Observer:
    """Learns every outcome of a job under a limit. Each method does nothing: override the ones you need.

    Methods are called in the loop of the worker or consumer, or in the task's own thread: keep them quick.
    ``job`` is the gate's object for the job, whose ``str()`` names it. Where the decorator pays, it is the
    name of the task.
    """

    def held(self, job: Any, demand: Demand, delay: float) -> None:
        """Take note of a job that begins to wait.

        Args:
            job: The job.
            demand: The tokens that it waits for, with their bucket and limit.
            delay: The seconds until they are there, as forecast now. 0.0: it waits until jobs that
                its bucket has let go have started.

        """

    def admitted(self, job: Any, demands: Sequence[Demand], waited: float, limit: Limit | None) -> None:
        """Take note of a job that has paid and may run.

        Args:
            job: The job.
            demands: The tokens that it has paid, each with bucket and limit.
            waited: The seconds for which it was held, or waited in the decorator.
            limit: The last limit that made it wait. ``None``: it did not wait.

        """

    def refused(self, job: Any, demand: Demand, delay: float, how: str) -> None:
        """Take note of a job that found no tokens and does not wait for them.

        Args:
            job: The job.
            demand: The tokens that it did not get, with their bucket and limit.
            delay: The seconds until they are there.
            how: How the job is refused: ``"raise"``, ``"drop"``, ``"retry"``, ``"fallback"``, or
                ``"timeout"`` if the wait is, or would be, longer than ``timeout`` or ``max_wait``.

        """

    def skipped(self, job: Any, limit: Limit) -> None:
        """Take note of a job that was revoked, or has expired, while a limit made it wait."""

    def failed(self, job: Any, limit: Limit, error: Exception) -> None:
        """Take note of a job that cannot pay: its cost cannot be computed, or the bucket raises."""

    def returned(self, job: Any, limit: Limit) -> None:
        """Take note of a held job that goes back to its queue before its turn.

        It was held for too long, or another worker has started and is to have its share.
        """

    def parked(self, limit: Limit, jobs: int) -> None:
        """Take note of jobs that were moved aside in the broker, until their tokens come."""

    def shadowed(self, limit: Limit, seconds: float) -> None:
        """Take note of a job that a limit with ``shadow=True`` would have made wait, or refused.

        Args:
            limit: The limit.
            seconds: How long the job would have waited for its tokens. It may be infinite.

        """

    def forgotten(self, jobs: Sequence[Any]) -> None:
        """Take note of held jobs that go back to the broker: the worker stops or has reconnected."""

    def given_back(self, limit: Limit, tokens: float) -> None:
        """Take note of tokens that a paid job gave back. Below 0: it was charged more, afterwards."""

    def changed(self, limit: Limit, what: str, reason: str) -> None:
        """Take note of a limit that an operator has changed.

        Args:
            limit: The limit.
            what: What is new: ``"5 tokens_per_second (was 1)"``.
            reason: Why, in the operator's words, or ``""``.

        """


#: An observer that takes longer, in seconds, is logged.
_SLOW: Final = 0.05

#: The observers that the log has told of.
_failed: Final[weakref.WeakSet[Observer]] = weakref.WeakSet()
_slow: Final[weakref.WeakSet[Observer]] = weakref.WeakSet()

#: All observers, in the order in which they are called.
observers: Final[list[Observer]] = []

#: For each outcome: the observers that do something with it, as long as all observers are those known here.
_hearing: Final[dict[str, list[tuple[Observer, Callable[..., None]]]]] = {}
_known: Final[list[Observer]] = []


def tell(outcome: str, *details: Any) -> None:
    """Call all observers.

    What an observer raises changes nothing else. It is logged, as is one that takes long: once each.

    Args:
        outcome: The name of a method of `Observer`.
        details: Its arguments.

    """
    for observer, method in _hearers(outcome):
        began = perf_counter()
        try:
            method(*details)
        except Exception:
            if observer not in _failed:
                _failed.add(observer)
                logger.exception("The observer %r failed. Further failures are not logged", observer)
        if perf_counter() - began > _SLOW and observer not in _slow:
            _slow.add(observer)
            took = (perf_counter() - began) * 1000
            logger.warning("The observer %r took %.0f ms, and holds up all jobs", observer, took)


def _hearers(outcome: str) -> list[tuple[Observer, Callable[..., None]]]:
    """Return the observers that do something with an outcome, and their methods for it."""
    if _known != observers:
        _known[:] = observers
        _hearing.clear()
    hearers = _hearing.get(outcome)
    if hearers is None:
        idle = getattr(Observer, outcome)
        hearers = _hearing[outcome] = [
            (each, getattr(each, outcome))
            for each in observers
            if getattr(type(each), outcome) is not idle
        ]
    return hearers


#: The numbers of a tally. See `Tally`.
_NAMES: Final = (
    *("admitted", "tokens", "refused", "failed", "skipped"),
    *("returned", "parked", "shadowed", "waited", "longest"),
)

#: The position of each of them.
_ADMITTED, _TOKENS, _REFUSED, _FAILED, _SKIPPED = range(5)
_RETURNED, _PARKED, _SHADOWED, _WAITED, _LONGEST = range(5, 10)

#: The number of rows in shared memory, one for each process. Further processes use the last row together.
_ROWS: Final = 256

#: One lock for all tallies of the process.
_lock = threading.Lock()


class Tally:
    """The numbers of one limit, since the worker or consumer began.

    - ``admitted``: jobs that have paid.
    - ``tokens``: the tokens that they have paid, as settled so far.
    - ``refused``: jobs that found no tokens and did not wait.
    - ``failed``: jobs that could not pay: their cost could not be computed, or the bucket raised.
    - ``skipped``: jobs that were revoked, or expired, while held.
    - ``returned``: held jobs that went back to their queue before their turn.
    - ``parked``: jobs that were moved aside in the broker, counted each time.
    - ``shadowed``: jobs that a limit with ``shadow=True`` would have made wait, or refused.
    - ``waited``, ``longest``: the seconds that admitted jobs have waited: their sum, and the longest wait. With
      ``shadow=True`` those that they would have waited.
    """

    __slots__ = ("__weakref__", "_cells", "_column", "_table")

    def __init__(self) -> None:
        self._cells: Any = [0.0] * len(_NAMES)
        #: The shared memory that has the numbers, once other processes share them.
        self._table: _Table | None = None
        self._column = 0

    def snapshot(self) -> dict[str, float]:
        """Return the numbers by their names. Each is the sum over all processes, but for ``longest``."""
        with _lock:
            if self._table is None:
                return dict(zip(_NAMES, self._cells, strict=True))
            rows = self._table.rows(self._column)
        columns = zip(*rows, strict=True)
        numbers: dict[str, float] = dict(zip(_NAMES, map(sum, columns), strict=True))
        numbers["longest"] = max(row[_LONGEST] for row in rows)
        return numbers

    def _count(self, field: int, amount: float = 1.0, tokens: float = 0.0) -> None:
        cells, first = self._cells, 0
        if (table := self._table) is not None:
            cells, first = table.own_row(), self._column
        with _lock:  # nothing is called inside: a signal handler that counts too would wait for ever
            cells[first + field] += amount
            if tokens:
                cells[first + _TOKENS] += tokens
            if field == _WAITED and cells[first + _LONGEST] < amount:
                cells[first + _LONGEST] = amount


class _Table:
    """Tallies in memory that a process shares with all that are forked from it.

    Each process counts in a row of its own, so no process waits for another. For its row it locks one byte
    of an unlinked file. The kernel unlocks the byte when the process ends, even if it is killed. Another
    process may then take the row and add to its numbers, so no number is lost.
    """

    def __init__(self, tallies: Sequence[Tally]) -> None:
        self._width = len(_NAMES) * len(tallies)
        # First a mark for each row that is in use, then the rows. Pages that are never written take no memory.
        self._memory = memoryview(mmap(-1, 8 * _ROWS * (1 + self._width))).cast("d")
        self._file, self._mark = open_private_file(self, "rate_limiter_tally")
        self._own: Any = None
        own = self.own_row()
        for number, tally in enumerate(tallies):
            column = number * len(_NAMES)
            for field, value in enumerate(tally._cells):
                own[column + field] = value
            tally._table, tally._column, tally._cells = self, column, None

    def own_row(self) -> Any:
        """Return the row of this process."""
        if self._own is None:
            number = next((row for row in range(_ROWS) if self._lock(row)), _ROWS - 1)
            self._memory[number] = 1.0
            self._own = self._row(number)
        return self._own

    def rows(self, column: int) -> list[list[float]]:
        """Return the numbers of one tally, by its first column: a list for each process."""
        used = (number for number in range(_ROWS) if self._memory[number])
        return [self._row(number)[column : column + len(_NAMES)].tolist() for number in used]

    def forget_row(self) -> None:
        """Let a forked child take a row of its own."""
        self._own = None

    def _row(self, number: int) -> Any:
        begin = _ROWS + number * self._width
        return self._memory[begin : begin + self._width]

    def _lock(self, row: int) -> bool:
        if not is_open(self._file, self._mark):
            return False
        try:
            lockf(self._file, LOCK_EX | LOCK_NB, 1, row)
        except OSError:
            return False
        return True


_tallies: "weakref.WeakKeyDictionary[Limit, Tally]" = weakref.WeakKeyDictionary()
_tables: "weakref.WeakSet[_Table]" = weakref.WeakSet()


def tally_of(limit: Limit) -> Tally:
    """Return the tally of a limit."""
    tally = _tallies.get(limit)
    if tally is None:
        tally = _tallies.setdefault(limit, Tally())
    return tally


def share_tallies(limits: Iterable[Limit]) -> None:
    """Share the tallies of limits with all processes that are forked from this one from now on.

    A tally that is shared already stays as it is. Without ``fork`` and ``lockf`` each process counts
    for itself.
    """
    tallies = [tally for tally in map(tally_of, dict.fromkeys(limits)) if tally._table is None]
    if tallies and lockf is not None and hasattr(os, "fork"):
        with _lock:
            _tables.add(_Table(tallies))


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 - another thread may have held it
    _lock = threading.Lock()
    for table in list(_tables):
        table.forget_row()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class _Counting(Observer):
    """The observer that keeps the tallies."""

    def admitted(self, job: Any, demands: Sequence[Demand], waited: float, limit: Limit | None) -> None:
        if len(demands) == 1:
            demand = demands[0]
            tally_of(demand.limit)._count(_ADMITTED, 1.0, demand.tokens)
        else:  # one limit may take the same from several buckets
            for each, tokens in {demand.limit: demand.tokens for demand in demands}.items():
                tally_of(each)._count(_ADMITTED, 1.0, tokens)
        if limit is not None:
            tally_of(limit)._count(_WAITED, waited)

    def refused(self, job: Any, demand: Demand, delay: float, how: str) -> None:
        tally_of(demand.limit)._count(_REFUSED)

    def skipped(self, job: Any, limit: Limit) -> None:
        tally_of(limit)._count(_SKIPPED)

    def failed(self, job: Any, limit: Limit, error: Exception) -> None:
        tally_of(limit)._count(_FAILED)

    def returned(self, job: Any, limit: Limit) -> None:
        tally_of(limit)._count(_RETURNED)

    def parked(self, limit: Limit, jobs: int) -> None:
        tally_of(limit)._count(_PARKED, jobs)

    def shadowed(self, limit: Limit, seconds: float) -> None:
        tally_of(limit)._count(_SHADOWED)
        if seconds < math.inf:
            tally_of(limit)._count(_WAITED, seconds)

    def given_back(self, limit: Limit, tokens: float) -> None:
        tally_of(limit)._count(_TOKENS, -tokens)


observers.append(_Counting())
