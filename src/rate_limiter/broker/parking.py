"""Lanes: queues in the broker where jobs wait for their tokens, beside the queue that they came from.

A lane belongs to one queue and one set of limits, and is named ``<queue>.parked.<name>``. It is of the queue's
type. On Redis it holds the messages as they came; on RabbitMQ their copies say where the originals were sent
(`origin`). Two more names go with each queue that has lanes:

- ``<queue>.parked`` tells which lanes there are: a hash on Redis, a queue with a note for each on RabbitMQ. A
  worker that does not know a lane finds it there: its limit has another name now, or is gone.
- ``<queue>.parked.workers`` tells which workers use them: a sorted set on Redis, on RabbitMQ a queue without
  messages, which each of them consumes. The last one that stops puts everything back.
"""

import contextlib
import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha1
from itertools import islice
from pathlib import Path
from queue import Empty
from typing import Any, Final, Protocol

from kombu.entity import Queue
from kombu.messaging import Consumer
from kombu.transport import virtual

from .origin import MARK, restore_origin
from .relay import Relay, redis_client
from .restore import restore_in_order
from .static import StaticCounts

__all__ = ["AmqpLanes", "Lane", "Lanes", "RedisLanes", "lane_entity", "lane_name", "lanes_of"]

_HERE: Final = Path(__file__).parent
_PUT_BACK: Final = (_HERE / "parking.lua").read_text()
_SWEEP: Final = (_HERE / "sweep.lua").read_text()

#: The longest name of a queue on RabbitMQ, in bytes, and of the last part of a lane's name that is left as it is.
_LONGEST_NAME: Final = 255
_LONGEST_PART: Final = 60

#: How many messages are put back at once. One script on Redis takes about 1 µs for each, and nobody else is served.
_AT_ONCE: Final = 500

#: Seconds after which a worker on Redis that does not renew its sign counts as gone.
_GONE: Final = 10.0

#: At most so many messages of a queue on RabbitMQ are sent behind those that are put back into it.
_MOST_ROTATED: Final = 10_000

#: Seconds until a channel is closed after its last acknowledgements. A quorum queue may get them late, and forgets
#: those that it has not got when the channel closes.
_SETTLE: Final = 0.5

#: Seconds without a message after which to look whether a lane is empty.
_NOTHING_MORE: Final = 0.2

#: What RabbitMQ says of a queue that is declared as another worker, or an operator, has not declared it; and of one
#: that is not there.
_OF_ANOTHER_KIND: Final = 406
_NOT_THERE: Final = 404

#: Seconds to wait for RabbitMQ to confirm a note of a lane; and what is put back.
_NOTED: Final = 1.0
_CONFIRM: Final = 10.0

#: What a lane takes over of the arguments of its queue. No ``x-expires`` or length: they would delete jobs.
_ARGUMENTS: Final = ("x-queue-type", "x-max-priority", "x-queue-mode")


def lane_name(queue: str, limits: Iterable[str]) -> str:
    """Return the name of the lane for jobs of a queue that have these limits.

    Args:
        queue: The name of the queue.
        limits: The names of the limits.

    It has letters, digits and ``_ - .`` behind the name of the queue. A set of limits whose names are long, or
    have other characters, gets a part of them and a number that is the same in all workers.

    """
    names = sorted(limits)
    last = "+".join(names)
    safe = re.sub(r"[^A-Za-z0-9_.+-]+", "-", last)
    room = min(_LONGEST_PART, _LONGEST_NAME - len(f"{queue}.parked.".encode()))
    if safe != last or len(safe) > room:
        number = sha1("\0".join(names).encode(), usedforsecurity=False).hexdigest()[:8]
        safe = f"{safe[: max(0, room - 9)].strip('-+.')}-{number}".lstrip("-")
    return f"{queue}.parked.{safe}"


def lane_entity(queue: Any, name: str) -> Any:
    """Return the lane of a queue as ``kombu.Queue``."""
    given = {**(queue.queue_arguments or {})}
    if queue.max_priority is not None:
        given["x-max-priority"] = queue.max_priority
    arguments = {key: given[key] for key in _ARGUMENTS if key in given}
    options = {"routing_key": name, "durable": queue.durable, "queue_arguments": arguments}
    return Queue(name, **options)  # type: ignore[no-untyped-call]


class Lane:
    """One lane, as one connection consumes it: through a channel and a prefetch window of its own.

    Args:
        connection: The kombu connection of the consumer.
        entity: The lane. It is declared already.
        queue: The name of the queue that its jobs came from.
        on_message: Called with each message. It looks as if it came from the queue.
        options: Further arguments of ``kombu.Consumer``.

    """

    def __init__(
        self,
        connection: Any,
        entity: Any,
        queue: str,
        on_message: Callable[[Any], Any],
        **options: Any,
    ) -> None:
        self.queue = queue
        self._name = entity.name
        self._on_message = on_message
        self.channel: Any = connection.channel()
        self._is_redis = _is_redis(self.channel)
        #: The prefetch count. On RabbitMQ it is a new consumer's.
        self.window = 1
        self._counts: StaticCounts | None = None
        if self._is_redis:
            restore_in_order(self.channel)
            self.channel.Message = _message_class(self.channel.Message, self._name)
        else:
            self._counts = StaticCounts(self.channel, count=lambda: self.window)
        self._consumer: Any = Consumer(  # type: ignore[no-untyped-call]
            self.channel, [entity], on_message=self._receive, auto_declare=False, **options
        )
        self.consumes = False

    def __len__(self) -> int:
        """How many messages of it are not acknowledged."""
        if self._counts is not None:
            return len(self._counts)
        qos = self.channel.qos
        return len(qos._delivered) - len(qos._dirty)

    @property
    def full(self) -> bool:
        """Whether no more come before one is acknowledged, though there may be more."""
        return self.consumes and len(self) >= self.window

    def consume(self, window: int) -> None:
        """Consume it.

        Args:
            window: At most so many messages, besides those that are there already.

        """
        self.window = window + len(self) if self._is_redis else window
        self.channel.basic_qos(0, self.window, False)
        if self._is_redis:
            self.channel.qos.__dict__.pop("can_consume", None)
        if not self._is_redis or not self._consumer._active_tags:
            self._consumer.consume()
        self.consumes = True

    def rest(self) -> None:
        """Consume it no more for a while. Messages that are on their way still come."""
        self.consumes = False
        if self._is_redis:
            # Cancelled, it would leave a message that comes now to no one.
            self.channel.qos.can_consume = _never
            return
        for tag in list(self._consumer._active_tags.values()):
            self.channel.basic_cancel(
                tag, nowait=True
            )  # an answer would be waited for, and jobs handled
        self._consumer._active_tags.clear()

    def give_back(self, messages: Iterable[Any]) -> None:
        """Put messages back to the front of the lane.

        Args:
            messages: The messages, the latest first.

        """
        for message in messages:
            if message.acknowledged or message.channel is not self.channel:
                continue
            if self._is_redis:
                qos = self.channel.qos
                qos.restore_by_tag(message.delivery_tag)
                virtual.QoS.ack(qos, message.delivery_tag)  # type: ignore[no-untyped-call]
                message._state = "REQUEUED"
            else:
                message.requeue()

    def close(self) -> None:
        """Close the channel. What is not acknowledged goes back to the lane."""
        self.consumes = False
        with contextlib.suppress(Exception):  # the connection is lost, and the channel with it
            self.channel.close()

    def _receive(self, message: Any) -> None:
        if self._is_redis:
            message.delivery_info = message._raw["properties"]["delivery_info"]
        message.delivery_info[MARK] = self.queue
        restore_origin(message)
        self._on_message(message)


class Lanes(Protocol):
    """What a broker knows of lanes. Names of queues and lanes are text.

    Each method may raise whatever the connection or the broker says.
    """

    def join(self, queue: str, lanes: Mapping[str, Iterable[str]]) -> None:
        """Say that this worker uses lanes of a queue, and which limits each is for."""

    def leave(self, queue: str) -> None:
        """Say that this worker uses no lanes of a queue any more."""

    def declare(self, entities: Iterable[Any]) -> dict[str, int | Exception]:
        """Make the lanes that are not there. Return how many messages each has, or why there is none."""

    def there(self, queue: str) -> dict[str, list[str]]:
        """Return the lanes of a queue, and the names of the limits that each is for."""

    def unused(self, queue: str, lanes: Iterable[str]) -> list[str]:
        """Return the lanes that no worker consumes."""

    def calm(self, channels: Iterable[Any]) -> None:
        """Read what is on its way to channels that consume no more: it would miss what is put back."""

    def alone(self, queue: str) -> bool:
        """Tell whether no other worker uses lanes of a queue."""

    def count(self, lane: str) -> int:
        """Return how many messages wait in a lane."""

    def put_back(self, lane: str, queue: str, first: Iterable[Any] = ()) -> int:
        """Put the messages of a lane in front of what waits in its queue, in order. Return how many.

        Those are all that are there now. What another worker parks meanwhile may stay.

        Args:
            lane: The lane.
            queue: Its queue.
            first: Messages of the lane that this worker has in hand, the oldest first. On Redis they are to be
                given back before.

        """

    def sweep(self, queue: str, lane: str, tasks: Iterable[str], most: int) -> int:
        """Move jobs of some tasks from the front of a queue to the end of a lane, inside the server.

        Args:
            queue: The queue.
            lane: The lane.
            tasks: The names of the tasks.
            most: How many messages to look at. It takes 15 to 25 µs for each.

        Returns:
            How many were moved. On RabbitMQ none.

        """

    def purge(self, lane: str) -> int:
        """Delete all messages of a lane. Return how many."""

    def remove(self, queue: str, lanes: Iterable[str]) -> None:
        """Delete lanes that are empty, and what tells of them."""


def lanes_of(connection: Any, worker: str) -> Lanes | None:
    """Return the lanes of a broker. ``None``: this broker has none.

    Args:
        connection: A kombu connection.
        worker: The name of the worker that asks.

    """
    kind = connection.transport.driver_type
    if kind == "redis":
        return RedisLanes(connection.default_channel, worker)
    return AmqpLanes(connection) if kind == "amqp" else None


class RedisLanes:
    """The lanes on one Redis. See `Lanes`.

    Args:
        channel: A kombu channel.
        worker: The name of the worker, or of whoever asks.

    """

    def __init__(self, channel: Any, worker: str) -> None:
        self._channel = channel
        self._worker = worker
        self._client = redis_client(channel)
        self._put_back = self._client.register_script(_PUT_BACK)
        self._sweep = self._client.register_script(_SWEEP)

    def join(self, queue: str, lanes: Mapping[str, Iterable[str]]) -> None:
        """Renew this worker's signs. It has to be called every few seconds."""
        if not lanes:
            return
        now = self._now()
        with self._client.pipeline(transaction=False) as pipe:
            pipe.zadd(self._key(f"{queue}.parked.workers"), {self._sign(lane): now for lane in lanes})
            for lane, limits in lanes.items():
                pipe.hsetnx(self._key(f"{queue}.parked"), lane, json.dumps(list(limits)))
            pipe.execute()

    def leave(self, queue: str) -> None:  # noqa: D102 - as in Lanes
        key = self._key(f"{queue}.parked.workers")
        mine = [sign for sign in self._client.zrange(key, 0, -1) if _parts(sign)[0] == self._worker]
        if mine:
            self._client.zrem(key, *mine)

    def declare(self, entities: Iterable[Any]) -> dict[str, int | Exception]:  # noqa: D102
        return {entity.name: self.count(entity.name) for entity in entities}

    def there(self, queue: str) -> dict[str, list[str]]:  # noqa: D102
        found = self._client.hgetall(self._key(f"{queue}.parked"))
        return {_text(lane): json.loads(limits) for lane, limits in found.items()}

    def unused(self, queue: str, lanes: Iterable[str]) -> list[str]:  # noqa: D102
        used = {lane for _, lane in self._signs(queue)}
        return [lane for lane in lanes if lane not in used]

    def calm(self, channels: Iterable[Any]) -> None:  # noqa: D102
        for channel in channels:
            channel.qos.can_consume = _never
            if (
                channel._in_poll
            ):  # it waits for a second at most; kombu does this when it closes a channel
                with contextlib.suppress(Empty):
                    channel._brpop_read()

    def alone(self, queue: str) -> bool:  # noqa: D102
        return all(worker == self._worker for worker, _ in self._signs(queue))

    def count(self, lane: str) -> int:  # noqa: D102
        with self._client.pipeline(transaction=False) as pipe:
            for key in self._lists(lane):
                pipe.llen(key)
            return sum(pipe.execute())

    def put_back(self, lane: str, queue: str, first: Iterable[Any] = ()) -> int:  # noqa: D102
        total = 0
        for source, target in zip(self._lists(lane), self._lists(queue), strict=True):
            left = self._client.llen(source)
            while left > 0 and (
                count := self._put_back(keys=[source, target], args=[min(left, _AT_ONCE)])
            ):
                total, left = total + count, left - count
        return total

    def sweep(self, queue: str, lane: str, tasks: Iterable[str], most: int) -> int:  # noqa: D102
        pairs = zip(self._lists(queue), self._lists(lane), strict=True)
        return sum(self._sweep(keys=pair, args=[most, *tasks]) for pair in pairs)

    def purge(self, lane: str) -> int:  # noqa: D102
        count = self.count(lane)
        self._client.delete(*self._lists(lane))
        return count

    def remove(self, queue: str, lanes: Iterable[str]) -> None:  # noqa: D102
        for lane in lanes:
            if not self.count(lane):
                self._client.hdel(self._key(f"{queue}.parked"), lane)

    def _key(self, name: str) -> str:
        return f"{self._channel.global_keyprefix}{name}"

    def _lists(self, name: str) -> list[str]:
        channel = self._channel
        return [self._key(channel._q_for_pri(name, step)) for step in channel.priority_steps]

    def _now(self) -> float:
        """Return the time of the Redis: workers may have other clocks."""
        seconds, micros = self._client.time()
        return float(seconds) + float(micros) / 1e6

    def _sign(self, lane: str) -> str:
        return json.dumps([self._worker, lane])

    def _signs(self, queue: str) -> list[tuple[str, str]]:
        """Return the workers that live, each with a lane that it uses."""
        key, since = self._key(f"{queue}.parked.workers"), self._now() - _GONE
        self._client.zremrangebyscore(key, "-inf", since)
        return [_parts(sign) for sign in self._client.zrange(key, 0, -1)]


class AmqpLanes:
    """The lanes on a RabbitMQ. See `Lanes`.

    What it does it does on connections of its own: to wait for an answer on the consumer's would be to handle
    jobs meanwhile.

    Args:
        client: A kombu connection to the RabbitMQ. It is cloned.

    """

    def __init__(self, client: Any) -> None:
        self._client = client
        #: For each queue: the channel on which this worker says that it uses lanes of it.
        self._signs: dict[str, Any] = {}

    def join(self, queue: str, lanes: Mapping[str, Iterable[str]]) -> None:  # noqa: D102
        if not lanes:
            return
        known = self.there(queue)
        with self._channel() as channel:
            missing = {lane: limits for lane, limits in lanes.items() if lane not in known}
            if missing:
                channel.queue_declare(f"{queue}.parked", durable=True, auto_delete=False)
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
        if queue not in self._signs:
            channel = self._client.channel()
            self._signs[queue] = channel
            name = f"{queue}.parked.workers"
            channel.queue_declare(name, durable=True, auto_delete=True)
            channel.basic_consume(name, no_ack=True, callback=_ignore)

    def leave(self, queue: str) -> None:  # noqa: D102
        channel = self._signs.pop(queue, None)
        if channel is not None:
            channel.close()

    def declare(self, entities: Iterable[Any]) -> dict[str, int | Exception]:  # noqa: D102
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

    def there(self, queue: str) -> dict[str, list[str]]:  # noqa: D102
        if self._look_at(f"{queue}.parked") is None:
            return {}
        with self._channel() as channel:  # as it closes, the notes go back
            return {lane: limits for _, lane, limits in _notes(channel, queue)}

    def unused(self, queue: str, lanes: Iterable[str]) -> list[str]:  # noqa: D102
        found = {lane: self._look_at(lane) for lane in lanes}
        return [lane for lane, there in found.items() if there is None or not there.consumer_count]

    def calm(self, channels: Iterable[Any]) -> None:
        """Do nothing: what arrives late goes back to its place."""

    def alone(self, queue: str) -> bool:  # noqa: D102
        there = self._look_at(f"{queue}.parked.workers")
        return there is None or there.consumer_count <= (queue in self._signs)

    def count(self, lane: str) -> int:  # noqa: D102
        there = self._look_at(lane)
        return 0 if there is None else int(there.message_count)

    def put_back(self, lane: str, queue: str, first: Iterable[Any] = ()) -> int:  # noqa: D102
        before = self.count(queue)
        with self._channel() as channel:
            count = self._move(first, queue)
            if self._look_at(lane) is not None:
                # Another worker may park at once what comes back: this would not end. Where there is none, some may
                # be on their way back to the lane, and are not counted yet.
                most = max(self.count(lane), _AT_ONCE if self.alone(queue) else 0)
                count += self._move(islice(self._all_of(channel, lane), most), queue)
            if count and before <= _MOST_ROTATED:
                self._move(_got(channel, queue, before), queue)
            if count:
                time.sleep(_SETTLE)
        return count

    def sweep(self, queue: str, lane: str, tasks: Iterable[str], most: int) -> int:  # noqa: D102
        return 0

    def purge(self, lane: str) -> int:  # noqa: D102
        if self._look_at(lane) is None:
            return 0
        with self._channel() as channel:
            return int(channel.queue_purge(lane) or 0)

    def remove(self, queue: str, lanes: Iterable[str]) -> None:  # noqa: D102
        gone = set()
        for lane in lanes:
            there = self._look_at(lane)
            if there is not None and not there.message_count and not there.consumer_count:
                with self._channel() as channel:  # quorum queues know no if_empty
                    channel.queue_delete(lane)
            if there is None or not (there.message_count or there.consumer_count):
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
        finally:
            with contextlib.suppress(Exception):
                connection.collect()  # one that is blocked would not answer

    @contextlib.contextmanager
    def _channel(self) -> Iterator[Any]:
        with self._connection() as connection:
            channel = connection.channel()
            yield channel
            channel.close()

    def _look_at(self, name: str) -> Any:
        """Return how many messages and consumers a queue has. ``None``: there is no such queue."""
        with self._connection() as connection:
            try:
                return connection.channel().queue_declare(name, passive=True)
            except connection.channel_errors as error:
                if getattr(error, "reply_code", None) != _NOT_THERE:
                    raise
        return None

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
        relay = Relay(_acknowledging(done), failed.append)
        try:
            for message in messages:
                relay.send(message, message, queue)
                end = time.monotonic() + _CONFIRM
                while relay.full and not failed and time.monotonic() < end:
                    relay.wait(_CONFIRM / 100)
                if relay.full:
                    break
                if failed:
                    break
            relay.wait(0.0 if relay.blocked else _CONFIRM)
        finally:
            relay.close()
        if failed:
            raise RuntimeError(f"RabbitMQ has not confirmed a message for queue {queue}")
        return len(done)


def _acknowledging(done: list[Any]) -> Callable[[Any], None]:
    def moved(message: Any) -> None:
        message.ack()
        done.append(message)

    return moved


def _as_sent(channel: Any, message: Any) -> Any:
    """Return kombu's message, as it was sent at first."""
    message = channel.message_to_python(message)
    restore_origin(message)
    return message


def _got(channel: Any, queue: str, most: int | None = None) -> Iterator[Any]:
    """Yield the messages of a queue, as they were sent at first."""
    while most is None or most > 0:
        message = channel.basic_get(queue, no_ack=False)
        if message is None:
            return
        yield _as_sent(channel, message)
        most = None if most is None else most - 1


def _notes(channel: Any, queue: str) -> Iterator[tuple[Any, str, list[str]]]:
    for note in _got(channel, f"{queue}.parked"):
        with contextlib.suppress(ValueError, TypeError):
            lane, limits = json.loads(note.body)
            yield note, str(lane), list(limits)


def _is_redis(channel: Any) -> bool:
    return hasattr(channel, "unacked_index_key")


def _message_class(kind: Any, lane: str) -> Any:
    """Return a class of messages that kombu, where it has to put them back, puts back into a lane."""

    class Parked(kind):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # kombu notes these two as it takes the message. See Lane._receive.
            self.delivery_info: Any = {
                **self._raw["properties"]["delivery_info"],
                "exchange": "",
                "routing_key": lane,
            }

    return Parked


def _parts(sign: Any) -> tuple[str, str]:
    worker, lane = json.loads(sign)
    return worker, lane


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _never() -> bool:
    return False


def _ignore(_message: Any) -> None:
    """Take note of a message that nobody should have sent."""
