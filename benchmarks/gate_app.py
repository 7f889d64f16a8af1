"""The app of the workers that gate.py measures; what it declares comes in $GATE_BENCH, as JSON.

Each run of a job is one line of fixed length in a file per task, so that counting them is cheap.
"""

import gc
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from celery import Celery, signals
from kombu.asynchronous.hub import Hub
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from rate_limiter import BucketPerKey, RetryAfter, TokenBucket, otel
from rate_limiter.celery import Gate, throttle
from rate_limiter.redis_bucket import RedisTokenBucket

OPTIONS = json.loads(os.environ["GATE_BENCH"])

app = Celery("bench", broker=OPTIONS["broker"])
app.conf.update(OPTIONS["conf"])

_files: dict[str, int] = {}


def note(kind: str, number: int, moment: float) -> None:
    """Append a line: which worker, which job, when."""
    if kind not in _files:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        _files[kind] = os.open(f"{OPTIONS['log']}.{kind}", flags, 0o600)
    os.write(_files[kind], b"%-8s %08d %020.9f\n" % (OPTIONS["worker"].encode(), number, moment))


class NotedBucket(TokenBucket):
    """Notes each grant, with the reading of the clock by which it was decided."""

    def __init__(self, capacity: float, tokens_per_second: float) -> None:
        self.read_at = 0.0
        super().__init__(capacity, tokens_per_second, clock=self._read)

    def _read(self) -> float:
        self.read_at = time.monotonic()
        return self.read_at

    def take_or_delay(self, tokens: float = 1) -> float:
        """Take, and note it."""
        delay = super().take_or_delay(tokens)
        if not delay:
            note("grant", 0, self.read_at)
        return delay


class Asks:
    """Notes how often buckets were asked in each turn of the event loop."""

    def __init__(self) -> None:
        self.count = 0
        ask, turn = TokenBucket.take_or_delay, Hub.fire_timers

        def take_or_delay(bucket: TokenBucket, tokens: float = 1) -> float:
            self.count += 1
            return ask(bucket, tokens)

        def fire_timers(hub: Hub, *args: Any, **options: Any) -> Any:
            if self.count:
                count, self.count = self.count, 0
                note("asks", count, time.monotonic())
            return turn(hub, *args, **options)

        TokenBucket.take_or_delay, Hub.fire_timers = take_or_delay, fire_timers  # type: ignore[method-assign]


if OPTIONS["asks"]:
    Asks()


class Lateness:
    """Notes how many microseconds late a timer of 10 ms fires in the event loop of the worker's consumer.

    "behind" is all of it. "late" is what is left without full garbage collections, which are noted apart, and
    without the time in which the loop's thread waited for a CPU, where the system (Linux) tells that.
    """

    def __init__(self) -> None:
        self.timer: Any = None
        self.due = self.began = self.collected = self.waited = 0.0
        self.notes: queue.SimpleQueue[tuple[str, int, float]] = queue.SimpleQueue()
        gc.callbacks.append(self._on_collection)
        signals.worker_ready.connect(self._on_ready)

    def _on_ready(self, sender: Any, **_: Any) -> None:
        self.timer = sender.timer
        try:
            self.statistics = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except FileNotFoundError:
            self.statistics = -1
        threading.Thread(target=self._write, daemon=True).start()
        # Not at once: the first turn of Celery's loop may wait 0.1 s for a message.
        self.timer.call_after(0.01, self._wait)

    def _wait(self) -> None:
        self.collected, self.waited = 0.0, self._waits()
        self.due = time.monotonic() + 0.01
        self.timer.call_at(self.due, self._fired)

    def _fired(self) -> None:
        now = time.monotonic()
        behind = now - self.due
        late = max(0.0, behind - self.collected - (self._waits() - self.waited))
        self.notes.put(("behind", int(behind * 1e6), now))
        self.notes.put(("late", int(late * 1e6), now))
        if self.collected:
            self.notes.put(("full", int(self.collected * 1e6), now))
        self._wait()

    def _write(self) -> None:
        """Write in another thread: a disk that is busy takes long."""
        while True:
            time.sleep(0.1)
            while not self.notes.empty():
                note(*self.notes.get())

    def _waits(self) -> float:
        if self.statistics < 0:
            return 0.0
        return int(os.pread(self.statistics, 100, 0).split()[1]) / 1e9

    def _on_collection(self, phase: str, about: dict[str, int]) -> None:
        if about["generation"] == 2:
            now = time.monotonic()
            if phase == "start":
                self.began = now
            else:
                self.collected += max(0.0, now - max(self.began, self.due))


if OPTIONS["lateness"]:
    Lateness()


def look_up_for(name: str, seconds: float) -> None:
    """Let the look-up of a host name take so long, in vain."""
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == name:
            time.sleep(seconds)
            raise socket.gaierror(socket.EAI_AGAIN, f"{name} was looked up for {seconds:g} s")
        return look_up(host, *arguments, **options)

    socket.getaddrinfo = getaddrinfo


if OPTIONS["look_up"]:
    look_up_for(*OPTIONS["look_up"])


@signals.worker_ready.connect
def ready(**_: Any) -> None:
    note("ready", os.getpid(), time.monotonic())


def limit() -> Callable[[Any], Any]:
    """Return what the limited task is decorated with."""
    if OPTIONS["gate"] is False:
        return lambda function: function
    if OPTIONS["gate"]:
        Gate(app, max_held=OPTIONS["max_held"])
    if OPTIONS["divided"]:
        return lambda function: function  # the settings have the limit
    if OPTIONS["keyed"]:
        per_key = BucketPerKey(OPTIONS["capacity"], OPTIONS["rate"])
        return throttle(per_key, key=lambda number: number // OPTIONS["keyed"])
    if OPTIONS["cluster"]:
        return throttle(
            RedisTokenBucket(
                OPTIONS["conf"]["task_default_queue"],
                OPTIONS["capacity"],
                OPTIONS["rate"],
                url=OPTIONS["cluster"],
                on_outage=OPTIONS["on_outage"],
            )
        )
    bucket = NotedBucket if OPTIONS["grants"] else TokenBucket
    return throttle(bucket(OPTIONS["capacity"], OPTIONS["rate"]), when_limited=OPTIONS["when_limited"])


def second() -> Callable[[Any], Any]:
    """Return what declares a second limit, if there is one."""
    if OPTIONS["second"] is None:
        return lambda function: function
    return throttle(TokenBucket(max(1, OPTIONS["second"] / 10), OPTIONS["second"]), name="second")


def watch() -> None:
    """Receive each signal, and measure through OpenTelemetry; or send signals that nobody receives."""
    from rate_limiter.celery import signals as ours  # noqa: PLC0415 - importing it begins to send

    if OPTIONS["watched"] == "all":
        for name in ours.__all__:
            getattr(ours, name).connect(lambda **_: None, weak=False)
        otel.instrument(MeterProvider([InMemoryMetricReader()]))


if OPTIONS["watched"]:
    watch()


@app.task(name="limited", rate_limit=OPTIONS["native"])
@second()
@limit()
def limited(number: int) -> None:
    note("limited", number, time.monotonic())
    if OPTIONS["sleep"]:
        time.sleep(OPTIONS["sleep"])


@app.task(name="free", ignore_result=True)
def free(number: int) -> None:
    note("free", number, time.monotonic())


@app.task(name="busy")
def busy(milliseconds: int) -> None:
    """Occupy a slot."""
    note("busy", milliseconds, time.monotonic())
    time.sleep(milliseconds / 1000)


@app.task(name="later", bind=True)
@throttle(TokenBucket(1_000, 1_000))
def later(self: Any, number: int) -> None:
    """Raise RetryAfter once."""
    note("later", number, time.monotonic())
    if "rate_limiter_pauses" not in (self.request.headers or {}):
        raise RetryAfter(OPTIONS["pause"])
