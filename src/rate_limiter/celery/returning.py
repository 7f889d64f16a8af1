"""Sending jobs back: the same message goes to the end of its queue, with a new ETA.

It is no retry: the number of retries and everything else about the message stay as they were. The job
waits for its ETA as any job with a countdown does, in the worker that gets it. A job that was held for too
long goes without an ETA, and is held again.

At the gate the message is there, and is moved (`Returning`). In the pool it is gone; `publish_again` makes
it anew from the task's request. The request does not tell everything: see there.
"""

import contextlib
import logging
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from threading import RLock
from typing import Any, Final

from celery import Celery, Task
from celery.worker import state
from kombu import pools
from kombu.exceptions import EncodeError
from kombu.serialization import dumps, registry

from ..broker.origin import MARK, can_be_sent_to, mark_messages
from ..broker.relay import Relay

__all__ = ["Returning", "has_queue", "publish_again"]

logger = logging.getLogger("rate_limiter")

#: The headers of Celery's message protocol, but for the ETA.
_HEADERS: Final = (
    *("lang", "task", "id", "shadow", "expires", "group", "group_index", "retries", "timelimit"),
    *("root_id", "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result"),
    *("replaced_task_nesting", "stamped_headers", "stamps"),
)

#: The properties of a message that are passed to ``publish`` as arguments, or that kombu sets itself.
_SET_BY_KOMBU: Final = frozenset(
    {
        *("application_headers", "content_type", "content_encoding", "priority", "expiration"),
        *("body_encoding", "delivery_info", "delivery_tag", "user_id"),
    }
)


class Returning:
    """The jobs of one connection that are on their way back to their queues.

    Args:
        consumer: Celery's consumer, before it has begun to consume.
        lock: The gate's lock. It is held while anything here runs.
        has_timer: Whether ``consumer.timer`` calls from the thread that consumes.
        sent: Called with a job that was sent back, and is acknowledged.
        again: Called with a function without arguments that is to be called in a second: it sends a job
            back whose copy has failed.

    """

    def __init__(
        self,
        consumer: Any,
        lock: RLock,
        has_timer: bool,
        sent: Callable[[Any], None],
        again: Callable[[Callable[[], Any]], None],
    ) -> None:
        self._consumer = consumer
        self._lock = lock
        self._has_timer = has_timer
        self._sent = sent
        self._again = again
        self._relay = Relay(self._moved, self._failed)
        self._timer: Any = None
        self._look_at = 0.0
        self._stopping = False
        mark_messages(consumer.task_consumer.channel)

    def takes(self, request: Any, *, unchanged: bool = False) -> bool:
        """Whether a job can be sent back now. If not, it is to be held.

        It cannot where it has no queue to go to (``Broadcast`` on Redis), while RabbitMQ confirms nothing,
        and, unless it is sent back unchanged, where the old message protocol keeps the ETA in the body.
        """
        message = request.message
        queue = message.delivery_info.get(MARK)
        return (
            queue is not None
            and can_be_sent_to(message.channel, queue)
            and (unchanged or "task" in (message.headers or {}))
            and not self._relay.full
        )

    def send(self, request: Any, seconds: float | None = None) -> None:
        """Send a job back. It is acknowledged when its copy is stored.

        Args:
            request: The request.
            seconds: When it is to run: in so many seconds. ``None``: at once, with all headers as they are.

        Raises:
            Exception: It could not be sent; it is still unacknowledged.

        """
        eta = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
        self._send(request, eta)

    def stop(self) -> None:
        """Wait a moment for the last confirmations, and close."""
        with self._lock:
            self._stopping = True
            self._relay.farewell()
            self._relay.close()
            if self._timer is not None:
                self._consumer.timer.cancel(self._timer)
                self._timer = None

    def _send(self, request: Any, eta: datetime | None) -> None:
        message = request.message
        with self._lock:
            headers = None if eta is None else {"eta": eta.isoformat()}
            self._relay.send((request, eta), message, message.delivery_info[MARK], headers)
            self._look_again()

    def _look_again(self) -> None:
        due = self._relay.due
        if due >= self._look_at and self._timer is not None:
            return
        if self._timer is not None:
            self._consumer.timer.cancel(self._timer)
            self._timer = None
        if due < math.inf:
            # Without an event loop, and on no green pool, Celery's timer is a thread.
            look = self._look if self._has_timer else partial(self._consumer.call_soon, self._look)
            self._look_at = due
            self._timer = self._consumer.timer.call_at(due, look)

    def _look(self) -> None:
        with self._lock:
            # It has fired. On gevent a cancel would kill the greenlet that runs this.
            self._timer = None
            if not self._stopping:
                self._relay.tend()
                self._look_again()

    def _moved(self, job: tuple[Any, datetime | None]) -> None:
        request, eta = job
        if eta is not None:
            logger.info(
                "Sent back %s[%s] for %.3g s",
                request.name,
                request.id,
                (eta - datetime.now(UTC)).total_seconds(),
            )
        state.task_ready(request)
        if request.message.acknowledged:
            request.acknowledged = True
            if not self._stopping:
                self._sent(request)
        elif not self._stopping:
            request.acknowledge()
            self._sent(request)
        elif request.message.channel.connection is not None:
            # The event loop has ended, and would not do it any more.
            request.message.ack_log_error(logger, self._consumer.connection_errors)

    def _failed(self, job: tuple[Any, datetime | None]) -> None:
        request, eta = job
        if self._stopping:
            state.task_ready(request)  # the broker delivers it again
            return
        logger.warning("%s[%s] could not be sent back yet: no confirmation", request.name, request.id)
        self._again(partial(self._send, request, eta))


def has_queue(task: Task, request: Any) -> bool:
    """Whether there is a queue that a job can be sent back to.

    Args:
        task: The task.
        request: ``task.request``.

    A ``Broadcast`` queue is one on RabbitMQ only. Elsewhere to send such a job back is to send it to all
    workers once more.

    """
    _, kind = _queue_of(task.app, request)
    return kind != "fanout" or task.app.connection_for_write().transport.driver_type == "amqp"


def publish_again(task: Task, request: Any, seconds: float) -> None:
    """Publish the message of a job that runs now once more, to run in so many seconds.

    It returns when the broker has stored the message. RabbitMQ does not while it is short of memory, and
    a broker that is away does not either: the job occupies its slot until then. It tries for as long as
    that takes, unless ``task_publish_retry`` is off.

    Args:
        task: The task.
        request: ``task.request``.
        seconds: Seconds until the job runs again.

    Raises:
        Exception: The message could not be published; the job fails with it.

    What the request does not tell is guessed: the serializer, except on RabbitMQ (``task_serializer``, or
    the first of ``accept_content`` that can encode the arguments); the queue, where several that the
    worker consumes are bound to the job's exchange and fit its routing key (then the message goes to
    that exchange again, and to all queues that are bound to it). Arguments that the task has changed are
    sent as changed. Headers that bear the name of an attribute of ``task.request`` are lost.

    """
    app, properties = task.app, request.properties or {}
    info = request.delivery_info or {}
    fields = vars(request)
    eta = datetime.now(UTC) + timedelta(seconds=seconds)
    headers = {
        **{name: fields[name] for name in _HEADERS if name in fields},
        **(request.headers or {}),
        "eta": eta.isoformat(),
    }
    embed = {name: request.get(name) for name in ("callbacks", "errbacks", "chain", "chord")}
    content_type, content_encoding, body = _encode(
        task, (request.args, request.kwargs, embed), properties.get("content_type")
    )
    queue, _ = _queue_of(app, request)
    expiration = properties.get("expiration")
    with _confirming_producer(app) as producer:
        producer.publish(
            body,
            exchange="" if queue else info.get("exchange"),
            routing_key=queue or info.get("routing_key"),
            mandatory=True,
            retry=app.conf.task_publish_retry,
            # Without acks_late the job is acknowledged: there is no other copy of it.
            retry_policy={**app.conf.task_publish_retry_policy, "max_retries": None},
            content_type=content_type,
            content_encoding=content_encoding,
            compression=fields.get("compression"),
            priority=info.get("priority"),
            expiration=None if expiration is None else int(expiration) / 1000,
            headers=headers,
            **{k: v for k, v in properties.items() if k not in _SET_BY_KOMBU},
        )
    logger.info("Sent back %s[%s] for %.3g s", task.name, request.id, seconds)


def _queue_of(app: Celery, request: Any) -> tuple[str | None, str]:
    """Return the name of the queue that a job came from, and the type of the exchange before it.

    The name is ``None``, and the type empty, where that is not certain.
    """
    info = request.delivery_info or {}
    exchange, key = info.get("exchange"), info.get("routing_key")
    if not exchange:
        return key, "direct"
    consumed = app.amqp.queues.consume_from.values()
    found = [queue for queue in consumed if queue.exchange and queue.exchange.name == exchange]
    if len(found) > 1:
        found = [queue for queue in found if queue.routing_key == key]
    return (found[0].name, found[0].exchange.type) if len(found) == 1 else (None, "")


def _encode(task: Task, body: tuple[Any, ...], content_type: str | None) -> Any:
    accepted = [registry.type_to_name.get(name, name) for name in task.app.conf.accept_content]
    names = [task.serializer or task.app.conf.task_serializer, *accepted]
    if content_type in registry.type_to_name:
        names.insert(0, registry.type_to_name[content_type])
    elif isinstance(body[0], tuple) and "pickle" in accepted:
        names.insert(0, "pickle")  # the others make lists of tuples
    for name in names[:-1]:
        with contextlib.suppress(EncodeError):
            return dumps(body, name)  # type: ignore[no-untyped-call]
    return dumps(body, names[-1])  # type: ignore[no-untyped-call]


def _confirming_producer(app: Celery) -> Any:
    """Return a producer of a pool whose connections wait for RabbitMQ's confirmation."""
    options = {**app.conf.broker_transport_options, "confirm_publish": True}
    connection = app.connection_for_write(transport_options=options)
    return pools.producers[connection].acquire(block=True)
