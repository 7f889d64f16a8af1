"""``@throttle``: a limit declared beside its task, and enforced in the worker as the task starts.

Where the app has a `Gate`, the gate finds the same declaration and makes the job wait in the worker's
consumer instead, before it takes a pool slot. The decorator then only reads the receipt (see `receipt`).
"""

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic
from types import FrameType
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

from celery import Task
from celery._state import get_current_task
from celery.app.trace import build_tracer
from celery.local import Proxy

from ..all_of import charge_refilled, give_back, take_all_or_longest_delay, wait_for_all
from ..bucket import Bucket
from ..exceptions import RateLimitExceeded, RetryAfter
from ..gating.declared import Names, check_parameters, new_limit
from ..gating.limit import AnyBucket, AnyCost, AnyKey, Call, Demand, Limit, refuse_to_pay_twice
from ..gating.parameters import Parameters
from ..gating.record import record_of
from ..gating.tally import tell
from .charge import Charge, charge_of, warn_of_private_buckets
from .declarations import (
    LIMITS,
    at_gate,
    gates,
    held_at_gate,
    limits_of,
    name_limits,
    parameters_of,
    refuse_async,
)
from .ending import postpone, refuse_in_task
from .receipt import consume
from .returning import has_queue
from .settings import enabled

__all__ = ["renew_tracer", "throttle", "watch", "watch_all", "watch_late"]

logger = logging.getLogger("rate_limiter")

P = ParamSpec("P")
R = TypeVar("R")

#: The attribute of a function that `watch` has put in place of a task's body.
_WATCHED: Final = "__rate_limiter_watched__"

#: The right order of the decorators, for errors.
_HOW: Final = '\n\n    @app.task\n    @throttle("100/m")\n    def send_email(to): ...\n'

#: The seconds that a job may wait for a few missing tokens, if it was sent back before and has come at its
#: scheduled time.
_LAST_WAIT: Final = 0.5

#: For each running request: the limits that are paid and whose decorator is not entered yet. Kept beside
#: the request, since an inline call copies the request and retry() sends its contents.
_prepaid: WeakKeyDictionary[Any, set[Limit]] = WeakKeyDictionary()


def throttle(
    bucket: AnyBucket | str,
    *,
    burst: float | None = None,
    initial: float | None = None,
    tokens: AnyCost = 1,
    key: AnyKey | None = None,
    when_limited: str | Callable[..., Any] = "wait",
    timeout: float | None = None,
    max_wait: float | None = None,
    shadow: bool = False,
    name: str | None = None,
    buckets: Iterable[Bucket] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Limit the rate of a task. Stands below ``@app.task``::

        @app.task
        @throttle("100/m")
        def send_email(to): ...

    Args:
        bucket: The bucket to take tokens from. Or a rate: tokens per second, minute, hour or day, as in
            ``"5/s"``, ``"100/m"``, ``"2/h"``, ``"1000/d"``; it makes a `TokenBucket`, or with ``key`` a
            `BucketPerKey`. Or a callable that returns the bucket, for example that of
            the customer's tier. It is given exactly the arguments that the producer sent, never ``self``; and
            the headers of the message, if it has a keyword-only parameter ``headers``.
        burst: With a rate, the capacity of the bucket, in tokens. The default is what the
            rate gives in 0.1 s, at least 1, and at least what a job costs. There is no default if the
            cost depends on the job.
        initial: With a rate, the tokens that the bucket starts with, from 0 to ``burst``. By default it is full.
            With 0 a worker that starts brings no burst, where 20 new workers would bring 20. With ``key``: as
            in `BucketPerKey`.
        tokens: What a job costs: a number above 0, at most the bucket's capacity. Or the name of a
            parameter: the cost is that argument, as it was sent by position or by keyword, or else its
            default. Or a callable that returns the cost, with the same arguments as one for ``bucket``.
        key: With a `BucketPerKey` or a rate: the name of the parameter whose value picks the bucket. Or a
            callable that returns the key, with the same arguments as one for ``bucket``.
        when_limited: What happens when the tokens are not there.

            - ``"wait"``: the job waits. In the decorator it occupies its pool slot meanwhile, and its
              time limits count the wait. At the gate it does neither.
            - ``"retry"``: the job goes back to the broker and is delivered again when its tokens are
              due. This does not count as a retry. An inline or eager call raises `RateLimitExceeded`.
            - ``"raise"``: `RateLimitExceeded` with ``retry_after`` (seconds) is the task's result.
            - ``"drop"``: the job ends as a revoked job does; ``.get()`` raises ``TaskRevokedError``.
            - a callable: it is called with the job's arguments instead of the task.
        timeout: With ``"wait"``, the most seconds to wait in the decorator. If the tokens come later, the
            task's result is `RateLimitExceeded`, at once if the forecast says so. A limit with a timeout
            is always enforced in the decorator.
        max_wait: The most seconds that a job waits, at the gate and in the decorator: 0 or more. If its tokens
            come later, it ends as ``when_limited`` says, with ``"wait"`` as with ``"raise"``; at once if
            the forecast says so. It then costs nothing. With a policy other than ``"wait"`` jobs do not
            wait at all unless ``max_wait`` is given.
        shadow: To try a limit in production. With ``True`` it makes no job wait and refuses none. It only
            counts, shows and signals the jobs that it would have made wait, or refused. It needs a bucket of
            its own: with the bucket of a limit without ``shadow``, jobs of that limit would wait for tokens
            that the trial took.
        name: The name of the limit in logs, commands and errors. Each limit of an app needs another. By default
            the name of the task.
        buckets: All buckets that a callable for ``bucket`` may return. A prefork pool needs them if there
            is no `Gate`.

    Returns:
        The decorator.

    Raises:
        TypeError: The decorated object is not a plain function, or an argument has the wrong type.
        ValueError: An argument has an impossible value, such as a cost above the capacity, or the name of
            a parameter that the function does not have.

    Every execution pays: a retry, a redelivery, and an inline ``task()`` or ``task.run()`` too. A task can
    settle its cost (`current_charge`). A task that raises `RetryAfter` pauses its bucket.

    The limit is one rate for the worker, in every pool: before a prefork pool forks, the bucket moves to
    shared memory. Two kinds of buckets cannot be shared, and need a `Gate` in a prefork pool: a
    `BucketPerKey` in memory, and a bucket that a callable returns and ``buckets`` does not name. If pool
    processes are spawned, every limit needs a `Gate`. Without it the worker refuses to start.

    """
    _refuse_what_is_decorated(bucket, sys._getframe(1))
    limit = new_limit(
        bucket,
        burst=burst,
        initial=initial,
        tokens=tokens,
        key=key,
        when_limited=when_limited,
        timeout=timeout,
        max_wait=max_wait,
        shadow=shadow,
        name=name,
        buckets=buckets,
        fallback=True,
    )

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        _refuse_what_is_not_a_function(function)
        # Celery's check of a caller's arguments does not follow __wrapped__.
        signature = inspect.signature(function)
        parameters = Parameters(signature)
        _check_function(limit, function, parameters)

        @functools.wraps(function)
        def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            return cast("R", _run(limit, function, parameters, args, kwargs))

        limited.__signature__ = signature  # type: ignore[attr-defined]
        setattr(limited, LIMITS, (limit, *getattr(function, LIMITS, ())))
        return limited

    return decorate


def watch(task: Task, limits: Iterable[Limit] = ()) -> None:
    """Wrap the body of a task that only the gate limits: its jobs obey the receipt, inline calls pay.

    Args:
        task: The task.
        limits: The limits that the gate enforces for the task from any queue. An execution without a
            receipt pays them here: an inline call, or an element of ``chunks`` or ``starmap``.

    """
    at_gate[task] = tuple(limit for limit in limits if limit not in limits_of(task))
    # With autoretry_for, task.run is Celery's (celery/app/autoretry.py): it would retry RetryAfter.
    body = "_orig_run" if hasattr(task, "_orig_run") else "run"
    run = getattr(task, body)
    if limits_of(task) or hasattr(run, _WATCHED):
        return

    @functools.wraps(run)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if not enabled(task.app):
            return run(*args, **kwargs)
        return _begin(
            task, None, run, args, kwargs, _Sent(_without_self(args), kwargs, parameters_of(task))
        )

    setattr(watched, _WATCHED, True)
    setattr(task, body, watched)


def watch_late(task: Task, limits: Iterable[Limit], hostname: str) -> None:
    """`watch` a task that may not have been known as its worker started. Celery has made its tracer by now.

    Args:
        task: The task.
        limits: As in `watch`.
        hostname: The name of the worker.

    """
    before = task.run
    watch(task, limits)
    if task.run != before:
        renew_tracer(task, hostname)


def renew_tracer(task: Task, hostname: str) -> None:
    """Make Celery's tracer of a task again: it calls the body that the task had when it was made."""
    task.__trace__ = build_tracer(task.name, task, task.app.loader, hostname, app=task.app)


def watch_all(gate: Any, tasks_of: Mapping[Limit, Iterable[str]]) -> list[Task]:
    """`watch` the tasks that a gate limits, as its ``tasks_of()`` names them; return them."""
    names = sorted({name for names in tasks_of.values() for name in names})
    tasks = [gate.app.tasks[name] for name in names]
    for task in tasks:
        watch(task, gate.limits_for(task))
    return tasks


def _refuse_what_is_decorated(bucket: Any, caller: FrameType) -> None:
    """Refuse a function or a task where a bucket is to be: the parentheses were forgotten."""
    if _is_task(bucket):
        raise TypeError(f"@throttle is given a rate or a bucket, and stands below @app.task:{_HOW}")
    # A callable that returns a bucket is a function too. A function that is being decorated differs in one
    # way: its caller's code defines it, and executes one of the function's lines now.
    function = inspect.unwrap(bucket) if inspect.isfunction(bucket) else None
    if function is None or function.__name__ == "<lambda>":
        return
    code = function.__code__
    last = max((line for *_, line in code.co_lines() if line), default=code.co_firstlineno)
    if any(constant is code for constant in caller.f_code.co_consts) and (
        code.co_firstlineno <= caller.f_lineno <= last
    ):
        raise TypeError(
            f"@throttle is given a rate or a bucket, not the function {function.__qualname__}; write:{_HOW}"
        )


def _refuse_what_is_not_a_function(function: Any) -> None:
    if _is_task(function):
        raise TypeError(
            "@throttle stands below @app.task, not above it: it limits the function, not the task:"
            f"{_HOW}"
        )
    if not inspect.isfunction(function):
        raise TypeError(f"@throttle decorates a function, not {function!r}; write:{_HOW}")
    refuse_async(function, function.__qualname__)


def _is_task(it: Any) -> bool:
    # isinstance() would evaluate a Proxy, so its type is looked at first.
    return issubclass(type(it), Proxy) or isinstance(it, Task)


def _check_function(limit: Limit, function: Any, parameters: Parameters) -> None:
    """Check a limit against the function that it decorates, and against the function's other limits."""
    whose = f"`{function.__qualname__}`"
    callers = parameters.without_first if parameters.names[:1] == ["self"] else parameters
    check_parameters(limit, callers, whose)
    names = Names()
    for each in (limit, *getattr(function, LIMITS, ())):
        if each.name:
            names.add(each, whose)


class _Sent(NamedTuple):
    """The arguments that the producer sent. They price the job."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: Parameters


def _run(
    limit: Limit,
    function: Callable[..., Any],
    parameters: Parameters,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Pay a limit of the decorator and call the function; or refuse it, as ``when_limited`` says."""
    given = _without_self(args)
    sent = _Sent(given, kwargs, parameters if given is args else parameters.without_first)
    task: Task | None = get_current_task()
    # Not the task's own limit: the function is called as a plain one, or by another task.
    if task is None or limit not in limits_of(task):
        return _pay_and_call((limit,), Charge(), None, None, function, args, kwargs, sent)
    if not enabled(task.app):
        return function(*args, **kwargs)
    return _begin(task, limit, function, args, kwargs, sent)


def _begin(
    task: Task,
    limit: Limit | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sent: _Sent,
) -> Any:
    """Enter a task's body, or one of the decorators around it.

    A job pays all limits of its task as it enters the outermost decorator, and then goes through the others
    once each without paying. A nested ``task.run()`` finds the request of the job that calls it, and pays
    for itself.
    """
    request = task.request
    prepaid = _prepaid.get(request)
    if prepaid is not None and limit in prepaid:
        prepaid.discard(limit)
        return _call(function, args, kwargs, Charge(), None)
    if prepaid is not None:
        due = [] if limit is None else [limit]
        if limit is None or limit is limits_of(task)[0]:
            due += at_gate.get(task, ())
        return _pay_and_call(due, Charge(), task, None, function, args, kwargs, sent)
    # A worker has named them at its start. This may be a call outside of a worker.
    if not all(record_of(each).name for each in limits_of(task)):
        name_limits(task)
    _prepaid[request] = prepaid = set(limits_of(task))
    prepaid.discard(limit)
    receipt = consume(task, request)
    if receipt.error is not None:
        raise receipt.error
    if receipt.refused is not None:
        name, delay, fallback = receipt.refused
        if fallback is not None:
            return fallback(*_without_self(args), **kwargs)
        raise RateLimitExceeded(f"rate limit exceeded: {name}", delay)
    if request.args is not None:
        # With pydantic=True the function gets models, made from the arguments that the producer sent.
        sent = sent._replace(args=tuple(request.args), kwargs=dict(request.kwargs or {}))
    charge = charge_of(task, receipt, sent.args, sent.kwargs)
    due = [each for each in (*limits_of(task), *at_gate.get(task, ())) if each not in charge]
    job = None if _is_inline(task) else task
    return _pay_and_call(due, charge, task, job, function, args, kwargs, sent)


def _pay_and_call(
    due: Iterable[Limit],
    charge: Charge,
    task: Task | None,
    job: Task | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sent: _Sent,
) -> Any:
    """Pay the limits that are due and call the function; or refuse it, as ``when_limited`` says.

    Args:
        due: The limits that were not paid at the gate.
        charge: What was paid at the gate.
        task: The task, if the function is called as one.
        job: The same, unless the call is an inline one.
        function: The function.
        args: Its arguments.
        kwargs: Its keyword arguments.
        sent: The arguments that the producer sent.

    """
    name = function.__qualname__ if task is None else task.name
    began = monotonic()
    try:
        demands = _price(due, name, sent, task and task.request)
        refused, slowest = _pay(demands, name, task and task.request)
    except BaseException:
        charge.give_back()
        raise
    if refused is not None:
        charge.give_back()  # what was paid at the gate
        demand, delay = refused
        tell("refused", name, demand, delay, demand.limit.policy)
        if callable(fallback := demand.limit.when_limited):
            return fallback(*_without_self(args), **kwargs)
        return refuse_in_task(demand, delay, record_of(demand.limit).name or name, job)
    paid = [demand for one in demands for demand in one]
    if paid:
        waited = 0.0 if slowest is None else monotonic() - began
        tell("admitted", name, paid, waited, slowest)
        if task is not None and task.app in gates:
            warn_of_private_buckets(name, [each for each in paid if held_at_gate(each.limit)])
    charge.add(paid)
    return _call(function, args, kwargs, charge, job)


def _call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    charge: Charge,
    job: Task | None,
) -> Any:
    """Call a function that is paid for. If it raises `RetryAfter`, pause its buckets and run the job again."""
    try:
        with charge.current():
            return function(*args, **kwargs)
    except RetryAfter as pause:
        seconds = float(pause.retry_after or 0.0)
        for limit in charge.pause(seconds):
            logger.warning(
                "Limit %s: paused for this job alone; its bucket is in the worker's main process",
                record_of(limit).name,
            )
        if job is None or job.request.is_eager:
            raise
        postpone(job, pause, seconds)
        # A Broadcast job on Redis has no queue to go back to: it runs again in its slot.
        charge.pay_again()
        return _call(function, args, kwargs, charge, job)


def _without_self(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[1:] if args and isinstance(args[0], Task) else args


def _is_inline(task: Task) -> bool:
    return bool(task.request.called_directly or len(task.request_stack) > 1)


def _price(limits: Iterable[Limit], name: str, sent: _Sent, request: Any) -> list[Sequence[Demand]]:
    """Return the demands of each limit for one call."""
    headers = request.headers if request is not None else None
    call = Call(f"task {name}", sent.args, sent.kwargs, headers, sent.parameters)
    demands: list[Sequence[Demand]] = []
    for limit in limits:
        try:
            demands.append(limit.demands(call))
            refuse_to_pay_twice([demand.bucket for one in demands for demand in one], f"`{name}`")
        except Exception as error:
            tell("failed", name, limit, error)
            raise
    return demands


def _pay(
    each: Sequence[Sequence[Demand]], name: str, request: Any
) -> tuple[tuple[Demand, float] | None, Limit | None]:
    """Take the tokens of all limits, or of none.

    Args:
        each: The demands of each limit.
        name: What to call the job.
        request: ``task.request``, if there is a task.

    Returns:
        The demand that was refused and its delay, if nothing was taken; and the limit that made the
        job wait the longest.

    Raises:
        RateLimitExceeded: The wait for a limit is, or would be, longer than its ``timeout`` or ``max_wait``.
        ValueError: A bucket can never grant its tokens.

    """
    eta = request.eta if request is not None else None
    with contextlib.ExitStack() as paid:
        waits = []
        taken: list[Demand] = []
        shadows: list[Demand] = []
        for one in each:
            limit = one[0].limit
            if limit.shadow:  # it counts a job when all others let it go
                shadows += one
            elif _waits(limit, request):
                waits.append((one, limit.max_wait if limit.timeout is None else limit.timeout))
            else:
                delay, refused = _take_or_delay(one, eta)
                if delay:
                    return (one[refused], delay), None
                taken += one
                paid.callback(give_back, one)
        try:
            slowest = wait_for_all(waits)
        except RateLimitExceeded as error:
            demand = error.demand  # type: ignore[attr-defined]
            if demand.limit.when_limited != "wait":
                return (demand, error.retry_after or 0.0), None
            tell("refused", name, demand, error.retry_after or 0.0, "timeout")
            raise
        except Exception as error:
            tell("failed", name, error.demand.limit, error)  # type: ignore[attr-defined]
            raise
        if slowest is not None:
            charge_refilled(taken)
        for demand in shadows:
            demand.bucket.wait(demand.tokens)
        paid.pop_all()
    return None, None if slowest is None else slowest.limit


def _waits(limit: Limit, request: Any) -> bool:
    """Whether a job that the limit refuses waits in its slot."""
    if limit.max_wait is not None:
        return True
    if limit.when_limited != "retry":
        return limit.when_limited == "wait"
    task = get_current_task()
    # "retry" sends a job back, but a Broadcast job on Redis has no queue to go back to: it waits.
    return bool(task and request and not _is_inline(task) and not has_queue(task, request))


def _take_or_delay(demands: Sequence[Demand], eta: Any) -> tuple[float, int]:
    """Take the tokens of one limit, or return the longest delay, and the position of its demand."""
    delay, refused = take_all_or_longest_delay(demands)
    if delay and eta and demands[0].limit.when_limited == "retry":
        # The job was sent back before and comes at its scheduled time. It waits for a few tokens that
        # are missing, so that it need not be sent back again.
        try:
            wait_for_all([(demands, _LAST_WAIT)])
        except RateLimitExceeded:
            return delay, refused
        return 0.0, 0
    return delay, refused
