"""Several buckets as one. All taking from several buckets at a time stands here.

Buckets on one Redis server are taken from in one call, and after all others, so that no refusal makes them give
back: see ``server``, ``take_together``, ``wait_together`` and ``check_together`` of `RedisTokenBucket`.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from time import monotonic
from typing import Any, NamedTuple, Protocol, TypeVar

from .bucket import Bucket, is_in_redis
from .checks import positive, timeout_seconds

__all__ = [
    "AllOf",
    "Demand",
    "charge_refilled",
    "give_back",
    "members",
    "take_all_or_delay",
    "take_all_or_longest_delay",
    "wait_for_all",
]


class Demand(Protocol):
    """Tokens to take from one bucket. Demands that are paid together are for different buckets."""

    @property
    def bucket(self) -> Bucket: ...  # noqa: D102
    @property
    def tokens(self) -> float: ...  # noqa: D102


AnyDemand = TypeVar("AnyDemand", bound=Demand)


class AllOf:
    """Several buckets as one: takes the tokens from all of them, or from none.

    It keeps the limit of each bucket: ``capacity + tokens_per_second * t`` in any span of ``t`` seconds.
    At most ten in any second, and at most 1,000 in any 24 hours (500 + 500)::

        AllOf(TokenBucket(5, 5), TokenBucket(500, 500 / 86400))

    A refusal by one bucket costs the others nothing. An ``AllOf`` is itself a `Bucket`.

    Args:
        buckets: At least one.

    Raises:
        TypeError: An argument is not a bucket.
        ValueError: There is no argument, or a bucket is named twice, be it inside another ``AllOf``.

    """

    def __init__(self, *buckets: Bucket) -> None:
        for bucket in buckets:
            if not isinstance(bucket, Bucket):
                raise TypeError(f"AllOf takes buckets, not {bucket!r}")
        if not buckets:
            raise ValueError("AllOf needs at least one bucket")
        self.buckets = buckets
        single = list(members(self))
        if len(set(single)) < len(single):
            raise ValueError(f"AllOf was given the same bucket twice, it would pay twice: {buckets!r}")
        for together in _by_server([_Share(bucket, 1) for bucket in single]):
            if len(together) > 1:
                single[together[0]].check_together([single[each] for each in together])  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"AllOf({', '.join(map(repr, self.buckets))})"

    @property
    def capacity(self) -> float:
        """The smallest capacity."""
        return min(bucket.capacity for bucket in self.buckets)

    @property
    def tokens_per_second(self) -> float:
        """The lowest rate."""
        return min(bucket.tokens_per_second for bucket in self.buckets)

    @property
    def tokens(self) -> float:
        """The lowest level: as many tokens are in every bucket now."""
        return min(bucket.tokens for bucket in self.buckets)

    def allow(self, tokens: float = 1) -> bool:
        """Take from all buckets now, or from none. See `TokenBucket.allow`."""
        number = positive("tokens", tokens, documented=True)
        try:
            return not take_all_or_delay(self._demands(number))[0]
        except ValueError:  # more than a capacity
            return False

    try_consume = allow

    def wait(self, tokens: float = 1, *, timeout: float | None = None) -> None:
        """Block until all buckets have granted the tokens. See `TokenBucket.wait`.

        It waits at one bucket after the other, at the slowest first, and keeps the tokens it has got.
        Each bucket serves its callers in order, and no two callers can block each other. Each bucket
        grants at its own rate; but if a later bucket stalls, several threads that already have the
        tokens of the earlier ones may return at the same time. ``timeout`` is in seconds of real time,
        also where a bucket has another clock; after it all tokens are given back.
        """
        wait_for_all([(self._demands(tokens), timeout)])

    def take_or_delay(self, tokens: float = 1) -> float:
        """Take from all buckets, or return the longest delay. See `TokenBucket.take_or_delay`."""
        return take_all_or_longest_delay(self._demands(tokens))[0]

    def refund(self, tokens: float) -> None:
        """Give back to all of them. See `TokenBucket.refund`."""
        give_back(self._demands(tokens))

    def charge(self, tokens: float) -> None:
        """Take from all of them without asking. See `TokenBucket.charge`."""
        for bucket in self.buckets:
            bucket.charge(tokens)

    def pause(self, seconds: float) -> None:
        """Pause all of them. See `TokenBucket.pause`."""
        for bucket in self.buckets:
            bucket.pause(seconds)

    def configure(
        self, *, capacity: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Raise ``TypeError``: an ``AllOf`` has no numbers of its own. Configure one of its buckets."""
        raise TypeError("AllOf has no capacity and no rate of its own: configure one of its buckets")

    def _demands(self, tokens: float) -> list["_Share"]:
        return [_Share(bucket, tokens) for bucket in members(self)]


class _Share(NamedTuple):
    bucket: Bucket
    tokens: float


def members(bucket: Bucket) -> Iterator[Bucket]:
    """Yield the bucket itself, or for an `AllOf` the buckets in it, however nested."""
    if isinstance(bucket, AllOf):
        for each in bucket.buckets:
            yield from members(each)
    else:
        yield bucket


def take_all_or_delay(demands: Sequence[Demand]) -> tuple[float, int]:
    """Take all tokens or none, and ask no bucket after the first that refuses.

    Returns:
        ``0.0`` and 0 if all were taken. Otherwise nothing is taken: the delay in seconds of the first
        bucket that refused, and its position.

    Raises:
        ValueError: As `TokenBucket.take_or_delay`. Nothing is taken.

    """
    taken: list[Demand] = []
    try:
        for together in _by_server(demands):
            delay, refused = _take_together(demands, together)
            if delay:
                return delay, refused
            taken += [demands[each] for each in together]
    finally:
        if len(taken) < len(demands):
            give_back(taken)
    return 0.0, 0


def take_all_or_longest_delay(demands: Sequence[Demand]) -> tuple[float, int]:
    """Take all tokens or none, and ask every bucket.

    Returns:
        ``0.0`` and 0 if all were taken. Otherwise nothing is taken: the longest delay in seconds, and
        the position of its bucket.

    Raises:
        ValueError: As `TokenBucket.take_or_delay`. Nothing is taken.

    """
    delays = _take_all_or_delays(demands)
    longest = max(delays)
    return longest, delays.index(longest)


def wait_for_all(
    waits: Iterable[tuple[Sequence[AnyDemand], float | None]],
) -> AnyDemand | None:
    """Block until the tokens of all groups are taken.

    A group that can be taken at once is taken, all of it or none. Then it waits at one bucket after the
    other and keeps the tokens it has got: at the slowest first, so that the other buckets keep their
    tokens for as long as possible.

    Args:
        waits: The groups: demands, and the most seconds of real time to wait for them; ``None``: no
            limit. The time of a group begins when the wait for its first bucket begins.

    Returns:
        The demand that it waited for first, the slowest; ``None``: it did not have to wait.

    Raises:
        RateLimitExceeded: As `TokenBucket.wait`, or the time is up. Nothing is taken: all tokens are
            given back, as after any other exception. The attribute ``demand`` of an exception is the
            demand whose bucket has raised it.
        ValueError: As `TokenBucket.wait`.

    """
    taken: list[AnyDemand] = []
    refused: list[tuple[float, list[AnyDemand], float | None]] = []
    demand: AnyDemand | None = None
    try:
        for demands, timeout in waits:
            most = None if timeout is None else timeout_seconds(timeout)
            demand = demands[0]
            delays = _take_all_or_delays(demands)
            if any(delays):
                order = sorted(range(len(demands)), key=delays.__getitem__, reverse=True)
                refused.append((max(delays), [demands[index] for index in order], most))
            else:
                taken += demands
        for _, slowest_first, most in sorted(refused, key=itemgetter(0), reverse=True):
            began, left = monotonic(), most
            for together in _by_server(slowest_first, last=False):
                group = [slowest_first[each] for each in together]
                demand = group[0]
                _wait_together(group, left)
                taken += group
                if most is not None:
                    left = max(0.0, most - (monotonic() - began))
        if refused:
            charge_refilled(taken[:-1])
    except BaseException as error:
        give_back(taken)
        error.demand = demand  # type: ignore[attr-defined]
        raise
    return max(refused, key=itemgetter(0))[1][0] if refused else None


def give_back(demands: Iterable[Demand]) -> None:
    """Refund tokens that were taken; also those of the other buckets, if the refund of one raises."""
    with contextlib.ExitStack() as refunds:
        for demand in demands:
            refunds.callback(demand.bucket.refund, demand.tokens)


def charge_refilled(demands: Iterable[Demand]) -> None:
    """Make tokens that were taken before a wait count as taken now.

    A bucket that has become full since then would hold fewer tokens if they were taken only now: the
    difference is charged.
    """
    for demand in demands:
        bucket: Any = demand.bucket
        tokens = demand.tokens
        if hasattr(bucket, "leave_room"):  # what it holds is known to its server alone
            bucket.leave_room(tokens)
            continue
        refilled = min(tokens, bucket.tokens + tokens - bucket.capacity)
        if refilled > 0.0:
            bucket.charge(refilled)


def _take_all_or_delays(demands: Sequence[Demand]) -> list[float]:
    """Take all tokens or none, ask every bucket, and return the delay of each."""
    delays = [0.0] * len(demands)
    taken: list[Demand] = []
    try:
        for together in _by_server(demands):
            delay, refused = _take_together(demands, together)
            if delay:
                delays[refused] = delay
            else:
                taken += [demands[each] for each in together]
    finally:
        if len(taken) < len(demands):
            give_back(taken)
    return delays


def _by_server(demands: Sequence[Demand], *, last: bool = True) -> list[list[int]]:
    """Return the positions of the demands: one by one, but those from buckets of one server together.

    Args:
        demands: The demands.
        last: Whether those of servers come last. If not, they come where the first of them stands.

    """
    if not any(is_in_redis(demand.bucket) for demand in demands):
        return [[position] for position in range(len(demands))]
    groups: dict[Any, list[int]] = {}
    for position, demand in enumerate(demands):
        bucket: Any = demand.bucket
        groups.setdefault(bucket.server if is_in_redis(bucket) else position, []).append(position)
    return sorted(groups.values(), key=lambda group: last and is_in_redis(demands[group[0]].bucket))


def _take_together(demands: Sequence[Demand], together: Sequence[int]) -> tuple[float, int]:
    """Take from one bucket, or from several of one server; return the delay and whose it is."""
    first = demands[together[0]]
    if len(together) == 1:
        return first.bucket.take_or_delay(first.tokens), together[0]
    delay, place = first.bucket.take_together([demands[each] for each in together])  # type: ignore[attr-defined]
    return delay, together[place]


def _wait_together(group: Sequence[Demand], timeout: float | None) -> None:
    if len(group) == 1:
        group[0].bucket.wait(group[0].tokens, timeout=timeout)
    else:
        group[0].bucket.wait_together(group, timeout)  # type: ignore[attr-defined]
