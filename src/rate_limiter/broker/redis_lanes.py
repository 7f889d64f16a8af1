"""The lanes on one Redis: see `lanes`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from .lane import SIGN
from .redis_channel import finish_reading, redis_client

__all__ = ["RedisLanes"]

_HERE: Final = Path(__file__).parent
_PUT_BACK: Final = (_HERE / "put_back.lua").read_text()
_SWEEP: Final = (_HERE / "sweep.lua").read_text()

#: How many messages are put back, or read, at once. A script takes about 1 µs for each, and Redis serves nobody else
#: meanwhile.
_AT_ONCE: Final = 500

#: A worker that has not renewed its signs for so many seconds counts as gone.
_GONE: Final = 10.0


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
        """Say that this worker uses lanes. It has to be called again every few seconds: a sign ends by itself."""
        if not lanes:
            return
        now = self._now()
        with self._client.pipeline(transaction=False) as pipe:
            pipe.zadd(self._key(f"{queue}.parked{SIGN}"), {self._sign(lane): now for lane in lanes})
            for lane, limits in lanes.items():
                pipe.hsetnx(self._key(f"{queue}.parked"), lane, json.dumps(list(limits)))
            pipe.execute()

    def leave(self, queue: str) -> None:
        key = self._key(f"{queue}.parked{SIGN}")
        mine = [sign for sign in self._client.zrange(key, 0, -1) if _parts(sign)[0] == self._worker]
        if mine:
            self._client.zrem(key, *mine)

    def declare(self, entities: Iterable[Any]) -> dict[str, int | Exception]:
        return {entity.name: self.count(entity.name) for entity in entities}

    def there(self, queue: str) -> dict[str, list[str]]:
        found = self._client.hgetall(self._key(f"{queue}.parked"))
        return {_text(lane): json.loads(limits) for lane, limits in found.items()}

    def unused(self, queue: str, lanes: Iterable[str]) -> list[str]:
        used = {lane for _, lane in self._signs(queue)}
        return [lane for lane in lanes if lane not in used]

    def calm(self, channels: Iterable[Any]) -> None:
        for channel in channels:
            finish_reading(channel)

    def alone(self, queue: str) -> bool:
        return all(worker == self._worker for worker, _ in self._signs(queue))

    def count(self, lane: str) -> int:
        with self._client.pipeline(transaction=False) as pipe:
            for key in self._lists(lane):
                pipe.llen(key)
            return sum(pipe.execute())

    def find(self, lane: str, job: str) -> int | None:
        wanted, before = f'"id": {json.dumps(job)}'.encode(), 0  # in the headers, as kombu writes them
        for key in self._lists(lane):
            for start in range(0, self._client.llen(key), _AT_ONCE):
                messages = self._client.lrange(key, -start - _AT_ONCE, -start - 1)[::-1]
                for place, message in enumerate(messages):
                    if wanted in message:
                        return before + place
                before += len(messages)
        return None

    def put_back(self, lane: str, queue: str, first: Iterable[Any] = ()) -> int:
        total = 0
        for source, target in zip(self._lists(lane), self._lists(queue), strict=True):
            left = self._client.llen(source)
            while left > 0 and (
                count := self._put_back(keys=[source, target], args=[min(left, _AT_ONCE)])
            ):
                total, left = total + count, left - count
        return total

    def sweep(self, queue: str, lane: str, tasks: Iterable[str], most: int) -> int:
        pairs = zip(self._lists(queue), self._lists(lane), strict=True)
        return sum(self._sweep(keys=pair, args=[most, *tasks]) for pair in pairs)

    def purge(self, lane: str) -> int:
        count = self.count(lane)
        self._client.delete(*self._lists(lane))
        return count

    def remove(self, queue: str, lanes: Iterable[str]) -> None:
        for lane in lanes:
            if not self.count(lane) and not self._is_in_hand(lane):
                self._client.hdel(self._key(f"{queue}.parked"), lane)

    def _is_in_hand(self, lane: str) -> bool:
        """Tell whether messages of a lane are unacknowledged. Those of a killed worker come back to the lane."""
        # An entry is a JSON list: the message, its exchange, its routing key.
        end = f"{json.dumps(lane)}]".encode()
        entries = self._client.hscan_iter(self._key(self._channel.unacked_key), count=_AT_ONCE)
        return any(entry.endswith(end) for _, entry in entries)

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
        key, since = self._key(f"{queue}.parked{SIGN}"), self._now() - _GONE
        self._client.zremrangebyscore(key, "-inf", since)
        return [_parts(sign) for sign in self._client.zrange(key, 0, -1)]


def _parts(sign: Any) -> tuple[str, str]:
    worker, lane = json.loads(sign)
    return worker, lane


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
