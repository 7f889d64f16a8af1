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
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from .redis_server import ERRORS, Server
from .redis_state import Part, Question, State
from .token_bucket import TokenBucket

__all__ = ["Asked"]

logger = logging.getLogger("rate_limiter")

#: What `Asked.take_or_delay` returns while an answer is out.
_UNKNOWN: Final = math.nan

#: Seconds after which tokens that no job has taken go back.
_STASHED: Final = 0.05

#: A batch is what the rate gives this process in so many seconds, or in two round trips if these take longer.
_SPAN: Final = 0.05

#: How often it is asked, in seconds, whether somebody has changed a bucket on the server.
_LOOK: Final = 1.0

#: Seconds for which a capacity counts as known, once the server has told it.
_KNOWN: Final = 1.0

#: Seconds after which an answer is overdue.
_OVERDUE: Final = 0.55

#: The most buckets in one call.
_MOST: Final = 100

#: Two numbers of tokens that differ by less than this part are the same but for rounding.
_SLACK: Final = 1e-9


class _Beside(NamedTuple):
    """What a job takes from another bucket than the one that it waits for."""

    bucket: Any
    tokens: float


class Asked:
    """One bucket, as one gate takes from it.

    It has the part of `Bucket` that a gate needs; ``take_or_delay`` returns ``nan`` while an answer is out.
    If the jobs that wait for it take from other buckets of the server too, they are asked for together.

    Args:
        state: What this process knows of the bucket.

    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._listeners: list[Callable[[Any], None]] = []
        #: The tokens of all jobs that wait here; of the next one; and what that takes from other buckets.
        self._waiting = 0.0
        self._unit = 0.0
        self._beside: tuple[_Beside, ...] = ()
        self._begin()

    def look(self) -> None:
        """Have the thread learn what the server knows of the bucket, before the first job comes."""
        self._wants_look = True
        self._asker.need(self)

    def _begin(self) -> None:
        self._asker = asker_of(self._state.server)
        self._lock = threading.Lock()
        #: Tokens that were granted and not taken yet, and when they go back.
        self._stash = 0.0
        self._stashed_until = math.inf
        #: What the server has promised, at which bucket, and when that is there.
        self._held = 0.0
        self._held_at = self._state
        self._next = 0.0
        self._is_out = False
        #: Whether what is out only gives tokens back: the promise stays.
        self._keeps = False
        self._wants_look = False
        #: The other buckets that tokens are asked from now.
        self._with: tuple[_Beside, ...] = ()
        #: Whether a job takes more from another bucket than that can hold: then each is asked for itself.
        self._asks_alone = False
        self._seen = self._state.seen

    @property
    def pause(self) -> float:
        """The seconds until it may be asked for: it has failed just now."""
        return self._state.outages.left

    @property
    def capacity(self) -> float:
        """As of the bucket."""
        return self._state.capacity

    @property
    def tokens_per_second(self) -> float:
        """As of the bucket."""
        return self._state.rate

    @property
    def workers(self) -> int:
        """How many processes share the rate."""
        return self._state.server.workers

    @property
    def pause_left(self) -> float:
        """The seconds until the end of a pause, as far as known."""
        return self._state.pause_left

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
        state = self._state
        if state.server.asker is not self._asker:  # this is a forked child
            self._begin()
        now = time.monotonic()
        with self._lock:
            if self._stash >= tokens * (1 - _SLACK):
                self._stash = max(0.0, self._stash - tokens)
                return 0.0
            self._unit = tokens
            delay = self._next - now if self._held else _UNKNOWN
            is_out = self._is_out
        if tokens > state.capacity and now - state.known_at < _KNOWN:
            raise state.too_many(tokens)
        if state.outages.is_down or self._asker.is_overdue(now):
            self._asker.need(self)
            return state.take_without_server(tokens)
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

    def jobs_wait(self, tokens: float, demands: Sequence[Any] = ()) -> None:
        """Take note of the jobs that wait for this bucket.

        Args:
            tokens: How many tokens they take together.
            demands: What the first of them takes, from this and from other buckets. It is refused as one
                limit says, so buckets of limits that do not agree in that are not asked together.

        """
        self._waiting = tokens
        self._beside = ()
        if len(demands) > 1:
            policy = next(_policy_of(each) for each in demands if each.bucket is self)
            self._beside = tuple(
                _Beside(each.bucket, each.tokens)
                for each in demands
                if each.bucket is not self and _policy_of(each) == policy
            )
        if not tokens and (self._stash or self._held):
            self._expire()

    def _expire(self) -> None:
        self._stashed_until = time.monotonic() + _STASHED
        self._asker.need_at(self._stashed_until, self)

    # -- for the asker's thread -------------------------------------------------------------------

    def question(self, span: float) -> Question | None:
        """Return what is to be asked now. ``None``: nothing."""
        state, now = self._state, time.monotonic()
        with self._lock:
            back = 0.0
            waits = self._waiting > 0.0
            if self._stash and (now >= self._stashed_until or (waits and self._stash < self._unit)):
                back, self._stash = self._stash, 0.0
            asks = waits and self._unit > 0.0 and not (self._held and now < self._next)
            missed = state.outages.is_down or state.has_missed
            gives_up = self._held > 0.0 and not waits
            if not (asks or back or missed or gives_up):
                if not self._wants_look:
                    return None
                self._is_out, self._wants_look = True, False
                return Question.look(state)
            unit = self._unit if asks else 0.0
            jobs, promise = self._jobs(span) if asks else (0, 0)
            self._keeps = not (asks or gives_up)
            self._is_out = True
            parts = [Part(state, unit, back=back)]
            parts += [Part(each.bucket._state, each.tokens) for each in self._with if asks]
            if self._held and not self._keeps:
                held_at = [part.state for part in parts]
                if self._held_at not in held_at:
                    parts.append(Part(self._held_at))
                    held_at.append(self._held_at)
                place = held_at.index(self._held_at)
                parts[place] = parts[place]._replace(held=self._held)
        return Question.take(parts, jobs, promise)

    def _jobs(self, span: float) -> tuple[int, int]:
        """Return for how many jobs tokens are asked, and for how many of them they are promised."""
        state, unit = self._state, self._unit
        # One more than it can hold is promised in the same call.
        jobs = max(unit, min(self._waiting, state.capacity + unit)) / unit
        workers = state.server.workers
        batch = min(state.capacity / 2, state.rate / workers * span) / unit
        together = []
        for each in self._beside:
            bucket, tokens = each
            if isinstance(bucket, TokenBucket):
                jobs = min(jobs, bucket.tokens / tokens)  # what it refuses was fetched in vain
            elif isinstance(bucket, Asked) and not self._asks_alone:
                other = bucket._state
                if other.server is not state.server or other.outages.is_down:
                    continue
                if bucket._stash >= tokens:  # fetched before
                    jobs = min(jobs, bucket._stash / tokens)
                    continue
                jobs = min(jobs, other.capacity / tokens + 1)
                batch = min(batch, other.capacity / 2 / tokens, other.rate / workers * span / tokens)
                together.append(each)
        self._with = tuple(together)
        number = max(1, math.floor(jobs * (1 + _SLACK)))
        return number, max(1, math.floor(min(number, batch)))

    def answer(self, sent: float, question: Question, reply: list[Any]) -> None:
        """Take note of a reply, and tell who waits."""
        if not question.takes:
            question.learn_look(reply)
            with self._lock:
                self._is_out = False
                seen = self._state.seen
                changed, self._seen = seen != self._seen, seen
                if changed:
                    self._next = 0.0  # it is asked anew, in its place
            self.tell()
            return
        taken = question.learn_taken(reply)
        with self._lock:
            self._is_out = False
            self._seen = self._state.seen[0], self._seen[1]
            if not self._keeps:
                self._held, self._held_at = taken.promised, question.parts[taken.last].state
                self._next = sent + max(0.0, taken.wait)
                self._asks_alone = taken.wait < 0.0 and self._held_at is not self._state
                self._put(taken.jobs * question.parts[0].unit)
            if self._held:
                self._asker.need_at(self._next, self)
        self._asker.note(self, waits=self._held > 0.0)
        if taken.jobs:
            for bucket, tokens in self._with:
                with bucket._lock:
                    bucket._put(taken.jobs * tokens)
        self.tell()

    def _put(self, tokens: float) -> None:
        """Keep tokens for the jobs that wait, for a while."""
        if tokens:
            self._stash += tokens
            self._expire()

    def failed(self, question: Question) -> None:
        """Take note that no reply came. What was asked for counts as taken."""
        question.fail()
        with self._lock:
            self._is_out = False
            self._held = self._next = 0.0
        self._asker.note(self, waits=False)
        self.tell()

    def tell(self) -> None:
        """Tell who waits that there is news."""
        for listener in list(self._listeners):
            try:
                listener(self)
            except Exception:  # one gate is not to hold up the others
                logger.exception("A gate cannot be told of an answer of Redis")


def _policy_of(demand: Any) -> tuple[Any, float]:
    return demand.limit.when_limited, demand.limit.patience


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
        #: Those that wait for a promised moment. What has changed on the server may be for them.
        self._waiting: set[Asked] = set()
        self._look_at = 0.0
        #: When the call that is out was sent, and the seconds that calls have taken.
        self._sent: float | None = None
        self._took = 0.0

    def is_overdue(self, now: float) -> bool:
        """Tell whether an answer is overdue: a look-up of the server's name has no timeout."""
        sent = self._sent
        return sent is not None and now - sent > _OVERDUE

    def note(self, bucket: Asked, *, waits: bool) -> None:
        """Take note whether a bucket waits for a promised moment."""
        if waits:
            self._waiting.add(bucket)
        else:
            self._waiting.discard(bucket)

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
            due = self._due()
            try:
                if due:
                    self._ask(due)
                else:
                    self._look()
            except Exception:
                logger.exception("The thread that asks Redis at %s goes on", self._server.where)
                time.sleep(1.0)
            finally:
                self._sent = None

    def _due(self) -> list[Asked]:
        """Wait until something is to be asked; return for which buckets."""
        with self._changed:
            while True:
                now = time.monotonic()
                while self._later and self._later[0][0] <= now:
                    self._needed[heapq.heappop(self._later)[2]] = None
                pause = self._server.outages.left
                if self._waiting and now >= self._look_at and not pause:
                    return []
                if self._needed and not pause:
                    asked = (bucket for bucket in self._needed if not bucket.pause)
                    if due := list(itertools.islice(asked, _MOST)):
                        for bucket in due:
                            del self._needed[bucket]
                        return due
                    pause = min(bucket.pause for bucket in self._needed)
                until = self._later[0][0] - now if self._later else math.inf
                if self._waiting:
                    until = min(until, max(self._look_at - now, self._server.outages.left))
                if self._needed:
                    until = min(until, pause)
                self._changed.wait(None if until == math.inf else max(until, 1e-4))

    def _ask(self, due: list[Asked]) -> None:
        server = self._server
        span = max(_SPAN, 2 * self._took)
        questions = [(bucket, asked) for bucket in due if (asked := bucket.question(span))]
        if not questions:
            return
        sent = self._sent = time.monotonic()
        replies: list[Any]
        try:
            replies = server.run_all([question for _, question in questions])
        except Exception as error:
            if not isinstance(error, ERRORS):
                logger.exception("Redis at %s cannot be asked", server.where)
            server.outages.failed(error)
            replies = [error] * len(questions)
        now = self._sent = time.monotonic()
        self._took += (min(now - sent, 1.0) - self._took) / 8
        for (bucket, question), reply in zip(questions, replies, strict=True):
            try:
                if isinstance(reply, Exception):
                    raise reply
                bucket.answer(sent, question, reply)
            except Exception as error:  # noqa: BLE001 - or the bucket would be asked for no more
                if not server.outages.left:  # else it is known already that the server is down
                    server.failed(question, error)
                bucket.failed(question)
                self.need(bucket)
                continue
            if not server.outages.left:
                server.answered(question)
                for state in question.states:
                    state.tell_rest()

    def _look(self) -> None:
        """Ask whether somebody has changed a bucket; if so, look at each that somebody waits for."""
        self._sent = time.monotonic()
        self._look_at = self._sent + _LOOK
        if self._server.has_changed():
            for bucket in list(self._waiting):
                bucket.look()


def asker_of(server: Server) -> Asker:
    """Return what asks a server for the gates of this process."""
    if server.asker is None:
        server.asker = Asker(server)
    return server.asker  # type: ignore[no-any-return]
