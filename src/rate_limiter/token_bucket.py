"""The token bucket: it says how many jobs may start now, and when the next one may.

This file and `shared_bucket` are one design in two files: `SharedTokenBucket` is this bucket with its
numbers in shared memory. What this file provides for the other one stands in one marked block at the
end of the class, "Seams for SharedTokenBucket".

Design
------
*State.* Two floats: the moment at which the bucket was last full, and the tokens used since then. The
shortage ``used - elapsed * rate`` is computed afresh each time, so rounding errors do not add up: a
burst of exactly ``capacity`` is granted whatever the numbers are, and a rate holds for months. (Keeping
one "theoretical arrival time" instead loses a token of the burst for every third choice of capacity and
rate.)

*Rounding.* Sums of floats miss round numbers: ten steps of 0.1 s are not quite 1 s. So tokens are
granted when at most 2**-30 of the capacity is missing, and at most the tokens of half a microsecond.
The state keeps the exact shortage: what was granted early is paid before the next grant.

*Locking.* The clock is read before the lock is taken, and nothing is called while it is held: no
``min``, no helper, no allocation that could run a finalizer. CPython switches threads and runs signal
handlers only at calls and loops. So a thread that holds the lock is never switched away from, a signal
handler may itself call ``allow()``, and buckets can share a few locks: after a fork only these have to
be made new, however many buckets there are. The locks make it correct without the GIL too.

*Refusals.* Without a refund a bucket gains tokens by time alone, so a refusal stays right for a known
time. The bucket remembers ``(until, from how many tokens on)`` and answers the next call by comparing,
without the lock.

*Pausing.* `pause` moves the "last full" moment into the future, with the whole capacity used. The
elapsed time is negative until then, so nothing is granted.

*Waiting.* Waiters stand in a queue. Only its head sleeps until a forecast moment; it takes its tokens
when it wakes, and wakes the next one. So light waiters never starve a heavy one, tokens are never
granted ahead of time, and a waiter that is interrupted leaves nothing behind.
"""

import contextlib
import logging
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Final, NoReturn, TypeAlias

from .checks import initial_tokens, positive, timeout_seconds, too_many, zero_or_more
from .exceptions import timed_out

__all__ = ["TokenBucket"]

logger = logging.getLogger("rate_limiter")

#: A function that is called with a bucket whose tokens came back, or that was paused or configured.
Listener: TypeAlias = Callable[["TokenBucket"], object]

#: The value of `_refused` while no refusal is remembered. (A `SharedTokenBucket` remembers more.)
_NOTHING_REFUSED: Final[tuple[float, ...]] = (-math.inf, math.inf)

#: Reading two attributes without the lock is only known to be safe under the GIL.
_GIL: Final[bool] = getattr(sys, "_is_gil_enabled", lambda: True)()

#: After this many capacities were used without the bucket ever being full, the next refusal starts
#: the sum of used tokens anew, while its rounding error is still tiny.
_REBASE_AFTER: Final = 2.0**8

#: Tokens that may be missing from a grant, because of rounding: a share of the capacity, and at most
#: the tokens of so many seconds.
_EARLY_SHARE: Final = 2.0**-30
_EARLY_SECONDS: Final = 2.0**-21

#: Seconds before its deadline at which a `wait` gives up: the same, for rounding.
_DEADLINE_SLACK: Final = 1e-9

#: The most tokens used, and the longest delay in seconds: finite, so that time can bring them back.
_MOST: Final = sys.float_info.max

#: The largest whole numbers that floats represent exactly.
_EXACT: Final = 2**53

#: Seconds that `take_or_delay` returns while the tokens are there but a waiter is about to take them.
_BEHIND_A_WAITER: Final = 0.001

#: The locks of all buckets. A lock is held for less than a microsecond, and with the GIL never while
#: another thread runs, so it does not matter that buckets share them; without the GIL, rarely.
_LOCKS: Final = tuple(threading.Lock() for _ in range(64))

#: Changes in a forked child. Listeners that were subscribed in another process are not called.
_process = 0


class TokenBucket:
    """A thread-safe token bucket for all threads of one process.

    It holds up to ``capacity`` tokens, starts full (or with ``initial``), and gains ``tokens_per_second``
    until it is full. In any span of ``t`` seconds it grants at most ``capacity + tokens_per_second * t`` tokens.
    (Not to be mistaken for ``kombu.utils.limits.TokenBucket``, which takes its arguments the other
    way round and is not thread-safe.)

    Args:
        capacity: The most tokens it can hold, which is the largest burst. Above 0.
        tokens_per_second: The rate at which tokens come back. Above 0.
        initial: The tokens that it starts with, from 0 to ``capacity``. ``None``: it starts full. A process
            that starts with a full bucket brings a burst; with 0 it brings none.
        clock: Returns the time in seconds. If the clock is set back, no tokens come until it has caught up.
            Tests pass `rate_limiter.testing.ManualClock`.

    Raises:
        ValueError: The capacity or the rate is not above 0, ``initial`` is below 0 or above the capacity, or
            one of them is not finite.
        TypeError: One of them is not a number, or ``clock`` cannot be called.

    A forked child starts with the parent's level, without its waiters and listeners, and counts on its
    own from there (a `SharedTokenBucket` is one bucket for all of these processes). For the same reason
    a bucket can neither be pickled nor copied.

    All numbers are kept as floats. Costs below a 1e-15th of the capacity vanish in their rounding. In
    the other direction, a grant may be early by 1e-9 of the capacity or half a microsecond, whichever
    is less; what was granted early is paid before the next grant, so the excess does not grow.

    `subscribe`, `unsubscribe` and `changes` are an optional part of the contract of a `Bucket`, for a
    gate that sleeps until the moment that `take_or_delay` forecast. A gate asks a bucket that lacks
    them again every 0.5 s.

    """

    __slots__ = (
        "__weakref__",
        "_ahead",
        "_allowed",
        "_capacity",
        "_changes",
        "_clock",
        "_common",
        "_full_at",
        "_head",
        "_listeners",
        "_lock",
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
        initial: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = positive("capacity", capacity, documented=True)
        self._rate = positive("tokens_per_second", tokens_per_second, documented=True)
        if not callable(clock):
            raise TypeError(f"clock must be a callable that returns seconds, not {clock!r}")
        self._clock = clock
        #: When the bucket was last full (or the sum was started anew), and the tokens used since then. One
        #: that does not start full is as a full one from which the rest was taken.
        self._used = self._capacity - initial_tokens(initial, self._capacity)
        self._full_at = clock()
        #: While this equals `_full_at`, the bucket was not full since that pause, and at least the
        #: capacity is used.
        self._paused_until = -math.inf
        #: Until when, and from how many tokens on, a refusal is certain.
        self._refused = _NOTHING_REFUSED
        #: How often tokens came back before their time.
        self._changes = 0.0
        #: The process (see `_process`) that subscribed these listeners, and the listeners.
        self._listeners: tuple[int, tuple[Listener, ...]] | None = None
        self._common = None
        self._lock = _LOCKS[id(self) // 16 % len(_LOCKS)]
        self._forget_waiters()

    def _forget_waiters(self) -> None:
        self._head: _Waiter | None = None
        self._tail: _Waiter | None = None
        #: The tokens that the waiters want.
        self._ahead = 0.0
        #: The capacity that `allow` may use: none while there are waiters.
        self._allowed = self._capacity

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
        """The tokens that are there now: below 0 while in debt."""
        now = self._clock()
        with self._lock:
            full_at, used, capacity, rate = self._full_at, self._used, self._capacity, self._rate
        return capacity - max(0.0, used - max(0.0, now - full_at) * rate)

    def allow(self, tokens: float = 1.0) -> bool:
        """Take tokens now, all or nothing, without blocking. ``try_consume`` is another name of it.

        Args:
            tokens: How many to take. Above 0. Any real number, as everywhere: ``int``, ``float``,
                ``Decimal``, ``Fraction``; ``True`` counts as 1.

        Returns:
            Whether they were taken. Also ``False`` for more than ``capacity``, and while another thread
            is in `wait`: waiters come first.

        Raises:
            ValueError: ``tokens`` is not above 0, or is not finite.
            TypeError: ``tokens`` is not a number.

        """
        if type(tokens) is not float:  # what is kept has to be exactly that
            if type(tokens) is int and 0 < tokens <= _EXACT:
                tokens += 0.0
            else:
                tokens = positive("tokens", tokens, documented=True)
        now = self._clock()
        refused = self._refused
        if now < refused[0] and refused[1] <= tokens <= self._capacity:
            return False
        with self._lock:  # the arithmetic of `_take`, once more, to save a call
            short = self._used - (now - self._full_at) * self._rate
            if short <= 0.0:
                if tokens > 0.0 and tokens <= self._allowed:  # faster than a chained comparison
                    self._used = tokens
                    self._full_at = now
                    self._refused = _NOTHING_REFUSED
                    return True
            elif tokens > 0.0 and tokens <= self._allowed - short:
                self._used += tokens
                return True
        return self._allow_after_all(positive("tokens", tokens, documented=True))

    try_consume = allow

    def wait(self, tokens: float = 1, *, timeout: float | None = None) -> None:
        """Block until the tokens are there, then take them. First come, first served.

        The tokens are taken at the moment it returns. After an exception that was raised inside (by a
        soft time limit, Ctrl-C, a killed greenlet) nothing is taken, and the next waiter moves up.

        Args:
            tokens: How many to wait for. Above 0, at most ``capacity``.
            timeout: The most seconds to wait. ``None``: without a limit. 0: ask once.

        Raises:
            RateLimitExceeded: It would take longer than ``timeout``. Raised at once if the forecast
                says so, else when the time is up. Nothing is taken. ``retry_after`` is the forecast.
            ValueError: ``tokens`` is not above 0, is not finite, or is more than ``capacity`` (a wait
                for that would never end), perhaps because `configure` was called during the wait;
                ``timeout`` is below 0 or NaN.
            TypeError: An argument is not a number.

        """
        waiter = _Waiter(self, positive("tokens", tokens, documented=True))
        deadline = math.inf if timeout is None else self._clock() + timeout_seconds(timeout)
        try:
            delay = self._take(waiter.tokens, waiter)
            if not delay:
                return
            if self._clock() + delay - deadline > _DEADLINE_SLACK:
                raise timed_out(waiter.tokens, delay)
            self._queue(waiter)
            sleep, longest = getattr(self._clock, "wait_for", None), math.inf
            if sleep is None:
                sleep, longest = _wait_for, self._LONGEST_SLEEP
            while True:
                # Before it asks, so that it asks at the deadline once more.
                left = deadline - self._clock()
                delay = self._take(waiter.tokens, waiter)
                if not delay:
                    break
                if left <= _DEADLINE_SLACK:
                    raise timed_out(waiter.tokens, delay)
                if not waiter.queued:  # the process was forked while it slept, by a signal handler
                    self._queue(waiter)
                    continue
                # Only the head has a moment to wake at. The others sleep until it wakes them.
                sleep(waiter.alarm, min(left, delay, longest) if self._head is waiter else left)
            self._wake_head()
        except BaseException:
            # An interrupt can strike at a call only, and there is none before the next one is woken.
            try:
                with self._lock:
                    if waiter.taken:
                        if self._common is None:  # else `_leave` gives them back
                            least = self._capacity if self._full_at == self._paused_until else 0.0
                            self._used -= waiter.tokens
                            if self._used < least:
                                self._used = least
                            self._refused = _NOTHING_REFUSED
                            self._changes += 1.0
                    elif waiter.queued:
                        self._changes += 1.0
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
                            self._allowed = self._capacity
            finally:
                try:
                    head = self._head
                    if head is not None:
                        try:  # noqa: SIM105 - contextlib.suppress is a call
                            head.alarm.release()
                        except RuntimeError:  # it has been woken already
                            pass
                finally:
                    self._leave(waiter)
            raise

    def take_or_delay(self, tokens: float = 1) -> float:
        """Take tokens now, or say when to ask again.

        For callers that hold a job themselves: ``if delay := bucket.take_or_delay(n): hold(delay)``.

        Args:
            tokens: How many to take. Above 0, at most ``capacity``.

        Returns:
            Exactly ``0.0`` if they were taken. Otherwise nothing is taken or reserved, and it is the
            seconds, finite and above 0, until the tokens are there, after those in `wait` have got
            theirs. Rounded up: asking then succeeds if nobody else took tokens.

        Raises:
            ValueError: ``tokens`` is not above 0, is not finite, or is more than ``capacity``.
            TypeError: ``tokens`` is not a number.

        """
        return self._take(positive("tokens", tokens))

    def refund(self, tokens: float) -> None:
        """Give back tokens that were taken and not used.

        Args:
            tokens: How many. Above 0. Tokens beyond ``capacity`` are lost; during a `pause`, tokens
                above 0 are lost, because it ends with an empty bucket.

        Raises:
            ValueError: ``tokens`` is not above 0, or is not finite.
            TypeError: ``tokens`` is not a number.

        """
        self._locked(self._refund, positive("tokens", tokens))
        self._tell()

    def charge(self, tokens: float) -> None:
        """Take tokens without asking, into debt if need be: a job used more than it paid for.

        Args:
            tokens: How many. Above 0; may be more than ``capacity``. While in debt `tokens` is below 0,
                and nothing is granted until the debt is paid off at the bucket's rate.

        Raises:
            ValueError: ``tokens`` is not above 0, or is not finite.
            TypeError: ``tokens`` is not a number.

        """
        self._locked(self._charge, positive("tokens", tokens))

    def pause(self, seconds: float) -> None:
        """Grant nothing for some time, then start from empty: the remote said when to come back.

        A pause only ever extends: a shorter one during a longer one changes nothing, and a debt that
        lasts longer stays. A refund during a pause pays off debt at most; a charge becomes debt.

        Args:
            seconds: How long, from now on. 0 or more; 0 empties the bucket. If the clock was set back,
                the time until it has caught up comes on top.

        Raises:
            ValueError: ``seconds`` is below 0, or is not finite.
            TypeError: ``seconds`` is not a number.

        """
        self._locked(self._pause, zero_or_more("seconds", seconds))
        self._tell()

    def resume(self) -> None:
        """End a pause now: the bucket fills from empty. Without a pause nothing changes.

        A debt that would have lasted beyond the pause stays as it would have been at its end.
        """
        self._locked(self._resume)
        self._tell()

    @property
    def pause_left(self) -> float:
        """The seconds until the end of a pause. 0.0: there is none."""
        left: float = self._locked(self._pause_left)
        return left

    def configure(
        self, *, capacity: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Change the capacity, the rate or both, also for the threads that are waiting already.

        The tokens that are there stay, up to the new capacity. A debt stays, and so does the end of a
        pause.

        Args:
            capacity: The most tokens it can hold from now on. Above 0; ``None``: unchanged. A `wait`
                for more than that raises ``ValueError`` when it becomes the head of the queue.
            tokens_per_second: The rate from now on. Above 0; ``None``: unchanged.

        Raises:
            ValueError: An argument is not above 0, or is not finite. Nothing is changed.
            TypeError: An argument is not a number. Nothing is changed.

        """
        size = None if capacity is None else positive("capacity", capacity)
        rate = None if tokens_per_second is None else positive("tokens_per_second", tokens_per_second)
        self._locked(self._configure, size, rate)
        self._tell()

    # -- for gates that sleep until a forecast moment ----------------------------------------------

    @property
    def changes(self) -> float:
        """How often tokens came back before their time, or a pause or a new setting moved the forecast.

        Counts each `refund`, `pause`, `resume` and `configure`, and each waiter that left the queue without its
        tokens; in a `SharedTokenBucket` those of all processes. Reading it takes no lock and asks no
        clock, so that a gate can see cheaply whether another process, whose calls do not reach the
        listeners of this one, has changed the bucket.
        """
        return self._changes

    def subscribe(self, listener: Listener) -> None:
        """Have a function called whenever a forecast of `take_or_delay` may no longer be right.

        It is called with the bucket, in the thread that made the change and after it, without any lock:
        after each `refund`, `pause`, `resume` and `configure` in this process, and when a thread leaves
        `wait` without its tokens. It is not called when tokens are taken or charged: who asks too early is told
        the later moment. It should be quick, as one that wakes a sleeping thread is. An exception
        that it raises is logged, since the change is already made; the caller does not get it.

        A listener is held until it is unsubscribed. Subscribing it twice counts once. A child that is
        forked starts without listeners. May be called from any thread, and from signal handlers.

        Raises:
            TypeError: ``listener`` cannot be called.

        """
        if not callable(listener):
            raise TypeError(f"listener must be a callable that takes the bucket, not {listener!r}")
        self._set_listeners(lambda known: known if listener in known else (*known, listener))

    def unsubscribe(self, listener: Listener) -> None:
        """Stop calling a function. One that is not subscribed is ignored."""
        self._set_listeners(lambda known: tuple(other for other in known if other != listener))

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__}: capacity {self.capacity:g}, "
            f"{self.tokens_per_second:g} tokens_per_second>"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied: the copy would be a second rate beside "
            "the first. Make it at import, where every process finds its own; a SharedTokenBucket is "
            "one bucket for all processes that are forked from the one that made it"
        )

    # -- private ----------------------------------------------------------------------------------

    def _take(self, tokens: float, waiter: "_Waiter | None" = None, elsewhere: float = 0.0) -> float:
        """Take the tokens and return 0.0, or take nothing and return the delay.

        The same step that takes a waiter's tokens removes it from the queue and marks it, so that
        `wait` knows at every moment what it has to undo after an interrupt. More than the capacity is a
        ``ValueError``.
        """
        now = self._clock()
        with self._lock:
            full_at, capacity, rate = self._full_at, self._capacity, self._rate
            short = self._used
            if short > _MOST:  # infinite: the sum of absurd numbers
                short = self._used = _MOST
            # Else the clock was set back, another thread has read it later, or the bucket is paused.
            if now > full_at:
                short -= (now - full_at) * rate
            if short < 0.0:
                short = 0.0
            early = capacity * _EARLY_SHARE
            if early > rate * _EARLY_SECONDS:
                early = rate * _EARLY_SECONDS
            head = self._head
            ahead, limit, slack = elsewhere, capacity, 0.0
            if head is not None and head is not waiter:
                ahead += self._ahead
                limit = 0.0
                if waiter is not None and waiter.queued:
                    ahead -= tokens
            elif elsewhere:
                limit = 0.0
            elif now >= full_at or full_at != self._paused_until:
                slack = early
            if tokens <= limit - short + slack and tokens <= capacity:
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
                            self._allowed = self._capacity
                        else:
                            self._head.before = None
                            self._ahead -= tokens
                return 0.0
            used = self._used
            if used > _REBASE_AFTER * capacity and now > full_at:
                full_at = self._full_at = now
                # Sums of whole numbers, or of 1024ths, are exact. For others the caller pays for the
                # rounding: 7e-12 of the rate.
                if used * 1024.0 % 1.0:
                    short += used * 2.0**-37
                    if short > _MOST:
                        short = _MOST
                used = self._used = short
        if tokens > capacity:
            raise too_many(tokens, capacity)
        # The seconds from now until the arithmetic above grants them.
        delay = (used - capacity + tokens + ahead) / rate - (now - full_at)
        if ahead:
            return min(delay, _MOST) if delay > 0.0 else _BEHIND_A_WAITER
        step = math.ulp(now + delay)
        while delay < _MOST and not (
            delay > 0.0 and tokens <= capacity - max(0.0, used - (now + delay - full_at) * rate) + early
        ):
            delay = max(delay, 0.0) + step  # round it up
            step *= 2.0
        return min(delay, _MOST)

    def _allow_after_all(self, tokens: float) -> bool:
        """Decide what the short cut in `allow` did not grant, and remember a refusal."""
        try:
            if not self._take(tokens):
                return True  # rounding; or the clock was set back, or another thread had read it later
        except ValueError:  # more than the capacity
            return False
        now = self._clock()
        with self._lock:
            full_at, used, waiting = self._full_at, self._used, self._head
            capacity, rate = self._capacity, self._rate
        if waiting is None and _GIL:
            wait = (used - capacity + tokens) / rate - max(0.0, now - full_at) - _EARLY_SECONDS
            # Half of the time, so that no rounding makes the memory outlast the shortage.
            refused = (now + wait / 2.0, tokens)
            with self._lock:
                # Unless tokens came back in between; if others took some, it is only more certain.
                if (
                    self._full_at == full_at
                    and self._used >= used
                    and self._capacity == capacity
                    and self._rate == rate
                ):
                    self._refused = refused
        return False

    def _refund(self, tokens: float) -> None:
        now = self._clock()
        with self._lock:
            least = 0.0
            if self._full_at == self._paused_until:
                if now < self._full_at:
                    least = self._capacity
                else:
                    self._paused_until = -math.inf
            self._used -= tokens
            if self._used < least:
                self._used = least
            self._refused = _NOTHING_REFUSED
            self._changes += 1.0

    def _charge(self, tokens: float) -> None:
        now = self._clock()
        with self._lock:
            if self._used - (now - self._full_at) * self._rate <= 0.0:
                self._full_at = now
                self._used = tokens
            else:
                self._used += tokens
                if self._used > _MOST:
                    self._used = _MOST

    def _pause(self, seconds: float) -> None:
        until = self._clock() + seconds
        with self._lock:
            used = self._used
            if until > self._full_at:
                used -= (until - self._full_at) * self._rate
                self._full_at = until
            if used < self._capacity:
                used = self._capacity
            self._used = used
            self._paused_until = self._full_at
            self._changes += 1.0

    def _resume(self) -> None:
        now = self._clock()
        with self._lock:
            if now < self._full_at == self._paused_until:
                self._full_at = now
                self._paused_until = -math.inf
            self._changes += 1.0

    def _pause_left(self) -> float:
        now = self._clock()
        with self._lock:
            left = self._full_at - now if self._full_at == self._paused_until else 0.0
        return max(0.0, left)

    def _configure(self, size: float | None, rate: float | None) -> None:
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
                if self._allowed:  # nobody waits
                    self._allowed = size
                if used < 0.0:
                    used = 0.0
                if used > _MOST:
                    used = _MOST
            self._used = used
            if rate is not None:
                self._rate = rate
            self._refused = _NOTHING_REFUSED
            self._changes += 1.0

    def _queue(self, waiter: "_Waiter") -> None:
        alarm = threading.Lock()
        alarm.acquire()
        waiter.alarm = alarm
        _waiters.add(waiter)
        with self._lock:
            waiter.before = self._tail
            if self._tail is None:
                self._head = waiter
            else:
                self._tail.after = waiter
            self._tail = waiter
            self._ahead += waiter.tokens
            self._allowed = 0.0
            waiter.queued = True

    def _wake_head(self) -> None:
        head = self._head
        if head is not None:
            with contextlib.suppress(RuntimeError):  # it has been woken already
                head.alarm.release()

    def _tell(self) -> None:
        """Wake the head of the queue, and call the listeners."""
        self._wake_head()
        known = self._listeners
        if known is not None:
            process, listeners = known
            for listener in listeners if process == _process else ():
                try:
                    listener(self)
                except Exception:
                    logger.exception(
                        "A listener of %r failed; the bucket has changed all the same", self
                    )

    def _set_listeners(self, change: Callable[[tuple[Listener, ...]], tuple[Listener, ...]]) -> None:
        while True:  # until no other thread has changed them in between
            before = self._listeners
            changed = change(before[1] if before is not None and before[0] == _process else ())
            after = (_process, changed) if changed else None
            with self._lock:
                if self._listeners is before:
                    self._listeners = after
                    return

    # -- Seams for SharedTokenBucket ---------------------------------------------------------------
    #
    # All that this class does for the other one: `_common`, `_LONGEST_SLEEP`, `_locked` and `_leave`
    # below, and two values: ``elsewhere`` of `_take`, the tokens that the first waiters of
    # other processes want, which come before the caller's; and `_Waiter.stored`. The other class
    # overrides `_take` and `_forget_waiters` too, and calls them.

    #: What the processes share; ``None`` in a plain bucket. The attribute exists in every bucket, so
    #: that `rate_limiter.shared_bucket.share` can turn a plain one into a shared one.
    _common: Any

    #: The most seconds that the head sleeps before it looks again, on a clock that does not sleep itself.
    _LONGEST_SLEEP: ClassVar[float] = math.inf

    def _locked(self, act: Callable[..., Any], *args: Any) -> Any:
        """Let a method change the numbers; a shared bucket loads them before, and stores them after."""
        return act(*args)

    def _leave(self, waiter: "_Waiter") -> None:
        """Finish a `wait` that ends with an exception; a shared bucket gives back what it took."""
        self._tell()


class _Waiter:
    """One call of `wait`: a link of the queue."""

    __slots__ = (
        "__weakref__",
        "after",
        "alarm",
        "before",
        "bucket",
        "queued",
        "stored",
        "taken",
        "tokens",
    )

    #: Sleeping is waiting for this lock, which is released to wake the sleeper.
    alarm: threading.Lock

    def __init__(self, bucket: TokenBucket, tokens: float) -> None:
        self.bucket = bucket
        self.tokens = tokens
        self.taken = False
        #: Seam: whether a `SharedTokenBucket` has stored that its tokens are taken.
        self.stored = False
        self.queued = False
        self.before: _Waiter | None = None
        self.after: _Waiter | None = None


def _wait_for(alarm: threading.Lock, seconds: float) -> None:
    alarm.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))


#: Every call of `wait` in this process that has queued up, for the fork hook.
_waiters: "weakref.WeakSet[_Waiter]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """Forget the other threads of the parent, which do not exist here: their locks and their waiters.

    Nothing is done for each bucket: there may be a million of them.
    """
    global _process  # noqa: PLW0603
    _process += 1
    for lock in _LOCKS:
        lock._at_fork_reinit()  # type: ignore[attr-defined] # as the standard library does
    for waiter in list(_waiters):
        waiter.bucket._forget_waiters()
        waiter.before = waiter.after = None
        waiter.queued = False
    _waiters.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
