"""How a gate takes from a `RedisTokenBucket`: its loop never speaks to the server, a thread does.

A job that comes is held while the thread asks for its tokens. One call at a time is out to each server, and brings
what all held jobs need next, bucket by bucket, with the moment at which there will be more. Tokens are asked for
only if a job is here that takes them. What no job has taken within 50 ms goes back.
"""

import heapq
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import redis

from .redis_bucket import ERRORS, MICRO, Server, Shared

__all__ = ["Asked", "asked"]

logger = logging.getLogger("rate_limiter")

#: What `Asked.take_or_delay` returns while an answer is out.
_UNKNOWN: Final = math.nan

#: Seconds after which tokens that no job has taken go back.
_STASHED: Final = 0.05

#: A batch is what the rate gives this process in so many seconds, or in two round trips if these take longer.
_SPAN: Final = 0.05

#: Seconds after which a bucket is looked at, though its next tokens come later: somebody may have changed it.
_LOOK: Final = 1.0

#: The most buckets in one call.
_MOST: Final = 100

#: Two numbers of tokens that differ by less than this part are the same but for rounding.
_SLACK: Final = 1e-9


class Asked:
    """One bucket, as one gate takes from it. Made by `asked`.

    It has the part of `Bucket` that a gate needs; ``take_or_delay`` returns ``nan`` while an answer is out.

    Args:
        shared: The bucket's state in this process.
        asker: Asks the server.

    """

    def __init__(self, shared: Shared, asker: "Asker") -> None:
        self._shared = shared
        self._asker = asker
        self._lock = threading.Lock()
        self._listeners: list[Callable[[Any], None]] = []
        #: Tokens that were granted and not taken yet, and when they go back.
        self._stash = 0.0
        self._stashed_until = math.inf
        #: The tokens of all jobs that wait here, and of the next one, if it is to be asked for.
        self._waiting = 0.0
        self._unit = 0.0
        #: What the server has promised, and when that is there.
        self._held = 0.0
        self._next = 0.0
        self._look_at = math.inf
        self._is_out = False
        #: The version of the numbers that was last seen, and whether it was paused at the last look.
        self._seen = "", False

    @property
    def capacity(self) -> float:
        """As of the bucket."""
        return self._shared.capacity

    @property
    def tokens_per_second(self) -> float:
        """As of the bucket."""
        return self._shared.rate

    @property
    def tokens(self) -> float:
        """The tokens that were granted to this gate and that no job has taken yet."""
        return self._stash

    def subscribe(self, listener: Callable[[Any], None]) -> None:
        """Call this when an answer has come, in the asker's thread."""
        self._listeners.append(listener)

    def unsubscribe(self, listener: Callable[[Any], None]) -> None:
        """Call this no more."""
        self._listeners.remove(listener)

    def take_or_delay(self, tokens: float = 1) -> float:
        """Take tokens that are here, or ask for them.

        Returns:
            0.0: they were taken. The seconds until they come, if that is known; else ``nan``.

        Raises:
            ValueError: They are more than the capacity.

        """
        shared = self._shared
        if tokens > shared.capacity:
            raise ValueError(
                f"tokens must be at most the capacity {shared.capacity:g}, not {tokens:.15g}"
            )
        with self._lock:
            if self._stash >= tokens * (1 - _SLACK):
                self._stash = max(0.0, self._stash - tokens)
                return 0.0
            self._unit = tokens
            now = time.monotonic()
            delay = self._next - now if self._held else _UNKNOWN
            is_out = self._is_out
        if self._asker.is_stuck(now):
            self._asker.need(self)
            return shared.stand_in.take_or_delay(tokens, shared.share)
        if not is_out and not delay > 0.0:
            self._asker.need(self)
            return _UNKNOWN
        return _UNKNOWN if is_out and not delay > 0.0 else max(delay, 1e-3)

    def refund(self, tokens: float) -> None:
        """Put back what was taken from here."""
        with self._lock:
            self._stash += tokens
        self._expire()

    def charge(self, tokens: float) -> None:
        """Do nothing: the server knows what it has granted."""

    def jobs_wait(self, tokens: float) -> None:
        """Take note of how many tokens all jobs take together that wait for this bucket."""
        self._waiting = tokens
        if not tokens and (self._stash or self._held):
            self._expire()

    def _expire(self) -> None:
        self._stashed_until = time.monotonic() + _STASHED
        self._asker.need_at(self._stashed_until, self)

    # -- for the asker's thread -------------------------------------------------------------------

    def question(self, span: float) -> list[Any] | None:
        """Return the arguments of the script for what is to be asked now; ``None``: nothing."""
        shared, now = self._shared, time.monotonic()
        with self._lock:
            back = 0.0
            if self._stash and (now >= self._stashed_until or self._stash < self._unit):
                back, self._stash = self._stash, 0.0
            unit, waits = self._unit, self._waiting > 0.0
            if waits and self._held and now < self._next:
                if not back:
                    return shared.arguments("look") if now >= self._look_at else None
                unit = 0.0
            elif not (waits and unit):
                unit = 0.0
            if not unit and not back and not (self._held and not waits):
                return None
            want = promise = 0.0
            if unit:
                most = max(unit, min(self._waiting, shared.capacity))
                want = math.floor(most / unit * (1 + _SLACK)) * unit
                batch = min(want, shared.capacity / 2, shared.rate / shared.server.workers * span)
                promise = max(1, math.floor(batch / unit)) * unit
            held = self._held if unit or not waits else 0.0
            self._is_out = True
        return shared.arguments("take", back - shared.owed(), held, unit, want, promise)

    def answer(self, sent: float, reply: list[Any]) -> None:
        """Take note of a reply, and tell who waits."""
        given = self._shared.learn(reply)
        version = str(reply[0])
        with self._lock:
            self._is_out = False
            if len(given) == 2:  # a look
                seen = version, given[1] > 0.0
                changed, self._seen = seen != self._seen, seen
                if changed:
                    self._next = 0.0  # it is asked anew, in its place
                else:
                    self._look_again(sent)
                    return
            else:
                self._seen = version, self._seen[1]
                tokens, wait, self._held, _ = given
                if tokens:
                    self._stash += tokens
                    self._stashed_until = time.monotonic() + _STASHED
                    self._asker.need_at(self._stashed_until, self)
                self._next = sent + wait * MICRO
                if self._held:
                    self._look_again(sent)
        if len(given) > 2 and self._shared.has_missed:
            self._shared.paid()
        self.tell()

    def _look_again(self, now: float) -> None:
        """Have it asked for when its tokens are there; or looked at, if that is long."""
        self._look_at = now + _LOOK
        self._asker.need_at(min(self._next, self._look_at), self)

    def failed(self) -> None:
        """Take note that no reply came. What was asked for counts as taken."""
        with self._lock:
            self._is_out = False
            self._held = self._next = 0.0
        self.tell()

    def tell(self) -> None:
        """Tell who waits that there is news."""
        for listener in list(self._listeners):
            listener(self)


class Asker:
    """Asks one server for the buckets of this process.

    Args:
        server: The server.

    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._changed = threading.Condition(threading.Lock())
        self._needed: dict[Asked, None] = {}
        self._later: list[tuple[float, int, Asked]] = []
        self._count = itertools.count()
        self._thread: threading.Thread | None = None
        #: When the call that is out was sent, and the seconds that calls have taken.
        self._sent: float | None = None
        self._took = 0.0

    def is_stuck(self, now: float) -> bool:
        """Tell whether the server is down, or its answer is overdue: a look-up of its name has no timeout."""
        sent = self._sent
        return self._server.outages.is_down or (sent is not None and now - sent > _OVERDUE)

    def need(self, bucket: Asked) -> None:
        """Have something asked for a bucket soon."""
        with self._changed:
            self._needed[bucket] = None
            self._start()
            self._changed.notify()

    def need_at(self, moment: float, bucket: Asked) -> None:
        """Have something asked for a bucket at a moment."""
        with self._changed:
            heapq.heappush(self._later, (moment, next(self._count), bucket))
            self._start()
            self._changed.notify()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rate_limiter redis", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                self._ask(self._due())
            except Exception:
                logger.exception("The thread that asks Redis at %s goes on", self._server.where)
                time.sleep(1.0)

    def _due(self) -> list[Asked]:
        """Wait until something is to be asked; return for which buckets."""
        with self._changed:
            while True:
                now = time.monotonic()
                while self._later and self._later[0][0] <= now:
                    self._needed[heapq.heappop(self._later)[2]] = None
                pause = self._server.outages.left
                if self._needed and not pause:
                    due = list(itertools.islice(self._needed, _MOST))
                    for bucket in due:
                        del self._needed[bucket]
                    return due
                until = self._later[0][0] - now if self._later else math.inf
                until = pause if self._needed else until
                self._changed.wait(None if until == math.inf else max(until, 1e-4))

    def _ask(self, due: list[Asked]) -> None:
        server = self._server
        span = max(_SPAN, 2 * self._took)
        questions = [(bucket, arguments) for bucket in due if (arguments := bucket.question(span))]
        if not questions:
            return
        sent = self._sent = time.monotonic()
        try:
            pipeline = server.client.pipeline(transaction=False)
            for bucket, arguments in questions:
                pipeline.evalsha(server.script.sha, 1, bucket._shared.key, *arguments)
            replies = pipeline.execute(raise_on_error=False)
            if any(isinstance(reply, redis.exceptions.NoScriptError) for reply in replies):
                server.client.script_load(server.script.script)
            server.show_life()
        except ERRORS as error:
            replies = [error] * len(questions)
        finally:
            self._sent = None
        now = time.monotonic()
        self._took += (min(now - sent, 1.0) - self._took) / 8
        for (bucket, _), reply in zip(questions, replies, strict=True):
            if not isinstance(reply, Exception):
                server.outages.answered()
                bucket.answer(sent, reply)
                continue
            if not isinstance(reply, redis.exceptions.NoScriptError):
                server.outages.failed(reply)
            bucket.failed()
            self.need(bucket)


#: Seconds after which an answer is overdue.
_OVERDUE: Final = 0.55


def asked(shared: Shared) -> Asked:
    """Return what one gate takes from."""
    server = shared.server
    if server.asker is None:
        server.asker = Asker(server)
    return Asked(shared, server.asker)
