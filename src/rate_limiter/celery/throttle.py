"""``@throttle``: a limit declared beside its task, and enforced in the worker as the task starts.

Where the app has a `Gate`, the gate finds the same declaration and makes the job wait in the worker's
consumer instead, before it takes a pool slot. The decorator then only collects the receipt.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Final, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

from celery import Celery, Task, bootsteps, signals
from celery._state import get_current_task
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.exceptions import ImproperlyConfigured
from celery.local import Proxy

from ..bucket import Bucket
from ..exceptions import RateLimitExceeded
from ..limit import Demand, Limit
from ..token_bucket import TokenBucket
from . import receipt
from .outcome import refuse_in_task
from .settings import enabled

__all__ = ["limits_of", "throttle"]

P = ParamSpec("P")
R = TypeVar("R")

#: The attribute of a decorated function that holds its limits.
_LIMITS: Final = "__rate_limits__"

#: How many seconds a job that was sent back may wait for the rest, when it comes again.
_TURN_WAIT: Final = 0.5

#: Which limits the execution with this request has paid for and not yet passed. Not kept in the
#: request: an inline call copies that, and retry() sends on what it finds there.
_passes: WeakKeyDictionary[Any, set[Limit]] = WeakKeyDictionary()

#: The apps that have a gate.
gated_apps: WeakSet[Celery] = WeakSet()


def throttle(
    bucket: Bucket | Callable[..., Bucket],
    *,
    tokens: float | Callable[..., float] = 1,
    key: Callable[..., Any] | None = None,
    when_limited: str | Callable[..., Any] = "wait",
    timeout: float | None = None,
    name: str | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Limit the rate of a task. Stands below ``@app.task``::

        @app.task
        @throttle(TokenBucket(capacity=5, tokens_per_second=1))
        def send_email(to): ...

    Args:
        bucket: The bucket to take tokens from, or a callable that is given exactly the arguments
            that the producer sent (never ``self``) and returns the bucket: premium, standard, free.
        tokens: What a job costs: a number above 0, at most the bucket's capacity, or such a callable.
        key: Keeps its place; for buckets per key, which this version does not have.
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

    Returns:
        The decorator.

    Raises:
        TypeError: It decorates something other than a plain function, or an argument has the wrong
            type.
        ValueError: An argument has an impossible value, for one a cost above the capacity.

    Every execution pays: a retry, a redelivery, and an inline ``task()`` or ``task.run()`` too. A
    ``TokenBucket`` is one rate per process. A prefork worker runs the decorator in its children, so
    one with several children and without a `Gate` refuses to start.

    """
    if key is not None:
        raise ValueError(f"key is for buckets per key, which this version does not have: {key!r}")
    limit = Limit(bucket, tokens=tokens, when_limited=when_limited, timeout=timeout, name=name or "")
    signals.worker_init.connect(_add_check, weak=False, dispatch_uid="rate_limiter: buckets per child")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        _refuse_what_is_not_a_function(function)

        @functools.wraps(function)
        def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            return cast("R", _run(limit, function, args, kwargs))

        # Celery's check of a caller's arguments does not follow __wrapped__.
        limited.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        setattr(limited, _LIMITS, (limit, *getattr(function, _LIMITS, ())))
        return limited

    return decorate


def limits_of(task: Task) -> tuple[Limit, ...]:
    """Return the limits that ``@throttle`` declared on a task."""
    return getattr(task.run, _LIMITS, ())


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
    sent = args[1:] if args and isinstance(args[0], Task) else args
    task: Task | None = get_current_task()
    due: list[Limit] = [limit]
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
            paid = receipt.consume(request)
            due = [each for each in limits_of(task) if not (paid and held_at_gate(each))]
            inline = request.called_directly or len(task.request_stack) > 1
            job = None if inline else task
        elif limit in passes:
            due = []
        passes.discard(limit)
    refused = _pay(due, name, sent, kwargs, request)
    if refused is None:
        return function(*args, **kwargs)
    demand, delay = refused
    if callable(demand[2].when_limited):
        return demand[2].when_limited(*sent, **kwargs)
    return refuse_in_task(demand, delay, demand[2].name or name, job)


def _pay(
    limits: Iterable[Limit],
    name: str,
    sent: tuple[Any, ...],
    kwargs: dict[str, Any],
    request: Any,
) -> tuple[Demand, float] | None:
    """Take the tokens of all limits; or of none, and return what was refused, and the delay."""
    headers, eta = (request.headers, request.eta) if request is not None else (None, None)
    with contextlib.ExitStack() as paid:
        for limit in limits:
            bucket, tokens, _ = demand = limit.demand(name, sent, kwargs, headers)
            if limit.when_limited == "wait":
                bucket.wait(tokens, timeout=limit.timeout)
            elif delay := _take_or_delay(demand, eta):
                return demand, delay
            paid.callback(bucket.refund, tokens)
        paid.pop_all()
    return None


def _take_or_delay(demand: Demand, eta: Any) -> float:
    bucket, tokens, limit = demand
    delay = bucket.take_or_delay(tokens)
    if delay and eta and limit.when_limited == "retry":
        # It comes when its turn is due: what little is missing it waits for.
        try:
            bucket.wait(tokens, timeout=_TURN_WAIT)
        except RateLimitExceeded:
            return delay
        return 0.0
    return delay


# -- the check at worker start --------------------------------------------------------------------


def _add_check(sender: Any, **_: Any) -> None:
    # A receiver cannot stop a worker: Signal.send swallows what it raises. A step can.
    sender.app.steps["worker"].add(_OneBucketPerChild)


class _OneBucketPerChild(bootsteps.Step):
    """Refuses a prefork worker in which a limit would run at a multiple of its rate."""

    def create(self, worker: Any) -> None:
        """Look at every throttled task, before the pool forks."""
        app = worker.app
        children = max(worker.concurrency, worker.max_concurrency or 0)
        # A child that takes another's place starts with the parent's level: a full bucket.
        replaced = bool(worker.max_tasks_per_child or worker.max_memory_per_child)
        one = children == 1 and not replaced
        if one or not issubclass(worker.pool_cls, PreforkPool) or not enabled(app):
            return
        for task in app.tasks.values():
            for limit in limits_of(task):
                if app in gated_apps and held_at_gate(limit):
                    continue
                rate = ""
                if isinstance(limit.bucket, TokenBucket):
                    rate = f" ({children} × {limit.bucket.tokens_per_second:g}/s)"
                elif isinstance(limit.bucket, Bucket):
                    continue  # an own class, which may well be shared
                alone = "use `-c 1`" + (" without replacing children" if replaced else "")
                cure = alone
                if app not in gated_apps:
                    cure = f"add `Gate(app)` from rate_limiter.celery, or {alone}"
                raise ImproperlyConfigured(
                    f"`{task.name}`: this bucket would be one per child{rate}; {cure}"
                )


def held_at_gate(limit: Limit) -> bool:
    """Whether a gate enforces the limit, rather than the decorator."""
    return not callable(limit.when_limited) and limit.timeout is None
