"""The lanes on a RabbitMQ: see `lanes`."""

import contextlib
import itertools
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from .lane import SIGN
from .origin import restore_origin
from .relay import Relay

__all__ = ["AmqpLanes"]

#: How many messages of a lane are in hand while they are put back.
_AT_ONCE: Final = 500

#: What is put back goes to the end of its queue. If at most so many messages were there before, they are sent behind it.
_MOST_ROTATED: Final = 10_000

#: Seconds until a channel is closed after its last acknowledgements. A quorum queue may get them late, and forgets
#: those that it has not got when the channel closes.
_SETTLE: Final = 0.5

#: Seconds without a message after which to look whether a lane is empty.
_NOTHING_MORE: Final = 0.2

#: Of the queues of notes and signs. A quorum queue, which a RabbitMQ may make by default, would drop a note that was
#: read 20 times.
_CLASSIC: Final = {"x-queue-type": "classic"}

#: RabbitMQ's error for a queue that exists with other arguments than those it is declared with.
_OF_ANOTHER_KIND: Final = 406

#: RabbitMQ's error for a queue that does not exist.
_NOT_THERE: Final = 404

#: Seconds to wait for RabbitMQ to confirm the note of a lane.
_NOTED: Final = 1.0

#: Seconds to wait for RabbitMQ to confirm messages that are put back.
_CONFIRM: Final = 10.0


class AmqpLanes:
    """The lanes on a RabbitMQ. See `Lanes`.

    It uses connections of its own: while an answer is awaited on the consumer's connection, jobs arrive there and
    are handled.

    Args:
        client: A kombu connection to the RabbitMQ. It is cloned.

    """

    def __init__(self, client: Any) -> None:
        self._client = client
        #: For each queue: the channel on which this worker says that it uses lanes of it, and the names of its signs.
        self._signs: dict[str, tuple[Any, set[str]]] = {}

    def join(self, queue: str, lanes: Mapping[str, Iterable[str]]) -> None:
        if not lanes:
            return
        known = self.there(queue)
        with self._channel() as channel:
            missing = {lane: limits for lane, limits in lanes.items() if lane not in known}
            if missing:
                notes = f"{queue}.parked"
                channel.queue_declare(notes, durable=True, auto_delete=False, arguments=_CLASSIC)
            for lane, limits in missing.items():
                note = channel.prepare_message(
                    json.dumps([lane, list(limits)]),
                    content_type="application/json",
                    content_encoding="utf-8",
                    properties={"delivery_mode": 2},
                )
                try:
                    channel.basic_publish(note, "", f"{queue}.parked", confirm_timeout=_NOTED)
                except TimeoutError:  # which would pass for a lost connection
                    raise RuntimeError(
                        "RabbitMQ confirms nothing: it is short of memory or disk space"
                    ) from None
        # An error closes the channel, and with it all its signs: they are noted when all are there.
        there: set[str] = set()
        if queue in self._signs:
            channel, there = self._signs.pop(queue)
        else:
            channel = self._client.channel()
        # A lane may have no consumer for a while, so each has a sign of its own too.
        signs = {_sign(f"{queue}.parked"), *map(_sign, lanes)}
        for sign in signs - there:
            channel.queue_declare(sign, durable=True, auto_delete=True, arguments=_CLASSIC)
            channel.basic_consume(sign, no_ack=True, callback=_ignore)
        self._signs[queue] = channel, there | signs

    def leave(self, queue: str) -> None:
        channel, _ = self._signs.pop(queue, (None, ()))
        if channel is not None:
            channel.close()

    def declare(self, entities: Iterable[Any]) -> dict[str, int | Exception]:
        found: dict[str, int | Exception] = {}
        with self._connection() as connection:
            for entity in entities:
                try:
                    there = entity(connection.default_channel).queue_declare()
                    found[entity.name] = int(there.message_count)
                except connection.channel_errors as error:
                    found[entity.name] = error
                    if getattr(error, "reply_code", None) == _OF_ANOTHER_KIND:
                        channel = connection.channel()
                        there = channel.queue_declare(entity.name, passive=True)
                        found[entity.name] = int(there.message_count)
        return found

    def there(self, queue: str) -> dict[str, list[str]]:
        if self._look_at(f"{queue}.parked") is None:
            return {}
        with self._channel() as channel:  # as it closes, the notes go back
            return {lane: limits for _, lane, limits in _notes(channel, queue)}

    def unused(self, queue: str, lanes: Iterable[str]) -> list[str]:
        signs = {lane: _sign(lane) for lane in lanes}
        found = self._look_at_all(signs.values()) if signs else {}
        return [
            lane
            for lane, sign in signs.items()
            if (there := found[sign]) is None or not there.consumer_count
        ]

    def calm(self, channels: Iterable[Any]) -> None:
        """Do nothing: what arrives late goes back to its place."""

    def alone(self, queue: str) -> bool:
        there = self._look_at(_sign(f"{queue}.parked"))
        return there is None or there.consumer_count <= (queue in self._signs)

    def count(self, lane: str) -> int:
        there = self._look_at(lane)
        return 0 if there is None else int(there.message_count)

    def find(self, lane: str, job: str) -> int | None:
        return None

    def put_back(self, lane: str, queue: str, first: Iterable[Any] = ()) -> int:
        before = self.count(queue)
        with self._channel() as channel:
            count = self._move(first, queue)
            if self._look_at(lane) is not None:
                # Another worker may park at once what comes back: this would not end. Where there is none, some may
                # be on their way back to the lane, and are not counted yet.
                most = max(self.count(lane), _AT_ONCE if self.alone(queue) else 0)
                count += self._move(itertools.islice(self._all_of(channel, lane), most), queue)
            if count and before <= _MOST_ROTATED:
                self._move(itertools.islice(_got(channel, queue), before), queue)
            if count:
                time.sleep(_SETTLE)
        return count

    def sweep(self, queue: str, lane: str, tasks: Iterable[str], most: int) -> int:
        return 0

    def purge(self, lane: str) -> int:
        if self._look_at(lane) is None:
            return 0
        with self._channel() as channel:
            return int(channel.queue_purge(lane) or 0)

    def remove(self, queue: str, lanes: Iterable[str]) -> None:
        gone = set()
        for lane in lanes:
            there = self._look_at(lane)
            if there is not None:
                if there.message_count or there.consumer_count:
                    continue
                with self._channel() as channel:  # quorum queues know no if_empty
                    channel.queue_delete(lane)
            gone.add(lane)
        if self._look_at(f"{queue}.parked") is None:
            return
        with self._channel() as channel:
            left = 0
            for note, lane, _ in list(_notes(channel, queue)):
                if lane in gone:
                    note.ack()
                else:
                    left += 1
        if not left:
            with contextlib.suppress(*self._client.channel_errors), self._channel() as channel:
                channel.queue_delete(f"{queue}.parked", if_unused=True, if_empty=True)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Any]:
        options = {**(self._client.transport_options or {}), "confirm_publish": True}
        connection = self._client.clone(transport_options=options)
        try:
            connection.connect()
            yield connection
        except BaseException:
            with contextlib.suppress(Exception):
                connection.collect()  # one that is blocked would not answer
            raise
        with contextlib.suppress(Exception):
            connection.release()

    @contextlib.contextmanager
    def _channel(self) -> Iterator[Any]:
        with self._connection() as connection:
            channel = connection.channel()
            yield channel
            channel.close()

    def _look_at(self, name: str) -> Any:
        """Return how many messages and consumers a queue has. ``None``: there is no such queue."""
        return self._look_at_all([name])[name]

    def _look_at_all(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the same of several queues, by their names."""
        found: dict[str, Any] = {}
        with self._connection() as connection:
            for name in names:
                try:
                    found[name] = connection.channel().queue_declare(name, passive=True)
                except connection.channel_errors as error:
                    if getattr(error, "reply_code", None) != _NOT_THERE:
                        raise
                    found[name] = None
        return found

    def _all_of(self, channel: Any, lane: str) -> Iterator[Any]:
        """Yield all messages of a lane, as they were sent at first. They are pushed: to get each takes long."""
        inbox: deque[Any] = deque()
        there = True
        while there or self.count(lane):
            channel.basic_qos(0, _AT_ONCE, False)
            tag = channel.basic_consume(lane, no_ack=False, callback=inbox.append)
            there = False
            with contextlib.suppress(TimeoutError):
                while True:
                    while inbox:
                        there = True
                        yield _as_sent(channel, inbox.popleft())
                    channel.connection.client.drain_events(timeout=_NOTHING_MORE)
            # RabbitMQ may pause for longer. The answers come behind what is on its way.
            channel.basic_cancel(tag)
            channel.basic_qos(0, _AT_ONCE, False)
            while inbox:
                there = True
                yield _as_sent(channel, inbox.popleft())

    @staticmethod
    def _move(messages: Iterable[Any], queue: str) -> int:
        """Send messages to the end of a queue. Return how many have arrived."""
        done: list[Any] = []
        failed: list[Any] = []

        def moved(message: Any) -> None:
            message.ack()
            done.append(message)

        relay = Relay(moved, failed.append)
        try:
            for message in messages:
                relay.send(message, message, queue)
                relay.tend()  # each original that is not acknowledged runs twice if this worker is killed now
                end = time.monotonic() + _CONFIRM
                while relay.full and not failed and time.monotonic() < end:
                    relay.wait(_CONFIRM / 100)
                if relay.full or failed:
                    break
            relay.wait(0.0 if relay.blocked else _CONFIRM)
        finally:
            relay.close()
        if failed:
            raise RuntimeError(f"RabbitMQ has not confirmed a message for queue {queue}")
        return len(done)


def _sign(lane: str) -> str:
    """Return the name of the queue without messages that each worker consumes that uses a lane."""
    return f"{lane}{SIGN}"


def _as_sent(channel: Any, message: Any) -> Any:
    """Return kombu's message, as it was sent at first."""
    message = channel.message_to_python(message)
    restore_origin(message)
    return message


def _got(channel: Any, queue: str) -> Iterator[Any]:
    """Get and yield the messages of a queue one by one, as they were sent at first."""
    while (message := channel.basic_get(queue, no_ack=False)) is not None:
        yield _as_sent(channel, message)


def _notes(channel: Any, queue: str) -> Iterator[tuple[Any, str, list[str]]]:
    """Yield each note of a queue's lanes: its message, the lane, and the names of the lane's limits."""
    for note in _got(channel, f"{queue}.parked"):
        with contextlib.suppress(ValueError, TypeError):
            lane, limits = json.loads(note.body)
            yield note, str(lane), list(limits)


def _ignore(_message: Any) -> None:
    """Do nothing with a message: nobody sends any to the queue that only shows who consumes it."""
