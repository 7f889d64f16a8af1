"""The slots of a worker's pool: when a job starts, which jobs start first, and how many slots there are.

*When.* Every pool calls ``request.on_accepted`` when a job starts. A limited request gets one of its own,
which tells the gate. Other ends of a request that waits for a slot are not told; the gate asks
`Slots.unstarted`.

*First.* Jobs that were held start before the unlimited ones that wait for a slot. Else a limit, which has
few jobs in the pool, would get few of the slots that become free. On prefork pools Celery keeps the jobs
without a slot in the deque of a semaphore, on threads pools Python keeps them in a queue; the jobs are put
at the front there. Green pools have no such place: the consumer waits until a slot is free.

*How many.* ``--autoscale`` counts the requests that are reserved, and the held ones are among them.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from time import monotonic
from typing import Any, Final

from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.worker import state

from ..gating.limit import Demand

__all__ = ["Slots", "scale_without"]

logger = logging.getLogger("rate_limiter")

#: The least seconds between two looks after a pool whose jobs do not start.
_MAINTAIN: Final = 0.5

#: Told of each limited request when it starts, and of what it has paid.
Started = Callable[[Any, Sequence[Demand]], None]


class Slots:
    """The way of limited jobs into the slots of one worker's pool.

    Args:
        consumer: Celery's consumer, which is being made. No job has gone to the pool yet.
        forward: Hands a request to the pool.
        started: Called when a job starts, in the pool's thread or greenlet, if it has such; and when it
            could not be handed to the pool.

    """

    def __init__(self, consumer: Any, forward: Callable[[Any], None], started: Started) -> None:
        self._forward = forward
        self._started = started
        self._line = _line_of(consumer)
        # Without event loop a prefork pool looks after itself, in a thread of its own.
        looked_after = consumer.hub is not None and isinstance(consumer.pool, PreforkPool)
        self._pool = consumer.pool if looked_after else None
        self._maintained_at = -math.inf

    def forward(self, request: Any, demands: Sequence[Demand], *, first: bool = False) -> None:
        """Hand a job to the pool.

        Args:
            request: The request.
            demands: What it has paid.
            first: Whether it is to start before jobs that wait for a slot already, but not before those
                that were handed over with this before.

        """
        start = request.on_accepted = _Start(request, demands, self._started)
        try:
            if self._line is None:
                self._forward(request)
            else:
                start.future = self._line.forward(self._forward, request, first)
        except BaseException:
            request.__dict__.pop("on_accepted", None)
            self._started(request, demands)
            raise

    def unstarted(self, request: Any) -> bool:
        """Tell whether a request that was handed to the pool a while ago is still to start."""
        if request not in state.reserved_requests or request in state.active_requests:
            return False
        if self._pool is not None and (now := monotonic()) >= self._maintained_at + _MAINTAIN:
            # Celery may overlook that a child has ended (worker_max_tasks_per_child). Then the job that it
            # was to run waits until the pool is looked after: every five seconds.
            self._maintained_at = now
            self._pool.maintain_pool()
        return True

    @staticmethod
    def cancel(requests: Iterable[Any]) -> None:
        """Take jobs that have not started out of a threads pool: the broker delivers them again.

        A prefork pool's jobs are taken out by Celery.
        """
        for request in requests:
            start = request.__dict__.pop("on_accepted", None)
            if isinstance(start, _Start) and start.future is not None:
                start.future.cancel()


class _Start:
    """Stands in for the ``on_accepted`` of a request until that is called."""

    __slots__ = ("demands", "future", "request", "started")

    def __init__(self, request: Any, demands: Sequence[Demand], started: Started) -> None:
        self.request = request
        self.demands = demands
        self.started = started
        #: What stands for the job in a threads pool.
        self.future: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        request = self.request
        request.__dict__.pop("on_accepted", None)  # else they would keep each other in memory
        try:
            request.on_accepted(*args, **kwargs)
        finally:
            self.started(request, self.demands)


class _SemaphoreLine:
    """The jobs that wait for a slot of a prefork pool, in the main process.

    Args:
        waiting: The deque of Celery's semaphore. Its entries are (callback, arguments, keyword arguments).

    """

    def __init__(self, waiting: deque[Any]) -> None:
        self._waiting = waiting
        #: The entries at the front that were put there, and perhaps some that have left it since.
        self._put_first: deque[Any] = deque()

    def forward(self, forward: Callable[[Any], None], request: Any, first: bool) -> None:
        waiting = self._waiting
        before = len(waiting)
        forward(request)
        if not first or len(waiting) <= before or waiting[-1][1] != (request,):
            return
        put_first = self._put_first
        while put_first and put_first[0] is not waiting[0]:
            put_first.popleft()
        if len(put_first) < before:
            entry = waiting.pop()
            waiting.insert(len(put_first), entry)
            put_first.append(entry)
        else:
            put_first.append(waiting[-1])


class _ThreadsLine:
    """The queue of a threads pool's executor, with a lane for jobs that start first.

    It stands in for the executor's ``SimpleQueue``, and is as safe as that for any thread and finalizer.
    """

    def __init__(self) -> None:
        self._first: deque[Any] = deque()
        self._rest: deque[Any] = deque()
        #: One entry for each item in the two.
        self._there: SimpleQueue[None] = SimpleQueue()
        self._puts_first = False
        self._latest: Any = None

    def forward(self, forward: Callable[[Any], None], request: Any, first: bool) -> Any:
        self._puts_first, self._latest = first, None
        try:
            forward(request)
            return getattr(self._latest, "future", None)
        finally:
            self._puts_first, self._latest = False, None

    def put(self, item: Any) -> None:
        """Add a job; or ``None``, which ends a thread."""
        if item is None:
            self._rest.append(item)
        else:
            self._latest = item
            (self._first if self._puts_first else self._rest).append(item)
        self._there.put(None)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Return the next item; raise ``queue.Empty`` where there is none."""
        self._there.get(block, timeout)
        try:
            return self._first.popleft()
        except IndexError:
            return self._rest.popleft()

    def get_nowait(self) -> Any:
        """Return the next item; raise ``queue.Empty`` where there is none."""
        return self.get(block=False)

    def empty(self) -> bool:
        """Tell whether there is no item."""
        return self._there.empty()

    def qsize(self) -> int:
        """Return how many items there are."""
        return self._there.qsize()


_NO_LINE: Final = (
    "Jobs of limits start behind the unlimited jobs that wait for a slot of the pool, and may start more "
    "rarely than their limits allow: this Celery has no %s"
)


def _line_of(consumer: Any) -> _SemaphoreLine | _ThreadsLine | None:
    """Return where jobs wait for a slot of the pool. ``None``: nowhere, or where nothing can be put first."""
    pool = consumer.pool
    if isinstance(pool, PreforkPool):
        semaphore = getattr(consumer.controller, "semaphore", None)
        if semaphore is None:
            return None  # without event loop the consumer waits until a slot is free
        waiting = getattr(semaphore, "_waiting", None)
        if isinstance(waiting, deque) and consumer.controller.pool_putlocks:
            return _SemaphoreLine(waiting)
        logger.warning(_NO_LINE, "semaphore._waiting, or worker_pool_putlocks is off")
    elif (executor := getattr(pool, "executor", None)) is not None:
        if isinstance(getattr(executor, "_work_queue", None), SimpleQueue) and not executor._threads:
            executor._work_queue = line = _ThreadsLine()
            return line
        logger.warning(_NO_LINE, "executor._work_queue")
    return None


def scale_without(controller: Any, held: Callable[[], int]) -> Callable[[], None] | None:
    """Have an autoscaler count only the jobs that are for the pool.

    Args:
        controller: Celery's worker.
        held: Returns how many of the reserved requests are not.

    Returns:
        What is to be called after jobs have been handed to the pool; ``None``: nothing.

    """
    autoscaler: Any = getattr(controller, "autoscaler", None)
    kind: Any = type(autoscaler)
    if not hasattr(kind, "qty") or not hasattr(kind, "maybe_scale"):
        return None

    def maybe_scale(self: Any, req: Any = None) -> None:
        if req is None:
            kind.maybe_scale(self)
        elif hasattr(self, "on_task_received"):  # from Celery 5.6 on
            # Whether the gate holds it is not known yet. The gate calls again when it is.
            self.on_task_received(req)

    qty = property(lambda self: max(0, kind.qty.__get__(self) - held()))
    autoscaler.__class__ = type(kind.__name__, (kind,), {"qty": qty, "maybe_scale": maybe_scale})
    if not controller.use_eventloop:
        return None  # Celery's autoscaler looks by itself, each second, in a thread of its own
    return autoscaler.maybe_scale  # type: ignore[no-any-return]
