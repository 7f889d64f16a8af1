"""What a job was charged, and settling it once the true cost is known."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from mmap import mmap
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from celery import Task
from celery._state import get_current_task

from ..bucket import Bucket, is_in_redis
from ..checks import zero_or_more
from ..gating.limit import Call, Demand, Limit
from ..gating.record import record_of
from ..gating.tally import tell
from ..shared_bucket import is_shared
from ..token_bucket import TokenBucket
from . import receipt
from .declarations import parameters_of
from .settings import enabled

__all__ = ["Charge", "charge_of", "current_charge", "note_pool_processes", "warn_of_private_buckets"]

logger = logging.getLogger("rate_limiter")

#: The charge of the execution that runs now.
_current: Final[ContextVar["Charge | None"]] = ContextVar("rate_limiter_charge", default=None)

#: Whether tasks run in pool processes, and the gate in another one.
_has_pool_processes = False

#: For each limit a byte: whether the warning of `warn_of_private_buckets` was logged.
_warned: Final[WeakKeyDictionary[Limit, Any]] = WeakKeyDictionary()


class _Payment(NamedTuple):
    """Tokens that were taken from each of some buckets.

    ``reachable`` tells whether these are the buckets that were paid from, or copies in another process.
    """

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
        """Add demands that were paid."""
        for bucket, tokens, limit in demands:
            before = self._paid.get(limit)
            self._paid[limit] = _Payment(tokens, (*(before.buckets if before else ()), bucket))

    def tokens(self, limit: str | None = None) -> float:
        """Return the tokens that were charged, as settled so far.

        Args:
            limit: The name of the limit, if the job was charged for several.

        Raises:
            LookupError: As `settle`.

        """
        chosen = self._find(limit)
        return self._paid[chosen].tokens if chosen is not None else 0.0

    def settle(self, actual: float | str, limit: str | None = None) -> None:
        """Correct the estimate: refund tokens that were not used, or charge those used beyond it.

        Args:
            actual: The true cost, in tokens: a number, or a number in text. 0 if the job found nothing
                to do. It may be more than the capacity: the bucket then goes into debt, and grants
                nothing until that is paid off. Anything else (``None`` from a remote that does not say,
                NaN, a number below 0) is logged as a warning and settles nothing: the work is done, and
                the job must not fail because of it.
            limit: The name of the limit, if the job was charged for several.

        Raises:
            LookupError: The job was charged for several limits and ``limit`` does not say which, or
                there is none of that name.
            RuntimeError: The gate paid from a bucket in the worker's main process that this pool
                process cannot reach: one of a ``BucketPerKey`` outside Redis, or one that a callable
                returned and ``buckets=[…]`` does not name. (What `throttle` and ``Gate.limit`` are given as a
                ``TokenBucket`` can be reached from every pool.)

        It can be called again: the last figure counts. It does nothing while limits are lifted.

        """
        chosen = self._find(limit)
        if chosen is None:
            return
        try:
            amount = zero_or_more("actual", float(actual) if isinstance(actual, str) else actual)
        except (TypeError, ValueError) as error:
            logger.warning("Limit %s: settle(): %s: the estimate stays", record_of(chosen).name, error)
            return
        paid = self._paid[chosen]
        if not paid.reachable:
            raise RuntimeError(
                f"limit {record_of(chosen).name}: this was paid in the worker's main process, from a bucket "
                "that a pool process cannot reach: settle() needs a TokenBucket that is declared as the "
                "bucket, or named in buckets=[…]"
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
        """Refund what was paid, from the buckets that can be reached from here: the job does not run."""
        for limit, paid in self._paid.items():
            if paid.reachable and paid.tokens:
                for bucket in paid.buckets:
                    bucket.refund(paid.tokens)
                tell("given_back", limit, paid.tokens)
        self._paid.clear()

    def pause(self, seconds: float) -> list[Limit]:
        """Pause the buckets that were paid from; return the limits whose buckets cannot be reached."""
        for paid in self._paid.values():
            if paid.reachable:
                for bucket in paid.buckets:
                    bucket.pause(seconds)
        return [limit for limit, paid in self._paid.items() if not paid.reachable]

    def pay_again(self) -> None:
        """Wait for the same tokens again, from the buckets that can be reached from here."""
        for paid in self._paid.values():
            if paid.reachable and paid.tokens:
                for bucket in paid.buckets:
                    bucket.wait(paid.tokens)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make this what `current_charge` returns in the block. An empty charge leaves the caller's there."""
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
    """Return the charge of the execution that runs now. Call it in the body of a task.

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


def charge_of(
    task: Task, decided: receipt.Receipt, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Charge:
    """Return the charge of an execution that begins: what was paid for it at the gate."""
    charge = Charge()
    for limit, tokens in decided.paid:
        buckets: tuple[Bucket, ...] = ()
        in_reach = limit.has_bucket or limit.buckets or is_in_redis(limit.bucket)
        if in_reach or not _gate_is_elsewhere():
            # The job has paid, so it runs, even if its bucket cannot be found any more.
            with contextlib.suppress(Exception):
                call = Call(
                    f"task {task.name}", args, kwargs, task.request.headers, parameters_of(task)
                )
                buckets = limit.buckets_of(call)
        charge._paid[limit] = _Payment(
            tokens, buckets, bool(buckets) and all(map(_is_shared_with_gate, buckets))
        )
    return charge


def note_pool_processes(limits: Iterable[Limit]) -> None:
    """Note that tasks run in pool processes, not in the gate's. Forked children inherit this.

    Args:
        limits: The limits that tasks may pay.

    """
    global _has_pool_processes  # noqa: PLW0603 - one per process, by design
    _has_pool_processes = True
    private = [limit for limit in limits if not isinstance(limit.bucket, Bucket)]
    memory = memoryview(mmap(-1, len(private) + 1))  # all processes of the pool share it
    for place, limit in enumerate(private):
        _warned[limit] = memory[place : place + 1]


def warn_of_private_buckets(name: str, demands: Iterable[Demand]) -> None:
    """Warn, once for each limit, that a pool process took from a bucket of its own, not from the gate's.

    Args:
        name: The name of the task.
        demands: What it has paid.

    """
    for limit in [demand.limit for demand in demands if not _is_shared_with_gate(demand.bucket)]:
        warned = _warned.setdefault(limit, bytearray(1))
        if not warned[0]:
            warned[0] = 1
            logger.warning(
                "Limit %s: calls of %s that are no jobs of their own (inline, chunks, map, starmap) take from a "
                "bucket of their pool process, which the gate does not see: they have one rate per pool "
                "process. Use the threads pool, or send each call as a job%s",
                record_of(limit).name,
                name,
                "" if limit.key is not None else ", or name the buckets in buckets=[…]",
            )


def _gate_is_elsewhere() -> bool:
    return _has_pool_processes or receipt.is_spawned()


def _is_shared_with_gate(bucket: Bucket) -> bool:
    """Whether the task's process sees the bucket that the gate takes from. A user's class counts as seen."""
    if not _gate_is_elsewhere() or not isinstance(bucket, TokenBucket):
        return True
    return is_shared(bucket) and not receipt.is_spawned()
