"""RedisTokenBucket: one rate for all processes, on all machines, that use the same Redis.

The level of a bucket is in one hash in Redis, and one script there (redis_bucket.lua) decides about it by the
server's clock. A caller that has to wait is promised its tokens there: callers of all processes are served in turn,
each at the moment that it was told. Several buckets of one server are taken from in one call, all or none.

While the server does not answer, or has an error for an answer, a bucket does what its ``on_outage`` says
(`outage`). If the error is about one bucket, that one alone does. An outage raises no error.
"""

import contextlib
import copy
import math
import re
import time
from collections.abc import Sequence
from typing import Any, Final, Self

from .all_of import Demand
from .checks import initial_tokens, positive, timeout_seconds, too_many, zero_or_more
from .exceptions import timed_out
from .outage import Policy, ServerDownError, check_policy
from .redis_server import Server, server_of
from .redis_state import MICRO, Known, Part, State, call_take, somebody

__all__ = ["RedisTokenBucket"]

_LONGEST_NAME: Final = 200

#: Seconds between two looks of a waiter whether somebody has changed the numbers, or has paused the bucket.
_LOOK: Final = 2.0

#: What a Redis Cluster places a key by.
_TAG: Final = re.compile(r"\{([^}]+)\}")


class RedisTokenBucket:
    """One bucket for all processes, on all machines, that name it: its level is in a Redis or Valkey.

        bucket = RedisTokenBucket("partner", capacity=10, tokens_per_second=5, url="redis://localhost/0")

    It does what a `TokenBucket` does. ``wait`` serves the callers of all processes first come, first served.
    Two objects of one name and server are equal, and are one bucket. The constructor does not contact the server.

    Args:
        name: Names the bucket in Redis, under ``rate_limiter:bucket:``. 1 to 200 characters.
        capacity: The most tokens it can hold. Above 0.
        tokens_per_second: The rate at which tokens come back. Above 0.
        client: A ``redis.Redis`` to use. Its own timeouts say for how long a call may take.
        url: Instead of a client: ``redis://``, ``rediss://`` or ``unix://``.
        on_outage: What it does while the server does not answer. ``"local"``, the default: each process
            has its share of the rate, from the last known level. ``"closed"``: no token is granted.
            ``"open"``: all are. What was granted is charged afterwards, up to a process's share of the
            capacity (``"open"``: up to the capacity).
        timeout: With ``url``, the most seconds for which a call waits for the server. Above 0.
        initial: The tokens of a bucket that Redis does not know yet: 0 to the capacity. ``None``: it is
            full. If it is less than the capacity, Redis keeps the bucket until it has been full, and not
            used, for a day.

    Raises:
        ValueError: A number is out of its range or not finite, the name or the URL is wrong, or this
            process has a bucket of that name and server with other numbers.
        TypeError: An argument has the wrong type, or not one of ``client`` and ``url`` is given.

    A server that loses its data, evicts the key, or is set back gives at most one burst more. Talk to the
    primary; ``maxmemory-policy noeviction`` keeps the keys. Threads may share a bucket, and so may forked processes:
    each has connections of its own.

    """

    def __init__(
        self,
        name: str,
        capacity: float,
        tokens_per_second: float,
        *,
        client: Any = None,
        url: str | None = None,
        on_outage: Policy = "local",
        timeout: float = 0.25,
        initial: float | None = None,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be text, not {name!r}")
        if not 0 < len(name) <= _LONGEST_NAME:
            raise ValueError(
                f"name must have 1 to {_LONGEST_NAME} characters, not {len(name)}: {name[:40]!r}"
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"name must be text that UTF-8 can encode, not {name!r}") from None
        check_policy(on_outage)
        size, rate = positive("capacity", capacity), positive("tokens_per_second", tokens_per_second)
        numbers = size, rate, initial_tokens(initial, size)
        server = server_of(client, url, positive("timeout", timeout))
        self.name = name
        self._state = server.state(name, numbers, on_outage)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RedisTokenBucket) and self._state is other._state

    def __hash__(self) -> int:
        return hash(self._state)

    def __repr__(self) -> str:
        return (
            f"<RedisTokenBucket {self.name!r}: capacity {self.capacity:g}, {self.tokens_per_second:g} "
            f"tokens_per_second, on {self.server.where}>"
        )

    @property
    def capacity(self) -> float:
        """The most tokens that it can hold, as last known here."""
        return self._state.capacity

    @property
    def tokens_per_second(self) -> float:
        """The rate at which tokens come back, as last known here."""
        return self._state.rate

    @property
    def tokens(self) -> float:
        """The tokens that are there now: below 0 while in debt. It asks the server; in an outage: as last known."""
        self._state.look()
        return self._state.level

    @property
    def pause_left(self) -> float:
        """The seconds until the end of a pause. It asks the server; during an outage it is what was last known."""
        self._state.look()
        return self._state.pause_left

    def allow(self, tokens: float = 1) -> bool:
        """Take tokens now, or none. See `TokenBucket.allow`."""
        number = positive("tokens", tokens, documented=True)
        try:
            return not _take([(self._state, number)])[0]
        except ValueError:  # more than the capacity
            return False

    try_consume = allow

    def wait(self, tokens: float = 1, *, timeout: float | None = None) -> None:
        """Block until the tokens are taken. See `TokenBucket.wait`.

        ``timeout`` does not count the time in which the server answers.
        """
        _wait([(self._state, positive("tokens", tokens))], timeout)

    def take_or_delay(self, tokens: float = 1) -> float:
        """Take tokens and return ``0.0``, or return the seconds to wait. See `TokenBucket.take_or_delay`."""
        return _take([(self._state, positive("tokens", tokens))])[0]

    def refund(self, tokens: float) -> None:
        """Give back tokens that were not used. See `TokenBucket.refund`. During an outage they are lost."""
        self._state.settle(positive("tokens", tokens))

    def charge(self, tokens: float) -> None:
        """Take tokens without asking. See `TokenBucket.charge`. During an outage they are charged afterwards."""
        self._state.settle(-positive("tokens", tokens))

    def pause(self, seconds: float) -> None:
        """Grant nothing to any process for some seconds. See `TokenBucket.pause`.

        During an outage it counts in this process, and for the others once the server answers.
        """
        self._state.pause(zero_or_more("seconds", seconds))

    def resume(self) -> None:
        """End a pause. See `TokenBucket.resume`. During an outage: only here, until that is over."""
        self._state.resume()

    def configure(
        self,
        *,
        capacity: float | None = None,
        tokens_per_second: float | None = None,
        reason: str = "",
        who: str | None = None,
    ) -> None:
        """Change the numbers for all processes, those that start later too, until `restore`.

        Args:
            capacity: The most tokens it can hold from now on. ``None``: unchanged.
            tokens_per_second: The rate from now on. ``None``: unchanged.
            reason: Why. It is stored beside them, with the moment.
            who: Who says so; stored too. ``None``: the user and the host of this process.

        Raises:
            ValueError: An argument is not above 0, or is not finite.
            TypeError: An argument is not a number.
            redis.RedisError: The server does not answer, or refuses. Nothing was changed, as far as known.

        """
        size = 0.0 if capacity is None else positive("capacity", capacity)
        rate = 0.0 if tokens_per_second is None else positive("tokens_per_second", tokens_per_second)
        self._state.configure(size, rate, reason, somebody() if who is None else who)

    def restore(self) -> None:
        """Let the numbers of the code count again. See `configure`.

        Raises:
            redis.RedisError: The server does not answer, or refuses.

        """
        self._state.restore()

    # -- for `AllOf`, `BucketPerKey` and gates ------------------------------------------------------

    @property
    def server(self) -> Server:
        """Where it is: buckets of one server are taken from together, see `all_of`."""
        return self._state.server

    @property
    def known(self) -> Known:
        """What this process knows of it, without asking the server."""
        state = self._state
        outage = state.outages.is_down
        return Known(state.level, state.pause_left, state.numbers[:2], state.stored, outage)

    @property
    def workers(self) -> int:
        """How many processes use the server now, as far as known."""
        return self.server.workers

    def of_key(self, key: str, own: tuple[float, float] | None, initial: float | None) -> Self:
        """Return the bucket of one key, for `BucketPerKey`.

        Args:
            key: The key.
            own: Its capacity and rate, if it has others than this bucket. If not, what is stored for this
                bucket counts for the key too.
            initial: As of `BucketPerKey`.

        """
        it = copy.copy(self)
        it.name = f"{self.name}:{key}"
        size, rate = own or self._state.numbers[:2]
        numbers = size, rate, size if initial is None else min(initial, size)
        it._state = self.server.state_of_key(it.name, numbers, self._state, follows=own is None)
        return it

    def take_together(self, demands: Sequence[Demand]) -> tuple[float, int]:
        """Take from several buckets of this server in one call, from all or from none.

        Returns:
            ``0.0`` and 0, or the seconds to wait and the position of the bucket because of which.

        """
        return _take(_states_of(demands))

    def wait_together(self, demands: Sequence[Demand], timeout: float | None) -> None:
        """Block until the tokens of several buckets of this server are taken, in one call.

        Raises:
            RateLimitExceeded: As `TokenBucket.wait`.

        """
        _wait(_states_of(demands), timeout)

    @staticmethod
    def check_together(buckets: Sequence["RedisTokenBucket"]) -> None:
        """Refuse buckets that a Redis Cluster would keep on different servers, if their names say so.

        Raises:
            ValueError: The hash tags in their names are different.

        """
        tags = {tag.group(1): each.name for each in buckets if (tag := _TAG.search(each.name))}
        if len(tags) > 1:
            raise ValueError(
                "buckets that are taken from together must have one hash tag, not "
                + ", ".join(f"{tag!r} (of {name!r})" for tag, name in sorted(tags.items()))
            )

    def for_gate(self) -> Any:
        """Return what one gate takes from instead: it never waits for the server."""
        from .redis_gate_bucket import GateBucket  # noqa: PLC0415 - only where there is a gate

        return GateBucket(self._state)


def _states_of(demands: Sequence[Demand]) -> list[tuple[State, float]]:
    return [
        (demand.bucket._state, positive("tokens", demand.tokens))  # type: ignore[attr-defined]
        for demand in demands
    ]


class _Turn:
    """The place of a caller that waits: at which bucket it was promised tokens, and how many."""

    state: State | None = None
    promised = 0.0


def _take(demands: Sequence[tuple[State, float]], turn: _Turn | None = None) -> tuple[float, int]:
    """Take tokens from all buckets of one server, or from none.

    Args:
        demands: The buckets, and how many tokens of each.
        turn: The place of the caller, if it waits.

    Returns:
        0.0 and 0. Or, if nothing was taken, the seconds until the tokens are there, and the position of
        the bucket that has not got them.

    Raises:
        ValueError: They are more than the capacity of a bucket.

    """
    if 0 < len(without := _without_server(demands)) < len(demands):
        return _take_split(demands, without, turn)
    parts = [
        Part(state, tokens, turn.promised if turn is not None and turn.state is state else 0.0)
        for state, tokens in demands
    ]
    try:
        taken = call_take(parts, 1, 0 if turn is None else 1)
    except ServerDownError:
        if turn is not None:
            turn.state = None
        # The call may have found out that some of them cannot be used.
        if 0 < len(without := _without_server(demands)) < len(demands):
            return _take_split(demands, without, turn)
        return _take_without_server(demands)
    if turn is not None:
        turn.state, turn.promised = demands[taken.last][0], taken.promised
    if taken.wait < 0.0:
        state, tokens = demands[taken.last]
        raise too_many(tokens, state.capacity)
    return (0.0, 0) if taken.jobs else (max(taken.wait, MICRO), taken.last)


def _without_server(demands: Sequence[tuple[State, float]]) -> list[int]:
    """Return the positions of the buckets that cannot be asked for now."""
    return [place for place, (state, _) in enumerate(demands) if state.outages.left]


def _take_split(
    demands: Sequence[tuple[State, float]], without: Sequence[int], turn: _Turn | None
) -> tuple[float, int]:
    """Take from some buckets as their ``on_outage`` says, and from the others on the server."""
    delay, place = _take_without_server([demands[each] for each in without])
    if delay:
        return delay, without[place]
    rest = [place for place in range(len(demands)) if place not in without]
    delay, place = math.inf, 0
    try:
        delay, place = _take([demands[each] for each in rest], turn)
    finally:
        if delay:
            for each in without:
                state, tokens = demands[each]
                state.stand_in.refund(tokens)
    return delay, rest[place]


def _take_without_server(demands: Sequence[tuple[State, float]]) -> tuple[float, int]:
    for position, (state, tokens) in enumerate(demands):
        delay = state.take_without_server(tokens)
        if delay:
            for before, given in demands[:position]:
                before.stand_in.refund(given)
            return delay, position
    return 0.0, 0


def _wait(demands: Sequence[tuple[State, float]], timeout: float | None) -> None:
    """Block until tokens of all buckets of one server are taken."""
    until = math.inf if timeout is None else time.monotonic() + timeout_seconds(timeout)
    turn = _Turn()
    try:
        while (asked := _take(demands, turn))[0]:
            delay, position = asked
            state, tokens = demands[position]
            if delay > until - time.monotonic():
                raise timed_out(tokens, delay)
            _sleep(state, delay)
    except BaseException:
        if turn.state is not None and turn.promised:
            with contextlib.suppress(ServerDownError):
                call_take([Part(turn.state, promised=turn.promised)])
        raise


def _sleep(state: State, seconds: float) -> None:
    """Sleep until a promised moment, or until somebody has changed the bucket."""
    end, seen = time.monotonic() + seconds, state.seen
    while (left := end - time.monotonic()) > 0.0:
        time.sleep(min(left, _LOOK))
        if left > _LOOK:  # not earlier: a caller that asks before its moment is refused
            state.look()
            if seen != state.seen:
                return
