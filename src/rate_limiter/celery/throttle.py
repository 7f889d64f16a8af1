"""``@throttle``: a limit declared beside its task, and enforced in the worker as the task starts.

Where the app has a `Gate`, the gate finds the same declaration and makes the job wait in the worker's
consumer instead, before it takes a pool slot. The decorator then only collects the receipt.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any, Final, ParamSpec, TypeVar, cast
from weakref import WeakSet

from celery import Celery, Task, bootsteps, signals
from celery._state import get_current_task
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.exceptions import Ignore, ImproperlyConfigured, TaskRevokedError
from celery.local import Proxy

from ..bucket import Bucket
from ..exceptions import RateLimitExceeded
from ..limit import Limit
from ..token_bucket import TokenBucket
from . import receipt

__all__ = ["limits_of", "throttle"]

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("rate_limiter")

#: The attribute of a decorated function that holds its limits.
_LIMITS: Final = "__rate_limits__"

#: Where a running job's request keeps the limits that it has paid for and not yet passed.
_PASSES: Final = "_rate_limiter_passes"

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
    if task is None or limit not in limits_of(task):
        task = None  # called by something else than its own task
    elif not task.app.conf.get("rate_limiter_enabled", True):
        return function(*args, **kwargs)
    if task is None:
        refused = _pay((limit,), function.__qualname__, sent, kwargs)
        return _refuse(*refused, None, sent, kwargs) if refused else function(*args, **kwargs)

    # A job pays for all limits of its task as it enters the first, and passes each of them once: a
    # nested task.run(), which finds the request of the job that calls it, pays for itself.
    request = task.request
    passes: set[Limit] | None = request.__dict__.get(_PASSES)
    refused = None
    if passes is None:
        request.__dict__[_PASSES] = passes = set()
        paid = receipt.consume(request)
        due = [limit for limit in limits_of(task) if not (paid and held_at_gate(limit))]
        refused = _pay(due, task.name, sent, kwargs)
        passes.update(limits_of(task))
        job = None if request.called_directly else task
    elif limit not in passes:
        refused = _pay((limit,), task.name, sent, kwargs)
        job = None
    if refused:
        return _refuse(*refused, job, sent, kwargs)
    passes.discard(limit)
    return function(*args, **kwargs)


def _pay(
    limits: Iterable[Limit], name: str, sent: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Limit, str, float] | None:
    """Take the tokens of all limits, or of none and return the limit that refused, and the delay."""
    with contextlib.ExitStack() as paid:
        for limit in limits:
            bucket, tokens = limit.price(name, sent, kwargs)
            if limit.when_limited == "wait":
                bucket.wait(tokens, timeout=limit.timeout)
            elif delay := bucket.take_or_delay(tokens):
                return limit, limit.name or name, delay
            paid.callback(bucket.refund, tokens)
        paid.pop_all()
    return None


def _refuse(
    limit: Limit,
    name: str,
    delay: float,
    job: Task | None,
    sent: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Do what the policy wants. ``job``: the task, where the job as a whole is refused."""
    if callable(limit.when_limited):
        return limit.when_limited(*sent, **kwargs)
    reason = f"rate limit exceeded: {name}"
    if limit.when_limited == "raise":
        raise RateLimitExceeded(reason, delay)
    if job is None or job.request.is_eager:
        raise TaskRevokedError(reason)
    request = job.request
    logger.info("Dropped %s[%s]: %s", job.name, request.id, reason)
    # What celery.worker.request.Request._announce_revoked does in the main process. Ignore alone
    # would store no result: get() and a chord would wait for ever.
    job.backend.mark_as_revoked(
        request.id,
        reason,
        request=request,
        store_result=not request.ignore_result or job.store_errors_even_if_ignored,
    )
    signals.task_revoked.send(sender=job, request=request, terminated=False, signum=None, expired=False)
    raise Ignore


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
        if (
            children == 1
            or not issubclass(worker.pool_cls, PreforkPool)
            or not app.conf.get("rate_limiter_enabled", True)
        ):
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
                cure = (
                    "use `-c 1`"
                    if app in gated_apps
                    else "add `Gate(app)` from rate_limiter.celery, or use `-c 1`"
                )
                raise ImproperlyConfigured(
                    f"`{task.name}`: this bucket would be one per child{rate}; {cure}"
                )


def held_at_gate(limit: Limit) -> bool:
    """Whether a gate enforces the limit, rather than the decorator."""
    return limit.when_limited == "wait" and limit.timeout is None
