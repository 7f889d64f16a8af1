"""RedisTokenBucket: one rate for all processes, on all machines, that use the same Redis.

The level of a bucket is in one hash in Redis, and one script there (redis_bucket.lua) decides about it by the
server's clock. A caller that has to wait is promised its tokens there: callers of all processes are served in turn,
each at the moment that it was told.

While the server does not answer, a bucket does what its ``on_outage`` says (`outage`). An outage raises no error.
"""

import contextlib
import functools
import math
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from .checks import not_negative, positive, zero_or_more
from .exceptions import RateLimitExceeded
from .outage import POLICIES, Outages, Policy, StandIn
from .token_bucket import TokenBucket

__all__ = ["RedisTokenBucket"]

_SCRIPT: Final = (Path(__file__).parent / "redis_bucket.lua").read_text()

#: Notes that a process is alive, and returns how many are.
_BEAT: Final = """
local clock = redis.call('TIME')
redis.call('ZADD', KEYS[1], clock[1], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', clock[1] - ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return redis.call('ZCARD', KEYS[1])
"""

#: All keys in Redis begin with this.
PREFIX: Final = "rate_limiter:"

#: Seconds between two signs of life of a process, and seconds without one after which it counts as gone.
_BEAT_EVERY: Final = 5.0
_GONE_AFTER: Final = 15

#: What fails if a server does not answer, or does not answer as it should.
ERRORS: Final = (redis.RedisError, OSError, UnicodeError)

_LONGEST_NAME: Final = 200

MICRO: Final = 1e-6


class ServerDownError(Exception):
    """The server does not answer. It never leaves the buckets."""


class RedisTokenBucket:
    """A bucket that all processes share which name it, on one Redis or Valkey.

        bucket = RedisTokenBucket("partner", capacity=10, tokens_per_second=5, url="redis://localhost/0")

    It does what a `TokenBucket` does. ``wait`` serves the callers of all processes first come, first served.
    Two objects of one name and server are equal, and are one bucket. Making one speaks to no server.

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

    Raises:
        ValueError: A number is not above 0 or not finite, the name or the URL is wrong, or this process has a
            bucket of that name and server with other numbers.
        TypeError: An argument has the wrong type, or not one of ``client`` and ``url`` is given.

    A server that loses its data, evicts the key, or is set back gives at most one burst more. Talk to the
    primary; ``maxmemory-policy noeviction`` keeps the keys.

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
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be text, not {name!r}")
        if not 0 < len(name) <= _LONGEST_NAME:
            raise ValueError(
                f"name must have 1 to {_LONGEST_NAME} characters, not {len(name)}: {name[:40]!r}"
            )
        if on_outage not in POLICIES:
            raise ValueError(
                f"on_outage must be one of {', '.join(map(repr, POLICIES))}, not {on_outage!r}"
            )
        numbers = positive("capacity", capacity), positive("tokens_per_second", tokens_per_second)
        server = _server_of(client, url, positive("timeout", timeout))
        self.name = name
        self._shared = server.bucket(name, *numbers, on_outage)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RedisTokenBucket) and self._shared is other._shared

    def __hash__(self) -> int:
        return hash(self._shared)

    def __repr__(self) -> str:
        return (
            f"<RedisTokenBucket {self.name!r}: capacity {self.capacity:g}, {self.tokens_per_second:g} "
            f"tokens_per_second, on {self._shared.server.where}>"
        )

    @property
    def capacity(self) -> float:
        """The most tokens that it can hold, as last known here."""
        return self._shared.capacity

    @property
    def tokens_per_second(self) -> float:
        """The rate at which tokens come back, as last known here."""
        return self._shared.rate

    @property
    def tokens(self) -> float:
        """The tokens that are there now. It asks the server; during an outage it is what was last known."""
        return self._shared.look()[0]

    @property
    def pause_left(self) -> float:
        """The seconds until the end of a pause. It asks the server; during an outage it is 0.0."""
        return self._shared.look()[1]

    def allow(self, tokens: float = 1) -> bool:
        """Take tokens now, or none. See `TokenBucket.allow`."""
        number = positive("tokens", tokens, documented=True)
        try:
            return not self._shared.take(number)
        except ValueError:  # more than the capacity
            return False

    try_consume = allow

    def wait(self, tokens: float = 1, *, timeout: float | None = None) -> None:
        """Block until the tokens are taken. See `TokenBucket.wait`.

        ``timeout`` does not count the time in which the server answers.
        """
        number = positive("tokens", tokens)
        until = math.inf if timeout is None else time.monotonic() + not_negative(timeout)
        turn = Turn()
        try:
            while delay := self._shared.take(number, turn=turn):
                if delay > until - time.monotonic():
                    raise RateLimitExceeded(
                        f"rate limit exceeded: {number:g} tokens only in {delay:.3g} s", delay
                    )
                self._sleep(delay)
        except BaseException:
            if turn.held:
                self._shared.forget(turn.held)
            raise

    def take_or_delay(self, tokens: float = 1) -> float:
        """Take tokens and return ``0.0``, or return the seconds to wait. See `TokenBucket.take_or_delay`."""
        return self._shared.take(positive("tokens", tokens))

    def refund(self, tokens: float) -> None:
        """Give back tokens that were not used. During an outage they are lost."""
        self._shared.settle(positive("tokens", tokens))

    def charge(self, tokens: float) -> None:
        """Take tokens without asking. During an outage they are charged afterwards."""
        self._shared.settle(-positive("tokens", tokens))

    def pause(self, seconds: float) -> None:
        """Grant nothing to any process for some seconds. During an outage the others learn it afterwards."""
        self._shared.pause(zero_or_more("seconds", seconds))

    def resume(self) -> None:
        """End a pause. See `TokenBucket.resume`."""
        self._shared.resume()

    def configure(
        self,
        *,
        capacity: float | None = None,
        tokens_per_second: float | None = None,
        reason: str = "",
    ) -> None:
        """Change the numbers for all processes, those that start later too, until `restore`.

        Args:
            capacity: The most tokens it can hold from now on. ``None``: unchanged.
            tokens_per_second: The rate from now on. ``None``: unchanged.
            reason: Why. It is stored beside them.

        Raises:
            ValueError: An argument is not above 0, or is not finite.
            TypeError: An argument is not a number.
            redis.RedisError: The server does not answer. Nothing was changed, as far as known.

        """
        size = "" if capacity is None else repr(positive("capacity", capacity))
        rate = (
            "" if tokens_per_second is None else repr(positive("tokens_per_second", tokens_per_second))
        )
        self._shared.order("configure", size, rate, reason)

    def restore(self) -> None:
        """Let the numbers count again that the code has. See `configure`.

        Raises:
            redis.RedisError: The server does not answer.

        """
        self._shared.order("clear")

    @property
    def workers(self) -> int:
        """How many processes use the server now, as far as known."""
        return self._shared.server.workers

    def for_gate(self) -> Any:
        """Return what one gate takes from instead: it never waits for the server. See `redis_asker`."""
        from .redis_asker import Asked  # noqa: PLC0415 - only where there is a gate

        return Asked(self._shared)

    def _sleep(self, seconds: float) -> None:
        """Sleep until a promised moment, or until somebody has changed the bucket."""
        end, seen = time.monotonic() + seconds, self._shared.seen
        while (left := end - time.monotonic()) > 0.0:
            time.sleep(min(left, _LOOK))
            if left > _LOOK:  # not earlier: who asks before his moment is refused
                self._shared.look()
                if seen != self._shared.seen:
                    return


#: Seconds between two looks of a waiter whether somebody has changed the numbers, or has paused the bucket.
_LOOK: Final = 2.0


class Turn:
    """The place of a caller that waits: what the server has promised it."""

    held = 0.0


class Debt(NamedTuple):
    """What the server is to charge: tokens taken without it."""

    #: By `RedisTokenBucket.charge`.
    charged: float = 0.0
    #: By the stand-in, and how many of them are charged at most.
    granted: float = 0.0
    most: float = 0.0

    @property
    def tokens(self) -> float:
        """How many are charged."""
        return self.charged + min(self.granted, self.most)


class Shared:
    """What all objects of one name and server share in this process.

    Args:
        server: Where the bucket is.
        name: Its name.
        capacity: As the code says.
        rate: As the code says.
        policy: What it does during an outage.

    """

    def __init__(
        self, server: "Server", name: str, capacity: float, rate: float, policy: Policy
    ) -> None:
        self.server = server
        self.key = f"{PREFIX}bucket:{name}"
        self.declared = capacity, rate, policy
        #: As last known; an operator may have changed them.
        self.capacity, self.rate = capacity, rate
        self.level = 0.0
        #: When the server has last told the level and the numbers; 0.0: never.
        self.known_at = 0.0
        #: The version of the numbers, and whether it is paused, as last seen.
        self.seen = "", False
        self.stand_in = StandIn(policy, server.outages)
        #: What the server has missed: tokens to charge, and until when it is paused.
        self._owed = 0.0
        self._paused_until = 0.0
        self._lock = threading.Lock()

    def take(self, tokens: float, *, turn: Turn | None = None) -> float:
        """Take tokens and return 0.0, or return the seconds until they are there.

        Args:
            tokens: How many.
            turn: The place of the caller, if it waits.

        Raises:
            ValueError: They are more than the capacity.

        """
        held, promise = (0.0, 0.0) if turn is None else (turn.held, tokens)
        try:
            given, wait, promised, _ = self._take(0.0, held, tokens, tokens, promise)
        except ServerDownError:
            if turn is not None:
                turn.held = 0.0
            if tokens > self.capacity:
                raise self.too_many(tokens) from None
            return self.stand_in.take_or_delay(tokens, self.share)
        if turn is not None:
            turn.held = promised
        if wait < 0.0:
            raise self.too_many(tokens)
        return 0.0 if given > 0.0 else max(wait * MICRO, MICRO)

    def too_many(self, tokens: float) -> ValueError:
        """Return the error for more tokens than the capacity."""
        return ValueError(f"tokens must be at most the capacity {self.capacity:g}, not {tokens:.15g}")

    def forget(self, held: float) -> None:
        """Give up what a caller was promised."""
        with contextlib.suppress(ServerDownError):
            self._take(0.0, held, 0.0, 0.0, 0.0)

    def settle(self, tokens: float) -> None:
        """Give tokens back; below 0: charge them."""
        try:
            self._take(tokens, 0.0, 0.0, 0.0, 0.0)
        except ServerDownError:
            self.put_debt(Debt(charged=max(0.0, -tokens)))

    def pause(self, seconds: float) -> None:
        """Grant nothing for some seconds."""
        try:
            self.call("pause", seconds / MICRO)
        except ServerDownError:
            self._paused_until = max(self._paused_until, time.monotonic() + seconds)
            self.stand_in.pause(seconds, self.share)

    def resume(self) -> None:
        """End a pause."""
        self._paused_until = 0.0
        self.stand_in.resume()
        with contextlib.suppress(ServerDownError):
            self.call("resume")

    def order(self, command: str, *arguments: str) -> None:
        """Change the numbers, or raise what the server's client raises."""
        self.learn(self.server.script(keys=[self.key], args=[command, *self._numbers(), *arguments]))

    def look(self) -> tuple[float, float]:
        """Return the level, and the seconds of a pause that are left."""
        try:
            level, paused = self.call("look")
        except ServerDownError:
            return self.level, 0.0
        self.seen = self.seen[0], paused > 0.0
        return level, paused * MICRO

    def call(self, command: str, *arguments: float) -> list[float]:
        """Run a command of the script, and return what it gives.

        Raises:
            ServerDownError: The server does not answer.

        """
        return self.learn(self.server.run(self.key, self.arguments(command, *arguments)))

    def arguments(self, command: str, *arguments: float) -> list[Any]:
        """Return the arguments of the script for a command."""
        return [command, *self._numbers(), *map(repr, map(float, arguments))]

    def learn(self, reply: list[Any]) -> list[float]:
        """Take note of what the server has replied to a command; return what it gives."""
        version, capacity, rate, _why, *texts = reply
        self.capacity, self.rate = float(capacity), float(rate)
        self.seen = str(version), self.seen[1]
        answer = [float(text) for text in texts]
        if len(answer) > 3:  # of "take"
            self.level, self.known_at = answer[3], time.monotonic()
        return answer

    @property
    def has_missed(self) -> bool:
        """Whether the server has missed something during an outage."""
        return bool(self._owed or self._paused_until or self.stand_in.has_granted)

    def take_debt(self) -> Debt:
        """Return what is to be charged with the next call, and owe it no more."""
        share = self.server.workers if self.declared[2] == "local" else 1
        with self._lock:
            charged, self._owed = self._owed, 0.0
        return Debt(charged, self.stand_in.take_granted(), self.capacity / share)

    def put_debt(self, debt: Debt) -> None:
        """Owe tokens: the call that was to charge them has failed."""
        with self._lock:
            self._owed += debt.charged
        self.stand_in.put_granted(debt.granted)

    def tell_pause(self) -> None:
        """Tell the server of a pause, if it has missed one."""
        left, self._paused_until = self._paused_until - time.monotonic(), 0.0
        if left > 0.0:
            self.pause(left)

    def after_fork(self) -> None:
        """Begin in a forked child: the parent tells the server what it has missed."""
        self._lock = threading.Lock()
        self._owed = self._paused_until = 0.0
        self.stand_in.after_fork()

    def _take(self, back: float, *arguments: float) -> list[float]:
        debt = self.take_debt()
        try:
            answer = self.call("take", back - debt.tokens, *arguments)
        except BaseException:
            self.put_debt(debt)
            raise
        self.tell_pause()
        return answer

    def share(self) -> TokenBucket:
        """Return a bucket with this process's share of the rate, from the last known level."""
        workers = self.server.workers
        bucket = TokenBucket(self.capacity / workers, self.rate / workers)
        since = time.monotonic() - self.known_at if self.known_at else 0.0
        level = min(self.capacity, self.level + since * self.rate) / workers
        if (missing := bucket.capacity - level) > 0.0:
            bucket.charge(missing)
        return bucket

    def _numbers(self) -> tuple[str, str]:
        return repr(self.declared[0]), repr(self.declared[1])


class Server:
    """A Redis, as this process uses it.

    Args:
        connect: Returns the client that speaks to it. Called again in a forked child.
        where: Its address, without a password.

    """

    def __init__(self, connect: Callable[[], Any], where: str) -> None:
        self.where = where
        self._connect = connect
        self.outages = Outages(f"Redis at {where}")
        #: How many processes use it, as far as known.
        self.workers = 1
        self._buckets: weakref.WeakValueDictionary[str, Shared] = weakref.WeakValueDictionary()
        self.begin()

    def begin(self) -> None:
        """Begin in a new process: with connections and locks of its own."""
        self._lock = threading.Lock()
        self._member = uuid.uuid4().hex
        self._beat_at = 0.0
        self.outages.after_fork()
        for shared in list(self._buckets.values()):
            shared.after_fork()
        #: What asks for the gates of this process, see `redis_asker`.
        self.asker: Any = None
        self.client = client = self._connect()
        self.script = client.register_script(_SCRIPT)
        self.beat = client.register_script(_BEAT)

    def bucket(self, name: str, capacity: float, rate: float, policy: Policy) -> Shared:
        """Return what the objects of a name share.

        Raises:
            ValueError: There is one with other numbers.

        """
        with self._lock:
            shared = self._buckets.get(name)
            if shared is None:
                shared = self._buckets[name] = Shared(self, name, capacity, rate, policy)
        if shared.declared != (capacity, rate, policy):
            raise ValueError(
                f"RedisTokenBucket {name!r} on {self.where} is {shared.declared} elsewhere in this process "
                f"(capacity, tokens_per_second, on_outage), not {(capacity, rate, policy)}"
            )
        return shared

    def show_life(self) -> None:
        """Tell the server now and then that this process lives, and learn how many do."""
        if (now := time.monotonic()) >= self._beat_at:
            self._beat_at = now + _BEAT_EVERY
            signs = [self._member, _GONE_AFTER]
            self.workers = max(1, int(self.beat(keys=[f"{PREFIX}workers"], args=signs)))

    def run(self, key: str, arguments: list[Any]) -> Any:
        """Run the script once.

        Raises:
            ServerDownError: The server does not answer, or has not a moment ago.

        """
        if self.outages.left:
            raise ServerDownError
        try:
            reply = self.script(keys=[key], args=arguments)
            self.show_life()
        except ERRORS as error:
            self.outages.failed(error)
            raise ServerDownError from error
        self.outages.answered()
        return reply


#: By their addresses. The first client, or URL, of an address is used.
_servers: dict[str, Server] = {}
_servers_lock = threading.Lock()


def _server_of(client: Any, url: str | None, timeout: float) -> Server:
    """Return the server of a client or a URL."""
    if (client is None) == (url is None):
        raise TypeError("RedisTokenBucket takes one of client=… and url=…")
    if client is None:
        if not isinstance(url, str):
            raise TypeError(f"url must be text, not {url!r}")
        place = _place_of(url)
    else:
        try:
            pool = client.connection_pool
            options = pool.connection_kwargs
        except AttributeError:
            raise TypeError(f"client must be a redis.Redis, not {client!r}") from None
        place = _place(options, getattr(pool, "service_name", None))
    with _servers_lock:
        server = _servers.get(place)
        if server is None:
            server = _servers[place] = Server(lambda: client or _connect(url, timeout), place)
    return server


@functools.lru_cache(maxsize=100)
def _place_of(url: str) -> str:
    """Return the address in a URL.

    Raises:
        ValueError: It is no URL of a Redis, or has an option that its client does not know.

    """
    try:
        pool = _connect(url, 1.0).connection_pool
        pool.connection_class(**pool.connection_kwargs)  # it does not connect
    except (ValueError, TypeError, redis.RedisError) as error:
        # The text of other errors may have a part of a password.
        plain = isinstance(error, TypeError) or "scheme" in str(error)
        reason = str(error) if plain else "see redis.Redis.from_url"
        raise ValueError(f"url must be the URL of a Redis: {reason}") from None
    return _place(pool.connection_kwargs, None)


def _place(options: dict[str, Any], service: str | None) -> str:
    place = (service and f"service {service}") or options.get("path")
    place = place or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
    return f"{place}/{options.get('db') or 0}"


def _connect(url: str | None, timeout: float) -> Any:
    return redis.Redis.from_url(
        str(url),
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=Retry(NoBackoff(), 0),  # redis-py would try for seconds
        health_check_interval=0,
    )


def _after_fork_in_child() -> None:
    """Of all threads only the forking one lives on: a lock another held would never be released."""
    global _servers_lock  # noqa: PLW0603
    _servers_lock = threading.Lock()
    for server in _servers.values():
        server.begin()  # redis-py's pool has locks, too


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
