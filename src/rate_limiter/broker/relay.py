"""Moving a message to the end of a queue: the copy is stored before the original is acknowledged.

On RabbitMQ the copy is published on a connection of its own, because RabbitMQ stops to read from every
connection that publishes while it is short of memory: the consumer's connection would stand still. The
copy is stored when RabbitMQ confirms it. Nobody waits for that; `Relay.tend` collects the
confirmations. On Redis one script stores the copy and acknowledges the original (relay.lua), so that no
message is there twice. The other virtual transports store a copy at once.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, Final
from weakref import WeakKeyDictionary

from kombu.compression import compress
from kombu.transport import virtual
from kombu.utils.json import dumps

from .origin import ORIGIN
from .redis_channel import forget, is_redis, redis_client

__all__ = ["Relay"]

#: At most so many copies, and bytes of them, wait for their confirmation. While RabbitMQ is short of
#: memory it confirms none, and does not read what is sent: more than the socket holds would block.
_MOST_PENDING: Final = 50
_MOST_BYTES: Final = 256 * 1024

#: Seconds between two looks for confirmations, while copies wait for theirs.
_LOOK: Final = 0.02

#: The same with an event loop, which tells of each confirmation.
_LOOK_IN_LOOP: Final = 1.0

#: Seconds to wait, when the consumer's connection ends, for the last confirmations.
_FAREWELL: Final = 0.5

#: After so many seconds without a copy the connection is closed. It is opened again when needed.
_IDLE: Final = 5.0

#: At most so many seconds are spent to write one frame (128 KiB) of a copy to the socket.
_WRITE: Final = 0.5

#: Stores a copy and acknowledges the original, on Redis.
_SCRIPT: Final = (Path(__file__).parent / "relay.lua").read_text()

#: The properties that a channel sets itself, or that are passed to it as arguments.
_SET_BY_CHANNEL: Final = frozenset(
    {
        *("content_type", "content_encoding", "application_headers", "priority"),
        *("body_encoding", "delivery_info", "delivery_tag"),  # virtual transports
    }
)


class Relay:
    """Moves the messages of one consumer.

    Args:
        moved: Called with the job when its copy is stored. It acknowledges the original.
        failed: Called with the job when its copy is not stored, or when nobody knows. The original is
            still unacknowledged; if the copy was stored all the same, the message runs twice.
        hub: kombu's event loop, if the consumer has one. It calls `tend` when RabbitMQ has something to say.

    Both are called by `tend`, `wait` and `close`, and on a virtual transport by `send`. On Redis the original
    is acknowledged by then.

    """

    def __init__(
        self, moved: Callable[[Any], None], failed: Callable[[Any], None], hub: Any = None
    ) -> None:
        self._moved = moved
        self._failed = failed
        self._hub = hub
        self._socket: Any = None
        #: The script, for each channel of Redis.
        self._scripts: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._numbers = itertools.count(1)
        self._connection: Any = None
        self._channel: Any = None
        #: The jobs whose copies are not confirmed, and the sizes of these, by the number of the publish.
        self._pending: dict[int, tuple[Any, int]] = {}
        self._bytes = 0
        self._returned: set[int] = set()
        self._outcomes: list[tuple[Callable[[Any], None], Any]] = []
        self._blocked = False
        self._used_at = 0.0

    @property
    def blocked(self) -> bool:
        """Whether RabbitMQ has said that it reads nothing: it is short of memory or disk space."""
        return self._blocked

    @property
    def full(self) -> bool:
        """Whether `send` should not be called for the time being."""
        return self._blocked or len(self._pending) >= _MOST_PENDING or self._bytes >= _MOST_BYTES

    @property
    def due(self) -> float:
        """The moment, by the monotonic clock, at which `tend` is to be called; infinite: never."""
        if self._outcomes:
            return monotonic()
        if self._connection is None:
            return math.inf
        if self._pending:
            return monotonic() + (_LOOK if self._hub is None else _LOOK_IN_LOOP)
        return self._used_at + _IDLE

    def send(
        self,
        job: Any,
        message: Any,
        queue: str,
        headers: Mapping[str, Any] | None = None,
        *,
        as_it_came: bool = False,
    ) -> None:
        """Put a copy of a message at the end of a queue.

        Args:
            job: What ``moved`` or ``failed`` is called with.
            message: The kombu message. It is not changed.
            queue: The name of the queue.
            headers: Headers that the copy has instead of the original's, or besides.
            as_it_came: On Redis, let the copy say that it was sent where the original was sent. Then the reader
                of the queue has to know whose messages they are; the others need `restore_origin`.

        Raises:
            Exception: It could not be sent. Then neither callback is called for it.

        """
        channel: Any = message.channel
        if isinstance(channel, virtual.Channel):
            if is_redis(channel):
                self._move(message, queue, None if as_it_came else _copy(message, channel, headers))
            else:
                publish: Callable[..., Any] = channel.basic_publish
                publish(_copy(message, channel, headers), "", queue)
            self._moved(job)
            return
        if self._connection is None:
            self._open(channel.connection.client)
        number = next(self._numbers)
        copy = _copy(message, self._channel, headers, number)
        self._pending[number] = job, len(copy.body)
        self._bytes += len(copy.body)
        self._used_at = monotonic()
        try:
            self._channel.basic_publish(copy, "", queue, mandatory=True, timeout=_WRITE)
        except BaseException:
            self._take(number)
            self.close()
            raise
        if self._outcomes and self._hub is not None:
            # To publish is to read confirmations too (py-amqp). Nothing else may call `tend` for them.
            self._hub.call_soon(self._tell)

    def tend(self) -> None:
        """Read what RabbitMQ has confirmed, keep the connection alive, and close it when it is idle."""
        connection = self._connection
        if connection is not None:
            try:
                with contextlib.suppress(TimeoutError):
                    while True:
                        connection.drain_events(timeout=0)
                connection.heartbeat_check()
            except Exception:  # noqa: BLE001 - whatever has happened to the connection
                self.close()
        self._tell()
        if not self._pending and monotonic() >= self._used_at + _IDLE:
            self.close()

    def wait(self, seconds: float) -> None:
        """Wait for the confirmations, for at most so many seconds."""
        end = monotonic() + seconds
        self.tend()
        while self._pending and (left := end - monotonic()) > 0:
            with contextlib.suppress(Exception):  # `tend` finds out what it is
                self._connection.drain_events(timeout=left)
            self.tend()

    def farewell(self) -> None:
        """Wait a moment for the last confirmations: messages without one run twice. `close` is to follow."""
        self.wait(_FAREWELL)

    def close(self) -> None:
        """Close the connection. What was not confirmed has failed."""
        connection, self._connection, self._channel = self._connection, None, None
        self._blocked = False
        if self._socket is not None:
            with contextlib.suppress(Exception):
                self._hub.remove_reader(self._socket)
            self._socket = None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.collect()
        for number in list(self._pending):
            self._outcomes.append((self._failed, self._take(number)))
        self._returned.clear()
        self._tell()

    def _open(self, client: Any) -> None:
        options = {
            **(client.transport_options or {}),
            "confirm_publish": False,  # it would wait for each confirmation
            "on_blocked": self._on_blocked,
            "on_unblocked": self._on_unblocked,
        }
        connection = client.clone(transport_options=options)
        try:
            connection.connect()
            channel = connection.channel()
            channel.confirm_select()
        except BaseException:
            with contextlib.suppress(Exception):
                connection.collect()
            raise
        self._numbers = itertools.count(1)
        channel.events["basic_return"].add(self._on_return)
        channel.events["basic_ack"].add(self._on_confirmed)
        channel.events["basic_nack"].add(self._on_refused)
        self._connection, self._channel = connection, channel
        if self._hub is not None:
            self._socket = connection.connection.sock
            self._hub.add_reader(self._socket, self._on_readable)

    def _move(self, message: Any, queue: str, copy: Any) -> None:
        """Store a copy on Redis, and acknowledge the original, in one step."""
        channel = message.channel
        script = self._scripts.get(channel)
        if script is None:
            script = self._scripts[channel] = redis_client(channel).register_script(_SCRIPT)
        text, like = "", message._raw
        if copy is not None:
            channel._inplace_augment_message(copy, "", queue)
            text, like = dumps(copy), copy  # type: ignore[no-untyped-call]
        to = channel._q_for_pri(queue, channel._get_message_priority(like, reverse=False))
        keys = channel.unacked_key, channel.unacked_index_key, to
        prefix = channel.global_keyprefix
        script(keys=[f"{prefix}{key}" for key in keys], args=[message.delivery_tag, text])
        forget(message, "ACK")

    def _on_readable(self, *_: Any) -> None:
        self.tend()

    def _on_blocked(self, _reason: str) -> None:
        self._blocked = True

    def _on_unblocked(self) -> None:
        self._blocked = False

    def _on_return(self, _error: Any, _exchange: str, _key: str, message: Any) -> None:
        # There is no such queue. RabbitMQ confirms the copy all the same, after this.
        self._returned.add(message.properties["application_headers"][ORIGIN]["number"])

    def _on_confirmed(self, number: int, multiple: bool) -> None:
        for each in self._up_to(number, multiple):
            outcome = self._failed if each in self._returned else self._moved
            self._returned.discard(each)
            self._outcomes.append((outcome, self._take(each)))

    def _on_refused(self, number: int, multiple: bool) -> None:
        for each in self._up_to(number, multiple):
            self._outcomes.append((self._failed, self._take(each)))

    def _up_to(self, number: int, multiple: bool) -> list[int]:
        return [each for each in self._pending if each == number or (multiple and each < number)]

    def _take(self, number: int) -> Any:
        job, size = self._pending.pop(number)
        self._bytes -= size
        return job

    def _tell(self) -> None:
        # Not from within the handlers above: what is called may read from a connection, or send again.
        outcomes, self._outcomes = self._outcomes, []
        for outcome, job in outcomes:
            outcome(job)


def _copy(
    message: Any, channel: Any, headers: Mapping[str, Any] | None, number: int | None = None
) -> Any:
    """Return what the channel publishes so that the message arrives once more."""
    info = message.delivery_info or {}
    origin = {"exchange": info.get("exchange", ""), "routing_key": info.get("routing_key", "")}
    if info.get("redelivered"):
        origin["redelivered"] = True  # the copy is a new message to the broker
    copied = {**(message.headers or {}), **(headers or {}), ORIGIN: origin}
    if "CC" in copied:
        origin["CC"] = copied.pop("CC")  # RabbitMQ would send the copy to these queues too
    if number is not None:
        origin["number"] = number
    body = message.body
    if (compression := copied.get("compression")) and not message.errors:
        body, _ = compress(body, compression)  # type: ignore[no-untyped-call] # kombu undid it
    properties = {k: v for k, v in message.properties.items() if k not in _SET_BY_CHANNEL}
    if properties.get("user_id") != channel.connection.client.userid:
        properties.pop("user_id", None)  # RabbitMQ refuses the name of another user
    return channel.prepare_message(
        body,
        priority=message.properties.get("priority"),
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        headers=copied,
        properties=properties,
    )
