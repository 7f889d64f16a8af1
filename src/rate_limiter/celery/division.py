"""One rate for all workers without a Redis: each has an equal share, by the workers that gossip brings news of.

Each worker sends a heartbeat every 2 s, and Celery's gossip brings it to all workers, to its sender too. A
worker's own heartbeats are the clock here: another worker that was not heard during three of them is gone. A worker
that is cut off from the broker, or whose loop is blocked by a long job on the solo pool, hears no other worker and
no heartbeat of its own, so it does not take over the shares of the others. On the solo pool its heartbeats would
wait for the end of the job too. So a thread sends events there, which count instead.

A worker that starts does not know the others before their next heartbeats. So its buckets are paused at first,
and start from empty unless it is alone. A worker that joins or leaves changes shares, and no level of tokens.

What it costs: a share that its worker does not use is used by nobody. All workers of the broker's virtual host
count. A pause, by an operator or by `RetryAfter`, is for one worker.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from time import monotonic
from typing import Any, Final

from celery.concurrency.solo import TaskPool as SoloPool
from celery.exceptions import ImproperlyConfigured
from celery.worker.consumer.gossip import Gossip
from kombu.exceptions import ContentDisallowed, DecodeError

from ..checks import positive
from ..gating.limit import Limit
from ..gating.record import listed, record_of
from ..token_bucket import TokenBucket

__all__ = ["DividedBucket", "Division", "why_no_share"]

logger = logging.getLogger("rate_limiter")

#: Seconds between two heartbeats, unless the worker is started with another ``--heartbeat-interval``.
_INTERVAL: Final = 2.0

#: After so many of its own heartbeats a worker has heard all others.
_ALL_HEARD: Final = 2

#: For so many heartbeats the buckets of a new worker are paused: a little less, so that the pause is over by then.
_PAUSED: Final = 1.5

#: Another worker may be silent during so many of a worker's own heartbeats.
_SILENT: Final = 3

#: What a worker sends on the solo pool. Gossip listens to all that begin with ``worker-``.
_SIGN: Final = "worker-share"

#: The transport whose queues are in the memory of one process.
_MEMORY: Final = "memory"


class DividedBucket(TokenBucket):
    """One worker's share of a capacity and a rate that are for all workers together.

    Args:
        capacity: The capacity for all workers together. Above 0.
        tokens_per_second: The rate for all workers together. Above 0.
        least: The least capacity of a share: what a job costs. Infinite: nobody knows, so each worker has
            the whole capacity.
        initial: As in `TokenBucket`, of a worker that is alone.
        clock: As in `TokenBucket`.

    """

    __slots__ = ("_least", "first", "share_of", "whole")

    def __init__(
        self,
        capacity: float,
        tokens_per_second: float,
        *,
        least: float,
        initial: float | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        super().__init__(capacity, tokens_per_second, initial=initial, clock=clock)
        self._least = least
        #: The tokens that a worker starts with which finds itself alone.
        self.first = self.capacity if initial is None else float(initial)
        #: The capacity and the rate for all workers together.
        self.whole = self.capacity, self.tokens_per_second
        #: How many workers have a share.
        self.share_of = 1

    def __repr__(self) -> str:
        capacity, rate = self.whole
        share = f"1/{self.share_of} of " if self.share_of > 1 else ""
        return f"<DividedBucket: {share}capacity {capacity:g}, {rate:g} tokens_per_second>"

    def configure(
        self, *, capacity: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Change the numbers for all workers together. See `TokenBucket.configure`."""
        size, rate = self.whole
        if capacity is not None:
            size = positive("capacity", capacity)
        if tokens_per_second is not None:
            rate = positive("tokens_per_second", tokens_per_second)
        self.whole = size, rate
        self._divide()

    def divide(self, workers: int) -> None:
        """Be the share of one of so many workers. The level stays, up to the new capacity."""
        if workers != self.share_of:
            self.share_of = workers
            self._divide()

    def _divide(self) -> None:
        capacity, rate = self.whole
        share = max(capacity / self.share_of, min(self._least, capacity))
        super().configure(capacity=share, tokens_per_second=rate / self.share_of)


class Division:
    """Gives the buckets of one worker their share, by the number of workers that live.

    Args:
        consumer: Celery's consumer. Its gossip is made, and not started.
        without_gossip: As the worker was started.
        without_heartbeat: As the worker was started.
        heartbeat_interval: As the worker was started.
        clock: Returns the time in seconds.

    """

    def __init__(
        self,
        consumer: Any,
        *,
        without_gossip: bool = False,
        without_heartbeat: bool = False,
        heartbeat_interval: float | None = None,
        clock: Callable[[], float] = monotonic,
        **_: Any,
    ) -> None:
        self._consumer = consumer
        driver: str = consumer.conninfo.transport.driver_type
        self._is_alone = driver == _MEMORY
        self._why_not = why_no_share(driver, without_gossip, without_heartbeat)
        self._interval = float(heartbeat_interval or _INTERVAL)
        self._clock = clock
        self._me = _sender(consumer.hostname, os.getpid())
        self._limits: list[Limit] = []
        #: The own heartbeats that have come back.
        self._beats = 0
        #: For each other worker, by its name and process: the last own heartbeat until which it counts.
        self._others: dict[str, float] = {}
        self._workers = 1
        #: Until when buckets are paused because the others are not known. ``None``: it has not begun.
        self._paused_until: float | None = None
        self._is_solo = isinstance(consumer.pool, SoloPool)
        #: Set to end the thread that sends signs of life. ``None``: there is none.
        self._end_signs: threading.Event | None = None
        gossip = consumer.gossip
        self._to_gossip = gossip.on_message
        if gossip.enabled:
            gossip.on_message = self._on_message

    def add(self, limits: Iterable[Limit]) -> None:
        """Divide the buckets of those limits that are to be divided.

        Raises:
            ImproperlyConfigured: The worker does not know of the others, or they do not of it.

        """
        for limit in limits:
            bucket = limit.bucket
            if not isinstance(bucket, DividedBucket) or limit in self._limits:
                continue
            name = record_of(limit).name
            if self._why_not:
                raise ImproperlyConfigured(f"limit {name}: {self._why_not}")
            self._limits.append(limit)
            self._announce(name, bucket)
            bucket.divide(self._workers)
            if self._paused_until is not None:  # its task was imported after the start
                self._begin_signs()
                if self._workers > 1 or self._beats < _ALL_HEARD:
                    bucket.pause(max(0.0, self._paused_until - self._clock()))

    def start(self) -> None:
        """Begin, with each connection. With the first one the others are not known."""
        if self._is_alone or self._why_not:
            return
        self._begin_signs()
        if self._paused_until is None:
            seconds = _PAUSED * self._interval
            self._paused_until = self._clock() + seconds
            for bucket in self._buckets():
                bucket.pause(seconds)

    def stop(self) -> None:
        """End, with the connection."""
        if self._end_signs is not None:
            self._end_signs.set()
            self._end_signs = None

    def _buckets(self) -> list[Any]:
        return [limit.bucket for limit in self._limits]

    def _announce(self, name: str, bucket: DividedBucket) -> None:
        if self._is_alone:
            logger.info(
                "Limit %s is for this worker alone: no other process uses a broker in memory", name
            )
            return
        capacity, rate = bucket.whole
        logger.warning(
            "Limit %s is divided, because there is no Redis: each worker that Celery's gossip knows has an equal share "
            "of %g tokens per second and of the capacity %g. What one worker does not use, no other one gets. "
            "This worker lets none of these jobs go in its first %g s. The shares follow at once when "
            "a worker joins or stops, and within %g s when one is killed. For one exact rate set "
            "rate_limiter_redis",
            name,
            rate,
            capacity,
            _PAUSED * self._interval,
            (_SILENT + 1) * self._interval,
        )

    # -- who lives --------------------------------------------------------------------------------

    def _on_message(self, prepare: Any, message: Any) -> None:
        """Take note of an event of a worker. Stands in for ``gossip.on_message``."""
        self._to_gossip(prepare, message)
        with suppress(DecodeError, ContentDisallowed):
            if isinstance(event := message.payload, dict):
                self._hear(event)

    def _hear(self, event: dict[str, Any]) -> None:
        kind, sender = event.get("type"), _sender(event.get("hostname"), event.get("pid"))
        if sender == self._me:
            if kind == (_SIGN if self._is_solo else "worker-heartbeat"):
                self._beat()
        elif kind == "worker-offline":
            self._others.pop(sender, None)
        elif isinstance(kind, str) and kind.startswith("worker-"):
            interval = event.get("freq")
            beats = float(_SILENT)
            if isinstance(interval, int | float) and interval > self._interval:
                beats *= interval / self._interval
            self._others[sender] = max(self._others.get(sender, 0.0), self._beats + beats)
        self._follow()

    def _beat(self) -> None:
        self._beats += 1
        self._others = {who: until for who, until in self._others.items() if until >= self._beats}
        if self._beats == _ALL_HEARD and not self._others:
            for bucket in self._buckets():
                if bucket.first:
                    # It is lost if somebody has paused the bucket meanwhile.
                    bucket.refund(bucket.first)

    def _follow(self) -> None:
        workers = 1 + len(self._others)
        if workers == self._workers:
            return
        self._workers = workers
        for bucket in self._buckets():
            bucket.divide(workers)
        if self._limits:
            names = listed(record_of(limit).name for limit in self._limits)
            logger.info("Workers that divide %s: %d", names, workers)

    def _begin_signs(self) -> None:
        if self._is_solo and self._limits and self._end_signs is None:
            self._end_signs = threading.Event()
            threading.Thread(target=self._send_signs, args=(self._end_signs,), daemon=True).start()

    def _send_signs(self, end: threading.Event) -> None:
        """Send a sign of life now and then, whatever the consumer's thread does."""
        app, name = self._consumer.app, self._consumer.hostname
        while not end.wait(self._interval):
            with suppress(Exception), app.connection_for_write() as connection:
                events = app.events.Dispatcher(connection, hostname=name, buffer_while_offline=False)
                events.send(_SIGN)
                while not end.wait(self._interval):
                    events.send(_SIGN)


def why_no_share(driver: str, without_gossip: bool = False, without_heartbeat: bool = False) -> str:
    """Return why a worker cannot have a share, or ``""`` if it can.

    Args:
        driver: The type of the broker's transport.
        without_gossip: Whether the worker does not listen to others.
        without_heartbeat: Whether it is silent.

    """
    if driver == _MEMORY:
        return ""
    if driver not in Gossip.compatible_transports:
        reason = f"which the transport {driver} does not have"
    elif without_gossip or without_heartbeat:
        option = "--without-gossip" if without_gossip else "--without-heartbeat"
        reason = f"and this worker is started {option}"
    else:
        return ""
    return (
        f"per='cluster' needs rate_limiter_redis, or else Celery's gossip and heartbeats, {reason}: each worker "
        "would have the whole rate. If that is meant, write per='worker'"
    )


def _sender(name: Any, process: Any) -> str:
    return f"{name} {process}"
