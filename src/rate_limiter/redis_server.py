"""The Redis of `redis_bucket`, as one process uses it: its connections, signs of life, outages, forks."""

import contextlib
import functools
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

from .extras import extra
from .outage import Outages, Policy, ServerDownError
from .redis_state import Question, State

with extra("redis", "redis"):
    import redis
    from redis.backoff import NoBackoff
    from redis.exceptions import NoScriptError
    from redis.retry import Retry

__all__ = ["ERRORS", "Server", "server_of"]

_SCRIPT: Final = (Path(__file__).parent / "redis_bucket.lua").read_text()

#: Notes that a process is alive, and returns how many are. One that is ahead dates from before the clock was
#: set back.
_BEAT: Final = """
local clock = redis.call('TIME')
redis.call('ZADD', KEYS[1], clock[1], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', clock[1] - ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], clock[1] + 1, '+inf')
redis.call('EXPIRE', KEYS[1], ARGV[2])
return redis.call('ZCARD', KEYS[1])
"""

#: All keys in Redis begin with this.
_PREFIX: Final = "rate_limiter:"

#: Counts how often somebody has changed a bucket.
_CHANGES: Final = f"{_PREFIX}changes"

#: Seconds between two signs of life of a process, and seconds without one after which it counts as gone.
_BEAT_EVERY: Final = 5.0
_GONE_AFTER: Final = 15

#: The most calls of a process that are out to one server. More wait here: a pool of connections has an end, and
#: a thousand that are made at once are not made in time.
_MOST_CALLS: Final = 20

#: What fails if a server does not answer, or does not answer as it should.
ERRORS: Final = (redis.RedisError, OSError, UnicodeError)

#: Those of them that are about the server, or the way there, for sure.
_NO_ANSWER: Final = (redis.ConnectionError, redis.TimeoutError, OSError)


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
        self._states: WeakValueDictionary[str, State] = WeakValueDictionary()
        #: The keys and versions of stored numbers that differ from the code, and that the log was told of.
        self.told: set[tuple[str, str]] = set()
        #: The states that the server has yet to be told something of: they are not to be forgotten.
        self.owing: set[State] = set()
        self.begin()

    def begin(self) -> None:
        """Begin in a new process: with connections and locks of its own."""
        self._lock = threading.Lock()
        self._member = uuid.uuid4().hex
        self._beat_at = 0.0
        self.outages.after_fork()
        self.owing = set()
        for state in list(self._states.values()):
            state.after_fork()
        self._changes: Any = None
        #: What asks for the gates of this process, see `redis_asker`.
        self.asker: Any = None
        self._client = client = self._connect()
        #: Lets only so many calls out, and no more than there may be connections.
        most = getattr(client.connection_pool, "max_connections", _MOST_CALLS)
        self._calls = threading.Semaphore(min(_MOST_CALLS, most))
        self._script = client.register_script(_SCRIPT)
        self._beat = client.register_script(_BEAT)

    def state(self, name: str, numbers: tuple[float, float, float], policy: Policy) -> State:
        """Return the state of the bucket of a name in this process.

        Args:
            name: The name.
            numbers: Capacity, tokens per second and first level, as the code says.
            policy: What it does during an outage.

        Raises:
            ValueError: There is one with other numbers.

        """
        state = self._get_or_make(name, numbers, policy)
        if (state.numbers, state.policy) != (numbers, policy):
            raise ValueError(
                f"RedisTokenBucket {name!r} on {self.where} is {(*state.numbers, state.policy)} elsewhere in "
                "this process (capacity, tokens_per_second, initial, on_outage), not "
                f"{(*numbers, policy)}"
            )
        return state

    def state_of_key(
        self, name: str, numbers: tuple[float, float, float], of_all: State, *, follows: bool
    ) -> State:
        """Return the state of the bucket of a key. Its numbers may come from a function, and may change.

        Args:
            name: The name of the key's bucket.
            numbers: As in `state`.
            of_all: The state of the bucket of all keys.
            follows: Whether the numbers that are stored for all keys count for this one.

        """
        state = self._get_or_make(name, numbers, of_all.policy)
        state.numbers, state.key_of_all = numbers, of_all.key if follows else ""
        return state

    def _get_or_make(self, name: str, numbers: tuple[float, float, float], policy: Policy) -> State:
        with self._lock:
            state = self._states.get(name)
            if state is None:
                key = f"{_PREFIX}bucket:{name}"
                state = self._states[name] = State(self, key, numbers, policy)
        return state

    def note_change(self) -> None:
        """Tell all processes that a bucket was changed: those that wait for it look at it."""
        with contextlib.suppress(*ERRORS):
            self._client.incr(_CHANGES)

    def has_changed(self) -> bool:
        """Tell whether somebody has changed a bucket since this was last asked."""
        seen = self._changes
        try:
            self._changes = self._client.get(_CHANGES)
        except _NO_ANSWER as error:
            self.outages.failed(error)
        except ERRORS:  # no right to it, say: it is learned when a bucket is asked for
            pass
        return bool(self._changes != seen)

    def run(self, question: Question) -> Any:
        """Call the script once.

        Raises:
            ServerDownError: The server does not answer, or has an error for this question. Or one of the two
                was so a moment ago.

        """
        if any(state.outages.left for state in question.states):
            raise ServerDownError
        try:
            reply = self._call(question)
        except ERRORS as error:
            self.failed(question, error)
            raise ServerDownError from error
        self.answered(question)
        return reply

    def order(self, question: Question) -> Any:
        """Call the script once for an operator, who is to see an error: also just after a failure of a bucket.

        Raises:
            redis.RedisError: The server does not answer, or has an error for this question.

        """
        try:
            reply = self._call(question)
        except ServerDownError:
            raise redis.ConnectionError(f"Redis at {self.where} does not answer") from None
        except (OSError, UnicodeError) as error:
            raise redis.ConnectionError(str(error)) from error
        self.answered(question)
        return reply

    def run_all(self, questions: Sequence[Question]) -> list[Any]:
        """Call the script for each question, on one way there and back; return replies and errors.

        Raises:
            redis.RedisError: The server does not answer.

        """
        with self._calls:
            self._show_life()
            replies = self._run_pipeline(questions, "EVALSHA", self._script.sha)
            gone = [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            if gone:  # Redis has started anew, or another one has taken over
                asked = [questions[place] for place in gone]
                again = self._run_pipeline(asked, "EVAL", self._script.script)
                for place, reply in zip(gone, again, strict=True):
                    replies[place] = reply
        return replies

    def answered(self, question: Question) -> None:
        """Take note that the server has answered a question."""
        self.outages.answered()
        for state in question.states:
            state.outages.answered()

    def failed(self, question: Question, error: Exception) -> None:
        """Take note of an error for an answer, and find out whose it is: the server's, or one bucket's.

        A sign of life is a write of its own. A server that takes none is down for all buckets.
        """
        if isinstance(error, _NO_ANSWER):
            self.outages.failed(error)
            return
        try:
            with self._calls:
                self._show_life(now=True)
        except ERRORS as of_server:
            self.outages.failed(of_server)
            return
        for state in self._broken(question.states) or question.states:
            state.outages.failed(error)

    def _broken(self, states: Sequence[State]) -> list[State]:
        """Return which of several buckets cannot even be looked at."""
        broken = []
        for state in states if len(states) > 1 else ():
            try:
                self._call(Question.look(state))
            except (*ERRORS, ServerDownError):
                broken.append(state)
        return broken

    def _call(self, question: Question) -> Any:
        with self._calls:
            if self.outages.left:  # another call has found out while this one waited
                raise ServerDownError
            self._show_life()
            return self._evaluate(self._script, question.keys, question.arguments)

    def _evaluate(self, script: Any, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        try:
            return self._client.evalsha(script.sha, len(keys), *keys, *arguments)
        except NoScriptError:
            return self._client.eval(script.script, len(keys), *keys, *arguments)

    def _run_pipeline(self, questions: Sequence[Question], command: str, script: str) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for question in questions:
            keys = question.keys
            pipeline.execute_command(command, script, len(keys), *keys, *question.arguments)
        replies: list[Any] = pipeline.execute(raise_on_error=False)
        return replies

    def _show_life(self, *, now: bool = False) -> None:
        """Tell the server now and then that this process lives, and learn how many do.

        It comes before what it goes with, so that nothing is taken if it fails. An outage ends with one: a
        server that can only be read from would seem well to a call that happens to take nothing.
        """
        moment = time.monotonic()
        if now or moment >= self._beat_at or self.outages.is_down:
            self._beat_at = moment + _BEAT_EVERY
            signs = [self._member, _GONE_AFTER]
            self.workers = max(1, int(self._evaluate(self._beat, [f"{_PREFIX}workers"], signs)))


#: By their addresses. The first client, or URL, of an address is used.
_servers: dict[str, Server] = {}
_servers_lock = threading.Lock()


def server_of(client: Any, url: str | None, timeout: float) -> Server:
    """Return the server of a client or a URL. It speaks to nobody.

    Raises:
        TypeError: Not one of both is given, or it has the wrong type.
        ValueError: It is no URL of a Redis.

    """
    if (client is None) == (url is None):
        given = "none" if client is None else "both"
        raise TypeError(f"RedisTokenBucket takes one of client=… and url=…, not {given}")
    if client is None:
        if not isinstance(url, str):
            raise TypeError(f"url must be text, not a {type(url).__name__}")  # it may have a password
        place = _place_of(url)
    else:
        if not isinstance(client, redis.Redis):
            kind = type(client)  # the repr of the client may have a password
            raise TypeError(
                f"client must be a redis.Redis, not a {kind.__module__}.{kind.__qualname__}"
            )
        pool = client.connection_pool
        place = _place(pool.connection_kwargs, getattr(pool, "service_name", None))
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
        plain = isinstance(error, TypeError) or str(error).startswith("Redis URL must specify")
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
