"""One token bucket for all processes that were forked from one.

Design
------
*State.* `TokenBucket`'s own numbers, in anonymous shared memory. To work on them a process takes the
lock, loads them into the bucket's attributes, lets `TokenBucket` do its arithmetic, and stores them:
whole into the record that is not in use, then one store of eight bytes says that it is. So a process
that is killed between any two instructions leaves the old state or the new one.

*Locking.* ``lockf`` on a file of its own, which the kernel unlocks when its owner dies, however it
dies. It knows only processes, so a thread lock goes around it: one for all buckets of the process,
because the kernel would see a deadlock in two threads that lock two files. The file is never mapped,
duplicated or closed while the bucket lives: each of these would unlock it.

*Refusals.* As in `TokenBucket` each process remembers its last one, with the number of times by then
that tokens came back before their time. While that number is the same it holds, without the lock.

*Waiting.* Within a process as in `TokenBucket`. The head of each process's queue holds a place in a
table in the shared memory; the places are served in order, and the next head gets a new one, so that
processes take turns and nobody overtakes a heavy waiter. A head looks again, and confirms its place, at
the moment for which its tokens are forecast, and every `_LOOK_AGAIN` seconds. It also locks one byte of
the file for its place, by which the others see whether it lives. A place whose owner was killed is
cleared; so is one that was not confirmed for `_GIVEN_UP` seconds, because its owner is stopped. Should
that one come back, it stands where it stood.
"""

import functools
import math
import mmap
import os
import sys
import tempfile
import threading
import time
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Final, cast

from .checks import positive
from .token_bucket import _GIL, _NOTHING_REFUSED, TokenBucket, _Waiter

try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, lockf
except ImportError:  # Windows
    lockf = None  # type: ignore[assignment]

__all__ = ["SharedTokenBucket", "is_shared", "share"]

#: Seconds after which a head looks again, whatever was forecast: another process may have refunded.
_LOOK_AGAIN: Final = 0.2

#: Seconds after which it is asked whether the owner of a place lives, and after which it is cleared
#: even so, unless it was confirmed.
_DOUBTED: Final = 0.01
_GIVEN_UP: Final = 0.5

# The layout of the shared memory, in doubles.
_RECORD: Final = 0  # where the record begins that is in use
_SOONER: Final = 1  # how often tokens came back before their time
_LAST_NUMBER: Final = 2  # of a place
_IN_USE: Final = 3  # how many rows of the table to look at
_RECORDS: Final = 4, 9  # when it was full, used, end of the pause, capacity, rate
_TABLE: Final = 14  # of places: number (0: free), tokens, when confirmed
_ROWS: Final = 256
_SIZE: Final = _TABLE + 3 * _ROWS

#: Within the process. Taken before, and released after, the lock of any bucket.
_threads = threading.Lock()


class SharedTokenBucket(TokenBucket):
    """A `TokenBucket` that is one for the process that made it and for all that are forked from it.

    Its level, rate, pauses and waiters are common to all threads of all these processes. To be made
    before the fork, as at import in a prefork worker; what is made in a child is shared with that
    child's own children. A spawned process does not share it, and it cannot be pickled. Each takes a
    file descriptor and 8 kB.

    Args:
        capacity: The most tokens it can hold, which is the largest burst. Above 0.
        tokens_per_second: The rate at which tokens come back. Above 0.
        clock: Returns the time in seconds, the same in all processes, as ``time.monotonic`` does.

    Raises:
        ValueError: An argument is not above 0, or is not finite.
        TypeError: An argument is not a number, or ``clock`` cannot be called.
        NotImplementedError: The platform has no ``fork`` or no ``fcntl.lockf``.

    `wait` is first come, first served within a process; processes take turns. What is given back,
    paused or configured in one process reaches those who wait in another within 0.2 s. Forecasts
    count the waiters of the own process, and the first one of each other.

    A process may be killed at any instruction: that costs at most the tokens which it was taking. One
    that is stopped (``SIGSTOP``) in `wait` keeps others waiting for up to 0.7 s; in the microseconds in
    which it holds the lock, until it continues or is killed.
    An exception from a signal handler is as harmless as in a `TokenBucket`, but the handler must not
    itself use a shared bucket: it would wait for the very code that it interrupts.

    """

    __slots__ = ()

    _LONGEST_SLEEP: ClassVar[float] = _LOOK_AGAIN

    def __init__(
        self,
        capacity: float,
        tokens_per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(capacity, tokens_per_second, clock=clock)
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
        """The tokens that are there now."""
        return self._locked(TokenBucket.tokens.__get__, self)  # type: ignore[no-any-return]

    def allow(self, tokens: float = 1.0) -> bool:
        """Take tokens now, all or nothing. See `TokenBucket.allow`."""
        now = self._clock()
        common = self._common
        cells = common.cells
        try:
            refused = self._refused
            if (
                now < refused[0]
                and refused[1] <= tokens + 0.0 <= refused[2]  # type: ignore[misc]
                and refused[3] == cells[_SOONER]  # type: ignore[misc]
            ):
                return False
            if not 0.0 < tokens + 0.0 < math.inf:
                positive("tokens", tokens)
        except (TypeError, ArithmeticError):  # a str, a Decimal
            positive("tokens", tokens)
            raise
        if self._head is not None:
            return False
        with _threads:
            try:
                lockf(common.file, LOCK_EX, 1)
                if not cells[_IN_USE]:  # the arithmetic of `TokenBucket.allow`
                    self._load()
                    short = self._used - (now - self._full_at) * self._rate
                    if short <= 0.0:
                        if tokens <= self._capacity:
                            self._used = tokens + 0.0
                            self._full_at = now
                            self._store()
                            return True
                    elif tokens <= self._capacity - short:
                        self._used += tokens
                        self._store()
                        return True
            finally:
                lockf(common.file, LOCK_UN, 1)
        try:
            return not self._take(tokens + 0.0, asked_at=now)
        except ValueError:  # more than the capacity
            return False

    try_consume = allow

    def refund(self, tokens: float) -> None:
        """Give back tokens that were taken and not used. See `TokenBucket.refund`."""
        self._locked(TokenBucket.refund, self, tokens)

    def charge(self, tokens: float) -> None:
        """Take tokens without asking. See `TokenBucket.charge`."""
        self._locked(TokenBucket.charge, self, tokens)

    def pause(self, seconds: float) -> None:
        """Grant nothing for some time, then start from empty. See `TokenBucket.pause`."""
        self._locked(TokenBucket.pause, self, seconds)

    def configure(
        self, *, capacity: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Change the capacity, the rate or both. See `TokenBucket.configure`."""
        self._locked(
            functools.partial(
                TokenBucket.configure, self, capacity=capacity, tokens_per_second=tokens_per_second
            )
        )

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
            # An exception may strike at any call: what is not stored by then was not taken.
            try:
                lockf(common.file, LOCK_EX, 1)
                self._load()
                if cells[_IN_USE]:
                    elsewhere = self._before(waiter)
                delay = TokenBucket._take(self, tokens, waiter, elsewhere)
                self._store(waiter if not delay else None)
                if self._head is not None or common.holder is not None:
                    self._hold_place()
                elif asked_at is not None and delay and not elsewhere and _GIL:
                    # Half the way, so that no rounding makes it outlast the shortage.
                    until = asked_at + delay / 2.0
                    self._refused = until, tokens, self._capacity, cells[_SOONER]  # type: ignore[assignment]
                return delay
            finally:
                lockf(common.file, LOCK_UN, 1)

    def _locked(self, act: Callable[..., Any], *args: Any) -> Any:
        """Let `TokenBucket` do something to the shared state. It may bring tokens sooner."""
        common = self._common
        with _threads:
            try:
                lockf(common.file, LOCK_EX, 1)
                self._load()
                result = act(*args)
                common.cells[_SOONER] += 1.0
                self._store()
                return result
            finally:
                lockf(common.file, LOCK_UN, 1)

    def _load(self) -> None:
        cells = self._common.cells
        record = _RECORDS[0] if cells[_RECORD] == _RECORDS[0] else _RECORDS[1]
        self._full_at = cells[record]
        self._used = cells[record + 1]
        self._paused_until = cells[record + 2]
        self._capacity = cells[record + 3]
        self._rate = cells[record + 4]

    def _store(self, served: _Waiter | None = None) -> None:
        cells = self._common.cells
        record = _RECORDS[1] if cells[_RECORD] == _RECORDS[0] else _RECORDS[0]
        cells[record] = self._full_at
        cells[record + 1] = self._used
        cells[record + 2] = self._paused_until
        cells[record + 3] = self._capacity
        cells[record + 4] = self._rate
        # No call from here to the mark: an interrupt finds neither or both.
        cells[_RECORD] = record
        if served is not None:
            served.stored = True

    def _leave(self, waiter: _Waiter) -> None:
        if waiter.stored or self._common.holder is waiter:
            self._locked(self._undo, waiter)

    def _undo(self, waiter: _Waiter) -> None:
        if waiter.stored:
            TokenBucket.refund(self, waiter.tokens)
        self._hold_place()

    # -- the table of places; all of it under the lock ---------------------------------------------

    def _before(self, waiter: _Waiter | None) -> float:
        """Return the tokens of the places before one's own, and clear those that are given up."""
        common, now = self._common, time.monotonic()
        cells = common.cells
        mine = common.number if common.holder is not None else 0.0
        turn = mine if waiter is not None and waiter is common.holder else math.inf
        rows = int(cells[_IN_USE])
        table = cells[_TABLE : _TABLE + 3 * rows].tolist()
        before, last = 0.0, 0
        for row in range(rows):
            number, tokens, confirmed = table[3 * row : 3 * row + 3]
            if not number:
                continue
            if number != mine:
                place = _TABLE + 3 * row
                age = now - confirmed
                if age > _GIVEN_UP or (age > _DOUBTED and self._is_nobodys(place)):
                    cells[place] = 0.0
                    continue
                if number < turn:
                    before += tokens
            last = row + 1
        cells[_IN_USE] = last
        return before

    def _hold_place(self) -> None:
        """See that the head of this process's queue, and nobody else of it, holds a place."""
        common, head = self._common, self._head
        cells = common.cells
        if common.holder is not head:
            if cells[common.place] == common.number:
                cells[common.place] = 0.0
            lockf(common.file, LOCK_UN, 1, common.place)
            common.holder = None
            if head is not None:
                common.number = cells[_LAST_NUMBER] = cells[_LAST_NUMBER] + 1.0
                common.holder = head
        if head is None:
            return
        if cells[common.place] != common.number:
            lockf(common.file, LOCK_UN, 1, common.place)
            for place in range(_TABLE, _TABLE + 3 * _ROWS, 3):
                if not cells[place] and self._is_nobodys(place):
                    break
            else:
                return  # more processes than rows: without one it is served when nobody else is
            common.place = place
            lockf(common.file, LOCK_EX | LOCK_NB, 1, place)
            cells[_IN_USE] = max(cells[_IN_USE], (place - _TABLE) // 3 + 1)
            cells[place + 1] = head.tokens
        cells[common.place + 2] = time.monotonic()
        cells[common.place] = common.number

    def _is_nobodys(self, place: int) -> bool:
        """Tell whether no other process that lives has locked the byte of a place."""
        file = self._common.file
        try:
            lockf(file, LOCK_EX | LOCK_NB, 1, place)
        except OSError:
            return False
        lockf(file, LOCK_UN, 1, place)
        return True

    def _waiting(self) -> int:
        cells = self._common.cells
        own = super()._waiting()
        places = cells[_TABLE::3].tolist()
        return own + sum(1 for number in places if number) - (1 if own else 0)

    def _forget_waiters(self) -> None:
        super()._forget_waiters()
        if self._common is not None:  # those who wait, and their place, are the parent's
            self._common.holder = None
            self._common.number = 0.0


class _Common:
    """What the processes share, and which place in its table this process holds."""

    __slots__ = ("cells", "file", "holder", "number", "place")

    def __init__(self) -> None:
        if lockf is None or not hasattr(os, "fork"):
            raise NotImplementedError(
                f"a SharedTokenBucket needs fork and fcntl.lockf, which {sys.platform} lacks: use a "
                "TokenBucket in one process, a RedisTokenBucket in several"
            )
        self.cells = memoryview(mmap.mmap(-1, 8 * _SIZE)).cast("d")
        if hasattr(os, "memfd_create"):
            self.file = os.memfd_create("rate_limiter")
        else:
            with tempfile.TemporaryFile() as unlinked:
                self.file = os.dup(unlinked.fileno())
        self.holder: _Waiter | None = None
        self.number = 0.0
        self.place = _TABLE


def is_shared(bucket: object) -> bool:
    """Tell whether a bucket is one for all processes forked from the one that made or shared it."""
    return isinstance(bucket, SharedTokenBucket)


def share(bucket: TokenBucket) -> None:
    """Turn a bucket, in place, into one for this process and all that are forked from it from now on.

    It keeps its level, and everything that a subclass adds; methods that a subclass overrides have to
    call ``super()``. To be called while no other thread is in a method of it. A shared bucket stays as
    it is.

    Args:
        bucket: A `TokenBucket`, or one of a class derived from it. Its class becomes
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
    """Derive a class whose ``super()`` calls, wherever they stand, end in `SharedTokenBucket`."""
    if kind not in _kinds:
        body = {"__slots__": (), "__module__": kind.__module__, "__doc__": kind.__doc__}
        name, bases = f"Shared{kind.__name__}", (kind, SharedTokenBucket)
        _kinds[kind] = types.new_class(name, bases, exec_body=lambda namespace: namespace.update(body))
    return _kinds[kind]


def _move_to_shared_memory(bucket: TokenBucket, kind: type[SharedTokenBucket] | None = None) -> None:
    common = _Common()
    weakref.finalize(bucket, os.close, common.file).atexit = False
    with bucket._lock:
        bucket._common = common
        if kind is not None:
            bucket.__class__ = kind
        cast("SharedTokenBucket", bucket)._store()
        bucket._refused = _NOTHING_REFUSED


def _after_fork_in_child() -> None:
    global _threads  # noqa: PLW0603
    _threads = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
