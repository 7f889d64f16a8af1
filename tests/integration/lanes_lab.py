"""How the tests of parking send jobs to a queue, start a worker of it, and look at its lanes."""

from typing import Any

import redis
from harness import Lab, Worker
from limits import declare, limit, start
from queue_specs import QueueSpec

PARKED = (limit(rate=4, overflow="park"),)

#: A lab, and a queue of it.
Place = tuple[Lab, QueueSpec]


def place_in(lab: Lab, *, quorum: bool = False) -> Place:
    """Declare a queue of a lab; return both."""
    name = lab.settings["task_default_queue"]
    queue = (f"{name}-q", f"{name}-jobs", "direct", "key", quorum)
    declare(lab, queue)
    return lab, queue


def send(place: Place, task: str, *numbers: int, **options: Any) -> None:
    """Send jobs to the queue."""
    lab, queue = place
    for number in numbers:
        lab.send(task, number, exchange=queue[1], routing_key=queue[3], **options)


def is_redis(lab: Lab) -> bool:
    """Tell whether the broker is Redis."""
    return lab.settings["broker_url"].startswith("redis")


def lanes(place: Place) -> dict[str, int]:
    """Return how many jobs wait in each lane that is there, and what else is there for lanes, with 0."""
    lab, queue = place
    names = {
        f"{queue[0]}.parked{end}": 0 for end in ("", ".workers", ".job", ".other", ".old", ".slow")
    }
    if is_redis(lab):
        with redis.Redis.from_url(lab.settings["broker_url"], decode_responses=True) as client:
            keys = [key for key in client.keys("*.parked*") if not key.endswith(("parked", "workers"))]
            return {key: client.llen(key) for key in keys}
    found = {}
    with lab.app.connection_for_read() as connection:
        for name in names:
            try:
                there = connection.channel().queue_declare(name, passive=True)
            except connection.channel_errors:
                continue
            found[name] = there.message_count
    return found


def parked(place: Place) -> int:
    """Return how many jobs wait in the lane of the limit of task job."""
    return lanes(place).get(f"{place[1][0]}.parked.job", 0)


def run(place: Place, *arguments: str, limits: Any = PARKED, **options: Any) -> Worker:
    """Start a worker of the queue."""
    lab, queue = place
    return start(lab, *arguments, limits=limits, queues=(queue,), **options)
