"""The gate of plain kombu consumers: limits for queues, and its use in your own loop."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from weakref import WeakSet

from kombu.message import Message
from kombu.messaging import Consumer

from ..bucket import Bucket
from ..checks import positive, whole
from ..gating.declared import Declarations, new_limit
from ..gating.leaving import LONGEST_HOLD
from ..gating.limit import AnyBucket, AnyCost, AnyKey, Limit, refuse_to_pay_twice
from ..gating.record import record_of
from .session import Session

__all__ = ["Gate"]

AnyConsumer = TypeVar("AnyConsumer", bound=Consumer)


class Gate:
    """Holds limited messages in the consumer until their tokens are there, and lets all others pass.

    In a ``ConsumerMixin`` it is an attribute, see `GateMixin`. In your own loop::

        gate = Gate()
        gate.limit("emails", bucket=TokenBucket(capacity=5, tokens_per_second=1))
        consumer = connection.Consumer([Queue("emails")], callbacks=[on_task], prefetch_count=10)
        with gate.attach(consumer):
            while True:
                with contextlib.suppress(TimeoutError):
                    connection.drain_events(timeout=gate.timeout(1))
                gate.poll()

    A message to which several limits apply takes from all of them or from none.

    Args:
        max_held: The most messages that a consumer holds for one limit. By default the messages that run
            in ten minutes, but at least its ``prefetch_count`` and at most 1,000; with a key, or a callable
            for ``bucket``, 1,000. The broker keeps the others, and all messages that stand behind them in
            the queue.
        longest_hold: On RabbitMQ a message that is held for so many seconds goes to the end of its queue: a
            channel with a message that is unacknowledged for ``consumer_timeout`` (30 minutes by default)
            is closed by RabbitMQ. A message whose turn comes soon may be held for half of that time more.
        on_refused: It is called with the message and the error for each message that does not run: under
            ``when_limited="raise"``, or because its cost cannot be computed or is above the capacity. See
            `GateMixin.on_refused`.

    Raises:
        TypeError: ``max_held`` is not a whole number, ``longest_hold`` no number, or ``on_refused`` not
            callable.
        ValueError: ``max_held`` is below 1, or ``longest_hold`` not above 0.

    A bucket in memory is one rate for all the consumers of a process that share it, in threads too; two
    processes run at twice the rate. `attach`, `wrap`, `poll` and `timeout` are for one loop in one
    thread; a second loop needs its own gate, which may use the same buckets.

    """

    def __init__(
        self,
        *,
        max_held: int | None = None,
        longest_hold: float = LONGEST_HOLD,
        on_refused: Callable[[Message, Exception], Any] | None = None,
    ) -> None:
        if max_held is not None:
            whole("max_held", max_held)
        if on_refused is not None and not callable(on_refused):
            raise TypeError(f"on_refused must be called with (message, error), not {on_refused!r}")
        self.max_held = max_held
        self.longest_hold = positive("longest_hold", longest_hold)
        self.on_refused = on_refused
        self._declared = Declarations("queues")
        self._started = False
        #: All loops that use this gate: those of mixins, and one of the user's own.
        self.sessions: WeakSet[Session] = WeakSet()
        self._session: Session | None = None

    def limit(
        self,
        *queues: str,
        bucket: AnyBucket | str,
        burst: float | None = None,
        initial: float | None = None,
        tokens: AnyCost = 1,
        key: AnyKey | None = None,
        when_limited: str = "wait",
        max_wait: float | None = None,
        shadow: bool = False,
        name: str | None = None,
        max_held: int | None = None,
        overflow: str | None = None,
        buckets: Iterable[Bucket] = (),
    ) -> None:
        """Declare a limit for queues, before the consumer starts.

        Args:
            queues: Names of queues, or shell patterns for them (``"mail.*"``). Without any: all queues.
            bucket: The `Bucket` that all their messages share. Or a rate: tokens per second, minute, hour
                or day, as in ``"5/s"``, ``"100/m"``, ``"2/h"``, ``"1000/d"``. Or a callable that is given
                ``(body, message)`` and returns a bucket; ``message.headers`` and
                ``message.delivery_info["routing_key"]`` are there to decide by.
            burst: With a rate, the capacity of the bucket, in tokens. The default is what the rate
                gives in 0.1 s, at least 1, and at least what a message costs. There is no default if the
                cost depends on the message.
            initial: With a rate, the tokens that the bucket starts with, from 0 to ``burst``. By default it is
                full. With 0 a consumer that starts brings no burst. With ``key``: as in `BucketPerKey`.
            tokens: What a message costs: a number above 0, at most the bucket's capacity. Or the name of a
                field of the body, which must be a mapping; a message without the field is rejected. Or a
                callable of ``(body, message)`` that returns the cost. Callables run in the consumer's
                loop: keep them quick.
            key: With a `BucketPerKey` or a rate: the name of the field whose value picks the bucket. Or a
                callable of ``(body, message)`` that returns the key.
            when_limited: ``"wait"``: the message is held. ``"retry"``: it is held until its tokens are due
                and then sent to the end of its queue, one after another at the bucket's rate.
                ``"drop"``: it is rejected, not requeued, so a dead-letter exchange gets it. ``"raise"``:
                the same, after ``on_refused`` was called with a `RateLimitExceeded`.
            max_wait: The most seconds that a message is held: 0 or more. If its tokens come later, it ends as
                ``when_limited`` says, with ``"wait"`` as with ``"raise"``; at once if the forecast says so.
            shadow: With ``True`` the limit holds and refuses no message, and only counts those that it would have.
                Its bucket must not be that of a limit without ``shadow``.
            name: The name of the limit in logs and errors. Each limit needs another. By default the names
                or patterns of its queues.
            max_held: For this limit, instead of the gate's.
            overflow: What happens when ``max_held`` messages are held. ``"hold"``, the default: the broker
                keeps the others. ``"pause"``: the queue is not consumed for a while. This is for queues
                whose messages all have the same limit, and for several consumers that share a backlog. It
                needs `attach` or `GateMixin`.
            buckets: All buckets that a callable for ``bucket`` may return. If it returns another one, the
                message is rejected.

        Raises:
            RuntimeError: A consumer has started.
            TypeError: An argument has the wrong type.
            ValueError: An argument has an impossible value, such as a cost above the capacity, or the
                name of another limit.

        """
        if self._started:
            raise RuntimeError("limit() comes before the consumer starts: declare it beside the gate")
        limit = new_limit(
            bucket,
            burst=burst,
            initial=initial,
            tokens=tokens,
            key=key,
            buckets=buckets,
            when_limited=when_limited,
            max_wait=max_wait,
            shadow=shadow,
            name=name,
            max_held=max_held,
            overflow=overflow,
        )
        if overflow == "park":
            raise ValueError("overflow='park' is for Celery: expected 'hold' or 'pause' here")
        self._declared.add(queues, limit)

    def attach(self, consumer: AnyConsumer) -> AnyConsumer:
        """Gate all messages of a consumer, before it begins to consume.

        Args:
            consumer: A ``kombu.Consumer`` with its queues and its callbacks or ``on_message``. Its
                ``prefetch_count``, 20 if it has none, is raised by the number of held messages. Where it is
                static (quorum queues, RabbitMQ 4) `poll` consumes its queues anew instead. After the
                connection was lost, attach a new one, or the same one after ``revive``.

        Returns:
            The consumer.

        Raises:
            TypeError: It is not a ``kombu.Consumer``.
            ValueError: A limited queue is consumed with ``no_ack``, or cannot be paused, or one bucket
                limits it twice.

        """
        if not isinstance(consumer, Consumer):
            raise TypeError(f"consumer must be a kombu.Consumer, not {consumer!r}")
        self._own_session().attach(consumer)
        return consumer

    def wrap(self, callback: Callable[..., Any], queue: str | None = None) -> Callable[..., None]:
        """Return a callback that calls the given one once the tokens are taken.

        Args:
            callback: For ``callbacks=[…]`` or ``on_message=``. Of several callbacks of one consumer,
                wrap one: each that is wrapped pays.
            queue: The name of the queue whose messages it gets. Without it limits are found by the
                message's routing key, and those with ``when_limited="retry"`` let it wait.

        Raises:
            TypeError: ``callback`` is not callable, or ``queue`` not a string.

        Unlike `attach` this does not know the consumer: it does not change the prefetch count (set it above
        ``max_held``), and it pauses no queue.

        """
        if not callable(callback):
            raise TypeError(f"callback must be callable, not {callback!r}")
        if queue is not None and not isinstance(queue, str):
            raise TypeError(f"queue must be the name of a queue, not {queue!r}")
        return self._own_session().wrap(callback, queue)

    def poll(self) -> int:
        """Call the callbacks of held messages whose tokens are there. Your loop calls this each time round.

        Returns:
            How many were called.

        Raises:
            Exception: An exception of a callback, or of the connection.

        """
        return self._own_session().poll()

    def timeout(self, most: float = 1.0) -> float:
        """Return the seconds that the loop may wait before the next `poll`: at most ``most``."""
        return self._own_session().timeout(most)

    def forget(self) -> int:
        """Forget the held messages, because their connection was lost or their consumer stops.

        Nothing is lost: they were not acknowledged, and the broker delivers them again once the channel is
        closed, on Redis too in the order in which they came.

        Returns:
            How many messages they were.

        """
        return self._own_session().forget()

    @property
    def held(self) -> dict[str, int]:
        """How many messages all consumers hold now, by the name of the limit."""
        held: Counter[str] = Counter()
        for session in list(self.sessions):
            for limit, count in session.held_by.items():
                held[record_of(limit).name] += count
        return dict(held)

    @property
    def limits(self) -> list[Limit]:
        """The limits that are declared."""
        return [declared.limit for declared in self._declared]

    def limits_for(self, queue: str) -> tuple[Limit, ...]:
        """Return the limits of a queue. After this, `limit` raises.

        Raises:
            ValueError: One bucket limits it twice.

        """
        self._started = True
        limits = tuple(self._declared.of(queue))
        refuse_to_pay_twice([limit.bucket for limit in limits], f"queue {queue}")
        return limits

    def _own_session(self) -> Session:
        if self._session is None:
            self._session = Session(self, self._refused)
        return self._session

    def _refused(self, message: Message, error: Exception) -> None:
        if self.on_refused is not None:
            self.on_refused(message, error)
