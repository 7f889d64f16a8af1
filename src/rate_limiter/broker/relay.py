"""Sending a message to the end of its queue, with the new copy safe before the old one is acknowledged.

On RabbitMQ the copy goes out on a connection of its own, and is safe when the broker confirms it: the
consumer's connection would stop altogether while the broker is short of memory. Nobody waits for the
confirmation, it is collected between messages. The virtual transports, Redis among them, store it at once.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from kombu.transport import virtual

__all__ = ["Copies", "restore_origin"]

#: The header of a copy. On RabbitMQ it carries what the message's exchange and routing key were.
_ORIGIN: Final = "x-rate-limiter-origin"

#: So many unconfirmed copies; a broker that is short of memory confirms none.
_MOST: Final = 50


class Copies:
    """The copies of one consumer.

    Args:
        done: Called with a job when its copy is safe.
        failed: Called with a job when nobody knows what became of its copy.

    """

    def __init__(self, done: Callable[[Any], None], failed: Callable[[Any], None]) -> None:
        self._done = done
        self._failed = failed
        self._numbers = itertools.count(1)
        self._channel: Any = None
        self._returned: set[int] = set()
        self._outcomes: list[tuple[Callable[[Any], None], Any]] = []
        #: Those that are not confirmed yet, by the number that the broker knows them by.
        self.pending: dict[int, Any] = {}
        #: The connection that they go out on; its heartbeats are the caller's.
        self.connection: Any = None

    @property
    def full(self) -> bool:
        """Whether no more should be sent for the time being."""
        return len(self.pending) >= _MOST

    def send(self, job: Any) -> None:
        """Send a copy of ``job.message`` to the end of ``job.queue``.

        Raises:
            Exception: It could not be sent.

        """
        message = job.message
        if _is_virtual(message.channel):
            payload = copy.deepcopy(message.serializable())
            # one of its own: the old message's acknowledgement is not to take it away
            payload["properties"]["delivery_tag"] = message.channel._next_delivery_tag()
            payload["headers"] = {**(payload["headers"] or {}), _ORIGIN: {}}
            message.channel._put(job.queue, payload)
            self._done(job)
            return
        if self._channel is None:
            self._open(message.channel.connection.client)
        number = next(self._numbers)
        self.pending[number] = job
        try:
            self._channel.basic_publish(
                _copied(message, self._channel, number), "", job.queue, mandatory=True
            )
        except BaseException:
            del self.pending[number]
            self.close()
            raise

    def collect(self) -> None:
        """Read what the broker has confirmed meanwhile."""
        try:
            while self.pending:
                self.connection.drain_events(timeout=0)
        except TimeoutError:
            pass
        except Exception:  # noqa: BLE001 - whatever has happened to the connection
            self.close()
        outcomes, self._outcomes = self._outcomes, []
        for outcome, job in outcomes:
            outcome(job)

    def wait(self, seconds: float) -> None:
        """Wait so long at most for what the broker has not confirmed."""
        end = monotonic() + seconds
        self.collect()
        while self.pending and monotonic() < end:
            with contextlib.suppress(TimeoutError):
                self.connection.drain_events(timeout=end - monotonic())
            self.collect()

    def close(self) -> None:
        """Close the connection. What was not confirmed has failed."""
        connection, self.connection, self._channel = self.connection, None, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.collect()
        pending = list(self.pending.values())
        self.pending.clear()
        for job in pending:
            self._failed(job)

    def _open(self, client: Any) -> None:
        connection = client.clone()
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
        self.connection, self._channel = connection, channel

    def _on_return(self, _error: Any, _exchange: str, _key: str, message: Any) -> None:
        # the queue is gone; the confirmation comes all the same
        self._returned.add(message.properties["application_headers"][_ORIGIN]["number"])

    def _on_confirmed(self, number: int, multiple: bool) -> None:
        for each in self._up_to(number, multiple):
            outcome = self._failed if each in self._returned else self._done
            self._outcomes.append((outcome, self.pending.pop(each)))
            self._returned.discard(each)

    def _on_refused(self, number: int, multiple: bool) -> None:
        self._outcomes += [(self._failed, self.pending.pop(n)) for n in self._up_to(number, multiple)]

    def _up_to(self, number: int, multiple: bool) -> list[int]:
        return [each for each in self.pending if each == number or (multiple and each < number)]


def restore_origin(message: Any) -> bool:
    """Make a copy look like the message that it was copied from. Return whether it is one."""
    origin = message.headers.pop(_ORIGIN, None) if message.headers else None
    if not isinstance(origin, dict):
        return False
    for name in "exchange", "routing_key":
        if isinstance(origin.get(name), str):
            message.delivery_info[name] = origin[name]
    return True


def _is_virtual(channel: Any) -> bool:
    return isinstance(channel, virtual.Channel)


def _copied(message: Any, channel: Any, number: int) -> Any:
    info = message.delivery_info
    headers = dict(message.headers)
    headers.pop("compression", None)  # message.body is not compressed any more
    headers[_ORIGIN] = {
        "exchange": info.get("exchange", ""),
        "routing_key": info.get("routing_key", ""),
        "number": number,
    }
    elsewhere = ("content_type", "content_encoding", "application_headers", "priority", "user_id")
    properties = {name: value for name, value in message.properties.items() if name not in elsewhere}
    return channel.prepare_message(
        message.body,
        priority=message.properties.get("priority"),
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        headers=headers,
        properties=properties,
    )
