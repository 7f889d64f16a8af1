"""The token bucket: how many jobs may go now, and when the next one may.

Design
------
*State.* Two floats: the moment the bucket was last full, and the tokens used since. The shortage
``used - elapsed * rate`` is then one fresh subtraction, so nothing accumulates: a burst of exactly
``capacity`` is granted whatever the numbers, and a rate holds for months. (Keeping one "theoretical
arrival time" instead loses a token of the burst for every third choice of capacity and rate.)

*Locking.* The clock is read before the lock is taken, and nothing is called while it is held: no
``min``, no helper, no allocation that could run a finalizer. CPython switches threads and runs signal
handlers only at calls and loops, so a thread that holds the lock is never switched away from, and a
signal handler may itself call ``allow()``. The lock makes it correct without the GIL too.

*Refusals.* A bucket only fills by itself, so a refusal stays right for a while. It is remembered as
``(until, from how many tokens on)``, and the next one is a comparison without the lock.

*Pausing.* A paused bucket is one that will be empty at a moment to come: to the arithmetic a clock
that was set back, and nothing is granted until it has caught up.

*Waiting.* Waiters stand in a queue. Its head alone sleeps towards a moment; it takes its tokens when
it wakes, and hands the turn on. So light waiters never starve a heavy one, tokens are never granted
ahead of time, and a waiter that is interrupted leaves nothing behind.
"""

import contextlib
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Final, NoReturn

from .checks import not_negative, positive
from .exceptions import RateLimitExceeded

__all__ = ["TokenBucket"]

#: No refusal is remembered.
_NOTHING_REFUSED: Final = (-math.inf, math.inf)

#: Reading two attributes without the lock is only known to be safe under the GIL.
_GIL: Final[bool] = getattr(sys, "_is_gil_enabled", lambda: True)()

#: Once this many capacities were used without the bucket ever being full, the state is written anew
#: at the next refusal, before the rounding of the sum comes to anything.
_REBASE_AFTER: Final = 2.0**8

#: What `take_or_delay` answers while the tokens are there but a waiter is just about to take them.
_BEHIND_A_WAITER: Final = 0.001


class TokenBucket:
    """A thread-safe token bucket for all threads of one process.

    It holds up to ``capacity`` tokens, starts full, and gains ``tokens_per_second`` until it is full
    again. In any span of ``t`` seconds it grants at most ``capacity + tokens_per_second * t`` tokens.
    (Not to be mistaken for ``kombu.utils.limits.TokenBucket``, which takes its arguments the other
    way round and is not thread-safe.)

    Args:
        capacity: The most tokens it can hold, which is the largest burst. Above 0.
        tokens_per_second: The rate at which tokens come back. Above 0.
        clock: Returns the time in seconds. A clock that is set back mints nothing: the bucket stands
            still until the clock has caught up. Tests pass `rate_limiter.testing.ManualClock`.

    Raises:
        ValueError: An argument is not above 0, or is not finite.
        TypeError: An argument is not a number, or ``clock`` cannot be called.

    A forked child starts with the parent's level and without its waiters, and counts on its own from
    there (`SharedTokenBucket` is one for all of them). For the same reason a bucket can neither be
    pickled nor copied. Costs below a 1e-15th of the capacity vanish in the rounding of floats.

    """

    __slots__ = (
        "__weakref__",
        "_ahead",
        "_capacity",
        "_clock",
        "_common",
        "_full_at",
        "_head",
        "_lock",
        "_open",
        "_paused_until",
        "_rate",
        "_refused",
        "_tail",
        "_used",
    )

    def __init__(
        self,
        capacity: float,
        tokens_per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = positive("capacity", capacity)
        self._rate = positive("tokens_per_second", tokens_per_second)
        if not callable(clock):
            raise TypeError(f"clock must be a callable that returns seconds, not {clock!r}")
        self._clock = clock
        #: When the bucket was last full (or the state was written anew), and the tokens used since.
        self._full_at = clock()
        self._used = 0.0
        #: While this is the same as `_full_at`, the bucket was not full since that pause, and at least
        #: the capacity is used.
        self._paused_until = -math.inf
        #: What a `SharedTokenBucket` shares. Here, so that a bucket can become one.
        self._common: Any = None
        #: Until when, and from how many tokens on, a refusal is certain.
        self._refused = _NOTHING_REFUSED
        self._forget_waiters()
        _buckets.add(self)

    def _forget_waiters(self) -> None:
        self._lock = threading.Lock()
        self._head: _Waiter | None = None
        self._tail: _Waiter | None = None
        #: The tokens that the waiters want.
        self._ahead = 0.0
        #: The capacity that `allow` may use: none while somebody waits.
        self._open = self._capacity

    @property
    def capacity(self) -> float:
        """The most tokens the bucket can hold."""
        return self._capacity

    @property
    def tokens_per_second(self) -> float:
        """The rate at which tokens come back."""
        return self._rate

    @property
    def tokens(self) -> float:
        """The tokens that are there now."""
        now = self._clock()
        with self._lock:
            full_at, used, capacity, rate = self._full_at, self._used, self._capacity, self._rate
        return capacity - max(0.0, used - max(0.0, now - full_at) * rate)

    def allow(self, tokens: float = 1.0) -> bool:
        """Take tokens now, all or nothing, without blocking.

        Args:
            tokens: How many to take. Above 0; ``True`` counts as 1.

        Returns:
            Whether they were taken. ``False`` too for more than ``capacity``, and while anybody is in
            `wait`: waiters come first.

        Raises:
            ValueError: ``tokens`` is not above 0, or is not finite.
            TypeError: ``tokens`` is not a number.

        """
        now = self._clock()
        try:
            refused = self._refused
            if now < refused[0] and refused[1] <= tokens + 0.0 <= self._capacity:
                return False
            with self._lock:  # the arithmetic of `_take`, once more, for want of a call
                short = self._used - (now - self._full_at) * self._rate
                if short <= 0.0:
                    if tokens > 0.0 and tokens <= self._open:  # faster than a chained comparison
                        self._used = tokens + 0.0
                        self._full_at = now
                        self._refused = _NOTHING_REFUSED
                        return True
                elif tokens > 0.0 and tokens <= self._open - short:
                    self._used += tokens
                    return True
        except (TypeError, ArithmeticError):  # a str, a Decimal
            positive("tokens", tokens)
            raise
        return self._allow_after_all(positive("tokens", tokens))

    try_consume = allow

    def wait(self, tokens: float = 1, *, timeout: float | None = None) -> None:
        """Block until the tokens are there, then take them. First come, first served.

        The tokens are taken at the moment it returns. An exception that is raised inside (a soft time
        limit, Ctrl-C, a killed greenlet) takes nothing, and lets the next waiter move up.

        Args:
            tokens: How many to wait for. Above 0, at most ``capacity``.
            timeout: The most seconds to wait; ``None``: as long as it takes. 0 asks once.

        Raises:
            RateLimitExceeded: It would take longer than ``timeout``. Raised at once where that can be
                foreseen, else when the time is up. Nothing is taken. ``retry_after`` is the forecast.
            ValueError: ``tokens`` is not above 0, is not finite, or is more than ``capacity`` (which
                no wait could ever get), be it only since a `configure` meanwhile; ``timeout`` is
                below 0 or NaN.
            TypeError: An argument is not a number.

        """
        waiter = _Waiter(positive("tokens", tokens))
        deadline = math.inf if timeout is None else self._clock() + not_negative(timeout)
        try:
            delay = self._take(waiter.tokens, waiter)
            if not delay:
                return
            if self._clock() + delay > deadline:
                raise _timed_out(waiter.tokens, delay)
            self._queue(waiter)
            sleep, longest = getattr(self._clock, "wait_for", None), math.inf
            if sleep is None:
                sleep, longest = _wait_for, self._LONGEST_SLEEP
            while delay := self._take(waiter.tokens, waiter):
                left = deadline - self._clock()
                if left <= 0.0:
                    raise _timed_out(waiter.tokens, delay)
                # Only the head has a moment to wake at. The others wait for the turn.
                sleep(waiter.turn, min(left, delay, longest) if self._head is waiter else left)
            self._wake_head()
        except BaseException:
            # Before the next one is woken there is no call in here at which an interrupt could strike.
            try:
                with self._lock:
                    if waiter.taken:
                        if self._common is None:  # else see `_leave`
                            least = self._capacity if self._full_at == self._paused_until else 0.0
                            self._used -= waiter.tokens
                            if self._used < least:
                                self._used = least
                            self._refused = _NOTHING_REFUSED
                    elif waiter.queued:
                        before, after = waiter.before, waiter.after
                        if before is None:
                            self._head = after
                        else:
                            before.after = after
                        if after is None:
                            self._tail = before
                        else:
                            after.before = before
                        self._ahead -= waiter.tokens
                        if self._head is None:
                            self._ahead = 0.0
                            self._open = self._capacity
            finally:
                try:
                    head = self._head
                    if head is not None:
                        try:  # noqa: SIM105 - contextlib.suppress is a call
                            head.turn.release()
                        except RuntimeError:  # it has been woken already
                            pass
                finally:
                    if self._common is not None:
                        self._leave(waiter)
            raise

    def take_or_delay(self, tokens: float = 1) -> float:
        """Take tokens now, or say how long that will not work.

        For callers that hold a job themselves: ``if delay := bucket.take_or_delay(n): hold(delay)``.

        Args:
            tokens: How many to take. Above 0, at most ``capacity``.

        Returns:
            Exactly ``0.0`` when they were taken. Otherwise nothing is taken or reserved, and it is the
            seconds, finite and above 0, until asking again makes sense, with those already in `wait`
            counted. Rounded up: asking then succeeds if nobody else took.

        Raises:
            ValueError: ``tokens`` is not above 0, is not finite, or is more than ``capacity``.
            TypeError: ``tokens`` is not a number.

        """
        return self._take(positive("tokens", tokens))

    def refund(self, tokens: float) -> None:
        """Give back tokens that were taken and not used.

        Args:
            tokens: How many. Above 0. What would lift the bucket above ``capacity`` is lost, and during
                a `pause` what would lift it above 0: it starts from empty.

        Raises:
            ValueError: ``tokens`` is not above 0, or is not finite.
            TypeError: ``tokens`` is not a number.

        """
        amount = positive("tokens", tokens)
        now = self._clock()
        with self._lock:
            least = 0.0
            if self._full_at == self._paused_until:
                if now < self._full_at:
                    least = self._capacity
                else:
                    self._paused_until = -math.inf
            self._used -= amount
            if self._used < least:
                self._used = least
            self._refused = _NOTHING_REFUSED
        self._wake_head()

    def charge(self, tokens: float) -> None:
        """Take tokens without asking, into debt if need be: what was used turned out to be more.

        Args:
            tokens: How many. Above 0; may be more than ``capacity``. While in debt `tokens` is below 0,
                and nothing is granted until the debt is paid off at the bucket's rate.

        Raises:
            ValueError: ``tokens`` is not above 0, or is not finite.
            TypeError: ``tokens`` is not a number.

        """
        amount = positive("tokens", tokens)
        now = self._clock()
        with self._lock:
            if self._used - (now - self._full_at) * self._rate <= 0.0:
                self._full_at = now
                self._used = amount
            else:
                self._used += amount

    def pause(self, seconds: float) -> None:
        """Grant nothing for some time, then start from empty: the remote said when to come back.

        It only ever extends: a shorter pause within a longer one changes nothing, and a debt that lasts
        longer stays. What is refunded meanwhile pays off debt at most; what is charged is debt.

        Args:
            seconds: How long, from now on. 0 or more; 0 empties the bucket. A clock that was set back
                has to catch up besides.

        Raises:
            ValueError: ``seconds`` is below 0, or is not finite.
            TypeError: ``seconds`` is not a number.

        """
        until = self._clock() + (0.0 if seconds == 0 else positive("seconds", seconds))
        with self._lock:
            used = self._used
            if until > self._full_at:
                used -= (until - self._full_at) * self._rate
                self._full_at = until
            if used < self._capacity:
                used = self._capacity
            self._used = used
            self._paused_until = self._full_at
        self._wake_head()

    def configure(
        self, *, capacity: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Change the capacity, the rate or both, for those too who are waiting already.

        The tokens that are there stay, as far as the new capacity holds them; so do a debt and the end
        of a pause.

        Args:
            capacity: The most tokens it can hold from now on. Above 0; ``None``: as it is. Who waits
                for more than that gets the ``ValueError`` of `wait` when the turn comes.
            tokens_per_second: The rate from now on. Above 0; ``None``: as it is.

        Raises:
            ValueError: An argument is not above 0, or is not finite. Nothing is changed.
            TypeError: An argument is not a number. Nothing is changed.

        """
        size = None if capacity is None else positive("capacity", capacity)
        rate = None if tokens_per_second is None else positive("tokens_per_second", tokens_per_second)
        now = self._clock()
        with self._lock:
            used = self._used
            if now > self._full_at:
                used -= (now - self._full_at) * self._rate
                if used < 0.0:
                    used = 0.0
                self._full_at = now
            if size is not None:
                used = size - (self._capacity - used)
                self._capacity = size
                if self._open:  # nobody waits
                    self._open = size
                if used < 0.0:
                    used = 0.0
            self._used = used
            if rate is not None:
                self._rate = rate
            self._refused = _NOTHING_REFUSED
        self._wake_head()

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.tokens:g} of {self.capacity:g} tokens, "
            f"{self.tokens_per_second:g} tokens_per_second, {self._waiting()} waiting>"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied: the copy would be a second rate beside "
            "the first. Make it at import, where every process finds its own; a SharedTokenBucket is "
            "one for all processes forked from its own, a RedisTokenBucket for all that name it"
        )

    # -- private ----------------------------------------------------------------------------------

    #: The longest that the head sleeps before it looks again, on a clock that does not sleep itself.
    _LONGEST_SLEEP: ClassVar[float] = math.inf

    def _take(self, tokens: float, waiter: "_Waiter | None" = None, elsewhere: float = 0.0) -> float:
        """Take the tokens and return 0.0, or take nothing and return the delay.

        A waiter is taken out of the queue with its tokens, and marked in the same step, so that
        `wait` knows at every moment what an interrupt has to undo. ``elsewhere`` are the tokens of
        those who come first in other processes. More than the capacity is a ``ValueError``.
        """
        now = self._clock()
        with self._lock:
            full_at, capacity, rate = self._full_at, self._capacity, self._rate
            short = self._used
            # Else the clock was set back, another thread has read it later, or the bucket is paused.
            if now > full_at:
                short -= (now - full_at) * rate
            if short < 0.0:
                short = 0.0
            head = self._head
            ahead, limit = elsewhere, capacity
            if head is not None and head is not waiter:
                ahead += self._ahead
                limit = 0.0
                if waiter is not None and waiter.queued:
                    ahead -= tokens
            elif elsewhere:
                limit = 0.0
            if tokens <= limit - short:
                if short == 0.0:
                    self._used = tokens
                    if now > full_at:
                        self._full_at = now
                    self._refused = _NOTHING_REFUSED
                else:
                    self._used += tokens
                if waiter is not None:
                    waiter.taken = True
                    if waiter.queued:  # as its head
                        self._head = waiter.after
                        if self._head is None:
                            self._tail = None
                            self._ahead = 0.0
                            self._open = self._capacity
                        else:
                            self._head.before = None
                            self._ahead -= tokens
                return 0.0
            used = self._used
            if used > _REBASE_AFTER * capacity and now > full_at:
                full_at = self._full_at = now
                # Sums of whole numbers, or of 1024ths, are exact. Else the rounding goes against the
                # caller: 7e-12 of the rate.
                if used * 1024.0 % 1.0:
                    short += used * 2.0**-37
                used = self._used = short
        if tokens > capacity:
            raise ValueError(f"tokens must be at most the capacity {capacity:g}, not {tokens:.15g}")
        # The seconds from now until the arithmetic above grants them.
        delay = (used + ahead + tokens - capacity) / rate - (now - full_at)
        if not delay < sys.float_info.max:
            return sys.float_info.max
        if ahead:
            return delay if delay > 0.0 else _BEHIND_A_WAITER
        step = math.ulp(now + delay)
        while delay <= 0.0 or tokens > capacity - max(0.0, used - (now + delay - full_at) * rate):
            delay = max(delay, 0.0) + step  # round it up
            step *= 2.0
        return delay

    def _allow_after_all(self, tokens: float) -> bool:
        """Decide what `allow` in its haste did not grant, and remember a refusal."""
        try:
            if not self._take(tokens):
                return True  # the clock had gone back, or another thread had read it later
        except ValueError:  # more than the capacity
            return False
        now = self._clock()
        with self._lock:
            full_at, used, waiting = self._full_at, self._used, self._head
            capacity, rate = self._capacity, self._rate
        if waiting is None and _GIL:
            wait = (used + tokens - capacity) / rate - max(0.0, now - full_at)
            # Half the way, so that no rounding makes it outlast the shortage.
            refused = (now + wait / 2.0, tokens)
            with self._lock:
                # Unless tokens came back meanwhile; that others took some makes it only more certain.
                if (
                    self._full_at == full_at
                    and self._used >= used
                    and self._capacity == capacity
                    and self._rate == rate
                ):
                    self._refused = refused
        return False

    def _queue(self, waiter: "_Waiter") -> None:
        turn = threading.Lock()
        turn.acquire()
        waiter.turn = turn
        with self._lock:
            waiter.before = self._tail
            if self._tail is None:
                self._head = waiter
            else:
                self._tail.after = waiter
            self._tail = waiter
            self._ahead += waiter.tokens
            self._open = 0.0
            waiter.queued = True

    def _wake_head(self) -> None:
        head = self._head
        if head is not None:
            with contextlib.suppress(RuntimeError):  # it has been woken already
                head.turn.release()

    def _waiting(self) -> int:
        waiter, number = self._head, 0
        while waiter is not None:
            waiter, number = waiter.after, number + 1
        return number

    def _leave(self, waiter: "_Waiter") -> None:
        """Give back, in shared memory, what a `wait` took that has been interrupted."""
        raise NotImplementedError  # only a shared bucket has `_common`


class _Waiter:
    """One call of `wait`: a link of the queue."""

    __slots__ = ("after", "before", "queued", "stored", "taken", "tokens", "turn")

    turn: threading.Lock

    def __init__(self, tokens: float) -> None:
        self.tokens = tokens
        self.taken = False
        #: Whether other processes know of it (`SharedTokenBucket`).
        self.stored = False
        self.queued = False
        self.before: _Waiter | None = None
        self.after: _Waiter | None = None


def _wait_for(turn: threading.Lock, seconds: float) -> None:
    turn.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))


def _timed_out(tokens: float, delay: float) -> RateLimitExceeded:
    return RateLimitExceeded(f"rate limit exceeded: {tokens:g} tokens only in {delay:.3g} s", delay)


#: Every bucket of this process, for the fork hook.
_buckets: "weakref.WeakSet[TokenBucket]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Of all threads only the forking one lives on: a lock another held would never be released."""
    for bucket in list(_buckets):
        bucket._forget_waiters()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
