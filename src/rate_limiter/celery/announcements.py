"""What the log of a worker says of each limit: which tasks it is enforced for, or that it limits nothing."""

import logging
from collections.abc import Iterable

from celery import Celery, Task

from ..gating.declared import Declared
from ..gating.engine import warn_of_unused
from ..gating.limit import Limit
from ..gating.record import record_of
from .declarations import own_tasks

__all__ = ["Announcements"]

logger = logging.getLogger("rate_limiter")


class Announcements:
    """The limits of a gate as they are announced: at the start, and when a limit is found to be for something.

    Args:
        app: The app.
        tasks_of: The limits, each with the names of its tasks. `found` adds to them.
        declared: What the limits are for that are declared by name or queue.

    """

    def __init__(
        self, app: Celery, tasks_of: dict[Limit, list[str]], declared: dict[Limit, Declared]
    ) -> None:
        self._app = app
        self._tasks_of = tasks_of
        self._declared = declared
        #: The limits that were found to be for nothing.
        self._unused: set[Limit] = set()

    def start(self) -> None:
        """Log each limit, and what keeps tasks from it."""
        app = self._app
        consumed = app.amqp.queues.consume_from
        registered = list(own_tasks(app))
        for limit, names in self._tasks_of.items():
            queue = self.queue_of(limit)
            if not names:
                self._warn(limit, "registered task", registered)
            elif queue is not None and queue not in consumed:
                self._warn(limit, "queue that is consumed", sorted(consumed))
            else:
                self._tell(limit, names)
        for name in sorted({name for names in self._tasks_of.values() for name in names}):
            self._warn_of_task(app.tasks[name])

    def queue_of(self, limit: Limit) -> str | None:
        """Return the queue whose jobs a limit is for. ``None``: those of all queues."""
        declared = self._declared.get(limit)
        return None if declared is None else declared.queue

    def consumes(self, queue: str) -> None:
        """Take note of a queue that the worker consumes from now on."""
        for limit in [each for each in self._unused if self.queue_of(each) == queue]:
            if self._tasks_of[limit]:
                self._unused.discard(limit)
                self._tell(limit, self._tasks_of[limit])

    def found(self, task: str, limits: Iterable[Limit]) -> None:
        """Take note of a task of these limits. It may have been imported after the start."""
        for limit in limits:
            names = self._tasks_of.setdefault(limit, [])
            if task not in names:
                names.append(task)
            if limit in self._unused:
                self._unused.discard(limit)
                self._tell(limit, [task])

    def _warn_of_task(self, task: Task) -> None:
        if task.rate_limit and not self._app.conf.worker_disable_rate_limits:
            logger.warning(
                "%s also has Celery's rate_limit=%r, which blocks its whole queue while it "
                "throttles; both apply",
                task.name,
                task.rate_limit,
            )
        if task.Strategy != Task.Strategy:
            logger.warning(
                "%s has a Strategy of its own, %r: jobs that it does not hand to "
                "consumer.on_task_request pass the gate, and pay in the pool",
                task.name,
                task.Strategy,
            )

    def _warn(self, limit: Limit, what: str, there: list[str]) -> None:
        self._unused.add(limit)
        warn_of_unused(limit, what, there)

    def _tell(self, limit: Limit, names: list[str]) -> None:
        declared = self._declared.get(limit)
        tasks = ", ".join(names) if declared is None or declared.patterns else "all tasks"
        if declared is not None and declared.queue is not None:
            tasks += f" from queue {declared.queue}"
        logger.info(
            "Limit %s: %r for %s, enforced at the gate", record_of(limit).name, limit.bucket, tasks
        )
