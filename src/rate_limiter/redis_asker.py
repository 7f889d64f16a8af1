"""How a gate takes from a `RedisTokenBucket`: its loop never speaks to the server, a thread does.

A job that comes is held while the thread asks for its tokens. One call at a time is out to each server, and brings
what all held jobs need next, bucket by bucket, with the moment at which there will be more. Tokens are asked for
only if a job is here that takes them. What no job has taken within 50 ms goes back.
"""

import contextlib
import heapq
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import redis

from .redis_bucket import ERRORS, MICRO, Debt, Server, Shared

__all__ = ["Asked"]

logger = logging.getLogger("rate_limiter")

#: What `Asked.take_or_delay` returns while an answer is out.
_UNKNOWN: Final = math.nan

#: Seconds after which tokens that no job has taken go back.
_STASHED: Final = 0.05

#: A batch is what the rate gives this process in so many seconds, or in two round trips if these take longer.
_SPAN: Final = 0.05

#: Seconds after which a bucket is looked at, though its next tokens come later: somebody may have changed it.
_LOOK: Final = 1.0

#: The most buckets that are looked at in one second.
_LOOKS: Final = 50

#: Seconds for which a capacity counts as known, once the server has told it.
_KNOWN: Final = 1.0

#: Seconds after which an answer is overdue.
_OVERDUE: Final = 0.55

#: The most buckets in one call.
_MOST: Final = 100

#: Two numbers of tokens that differ by less than this part are the same but for rounding.
_SLACK: Final = 1e-9


class Asked:
    """One bucket, as one gate takes from it.

    It has the part of `Bucket` that a gate needs; ``take_or_delay`` returns ``nan`` while an answer is out.

    Args:
        shared: The bucket's state in this process.

    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._listeners: list[Callable[[Any], None]] = []
        #: The tokens of all jobs that wait here, and of the next one.
        self._waiting = 0.0
        self._unit = 0.0
        self._begin()

    def _begin(self) -> None:
        self._asker = asker_of(self._shared.server)
        self._lock = threading.Lock()
        #: Tokens that were granted and not taken yet, and when they go back.
        self._stash = 0.0
        self._stashed_until = math.inf
        #: What the server has promised, and when that is there; when to look whether that has changed.
        self._held = 0.0
        self._next = 0.0
        self._look_at = math.inf
        self._is_out = False
        #: Whether what is out only gives tokens back: the promise stays.
        self._keeps = False
        self._seen = self._shared.seen

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
            ValueError: They are more than the capacity, as the server has said just now.

        """
        shared, server = self._shared, self._shared.server
        if server.asker is not self._asker:  # this is a forked child
            self._begin()
        now = time.monotonic()
        with self._lock:
            if self._stash >= tokens * (1 - _SLACK):
                self._stash = max(0.0, self._stash - tokens)
                return 0.0
            self._unit = tokens
            delay = self._next - now if self._held else _UNKNOWN
            is_out = self._is_out
        if tokens > shared.capacity and now - shared.known_at < _KNOWN:
            raise shared.too_many(tokens)
        if self._asker.is_stuck(now):
            self._asker.need(self)
            if tokens > shared.capacity:
                raise shared.too_many(tokens)
            return shared.stand_in.take_or_delay(tokens, shared.share)
        if delay > 0.0:
            return max(delay, 1e-3)
        if not is_out:
            self._asker.need(self)
        return _UNKNOWN

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

    def question(self, span: float) -> tuple[list[Any], Debt] | None:
        """Return the arguments of the script for what is to be asked now, and the debt in it.

        ``None``: nothing is to be asked.
        """
        shared, now = self._shared, time.monotonic()
        with self._lock:
            back = 0.0
            waits = self._waiting > 0.0
            if self._stash and (now >= self._stashed_until or (waits and self._stash < self._unit)):
                back, self._stash = self._stash, 0.0
            asks = waits and self._unit > 0.0 and not (self._held and now < self._next)
            missed = shared.server.outages.is_down or shared.has_missed
            gives_up = self._held > 0.0 and not waits
            if not (asks or back or missed or gives_up):
                if not (waits and self._held and now >= self._look_at):
                    return None
                self._is_out = True
                return shared.arguments("look"), Debt()
            unit = want = promise = 0.0
            if asks:
                unit = self._unit
                most = max(unit, min(self._waiting, shared.capacity))
                want = math.floor(most / unit * (1 + _SLACK)) * unit
                batch = min(want, shared.capacity / 2, shared.rate / shared.server.workers * span)
                promise = max(1, math.floor(batch / unit)) * unit
            held = self._held if asks or gives_up else 0.0
            self._keeps = not (asks or gives_up)
            self._is_out = True
        debt = shared.take_debt()
        return shared.arguments("take", back - debt.tokens, held, unit, want, promise), debt

    def answer(self, sent: float, reply: list[Any]) -> None:
        """Take note of a reply, and tell who waits."""
        given = self._shared.learn(reply)
        with self._lock:
            self._is_out = False
            if len(given) == 2:  # a look
                seen = self._shared.seen[0], given[1] > 0.0
                changed, self._seen = seen != self._seen, seen
                if changed:
                    self._next = 0.0  # it is asked anew, in its place
                elif self._held:
                    self._look_again(sent)
            else:
                self._seen = self._shared.seen[0], self._seen[1]
                if not self._keeps:
                    tokens, wait, self._held, _ = given
                    self._next = sent + max(0.0, wait) * MICRO
                    if tokens:
                        self._stash += tokens
                        self._stashed_until = time.monotonic() + _STASHED
                        self._asker.need_at(self._stashed_until, self)
                if self._held:
                    self._look_again(sent)
        self.tell()

    def _look_again(self, now: float) -> None:
        """Have it asked for when its tokens are there; or looked at, if that is long."""
        self._look_at = now + self._asker.look_after
        self._asker.need_at(min(self._next, self._look_at), self)

    def failed(self, debt: Debt) -> None:
        """Take note that no reply came. What was asked for counts as taken."""
        self._shared.put_debt(debt)
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

    @property
    def look_after(self) -> float:
        """The seconds until a bucket is looked at: longer if many wait for far moments."""
        return max(_LOOK, len(self._later) / _LOOKS)

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
        questions = [(bucket, *asked) for bucket in due if (asked := bucket.question(span))]
        if not questions:
            return
        sent = self._sent = time.monotonic()
        replies: list[Any]
        try:
            pipeline = server.client.pipeline(transaction=False)
            for bucket, arguments, _ in questions:
                pipeline.evalsha(server.script.sha, 1, bucket._shared.key, *arguments)
            replies = pipeline.execute(raise_on_error=False)
            if any(isinstance(reply, redis.exceptions.NoScriptError) for reply in replies):
                server.client.script_load(server.script.script)
        except Exception as error:
            if not isinstance(error, ERRORS):
                logger.exception("Redis at %s cannot be asked", server.where)
            replies = [error] * len(questions)
        finally:
            self._sent = None
        now = time.monotonic()
        self._took += (min(now - sent, 1.0) - self._took) / 8
        for (bucket, _, debt), reply in zip(questions, replies, strict=True):
            if not isinstance(reply, Exception):
                server.outages.answered()
                bucket.answer(sent, reply)
                continue
            if not isinstance(reply, redis.exceptions.NoScriptError):
                server.outages.failed(reply)
            bucket.failed(debt)
            self.need(bucket)
        if not server.outages.is_down:
            for bucket, _, _ in questions:
                bucket._shared.tell_pause()
            with contextlib.suppress(*ERRORS):
                server.show_life()


def asker_of(server: Server) -> Asker:
    """Return what asks a server for the gates of this process."""
    if server.asker is None:
        server.asker = Asker(server)
    return server.asker  # type: ignore[no-any-return]
