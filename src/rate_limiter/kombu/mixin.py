"""The gate in kombu's `ConsumerMixin` and `ConsumerProducerMixin`."""

import contextlib
import math
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

from kombu.mixins import ConsumerMixin

from .gate import Gate
from .session import Session

__all__ = ["GateMixin"]

#: The AMQP error of a broker without a prefetch count for a whole channel (quorum queues).
_NOT_IMPLEMENTED = 540


class GateMixin(ConsumerMixin):
    """Gates all messages of a ``ConsumerMixin`` or ``ConsumerProducerMixin``. Name it before them::

        class Worker(GateMixin, ConsumerMixin):
            gate = Gate()
            gate.limit("emails", bucket=TokenBucket(capacity=5, tokens_per_second=1))

            def get_consumers(self, Consumer, channel):
                return [Consumer([Queue("emails")], callbacks=[self.on_task], prefetch_count=10)]

    Callbacks and ``on_message`` are called as usual, once the tokens of the message are taken. Until then
    it is held, unacknowledged, and the loop goes on: it handles other messages, obeys ``should_stop``, and sends
    heartbeats (those of ``producer_connection`` too, which kombu does not send). When the consumer stops or
    loses its connection, the held messages go back to the broker.

    Set ``prefetch_count`` on the consumers, not on the channel: the gate raises it by the number of held
    messages. A consumer without one gets 20.

    Attributes:
        gate: The `Gate`, of this class or of the instance.

    Raises:
        TypeError: By ``run()`` and ``consume()``: ``gate`` is not set.
        ValueError: By both too: a limited queue is consumed with ``no_ack``, or cannot be paused, or one
            bucket limits it twice.

    """

    gate: Gate
    _session: Session | None = None

    def on_refused(self, message: Any, error: Exception) -> None:
        """Take note of a message that does not run.

        Args:
            message: The message. Unless this acknowledges, rejects or requeues it, it is rejected
                afterwards without being requeued.
            error: `RateLimitExceeded`, with ``retry_after`` in seconds, under a limit with
                ``when_limited="raise"``. Or the error because of which its cost cannot be computed or paid.

        By default it calls the gate's ``on_refused``. An exception that it raises is logged.

        """
        if self.gate.on_refused is not None:
            self.gate.on_refused(message, error)

    def consumer_context(self, **kwargs: Any) -> Any:
        """Return kombu's context. The gate accepts messages inside it."""
        # "Any": type stubs of kombu call this context a tuple, and no other type fits both
        return self._consumer_context(super().consumer_context(**kwargs))

    @contextlib.contextmanager
    def _consumer_context(self, of_kombu: Any) -> Iterator[Any]:
        session = self._own_session()
        try:
            with of_kombu as (connection, channel, consumers):
                if not session.open:
                    raise RuntimeError(
                        "this kombu does not call _consume_from: the gate cannot attach, and the "
                        "consumer will not run without its limits"
                    )
                connection.drain_events = _Loop(self, session, connection).drain_events
                yield connection, channel, consumers
                session.close()  # messages that arrive while the consumers are cancelled go back to the broker
        except Exception as error:
            if getattr(error, "reply_code", None) == _NOT_IMPLEMENTED:
                session.static = True
            raise
        finally:
            session.open = False
            session.forget()

    def _consume_from(self, *consumers: Any) -> Any:
        for consumer in consumers:
            self._own_session().attach(consumer)
        consume: Callable[..., Any] = super()._consume_from
        return consume(*consumers)

    def _own_session(self) -> Session:
        if self._session is None:
            if not isinstance(getattr(self, "gate", None), Gate):
                raise TypeError(f"{type(self).__name__} needs an attribute gate = Gate()")
            self._session = Session(self.gate, self.on_refused)
            self._session.open = False
        return self._session


class _Loop:
    """Stands in for ``connection.drain_events``: it also releases held messages and sends heartbeats.

    Args:
        consumer: The mixin's instance.
        session: The session of the gate, which holds the messages.
        connection: The consumer's connection.

    """

    def __init__(self, consumer: Any, session: Session, connection: Any) -> None:
        self._consumer = consumer
        self._session = session
        self._connection = connection
        self._drain: Callable[..., Any] = connection.drain_events
        #: Seconds between heartbeats, a quarter of the broker's interval. 0: the broker wants none.
        self._interval = connection.get_heartbeat_interval() / 4
        self._beat_at = 0.0

    def drain_events(self, timeout: float | None = None) -> Any:
        """Return once a message has been handled, read or released.

        Raises:
            TimeoutError: No message was, within ``timeout`` seconds.

        """
        if self._session.busy:  # a callback has called this
            return self._drain(timeout=timeout)
        end = math.inf if timeout is None else monotonic() + timeout
        while True:
            self._beat()
            left = self._session.timeout(min(max(0.0, end - monotonic()), self._interval or math.inf))
            read = True
            try:
                self._drain(timeout=None if left == math.inf else left)
            except TimeoutError:
                read = False
            if self._session.poll(1) or read:
                return None
            if monotonic() >= end or self._consumer.should_stop:
                raise TimeoutError

    def _beat(self) -> None:
        now = monotonic()
        if not self._interval or now < self._beat_at:
            return
        self._beat_at = now + self._interval
        self._connection.heartbeat_check()
        producer = getattr(self._consumer, "_producer_connection", None)
        if producer is not None and not _alive(producer):
            self._consumer._producer_connection = None  # the next one to publish gets another


def _alive(connection: Any) -> bool:
    """Send and read the heartbeats of a connection that nobody else reads. ``False``: it is lost."""
    try:
        if connection.connected:
            with contextlib.suppress(TimeoutError):
                while True:
                    connection.drain_events(timeout=0)  # the broker's heartbeats
            connection.heartbeat_check()
            return True
    except (*connection.connection_errors, *connection.channel_errors):
        pass
    with contextlib.suppress(Exception):
        connection.collect()
    return False
