"""A `RedisTokenBucket` as one gate takes from it: the gate's loop never speaks to the server.

A job that comes is held while the thread of `redis_asker` asks for its tokens. They are asked for only if a job is here
that takes them. What no job has taken within 50 ms goes back.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from .checks import too_many
from .redis_asker import asker_of
from .redis_state import Part, Question, State
from .token_bucket import TokenBucket

__all__ = ["GateBucket"]

logger = logging.getLogger("rate_limiter")

#: What `GateBucket.take_or_delay` returns while an answer is out.
_UNKNOWN: Final = math.nan

#: Seconds after which tokens that no job has taken go back.
_STASHED: Final = 0.05

#: Seconds for which a capacity counts as known, once the server has told it.
_KNOWN: Final = 1.0

#: Two numbers of tokens that differ by less than this part are the same but for rounding.
_SLACK: Final = 1e-9


class _Beside(NamedTuple):
    """What a job takes from another bucket than the one that it waits for."""

    bucket: Any
    tokens: float


class GateBucket:
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
        #: The tokens that the server has promised, the bucket that they are of, and when they are there.
        self._promised = 0.0
        self._promised_by = self._state
        self._due_at = 0.0
        #: Whether a call is out for this bucket; and whether it only gives tokens back: the promise stays.
        self._is_out = False
        self._keeps = False
        self._wants_look = False
        #: Tokens of jobs that have paid and start only now: the server is to be told.
        self._room = 0.0
        #: The other buckets that the call which is out takes from.
        self._with: tuple[_Beside, ...] = ()
        #: Whether a job takes more from another bucket than that can hold: then each bucket is asked alone.
        self._asks_alone = False
        self._seen = self._state.seen

    @property
    def outage_left(self) -> float:
        """The seconds until the server may be asked for this bucket again, after a failure."""
        return self._state.outages.left

    @property
    def capacity(self) -> float:
        """The most tokens that the bucket can hold, as last known here."""
        return self._state.capacity

    @property
    def tokens_per_second(self) -> float:
        """The rate of the bucket for all processes, as last known here."""
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
            delay = self._due_at - now if self._promised else _UNKNOWN
            is_out = self._is_out
        if tokens > state.capacity and now - state.known_at < _KNOWN:
            raise too_many(tokens, state.capacity)
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

    def leave_room(self, tokens: float) -> None:
        """Have the server hold no more than the capacity less so many tokens, which count as taken now."""
        with self._lock:
            self._room = max(self._room, tokens)
        self._asker.need(self)

    def jobs_wait(self, tokens: float, demands: Sequence[Any] = ()) -> None:
        """Take note of the jobs that wait for this bucket.

        Args:
            tokens: How many tokens they take together.
            demands: What the first of them takes, from this and from other buckets. It is refused as one
                limit says, so buckets of limits that do not agree in that are not asked together.

        """
        waited, self._waiting = self._waiting, tokens
        self._beside = ()
        if len(demands) > 1:
            policy = next(_policy_of(each) for each in demands if each.bucket is self)
            self._beside = tuple(
                _Beside(each.bucket, each.tokens)
                for each in demands
                if each.bucket is not self and _policy_of(each) == policy
            )
        if waited and not tokens and (self._stash or self._promised):
            self._expire()

    def _expire(self) -> None:
        self._stashed_until = time.monotonic() + _STASHED
        self._asker.need_at(self._stashed_until, self)

    def _plan_next(self, after: float) -> None:
        """Have something asked when the promised tokens come, and when those go back that no job has taken."""
        moment = self._stashed_until if self._stash else math.inf
        if self._promised:  # one that nobody waits for goes back now
            moment = min(moment, self._due_at if self._waiting else time.monotonic())
        if after < moment < math.inf:
            self._asker.need_at(moment, self)

    # -- for the asker's thread -------------------------------------------------------------------

    def question(self, span: float) -> Question | None:
        """Return what is to be asked now. ``None``: nothing."""
        state, now = self._state, time.monotonic()
        with self._lock:
            back = 0.0
            waits = self._waiting > 0.0
            if self._stash and (now >= self._stashed_until or (waits and self._stash < self._unit)):
                back, self._stash = self._stash, 0.0
            asks = waits and self._unit > 0.0 and not (self._promised and now < self._due_at)
            missed = state.outages.is_down or state.has_missed
            gives_up = self._promised > 0.0 and not waits
            room = self._take_room()
            if not (asks or back or missed or gives_up or room):
                self._plan_next(now)
                if not self._wants_look:
                    return None
                self._is_out, self._wants_look = True, False
                return Question.look(state)
            unit = self._unit if asks else 0.0
            jobs, promise = self._jobs(span) if asks else (0, 0)
            self._keeps = not (asks or gives_up)
            self._is_out = True
            parts = [Part(state, unit, back=back, room=room)]
            parts += [
                Part(bucket._state, tokens, room=bucket._take_room())
                for bucket, tokens in (self._with if asks else ())
            ]
            if self._promised and not self._keeps:
                states = [part.state for part in parts]
                if self._promised_by not in states:
                    parts.append(Part(self._promised_by))
                    states.append(self._promised_by)
                place = states.index(self._promised_by)
                parts[place] = parts[place]._replace(promised=self._promised)
        return Question.take(parts, jobs, promise)

    def _take_room(self) -> float:
        room, self._room = self._room, 0.0
        return room

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
            elif isinstance(bucket, GateBucket) and not self._asks_alone:
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
                    self._due_at = 0.0  # it is asked anew, in its place
            self.tell()
            return
        taken = question.learn_taken(reply)
        with self._lock:
            self._is_out = False
            self._seen = self._state.seen[0], self._seen[1]  # the reply tells the version, and no pause
            if not self._keeps:
                self._promised, self._promised_by = taken.promised, question.parts[taken.last].state
                self._due_at = sent + max(0.0, taken.wait)
                self._asks_alone = taken.wait < 0.0 and self._promised_by is not self._state
                self._put(taken.jobs * question.parts[0].unit)
            self._plan_next(-math.inf)
        self._asker.note(self, waits=self._promised > 0.0)
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
            self._promised = self._due_at = 0.0
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
