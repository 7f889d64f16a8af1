"""``@throttle``: a limit declared beside its task, and enforced in the worker as the task starts.

Where the app has a `Gate`, the gate finds the same declaration and makes the job wait in the worker's
consumer instead, before it takes a pool slot. The decorator then only collects the receipt.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

from celery import Task, signals
from celery._state import get_current_task
from celery.local import Proxy

from ..all_of import charge_refilled, give_back, take_all_or_longest_delay, wait_for_all
from ..bucket import Bucket
from ..exceptions import RateLimitExceeded, RetryAfter
from ..gating.limit import AnyBucket, Demand, Limit, refuse_to_pay_twice
from .charge import Charge, collect
from .declarations import LIMITS, limits_of
from .ending import postpone, refuse_in_task
from .prefork import share_before_fork
from .settings import enabled

__all__ = ["throttle", "watch"]

logger = logging.getLogger("rate_limiter")

P = ParamSpec("P")
R = TypeVar("R")

#: Marks what `watch` has put in place of a task's body.
_WATCHED: Final = "__rate_limiter_watched__"

#: How many seconds a job that was sent back may wait for the rest, when it comes again.
_TURN_WAIT: Final = 0.5

#: Which limits the execution with this request has paid for and not yet passed. Not kept in the
#: request: an inline call copies that, and retry() sends on what it finds there.
_passes: WeakKeyDictionary[Any, set[Limit]] = WeakKeyDictionary()


def throttle(
    bucket: AnyBucket,
    *,
    tokens: float | Callable[..., float] = 1,
    key: Callable[..., Any] | None = None,
    when_limited: str | Callable[..., Any] = "wait",
    timeout: float | None = None,
    name: str | None = None,
    buckets: Iterable[Bucket] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Limit the rate of a task. Stands below ``@app.task``::

        @app.task
        @throttle(TokenBucket(capacity=5, tokens_per_second=1))
        def send_email(to): ...

    Args:
        bucket: The bucket to take tokens from; or a callable that is given exactly the arguments
            that the producer sent (never ``self``) and returns the bucket: premium, standard, free.
        tokens: What a job costs: a number above 0, at most the bucket's capacity, or such a callable.
        key: Such a callable too, where ``bucket`` is a `BucketPerKey`: it returns the job's key there.
        when_limited: What happens when the tokens are not there.

            - ``"wait"``: the job waits. In the decorator it occupies its pool slot meanwhile, and its
              time limits count the wait; at the gate neither.
            - ``"retry"``: it goes back to the broker and comes again when its turn is due, which does
              not count as a retry. Called inline or eagerly it gets `RateLimitExceeded` instead.
            - ``"raise"``: `RateLimitExceeded` with ``retry_after`` (seconds) is the task's result.
            - ``"drop"``: it ends as a revoked job does; ``.get()`` raises ``TaskRevokedError``.
            - a callable: called with the job's arguments instead of the task.
        timeout: With ``"wait"``, the most seconds to wait in the decorator; after that, or at once
            where it can be foreseen, `RateLimitExceeded` is the task's result. Such a limit is
            always enforced in the decorator.
        name: What logs call the limit. By default the name of the task.
        buckets: All the buckets that a callable for ``bucket`` may return. Prefork pools need it where
            there is no `Gate`.

    Returns:
        The decorator.

    Raises:
        TypeError: It decorates something other than a plain function, or an argument has the wrong
            type.
        ValueError: An argument has an impossible value, for one a cost above the capacity.

    Every execution pays: a retry, a redelivery, and an inline ``task()`` or ``task.run()`` too. What
    it paid can be settled (`current_charge`), and a task that raises `RetryAfter` pauses its bucket.

    The limit is one rate for the worker, whatever its pool: before a prefork pool forks, the bucket
    becomes shared memory. What cannot be shared (a `BucketPerKey`, what a callable returns and
    ``buckets`` does not name) needs a `Gate` there, and any bucket does where processes are spawned:
    else the worker refuses to start.

    """
    limit = Limit(
        bucket,
        tokens=tokens,
        key=key,
        when_limited=when_limited,
        timeout=timeout,
        name=name or "",
        buckets=buckets,
    )
    signals.worker_init.connect(share_before_fork, weak=False, dispatch_uid="rate_limiter: prefork")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        _refuse_what_is_not_a_function(function)

        @functools.wraps(function)
        def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            return cast("R", _run(limit, function, args, kwargs))

        # Celery's check of a caller's arguments does not follow __wrapped__.
        limited.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        setattr(limited, LIMITS, (limit, *getattr(function, LIMITS, ())))
        return limited

    return decorate


def watch(task: Task) -> None:
    """Let a task that only the gate limits settle its charge, and pause its bucket."""
    # With autoretry_for, task.run is Celery's (celery/app/autoretry.py): it would retry RetryAfter.
    body = "_orig_run" if hasattr(task, "_orig_run") else "run"
    run = getattr(task, body)
    if limits_of(task) or hasattr(run, _WATCHED):
        return

    @functools.wraps(run)
    def watched(*args: Any, **kwargs: Any) -> Any:
        request = task.request
        if request in _passes or not enabled(task.app):
            return run(*args, **kwargs)
        _passes[request] = set()
        charge = collect(task, request, _without_self(args), kwargs)
        return _call(run, args, kwargs, charge, None if _is_inline(task) else task)

    setattr(watched, _WATCHED, True)
    setattr(task, body, watched)


def _refuse_what_is_not_a_function(function: Any) -> None:
    # Asking a Proxy for its class would evaluate it, so its type comes first.
    if issubclass(type(function), Proxy) or isinstance(function, Task):
        raise TypeError(
            "@throttle stands below @app.task, not above it: it limits the function, not the task:"
            "\n\n    @app.task\n    @throttle(bucket)\n    def send_email(to): ...\n"
        )
    if not inspect.isfunction(function):
        raise TypeError(f"@throttle decorates a function, not {function!r}; write @throttle(bucket)")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"{function.__qualname__} is async; Celery does not await tasks, so it would never run"
        )


def _run(
    limit: Limit, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Pay, then call the function, or do what the policy wants instead."""
    sent = _without_self(args)
    task: Task | None = get_current_task()
    due: list[Limit] = [limit]
    charge = Charge()
    name, request, job = function.__qualname__, None, None
    if task is not None and limit in limits_of(task):  # else something other than its task calls it
        if not enabled(task.app):
            return function(*args, **kwargs)
        # A job pays for all limits of its task as it enters the first, and passes each of them once:
        # a nested task.run(), which finds the request of the job that calls it, pays for itself.
        request = task.request
        name = task.name
        passes = _passes.get(request)
        if passes is None:
            _passes[request] = passes = set(limits_of(task))
            charge = collect(task, request, sent, kwargs)
            due = [each for each in limits_of(task) if each not in charge]
            job = None if _is_inline(task) else task
        elif limit in passes:
            due = []
        passes.discard(limit)
    try:
        paid, refused = _pay(due, name, sent, kwargs, request)
    except BaseException:
        charge.give_back()
        raise
    if refused is None:
        charge.add(paid)
        return _call(function, args, kwargs, charge, job)
    charge.give_back()  # what the gate was paid
    demand, delay = refused
    if callable(demand.limit.when_limited):
        return demand.limit.when_limited(*sent, **kwargs)
    return refuse_in_task(demand, delay, demand.limit.name or name, job)


def _call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    charge: Charge,
    job: Task | None,
) -> Any:
    """Call a function that is paid for; pause its buckets if it says that the remote wants that."""
    try:
        with charge.current():
            return function(*args, **kwargs)
    except RetryAfter as pause:
        seconds = float(pause.retry_after or 0.0)
        for limit in charge.pause(seconds):
            logger.warning(
                "Limit %s: paused for this job alone; its bucket is in the worker's main process",
                limit.name,
            )
        if job is None or job.request.is_eager:
            raise
        postpone(job, pause, seconds)


def _without_self(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[1:] if args and isinstance(args[0], Task) else args


def _is_inline(task: Task) -> bool:
    return bool(task.request.called_directly or len(task.request_stack) > 1)


def _pay(
    limits: Iterable[Limit],
    name: str,
    sent: tuple[Any, ...],
    kwargs: dict[str, Any],
    request: Any,
) -> tuple[list[Demand], tuple[Demand, float] | None]:
    """Take the tokens of all limits, or of none.

    Returns:
        What all limits demand; and if nothing was taken, the demand that was refused, and its delay.

    """
    headers, eta = (request.headers, request.eta) if request is not None else (None, None)
    each = [limit.demands(f"task {name}", sent, kwargs, headers) for limit in limits]
    demands = [demand for one in each for demand in one]
    refuse_to_pay_twice([demand.bucket for demand in demands], f"`{name}`")
    with contextlib.ExitStack() as paid:
        waits = []
        taken: list[Demand] = []
        for one in each:
            limit = one[0].limit
            if limit.when_limited == "wait":
                waits.append((one, limit.timeout))
            else:
                delay, refused = _take_or_delay(one, eta)
                if delay:
                    return demands, (one[refused], delay)
                taken += one
                paid.callback(give_back, one)
        if wait_for_all(waits):
            charge_refilled(taken)
        paid.pop_all()
    return demands, None


def _take_or_delay(demands: Sequence[Demand], eta: Any) -> tuple[float, int]:
    """Take the tokens of one limit, or return the longest delay, and the position of its demand."""
    delay, refused = take_all_or_longest_delay(demands)
    if delay and eta and demands[0].limit.when_limited == "retry":
        # The job was sent back before and comes at its scheduled time. It waits for a few tokens that
        # are missing, so that it need not be sent back again.
        try:
            wait_for_all([(demands, _TURN_WAIT)])
        except RateLimitExceeded:
            return delay, refused
        return 0.0, 0
    return delay, refused
