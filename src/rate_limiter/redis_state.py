"""What a process knows of a bucket in Redis, and how the script there is called (redis_bucket.lua).

A `State` belongs to all objects of one name and server. This file alone knows what the script takes and
answers. During an outage a state keeps what the server is to be told afterwards.
"""

import contextlib
import getpass
import logging
import socket
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .checks import too_many
from .outage import Outages, Policy, ServerDownError, StandIn
from .token_bucket import TokenBucket

if TYPE_CHECKING:
    from .redis_server import Server

__all__ = [
    "MICRO",
    "Debt",
    "Known",
    "Part",
    "Question",
    "State",
    "Stored",
    "Taken",
    "call_take",
    "somebody",
]

logger = logging.getLogger("rate_limiter")

#: The server counts in microseconds.
MICRO: Final = 1e-6


class Stored(NamedTuple):
    """Numbers that an operator has set, and that count instead of the code's."""

    capacity: float
    tokens_per_second: float
    #: When that was, as in ``"2026-11-29T17:00:00+00:00"``, why, and by whom.
    at: str
    reason: str
    who: str


class Known(NamedTuple):
    """What a process knows of a bucket without asking the server."""

    tokens: float
    pause_left: float
    #: Capacity and tokens per second, as the code says.
    declared: tuple[float, float]
    #: What an operator has set. ``None``: the numbers of the code count.
    stored: Stored | None
    #: Whether it cannot be asked for: it does what its ``on_outage`` says.
    is_outage: bool


class Debt(NamedTuple):
    """What the server is to charge: tokens taken without it."""

    #: By ``charge``.
    charged: float = 0.0
    #: By the stand-in, and how many of them are charged at most.
    granted: float = 0.0
    most: float = 0.0

    @property
    def tokens(self) -> float:
        """How many are charged."""
        return self.charged + min(self.granted, self.most)


_NO_DEBT: Final = Debt()


class State:
    """What all objects of one name and server share in this process.

    Args:
        server: Where the bucket is.
        key: Its key there.
        numbers: Capacity, tokens per second and first level, as the code says.
        policy: What it does during an outage.

    """

    def __init__(
        self,
        server: "Server",
        key: str,
        numbers: tuple[float, float, float],
        policy: Policy,
    ) -> None:
        self.server = server
        self.key = key
        #: The key whose stored numbers count where it has none of its own, or ``""``.
        self.key_of_all = ""
        self.numbers = numbers
        self.policy = policy
        #: As last known; an operator may have changed them.
        self.capacity, self.rate = numbers[:2]
        self.stored: Stored | None = None
        self._version = ""
        #: The level, and when the server has told it; 0.0: never.
        self._level = 0.0
        self.known_at = 0.0
        #: Until when it is paused, as far as known; and whether it was when somebody last looked.
        self._paused_until = 0.0
        self._was_paused = False
        #: What the server has missed: tokens to charge, and the pause.
        self._owed = 0.0
        self._owes_pause = False
        self.outages = Outages(f"{key} on Redis at {server.where}", server.outages)
        self.stand_in = StandIn(policy, self.outages)
        self._lock = threading.Lock()

    # -- what is known ----------------------------------------------------------------------------

    @property
    def seen(self) -> tuple[str, bool]:
        """What changes if somebody changes the numbers, or pauses the bucket."""
        return self._version, self._was_paused

    @property
    def level(self) -> float:
        """The tokens that are there now, as far as known without the server."""
        if not self.known_at or self.pause_left:
            return self._level
        return min(self.capacity, self._level + (time.monotonic() - self.known_at) * self.rate)

    @property
    def pause_left(self) -> float:
        """The seconds until the end of a pause, as far as known without the server."""
        return max(0.0, self._paused_until - time.monotonic()) if self._paused_until else 0.0

    # -- calls that are for this bucket alone -----------------------------------------------------

    def look(self) -> None:
        """Learn the level and the pause, if the server answers."""
        question = Question.look(self)
        with contextlib.suppress(ServerDownError):
            question.learn_look(self.server.run(question))

    def settle(self, tokens: float) -> None:
        """Give tokens back; below 0: charge them."""
        try:
            call_take([Part(self, back=tokens)])
        except ServerDownError:
            self.put_debt(Debt(charged=max(0.0, -tokens)))

    def pause(self, seconds: float) -> None:
        """Grant nothing for some seconds."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)
        try:
            self._tell("pause", seconds / MICRO)
        except ServerDownError:
            self._owes_pause = True
            self.server.owing.add(self)
            self.stand_in.pause(seconds, self._share)

    def resume(self) -> None:
        """End a pause."""
        self._paused_until = 0.0
        self._owes_pause = False
        self.stand_in.resume()
        with contextlib.suppress(ServerDownError):
            self._tell("resume")

    def configure(self, capacity: float, rate: float, reason: str, who: str) -> None:
        """Set capacity and rate for all processes; 0 leaves one as it is.

        Raises:
            redis.RedisError: The server does not answer.

        """
        question = Question("configure", capacity, rate, [Part(self)], (reason, who))
        question.learn(self.server.order(question))
        self.server.note_change()

    def restore(self) -> None:
        """Let the numbers of the code count again.

        Raises:
            redis.RedisError: The server does not answer.

        """
        question = Question("clear", 0, 0, [Part(self)])
        question.learn(self.server.order(question))
        self.server.note_change()

    def _tell(self, command: str, amount: float = 0.0) -> None:
        question = Question(command, amount, 0, [Part(self)])
        question.learn(self.server.run(question))
        self.server.note_change()

    # -- what the script is given, and what it shows ----------------------------------------------

    def argument(self, part: "Part", back: float, place: int) -> str:
        """Return what the script is given for this bucket.

        Args:
            part: What it is to do with it.
            back: The tokens to give back; below 0: to charge.
            place: Where the key stands whose stored numbers count too, or 0.

        """
        capacity, rate, initial = self.numbers
        version = self._version or "?"
        job = f"{back!r} {part.promised!r} {part.unit!r} {part.room!r}"
        return f"{capacity!r} {rate!r} {initial!r} {version} {job} {place}"

    def learn(self, version: str, level: str, stored: list[Any]) -> None:
        """Take note of what the script shows of this bucket."""
        self._level, self.known_at = float(level), time.monotonic()
        if stored:
            self._learn_numbers(version, *map(_text, stored))

    def learn_pause(self, seconds: float) -> None:
        """Take note of how long the bucket is paused."""
        self._was_paused = seconds > 0.0
        self._paused_until = time.monotonic() + seconds if seconds else 0.0

    def _learn_numbers(self, version: str, size: str, rate: str, moment: str, *texts: str) -> None:
        self.capacity, self.rate = float(size), float(rate)
        self._version = version
        self.stored = None
        if not moment:
            return
        at = datetime.fromtimestamp(float(moment) * MICRO, UTC).isoformat(timespec="seconds")
        reason, who, *base = texts
        self.stored = Stored(self.capacity, self.rate, at, reason, who)
        told = self.key_of_all or self.key, moment
        if tuple(map(float, base)) != self.numbers[:2] and told not in self.server.told:
            self.server.told.add(told)
            logger.warning(
                "%s: the code says capacity %g, %g tokens_per_second now. But capacity %g, %g tokens_per_second "
                "count, which %s has set at %s%s, until bucket.restore() or `celery limits restore`",
                self.key,
                *self.numbers[:2],
                *self.stored[:2],
                who,
                at,
                f" ({reason})" if reason else "",
            )

    # -- what the server has missed ---------------------------------------------------------------

    @property
    def has_missed(self) -> bool:
        """Whether the server has missed something during an outage."""
        return bool(self._owed or self._owes_pause or self.stand_in.has_granted)

    def take_debt(self) -> Debt:
        """Return what is to be charged with the next call, and owe it no more."""
        if not self.has_missed:
            return _NO_DEBT
        share = self.server.workers if self.policy == "local" else 1
        with self._lock:
            charged, self._owed = self._owed, 0.0
        return Debt(charged, self.stand_in.take_granted(), self.capacity / share)

    def put_debt(self, debt: Debt) -> None:
        """Owe tokens: the call that was to charge them has failed."""
        if debt != _NO_DEBT:
            with self._lock:
                self._owed += debt.charged
            self.stand_in.put_granted(debt.granted)
            self.server.owing.add(self)

    def tell_rest(self) -> None:
        """Tell the server of a pause that it has missed. Nothing more is owed then, until the next outage."""
        if self._owes_pause:
            self._owes_pause = False
            if left := self.pause_left:
                self.pause(left)
        if not self.has_missed:
            self.server.owing.discard(self)

    def take_without_server(self, tokens: float) -> float:
        """Take tokens during an outage, or return the seconds until that makes sense, as the policy says.

        Raises:
            ValueError: They are more than the capacity.

        """
        if tokens > self.capacity:
            raise too_many(tokens, self.capacity)
        delay = self.stand_in.take_or_delay(tokens, self._share)
        if not delay:
            self.server.owing.add(self)
        return delay

    def after_fork(self) -> None:
        """Begin in a forked child: the parent tells the server what it has missed."""
        self._lock = threading.Lock()
        self._owed = 0.0
        self._owes_pause = False
        self.outages.after_fork()
        self.stand_in.after_fork()

    def _share(self) -> TokenBucket:
        """Return a bucket with this process's share of the rate, from the last known level."""
        workers = self.server.workers
        bucket = TokenBucket(self.capacity / workers, self.rate / workers)
        if (missing := bucket.capacity - self.level / workers) > 0.0:
            bucket.charge(missing)
        if self.pause_left:
            bucket.pause(self.pause_left)
        return bucket


class Part(NamedTuple):
    """What one call does with one of its buckets."""

    state: State
    #: What one job takes from it.
    unit: float = 0.0
    #: The tokens that the caller was promised there.
    promised: float = 0.0
    #: Tokens to give back; below 0: to charge.
    back: float = 0.0
    #: Tokens of jobs that have paid and start only now: the bucket is to hold no more than its capacity less these.
    room: float = 0.0


class Taken(NamedTuple):
    """What a call for some jobs has given."""

    #: How many of them may go.
    jobs: int
    #: The seconds until the others may. Below 0: never, for one costs more than the capacity.
    wait: float
    #: The bucket that makes them wait, by its position, and what the caller is promised there.
    last: int
    promised: float


class Question:
    """One call of the script.

    Args:
        command: The command.
        first: Its first number.
        second: Its second number.
        parts: The buckets, all of one server, and what it does with each.
        texts: The further arguments of the command.

    """

    __slots__ = ("_debts", "arguments", "keys", "parts", "takes")

    def __init__(
        self,
        command: str,
        first: float,
        second: float,
        parts: Sequence[Part],
        texts: Sequence[str] = (),
    ) -> None:
        self.parts = parts
        self.takes = command == "take"
        #: What the server has missed is charged by each call that takes, or gives back.
        self._debts = [part.state.take_debt() if self.takes else _NO_DEBT for part in parts]
        self.keys = [part.state.key for part in parts]
        self.arguments = [f"{command} {first!r} {second!r} {len(parts)}"]
        for part, debt in zip(parts, self._debts, strict=True):
            place = 0
            if part.state.key_of_all:
                self.keys.append(part.state.key_of_all)
                place = len(self.keys)
            self.arguments.append(part.state.argument(part, part.back - debt.tokens, place))
        self.arguments += texts

    @property
    def states(self) -> list[State]:
        """The buckets."""
        return [part.state for part in self.parts]

    @classmethod
    def look(cls, state: State) -> "Question":
        """Return a call that only looks at a bucket."""
        return cls("look", 0, 0, [Part(state)])

    @classmethod
    def take(cls, parts: Sequence[Part], jobs: int, promise: int) -> "Question":
        """Return a call that takes for some jobs, for each from all buckets or from none.

        Args:
            parts: The buckets.
            jobs: For how many jobs it takes at most.
            promise: For how many of them it promises what is not there.

        """
        return cls("take", jobs, promise, parts)

    def fail(self) -> None:
        """Owe again what it was to charge: the server has not answered."""
        for part, debt in zip(self.parts, self._debts, strict=True):
            part.state.put_debt(debt)

    def learn(self, reply: Any) -> list[str]:
        """Take note of what the reply shows of each bucket; return what the command gives."""
        text, *stored = reply if isinstance(reply, list) else [reply]
        words = _text(text).split()
        shown = len(words) - 2 * len(self.parts)
        for number, part in enumerate(self.parts):
            version, level = words[shown + 2 * number : shown + 2 * number + 2]
            part.state.learn(version, level, stored[number] if stored else [])
        return words[:shown]

    def learn_look(self, reply: Any) -> None:
        """Take note of the reply to `look`."""
        self.parts[0].state.learn_pause(float(self.learn(reply)[0]) * MICRO)

    def learn_taken(self, reply: Any) -> Taken:
        """Take note of the reply to `take`."""
        jobs, wait, last, promised = self.learn(reply)
        return Taken(int(jobs), float(wait) * MICRO, int(last) - 1, float(promised))


def call_take(parts: Sequence[Part], jobs: int = 0, promise: int = 0) -> Taken:
    """Ask the server at once: see `Question.take`.

    Raises:
        ServerDownError: The server does not answer.

    """
    question = Question.take(parts, jobs, promise)
    try:
        taken = question.learn_taken(parts[0].state.server.run(question))
    except BaseException:
        question.fail()
        raise
    for part in parts:
        part.state.tell_rest()
    return taken


def somebody() -> str:
    """Return who this program runs for: the user and the host."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user without a name
        user = "?"
    return f"{user}@{socket.gethostname()}"


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
