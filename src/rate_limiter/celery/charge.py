"""What a job was charged, and settling it once the true cost is known."""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from celery import Task
from celery._state import get_current_task

from ..bucket import Bucket
from ..checks import positive
from ..gating.limit import Demand, Limit
from ..gating.record import record_of
from ..gating.tally import tell
from ..shared_bucket import is_shared
from ..token_bucket import TokenBucket
from . import receipt
from .declarations import parameters_of
from .settings import enabled

__all__ = ["Charge", "collect", "confine", "current_charge"]

#: The charge of the execution that runs now.
_current: Final[ContextVar["Charge | None"]] = ContextVar("rate_limiter_charge", default=None)

#: Whether tasks run in processes that the gate does not run in.
_confined = False


class _Payment(NamedTuple):
    """So many tokens from each of these buckets, and whether they are the ones that were paid from."""

    tokens: float
    buckets: tuple[Bucket, ...]
    reachable: bool = True


class Charge:
    """What one execution of a job was charged.

    In a task, `current_charge` returns it::

        @app.task
        @throttle(tokens_per_minute, tokens=lambda prompt: estimate(prompt))
        def complete(prompt):
            answer = api.complete(prompt)
            current_charge().settle(answer.tokens_used)

    """

    def __init__(self) -> None:
        self._paid: dict[Limit, _Payment] = {}

    def __repr__(self) -> str:
        paid = ", ".join(
            f"{record_of(limit).name}: {paid.tokens:g}" for limit, paid in self._paid.items()
        )
        return f"<Charge {paid or 'nothing'}>"

    def __contains__(self, limit: Limit) -> bool:
        """Whether the limit was paid."""
        return limit in self._paid

    def __bool__(self) -> bool:
        """Whether anything was paid."""
        return bool(self._paid)

    def add(self, demands: Iterable[Demand]) -> None:
        """Note what was paid here."""
        for bucket, tokens, limit in demands:
            before = self._paid.get(limit)
            self._paid[limit] = _Payment(tokens, (*(before.buckets if before else ()), bucket))

    def tokens(self, limit: str | None = None) -> float:
        """Return what was charged, as settled so far.

        Args:
            limit: The name of one of several limits.

        Raises:
            LookupError: As `settle`.

        """
        chosen = self._find(limit)
        return self._paid[chosen].tokens if chosen is not None else 0.0

    def settle(self, actual: float, limit: str | None = None) -> None:
        """Correct the estimate: give back what was not used, or take what was used beyond it.

        Args:
            actual: What the job did cost, in tokens; 0 if it found nothing to do. It may be more than
                the capacity: the bucket then goes into debt, and grants nothing until that is paid off.
            limit: The name of the limit, where the job was charged for several.

        Raises:
            ValueError: ``actual`` is below 0, or is not finite.
            TypeError: ``actual`` is not a number.
            LookupError: The job was charged for several limits and ``limit`` does not say which, or
                there is none of that name.
            RuntimeError: The gate paid from a bucket in the worker's main process that this pool
                process cannot reach: one of a ``BucketPerKey``, or one that a callable returned and
                ``buckets=[…]`` does not name. (What `throttle` and ``Gate.limit`` are given as a
                ``TokenBucket`` can be reached from every pool.)

        It can be called again: what counts is the last figure. Where limits are lifted it does nothing.

        """
        amount = 0.0 if actual == 0 and not isinstance(actual, str) else positive("actual", actual)
        chosen = self._find(limit)
        if chosen is None:
            return
        paid = self._paid[chosen]
        if not paid.reachable:
            raise RuntimeError(
                f"limit {record_of(chosen).name}: this was paid in the worker's main process, from a bucket "
                "that a pool process cannot reach: settle() needs a TokenBucket that is declared as the bucket, "
                "or named in buckets=[…]"
            )
        for bucket in paid.buckets:
            if amount > paid.tokens:
                bucket.charge(amount - paid.tokens)
            elif amount < paid.tokens:
                bucket.refund(paid.tokens - amount)
        self._paid[chosen] = paid._replace(tokens=amount)
        if amount != paid.tokens:
            tell("given_back", chosen, paid.tokens - amount)

    def give_back(self) -> None:
        """Refund all of it, as far as that can be done from here: the job does not run."""
        for limit, paid in self._paid.items():
            if paid.reachable and paid.tokens:
                for bucket in paid.buckets:
                    bucket.refund(paid.tokens)
                tell("given_back", limit, paid.tokens)
        self._paid.clear()

    def pause(self, seconds: float) -> list[Limit]:
        """Pause every bucket it was paid from; return the limits whose buckets are out of reach."""
        for paid in self._paid.values():
            if paid.reachable:
                for bucket in paid.buckets:
                    bucket.pause(seconds)
        return [limit for limit, paid in self._paid.items() if not paid.reachable]

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Be the charge of what runs in the block; unless nothing was paid: then the caller's stays."""
        if not self:
            yield
            return
        before = _current.set(self)
        try:
            yield
        finally:
            _current.reset(before)

    def _find(self, name: str | None) -> Limit | None:
        if not self._paid:
            return None
        found = [limit for limit in self._paid if name in (None, record_of(limit).name)]
        if len(found) != 1:
            names = ", ".join(repr(record_of(limit).name) for limit in self._paid)
            raise LookupError(f"limit must be the name of one of the limits {names}, not {name!r}")
        return found[0]


def current_charge() -> Charge:
    """Return what the execution that runs now was charged. To be called in a task.

    Raises:
        RuntimeError: No task runs here, or nothing limits it. (Where limits are lifted, by
            ``rate_limiter_enabled``, and where a task that only the gate limits is called inline or
            eagerly, it is an empty charge instead.)

    """
    charge = _current.get()
    if charge is not None:
        return charge
    task = get_current_task()
    if task is None:
        raise RuntimeError("current_charge() is for the body of a task: no task runs here")
    if not enabled(task.app) or task.request.called_directly or task.request.is_eager:
        return Charge()
    raise RuntimeError(f"{task.name} was charged nothing: no limit is declared for it")


def collect(task: Task, what: receipt.Receipt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Charge:
    """Begin the charge of an execution with what the gate was paid for it."""
    charge = Charge()
    for limit, tokens in what.paid:
        buckets: tuple[Bucket, ...] = ()
        if limit.has_bucket or limit.buckets or not _apart():
            # The job has paid, so it runs, even if its bucket cannot be told any more.
            with contextlib.suppress(Exception):
                buckets = limit.buckets_of(
                    f"task {task.name}", args, kwargs, task.request.headers, parameters_of(task)
                )
        charge._paid[limit] = _Payment(tokens, buckets, bool(buckets) and all(map(_reachable, buckets)))
    return charge


def confine() -> None:
    """From now on, and in future children, tasks run in other processes than the gate."""
    global _confined  # noqa: PLW0603 - one per process, by design
    _confined = True


def _apart() -> bool:
    return _confined or receipt.is_spawned()


def _reachable(bucket: Bucket) -> bool:
    """Whether a task can reach what the gate takes from. An own class of the user's is believed to."""
    return not _apart() or is_shared(bucket) or not isinstance(bucket, TokenBucket)
