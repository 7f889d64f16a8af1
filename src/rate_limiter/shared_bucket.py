"""One token bucket for all processes that were forked from one.

This file and `token_bucket` are one design in two files: all arithmetic stands there, this file stores
its numbers where all processes see them. What it uses of `TokenBucket` stands there in one marked block,
"Seams for SharedTokenBucket".

Design
------
*State.* `TokenBucket`'s own numbers, in anonymous shared memory. To use them a process takes the lock,
loads them into the bucket's attributes, lets `TokenBucket` do its arithmetic, and stores them: it writes
all of them to the record that is not in use, then says with one store of eight bytes that this record is
in use now. So a process that is killed between any two instructions leaves the old state or the new one.

*Locking.* ``lockf`` on a file of its own. The kernel unlocks it when the process that holds the lock
dies, however it dies. ``lockf`` tells processes apart but not threads, so a thread lock goes around it:
one for all shared buckets of the process, because the kernel would report a deadlock for two threads
that lock two files. The file is never mapped, duplicated or closed while the bucket lives: each of these
would unlock it. A daemon that closes all descriptors closes this one too, and the next file that it
opens may get its number. So the position of the file is set to a random number when it is made, and
compared before each lock.

*Refusals.* As in `TokenBucket`, each process caches its last refusal, with the value of a shared counter
of refunds, pauses and new settings. While the counter is unchanged, the cached refusal is still right
and is answered without the lock.

*Waiting.* Within a process as in `TokenBucket`. The head of each process's queue has a row in a table in
the shared memory. The rows are served in the order of their numbers, and the next head of a process gets
a new number, so that processes take turns and nobody overtakes a heavy waiter. A head looks again, and
confirms its row, at the moment for which its tokens are forecast, and every `_LOOK_AGAIN` seconds. It
also locks the byte of the file that belongs to its row, so that the others can see whether its process
lives. The row of a process that was killed is cleared. So is a row that was not confirmed for
`_GIVEN_UP` seconds, because its process is stopped; when that process continues, its head gets its row
back with the same number.
"""

import math
import mmap
import os
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any, ClassVar, Final, cast

from .checks import positive
from .private_file import is_open, open_private_file
from .token_bucket import _EARLY_SECONDS, _EXACT, _GIL, _NOTHING_REFUSED, TokenBucket, _Waiter

try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, lockf
except ImportError:  # Windows
    lockf = None  # type: ignore[assignment]

__all__ = ["SharedTokenBucket", "is_shared", "share"]

#: Seconds after which a head looks again, whatever was forecast: another process may have refunded
#: tokens.
_LOOK_AGAIN: Final = 0.2

#: Seconds without a confirmation after which others check whether the process of a row lives, and
#: after which they clear the row although it lives.
_DOUBTED: Final = 0.01
_GIVEN_UP: Final = 0.5

# The layout of the shared memory, in doubles.
_RECORD: Final = 0  # the cell at which the record in use begins
_CHANGES: Final = 1  # how often tokens came back before their time
_LAST_NUMBER: Final = 2  # the last number that a row got
_IN_USE: Final = 3  # how many rows of the table may be taken
_RECORDS: Final = 4, 9  # when it was full, used, end of the pause, capacity, rate
_TABLE: Final = 14  # rows of three cells: number (0: free), tokens, when confirmed
_ROWS: Final = 256
_SIZE: Final = _TABLE + 3 * _ROWS

#: Excludes the other threads of the process. Taken before, and released after, the lock of any bucket.
_threads = threading.Lock()


class SharedTokenBucket(TokenBucket):
    """One `TokenBucket` for the process that made it and for all processes that are forked from it.

    Its level, rate, pauses and waiters are common to all threads of all these processes. Make it before
    the fork, for example at import in a prefork worker. A bucket that was made in a child is shared with
    that child's own children. A spawned process does not share it, and it cannot be pickled. Each bucket
    takes a file descriptor and 8 kB.

    Args:
        capacity: The most tokens it can hold, which is the largest burst. Above 0.
        tokens_per_second: The rate at which tokens come back. Above 0.
        initial: The tokens that it starts with, as in `TokenBucket`: once, not once per process.
        clock: Returns the time in seconds, the same in all processes, as ``time.monotonic`` does.

    Raises:
        ValueError: As in `TokenBucket`.
        TypeError: As in `TokenBucket`.
        NotImplementedError: The platform has no ``fork`` or no ``fcntl.lockf``.
        RuntimeError: From every method that takes, gives back or changes: this process has closed the
            bucket's file descriptor, as a daemon does that closes all of them.

    `wait` is first come, first served within a process; processes take turns. A refund, a pause or a new
    setting in one process reaches the waiters of another within 0.2 s. Forecasts count all waiters of
    the own process, and the first one of each other process.

    A process may be killed at any instruction: that costs at most the tokens that it was taking. A
    process that is stopped (``SIGSTOP``) in `wait` delays others by up to 0.7 s; one that is stopped in
    the microseconds in which it holds the lock, until it continues or is killed. An exception from a
    signal handler is as harmless as in a `TokenBucket`, but the handler must not itself use a shared
    bucket: it would wait for the code that it interrupts.

    """

    __slots__ = ()

    _LONGEST_SLEEP: ClassVar[float] = _LOOK_AGAIN

    def __init__(
        self,
        capacity: float,
        tokens_per_second: float,
        *,
        initial: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(capacity, tokens_per_second, initial=initial, clock=clock)
        _move_to_shared_memory(self)

    @property
    def capacity(self) -> float:
        """The most tokens the bucket can hold."""
        cells = self._common.cells
        return cells[int(cells[_RECORD]) + 3]  # type: ignore[no-any-return]

    @property
    def tokens_per_second(self) -> float:
        """The rate at which tokens come back."""
        cells = self._common.cells
        return cells[int(cells[_RECORD]) + 4]  # type: ignore[no-any-return]

    @property
    def tokens(self) -> float:
        """The tokens that are there now: below 0 while in debt."""
        return self._locked(TokenBucket.tokens.__get__, self)  # type: ignore[no-any-return]

    @property
    def changes(self) -> float:
        """How often forecasts became wrong, in all processes. See `TokenBucket.changes`."""
        return self._common.cells[_CHANGES]  # type: ignore[no-any-return]

    def allow(self, tokens: float = 1.0) -> bool:
        """Take tokens now, all or nothing. See `TokenBucket.allow`."""
        if type(tokens) is not float:  # what is kept has to be exactly that
            if type(tokens) is int and 0 < tokens <= _EXACT:
                tokens += 0.0
            else:
                tokens = positive("tokens", tokens, documented=True)
        now = self._clock()
        common = self._common
        cells = common.cells
        refused = self._refused
        if now < refused[0] and refused[1] <= tokens <= refused[2] and refused[3] == cells[_CHANGES]:
            return False
        if not 0.0 < tokens < math.inf:
            positive("tokens", tokens, documented=True)
        if self._head is not None:
            return False
        with _threads:
            self._check_file()
            try:
                lockf(common.file, LOCK_EX, 1)
                if not cells[_IN_USE]:  # the arithmetic of `TokenBucket.allow`
                    self._load()
                    short = self._used - (now - self._full_at) * self._rate
                    if short <= 0.0:
                        if tokens <= self._capacity:
                            self._used = tokens
                            self._full_at = now
                            self._refused = _NOTHING_REFUSED
                            self._store()
                            return True
                    elif tokens <= self._capacity - short:
                        self._used += tokens
                        self._store()
                        return True
            finally:
                lockf(common.file, LOCK_UN, 1)
        try:
            return not self._take(tokens, asked_at=now)
        except ValueError:  # more than the capacity
            return False

    try_consume = allow

    # -- private ----------------------------------------------------------------------------------

    def _take(
        self,
        tokens: float,
        waiter: _Waiter | None = None,
        elsewhere: float = 0.0,
        asked_at: float | None = None,
    ) -> float:
        common = self._common
        cells = common.cells
        with _threads:
            self._check_file()
            # An exception may strike at any call: tokens are taken once that is stored.
            try:
                lockf(common.file, LOCK_EX, 1)
                self._load()
                if cells[_IN_USE]:
                    elsewhere = self._before(waiter)
                delay = TokenBucket._take(self, tokens, waiter, elsewhere)
                self._store(waiter if not delay else None)
                if self._head is not None or common.holder is not None:
                    self._hold_row()
                elif asked_at is not None and delay and not elsewhere and _GIL:
                    # Half of the time, so that no rounding makes the memory outlast the shortage.
                    until = asked_at + (delay - _EARLY_SECONDS) / 2.0
                    self._refused = until, tokens, self._capacity, cells[_CHANGES]
                return delay
            finally:
                lockf(common.file, LOCK_UN, 1)

    def _locked(self, act: Callable[..., Any], *args: Any) -> Any:
        common = self._common
        with _threads:
            self._check_file()
            try:
                lockf(common.file, LOCK_EX, 1)
                self._load()
                result = act(*args)
                self._store()
                return result
            finally:
                lockf(common.file, LOCK_UN, 1)

    def _check_file(self) -> None:
        """See that the descriptor still belongs to the file of this bucket."""
        common = self._common
        if not is_open(common.file, common.mark):
            raise RuntimeError(
                f"{self!r} cannot be locked any more: process {os.getpid()} has closed its file descriptor "
                f"{common.file}, as a daemon does that closes all descriptors. Make the bucket after that, "
                "or have this descriptor stay open"
            )

    def _load(self) -> None:
        cells = self._common.cells
        record = _RECORDS[0] if cells[_RECORD] == _RECORDS[0] else _RECORDS[1]
        self._full_at = cells[record]
        self._used = cells[record + 1]
        self._paused_until = cells[record + 2]
        self._capacity = cells[record + 3]
        self._rate = cells[record + 4]
        self._changes = cells[_CHANGES]

    def _store(self, served: _Waiter | None = None) -> None:
        cells = self._common.cells
        record = _RECORDS[1] if cells[_RECORD] == _RECORDS[0] else _RECORDS[0]
        cells[record] = self._full_at
        cells[record + 1] = self._used
        cells[record + 2] = self._paused_until
        cells[record + 3] = self._capacity
        cells[record + 4] = self._rate
        # Before the new numbers are in use: others then forget their refusals too early, never too late.
        cells[_CHANGES] = self._changes
        # No call from here to `stored`: an interrupt finds neither or both.
        cells[_RECORD] = record
        if served is not None:
            served.stored = True

    def _leave(self, waiter: _Waiter) -> None:
        if waiter.stored or self._common.holder is waiter:
            self._locked(self._undo, waiter)
        super()._leave(waiter)

    def _undo(self, waiter: _Waiter) -> None:
        if waiter.stored:
            self._refund(waiter.tokens)
        else:
            self._changes += 1.0
        self._hold_row()

    # -- the table of waiters; all of it under the lock --------------------------------------------

    def _before(self, waiter: _Waiter | None) -> float:
        """Return the tokens of the rows before the own one, and clear the rows that are given up."""
        common, now = self._common, time.monotonic()
        cells = common.cells
        mine = common.number if common.holder is not None else 0.0
        own = mine if waiter is not None and waiter is common.holder else math.inf
        rows = int(cells[_IN_USE])
        table = cells[_TABLE : _TABLE + 3 * rows].tolist()
        before, last = 0.0, 0
        for row in range(rows):
            number, tokens, confirmed = table[3 * row : 3 * row + 3]
            if not number:
                continue
            if number != mine:
                cell = _TABLE + 3 * row
                age = now - confirmed
                if age > _GIVEN_UP or (age > _DOUBTED and self._is_nobodys(cell)):
                    cells[cell] = 0.0
                    continue
                if number < own:
                    before += tokens
            last = row + 1
        cells[_IN_USE] = last
        return before

    def _hold_row(self) -> None:
        """See that the head of this process's queue, and no other waiter of it, has a row."""
        common, head = self._common, self._head
        cells = common.cells
        if common.holder is not head:
            if cells[common.row] == common.number:
                cells[common.row] = 0.0
            lockf(common.file, LOCK_UN, 1, common.row)
            common.holder = None
            if head is not None:
                common.number = cells[_LAST_NUMBER] = cells[_LAST_NUMBER] + 1.0
                common.holder = head
        if head is None:
            return
        if cells[common.row] != common.number:
            lockf(common.file, LOCK_UN, 1, common.row)
            for row in range(_TABLE, _TABLE + 3 * _ROWS, 3):
                if not cells[row] and self._is_nobodys(row):
                    break
            else:
                return  # more processes than rows: without one it is served when nobody else waits
            common.row = row
            lockf(common.file, LOCK_EX | LOCK_NB, 1, row)
            cells[_IN_USE] = max(cells[_IN_USE], (row - _TABLE) // 3 + 1)
            cells[row + 1] = head.tokens
        cells[common.row + 2] = time.monotonic()
        cells[common.row] = common.number

    def _is_nobodys(self, row: int) -> bool:
        """Tell whether no other living process has locked the byte of a row."""
        file = self._common.file
        try:
            lockf(file, LOCK_EX | LOCK_NB, 1, row)
        except OSError:
            return False
        lockf(file, LOCK_UN, 1, row)
        return True

    def _forget_waiters(self) -> None:
        super()._forget_waiters()
        if self._common is not None:  # the waiters and their row are the parent's
            self._common.holder = None
            self._common.number = 0.0


class _Common:
    """The memory and the file of a bucket, and the row of this process in the table."""

    __slots__ = ("cells", "file", "holder", "mark", "number", "row")

    def __init__(self, bucket: TokenBucket) -> None:
        if lockf is None or not hasattr(os, "fork"):
            raise NotImplementedError(
                f"a SharedTokenBucket needs fork and fcntl.lockf, which {sys.platform} lacks: use a "
                "TokenBucket, which limits each process by itself"
            )
        self.cells = memoryview(mmap.mmap(-1, 8 * _SIZE)).cast("d")
        self.file, self.mark = open_private_file(bucket, "rate_limiter")
        #: The waiter whose row it is, the number of that row, and the cell at which it begins.
        self.holder: _Waiter | None = None
        self.number = 0.0
        self.row = _TABLE


def is_shared(bucket: object) -> bool:
    """Tell whether all processes that are forked from this one share the bucket."""
    return isinstance(bucket, SharedTokenBucket)


def share(bucket: TokenBucket) -> None:
    """Make a bucket, in place, common to this process and to all that are forked from it from now on.

    It keeps its level, its listeners and everything that a subclass adds; methods that a subclass
    overrides have to call ``super()``. Call this while no other thread is in a method of the bucket. A
    bucket that is shared already stays as it is.

    Args:
        bucket: A `TokenBucket`, or an object of a class derived from it. Its class becomes
            `SharedTokenBucket`, or one derived from both.

    Raises:
        TypeError: It is no `TokenBucket`, or its class does not let its objects change theirs.
        NotImplementedError: The platform has no ``fork`` or no ``fcntl.lockf``.

    """
    if not isinstance(bucket, TokenBucket):
        raise TypeError(f"only a TokenBucket can be shared, not {bucket!r}")
    if not is_shared(bucket):
        kind = _shared_kind(type(bucket))
        _move_to_shared_memory(bucket, kind)


#: The classes of buckets that were shared.
_kinds: Final[dict[type, type[SharedTokenBucket]]] = {TokenBucket: SharedTokenBucket}


def _shared_kind(kind: type[TokenBucket]) -> type[SharedTokenBucket]:
    """Derive a class in which the ``super()`` calls of the user's class end in `SharedTokenBucket`."""
    if kind not in _kinds:
        body = {"__slots__": (), "__module__": kind.__module__, "__doc__": kind.__doc__}
        name, bases = f"Shared{kind.__name__}", (kind, SharedTokenBucket)
        _kinds[kind] = types.new_class(name, bases, exec_body=lambda namespace: namespace.update(body))
    return _kinds[kind]


def _move_to_shared_memory(bucket: TokenBucket, kind: type[SharedTokenBucket] | None = None) -> None:
    bucket._common = _Common(bucket)
    if kind is not None:
        bucket.__class__ = kind
    cast("SharedTokenBucket", bucket)._store()
    bucket._refused = _NOTHING_REFUSED


def _after_fork_in_child() -> None:
    global _threads  # noqa: PLW0603
    _threads = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
