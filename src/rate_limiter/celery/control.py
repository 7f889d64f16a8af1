"""Remote control of limits, by commands of Celery's own kind.

``celery inspect limits`` shows the limits of each worker, ``celery inspect explain ID`` where a job is, and
``celery control limit NAME rate=10/m`` changes a limit while the worker runs. ``celery control rate_limit``
changes the limit of a task that has one of ours, and Celery's own rate limit of every other task.

Importing ``rate_limiter.celery`` connects them, in workers and in the ``celery`` program. They are as
open as all of Celery's remote control: who may write to the broker may send them.
``rate_limiter_control = False`` closes them.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, Final, NamedTuple

from celery.concurrency.prefork import TaskPool
from celery.worker import state as worker_state
from celery.worker.control import Panel

from ..bucket import is_in_redis
from ..bucket_per_key import BucketPerKey
from ..gating.limit import Limit
from ..gating.record import listed, record_of
from ..gating.steering import Order, buckets_of, carry_out, shown
from ..shared_bucket import is_shared
from ..token_bucket import TokenBucket
from .bootstep import GateStep
from .declarations import limits_of
from .settings import controlled, enabled

__all__ = ["connect"]

#: Seconds for which a change waits for Redis.
_LONGEST: Final = 0.5

#: The changes that have no value.
_ALONE: Final = ("resume", "restore")

_RATE_LIMIT: Final = "rate_limit"
_celerys_rate_limit: Final = Panel.data[_RATE_LIMIT]


def connect() -> None:
    """Add the commands to those that Celery knows."""
    register = Panel.register
    register(type="inspect", name="limits")(_limits)
    register(type="inspect", name="explain", args=[("task_id", str)], signature="<task id>")(_explain)
    register(
        name="limit",
        args=[("name", str)],
        variadic="changes",
        signature="<name> [rate=10/m] [capacity=20] [pause=30s] [resume] [restore] [key=acme] [reason=…] [who=…]",
    )(_limit)
    celerys = Panel.meta[_RATE_LIMIT]
    register(name=_RATE_LIMIT, args=celerys.args, signature=celerys.signature)(_rate_limit)


class _RefusedError(Exception):
    """A command that cannot be obeyed. Its text is the reply."""


_REFUSALS: Final = (_RefusedError, ValueError, TypeError)


class _Known(NamedTuple):
    """A limit in this worker."""

    limit: Limit
    tasks: list[str]
    queue: str | None
    #: The gate's step, if that enforces the limit; ``None``: the decorator does, in the task.
    step: GateStep | None
    #: Whether the task takes from a bucket of its pool process, which is not the one seen here.
    out_of_reach: bool = False

    @property
    def enforced(self) -> str:
        """Where the limit is enforced."""
        if self.step is not None:
            return "at the gate"
        return "in the task" + (", in a process with a bucket of its own" if self.out_of_reach else "")


def _limits(state: Any, **_: Any) -> dict[str, Any]:
    """Show each rate limit: its rate, its tokens, and the jobs that it holds and has let go."""
    try:
        known = _all_limits(state)
    except _RefusedError as refused:
        return {"error": str(refused)}
    return {
        name: {
            "tasks": each.tasks,
            "queue": each.queue,
            "enforced": each.enforced,
            "held": 0 if each.step is None else each.step.engine.room.held_by[each.limit],
            "lanes": {} if each.step is None else each.step.lanes_of(each.limit),
            **shown(each.limit),
        }
        for name, each in known.items()
    }


def _explain(state: Any, task_id: str, **_: Any) -> dict[str, Any]:
    """Tell where a job is; for a held one, which limit makes it wait, and for how long."""
    try:
        _check_open(state.app)
    except _RefusedError as refused:
        return {"error": str(refused)}
    request = worker_state.requests.get(task_id)
    step = _step_of(state.consumer)
    if request is None:
        lane = None if step is None else step.where(task_id)
        return {"state": "unknown"} if lane is None else {"state": "parked", "lane": lane}
    told = {"task": request.name}
    for forecast in [] if step is None else step.engine.forecasts():
        if forecast.held.job is request:
            return told | {
                "state": "held",
                "limit": record_of(forecast.limit).name,
                "before": forecast.before,
                "seconds": round(forecast.seconds, 3),
            }
    if request in worker_state.active_requests:
        return told | {"state": "runs"}
    if request in worker_state.reserved_requests:
        return told | {"state": "waits for a slot of the pool"}
    return told | {"state": "waits for its ETA"}


def _limit(state: Any, name: str, changes: Iterable[str] = (), **order: Any) -> dict[str, str]:
    """Change a rate limit while the worker runs: its rate, its capacity, or a pause."""
    try:
        known = _all_limits(state)
        if name not in known:
            raise _RefusedError(f"there is no limit {name!r}, only: {listed(known)}")
        return {"ok": _change(known, name, _order(changes, order))}
    except _REFUSALS as refused:
        return {"error": str(refused)}


def _rate_limit(state: Any, task_name: str, rate_limit: Any, **kwargs: Any) -> Any:
    """Tell worker(s) to modify the rate limit for a task by type."""
    try:
        known = _all_limits(state)
    except _RefusedError:
        known = {}
    names = [name for name, each in known.items() if task_name in each.tasks]
    if not names:
        return _celerys_rate_limit(state, task_name, rate_limit, **kwargs)
    if len(names) > 1:
        return {
            "error": f"{task_name} has the limits {listed(names)}: change one of them with `control limit`"
        }
    try:
        what = _change(known, names[0], Order(rate=rate_limit))
    except _REFUSALS as refused:
        return {"error": str(refused)}
    return {"ok": f"limit {names[0]} of {listed(known[names[0]].tasks)}: {what}"}


def _change(known: dict[str, _Known], name: str, order: Order) -> str:
    if known[name].out_of_reach:
        raise _RefusedError(
            f"limit {name} cannot be changed: its tasks take from a bucket of their pool process, which "
            "the worker's main process cannot reach; a Gate(app) would enforce it there"
        )
    limit, limits = known[name].limit, [each.limit for each in known.values()]
    if any(map(is_in_redis, buckets_of(limit))):
        return _in_time(lambda: carry_out(order, limit, limits))
    return carry_out(order, limit, limits)


def _in_time(ask: Callable[[], str]) -> str:
    """Ask a server, but do not let the worker's loop wait for it: to look up its name may take long."""
    answer: Future[str] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:  # noqa: BLE001 - it is raised in the loop
            answer.set_exception(error)

    threading.Thread(target=run, name="rate_limiter order", daemon=True).start()
    try:
        return answer.result(_LONGEST)
    except TimeoutError:
        raise _RefusedError(
            f"Redis has not answered within {_LONGEST:g} s: the limit may be changed, or may not"
        ) from None


def _order(changes: Iterable[str], order: dict[str, Any]) -> Order:
    """Return the order that ``rate=10/m`` and the like, or keyword arguments, give."""
    for change in changes:
        option, equals, value = change.partition("=")
        order[option] = value if equals else True
    for option, value in order.items():
        if option not in Order._fields:
            raise _RefusedError(
                f"unknown option {option!r}; expected one of {', '.join(Order._fields)}"
            )
        if value is True and option not in _ALONE:
            raise _RefusedError(f"{option} needs a value, as in {option}=…")
        if option in _ALONE and value is not True:
            raise _RefusedError(f"{option} takes no value, not {value!r}")
    return Order(**order)


def _all_limits(state: Any) -> dict[str, _Known]:
    """Return the limits of the worker by their names."""
    _check_open(state.app)
    if not enabled(state.app):
        raise _RefusedError("rate limits are lifted here: rate_limiter_enabled is false")
    found: dict[Limit, _Known] = {}
    step = _step_of(state.consumer)
    if step is not None:
        for limit, tasks in step.tasks_of.items():
            found[limit] = _Known(limit, tasks, step.announcements.queue_of(limit), step)
    for name, task in sorted(state.app.tasks.items()):
        for limit in limits_of(task):
            if limit not in found:
                alone = _is_in_pool_processes_alone(state.consumer, limit)
                found[limit] = _Known(limit, [], None, None, alone)
            if name not in found[limit].tasks:
                found[limit].tasks.append(name)
    return {record_of(each.limit).name: each for each in found.values()}


def _is_in_pool_processes_alone(consumer: Any, limit: Limit) -> bool:
    """Tell whether a bucket that a task takes from cannot be shared by the processes of a pool."""
    return isinstance(consumer.pool, TaskPool) and any(
        isinstance(bucket, TokenBucket | BucketPerKey)
        and not is_shared(bucket)
        and not is_in_redis(bucket)
        for bucket in buckets_of(limit)
    )


def _check_open(app: Any) -> None:
    if not controlled(app):
        raise _RefusedError(
            "rate_limiter_control is false: this worker's limits have no remote control"
        )


def _step_of(consumer: Any) -> GateStep | None:
    return next((step for step in consumer.steps if isinstance(step, GateStep)), None)
