"""What an operator asks of lanes: ``celery limits unpark``, ``purge``, ``explain``. The broker answers, no worker."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from celery import Celery
from kombu.exceptions import OperationalError

from ..broker.lanes import Lanes, lanes_on

__all__ = ["Found", "find_job", "find_lanes", "purge", "unpark", "why_no_broker"]


class Found(NamedTuple):
    """A lane that is there, whoever uses it."""

    name: str
    queue: str
    #: The names of its limits.
    limits: list[str]
    jobs: int


def find_lanes(app: Celery, limit: str | None, queues: Iterable[str] = ()) -> list[Found]:
    """Return the lanes on the broker of an app.

    Args:
        app: The app.
        limit: The name of a limit: only those that are for it. ``None``: all.
        queues: The names of their queues. None: those that the app knows.

    """
    with app.connection_for_write() as connection:
        lanes = _lanes(connection)
        return [
            Found(lane, queue, limits, lanes.count(lane))
            for queue in queues or app.amqp.queues
            for lane, limits in sorted(lanes.there(queue).items())
            if limit is None or limit in limits
        ]


def find_job(app: Celery, task_id: str, queues: Iterable[str] = ()) -> tuple[str, int] | None:
    """Return the lane of a job, and how many jobs come before it. ``None``: it is in none, or the broker cannot tell.

    Args:
        app: The app.
        task_id: The id of the job.
        queues: The names of the queues whose lanes are searched. None: those that the app knows.

    """
    with app.connection_for_write() as connection:
        lanes = lanes_on(connection, "limits")
        if lanes is None:
            return None
        for queue in queues or app.amqp.queues:
            for lane in sorted(lanes.there(queue)):
                if (before := lanes.find(lane, task_id)) is not None:
                    return lane, before
    return None


def unpark(app: Celery, found: Iterable[Found]) -> int:
    """Put the jobs of lanes back, before what waits in their queues. Return how many."""
    with app.connection_for_write() as connection:
        lanes, count = _lanes(connection), 0
        for each in found:
            count += lanes.put_back(each.name, each.queue)
            if lanes.alone(each.queue):
                lanes.remove(each.queue, [each.name])
        return count


def purge(app: Celery, found: Iterable[Found]) -> int:
    """Delete the jobs of lanes. Return how many."""
    with app.connection_for_write() as connection:
        lanes = _lanes(connection)
        return sum(lanes.purge(each.name) for each in found)


def why_no_broker(app: Celery, error: Exception) -> str:
    """Return what to say of an error that means that the broker does not answer; ``""`` of any other."""
    if not isinstance(error, OperationalError):
        return ""
    where = app.connection_for_write().as_uri()  # without its password
    return f"The broker at {where} does not answer: {error}"


def _lanes(connection: Any) -> Lanes:
    lanes = lanes_on(connection, "limits")
    if lanes is None:
        raise ValueError(
            f"only Redis and RabbitMQ have lanes, and the broker is {connection.transport.driver_type}"
        )
    return lanes
