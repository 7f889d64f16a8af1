"""Which jobs wait for which bucket, in what order, and when the next one may go.

Jobs wait first come, first served per bucket. A job of a lower priority counts as come 30 s later for each
step: urgent jobs go first, and none waits for ever behind them. A job with several limits takes from all
their buckets or from none. It waits in the queue of the bucket that refused it, at the place of its arrival: it
stands in nobody's way at the other buckets, and no later job overtakes it there for ever.

If bucket A can serve such a job and bucket B cannot yet, and waiting for B costs A no more tokens than
the job takes from it, the job claims A. A then serves no other job until this one has gone.

Where jobs that were let go may have to wait for a slot of a pool, a bucket lets only so many go as may
start at once (`unstarted`). The next one waits in its queue, without asking the bucket, until one of them
has started.

Nothing here asks a bucket before the moment that the bucket has forecast. A bucket that was refunded,
paused or configured in this process says so (`Holding.poke`); one that other processes change is
compared with its counter of changes twice a second; only a bucket class that offers neither is asked
again twice a second.
"""

import heapq
import itertools
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from ..all_of import take_all_or_delay
from ..bucket import Bucket
from .held import Arrival, Held, Queue, changes_of
from .limit import Demand, Limit
from .unstarted import Unstarted

__all__ = ["Holding"]

Job = TypeVar("Job")

#: Seconds after which a bucket is looked at again that cannot tell this process of every change.
_LOOK_AGAIN: Final = 0.5

#: Seconds after which a bucket is looked at again while its answer is out, where nothing wakes the caller.
_ANSWER: Final = 0.02

#: The "delay" of a job that waits until one that was let go before it has started.
_UNTIL_A_START: Final = 0.0

#: How many times buckets are asked in one call of `release`. The loop of a worker or consumer has
#: other work to do too.
_ASKS_AT_ONCE: Final = 50

#: A job gains one step of priority over those that come so many seconds later.
_STEP: Final = 30.0

#: Two numbers of tokens whose ratio is below this are the same but for rounding.
_EVEN: Final = 1.000001


class Holding(Generic[Job]):
    """Jobs that wait for tokens. It knows no Celery, kombu, broker or timer.

    Args:
        refuse: Called with a job, the demand and the delay, when a limit whose ``when_limited`` is not
            ``"wait"`` has no tokens for it. ``True``: that job is gone. ``False``: hold it.
        fail: Called with a job, its limit and the error, when its turn has come and a bucket raises,
            say because the job now costs more than the capacity. That job is gone.
        skip: Called with a job when its turn has come, before it takes tokens. ``True``: it is gone
            (revoked, expired) and costs nothing.
        hold: Called with a job that begins to wait, the demand that makes it wait, and the delay; 0.0:
            until a job that was let go before has started. ``nan``: the delay is not known yet.
        known: Called with a job that still waits, the demand and the delay, where ``hold`` was told ``nan`` and the
            delay is known now.
        poked: Called when a bucket that jobs wait for was changed, in the thread that changed it.
        is_unstarted: Tells of a job that was let go whether it is still to start. ``None``: jobs start when
            they are let go.

    """

    def __init__(
        self,
        *,
        refuse: Callable[[Job, Demand, float], bool],
        fail: Callable[["Held[Job]", Exception], None],
        skip: Callable[["Held[Job]"], bool] = lambda _held: False,
        hold: Callable[["Held[Job]", Demand, float], None] = lambda *_: None,
        known: Callable[["Held[Job]", Demand, float], None] = lambda *_: None,
        poked: Callable[[], None] = lambda: None,
        is_unstarted: Callable[[Job], bool] | None = None,
    ) -> None:
        self._refuse = refuse
        self._fail = fail
        self._skip = skip
        self._on_hold = hold
        self._on_known = known
        self._on_poke = poked
        self._unstarted = None if is_unstarted is None else Unstarted(is_unstarted)
        self._count = itertools.count()
        self._queues: dict[Bucket, Queue[Job]] = {}
        #: Queues by the moment of their next look. An entry is void if its queue has another moment.
        self._due: list[tuple[float, int, Queue[Job]]] = []
        #: Buckets that have said that they were changed.
        self._poked: deque[Bucket] = deque()
        #: The thread that takes from several buckets now, and refunds those that granted in vain.
        self._asks_in = 0
        #: How many jobs each limit makes wait, and for which of them that has changed. The caller empties it.
        self.held_by: Counter[Limit] = Counter()
        self.changed: set[Limit] = set()

    def __len__(self) -> int:
        return self.held_by.total()

    def all(self) -> list[Held[Job]]:
        """Return the jobs that are held, bucket by bucket."""
        return [held for queue in self._queues.values() for held in queue.jobs]

    def late(self, longest: float, at_most: float, now: float) -> list[Held[Job]]:
        """Return the jobs, in order, that have waited for long, and whose turn does not come soon.

        Args:
            longest: Those that have waited for so many seconds.
            at_most: A job that has, and whose turn comes within so many seconds of its arrival, is none of
                them: as forecast now, if no other job comes before it.
            now: The caller's clock.

        """
        late = []
        for queue in self._queues.values():
            turn = max(now, queue.forecast())
            rate = queue.bucket.tokens_per_second
            for held in queue.jobs:
                if held is not queue.jobs[0]:
                    turn += queue.takes(held) / rate
                end = held.since + at_most
                if held.since + longest <= now and (turn > end or now >= end):
                    late.append(held)
        return sorted(late, key=lambda held: held.arrival)

    @property
    def next_due(self) -> float | None:
        """The moment, by the caller's clock, at which `release` is to be called next."""
        if self._poked:
            return 0.0
        due = self._due
        while due and due[0][2].look != due[0][0]:
            heapq.heappop(due)
        return due[0][0] if due else None

    def due_of(self, bucket: Bucket) -> float:
        """Return the moment at which the first job that waits for a bucket may go. 0.0: none waits."""
        queue = self._queues.get(bucket)
        return queue.forecast() if queue is not None and queue.jobs else 0.0

    def poke(self, bucket: Bucket) -> None:
        """Note that a bucket was changed, so that `next_due` is now. Safe from any thread."""
        if self._asks_in != threading.get_ident():  # else it is given back what was just taken from it
            self._poked.append(bucket)
            self._on_poke()

    def offer(self, job: Job, demands: Sequence[Demand], now: float, steps_behind: int = 0) -> bool:
        """Let a job go at once, or hold or refuse it.

        Args:
            job: Anything.
            demands: What it is to take, and under which limits.
            now: The caller's clock, in seconds.
            steps_behind: How many steps of priority it stands behind most jobs. Below 0: in front.

        Returns:
            ``True``: it has taken its tokens and may go. ``False``: it is held, or was refused.

        Raises:
            ValueError: It can never be granted.

        """
        arrival = (now + _STEP * steps_behind, next(self._count))
        for demand in demands:
            queue = self._queues.get(demand.bucket)
            if queue is not None and not queue.serves(arrival):  # behind those who came before
                delay = max(math.ulp(now), queue.forecast() - now)
                if 0.0 < demand.limit.patience < math.inf:
                    wait = queue.turn(demand.tokens, arrival) - now
                    if wait > demand.limit.patience and self._refuse(job, demand, wait):
                        return False
                if queue.stopped:
                    delay = math.nan if queue.asks else _UNTIL_A_START
                self._hold(arrival, job, demands, demand, now, delay)
                return False
        if self._unstarted is not None:
            for demand in demands:
                if self._unstarted.stops(demand):
                    self._unstarted.forget_ended(demand.bucket)
                    if self._unstarted.stops(demand):
                        self._hold(arrival, job, demands, demand, now, _UNTIL_A_START)
                        return False
        delay, refused, changes = self._take_all(demands)
        if not delay:
            if self._unstarted is not None:
                self._unstarted.add(job, demands, now)
            return True
        self._hold(arrival, job, demands, demands[refused], now, delay, changes)
        return False

    def release(self, now: float, most: float = math.inf) -> list[Held[Job]]:
        """Return the jobs that may go now, in order. They have taken their tokens.

        It may leave some for its next call, which is then due at once: it asks buckets 50 times at most.

        Args:
            now: The caller's clock, in seconds.
            most: How many at most, for callers that run each job before they ask for the next.

        """
        released: list[Held[Job]] = []
        asks = 0
        while len(released) < most and asks < _ASKS_AT_ONCE:
            self._look_at_poked()
            look = self.next_due
            if look is None or look > now:
                break
            queue = heapq.heappop(self._due)[2]
            queue.look = math.nan  # no moment is set
            if queue.stopped:
                if queue.due > -math.inf and self._unstarted is not None and not queue.asks:
                    self._unstarted.forget_ended(queue.bucket)
                queue.stopped = False
            elif now < queue.due and queue.claimant is None and not queue.has_changed():
                self._schedule(queue, now, queue.due - now)
                continue
            while queue.jobs and queue.serves(queue.jobs[0].arrival, queue.jobs[0]):
                if len(released) >= most or asks >= _ASKS_AT_ONCE:
                    self._schedule(queue, now, 0.0)
                    break
                held = queue.jobs[0]
                asks += len(held.demands)
                if self._skip(held):
                    self._leave(held, now)
                    continue
                try:
                    delay, demand, changes = self._take(held, now)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is that job's
                    self._leave(held, now)
                    self._fail(held, error)
                    continue
                if delay is None:
                    self._leave(held, now)
                    released.append(held)
                    if self._unstarted is not None:
                        self._unstarted.add(held.job, held.demands, now)
                elif demand.bucket is not queue.bucket:
                    self._move(held, demand, now, delay, changes)
                elif self._refused(held, demand, delay, now):
                    self._leave(held, now)
                else:
                    queue.changes = changes
                    self._wait(queue, now, delay)
                    if delay and not held.told:
                        held.told = True
                        self._on_known(held, demand, delay)
                    self._give_up_claims(held, now, delay)
                    break
            self._drop_if_empty(queue)
        return released

    def started(self, job: Job, demands: Sequence[Demand], now: float) -> bool:
        """Note that a job that was let go starts now, or never will.

        Returns:
            Whether a job may go because of that: then `next_due` is now.

        """
        if self._unstarted is None:
            return False
        self._unstarted.started(job, demands, now)
        due = False
        for demand in demands:
            queue = self._queues.get(demand.bucket)
            if queue is not None and queue.stopped:
                due = True
                if queue.due > -math.inf:
                    queue.due = -math.inf
                    self._look(queue, 0.0)
        return due

    def unstarted(self) -> list[Job]:
        """Return the jobs that were let go and have not started, as far as known."""
        return [] if self._unstarted is None else self._unstarted.jobs()

    def demand_of(self, held: Held[Job]) -> Demand:
        """Return what a held job waits for."""
        return next(demand for demand in held.demands if demand.bucket is held.queue.bucket)

    def take_out(self, held: Held[Job], now: float) -> None:
        """Let a job go before its turn. It takes no tokens."""
        queue = held.queue
        first = queue.jobs[0] is held
        queue.remove(held)
        self._count_one(held.limit, -1)
        if first and queue.jobs:
            self._schedule(queue, now, 0.0)
        self._open_claims(held, now)
        self._drop_if_empty(queue)

    def clear(self) -> list[Held[Job]]:
        """Forget every job, and return those that are held."""
        forgotten = self.all()
        for held in forgotten:
            held.left = True
        for queue in list(self._queues.values()):
            self._drop(queue)
        self._due.clear()
        self._poked.clear()
        self.held_by.clear()
        self.changed.clear()
        if self._unstarted is not None:
            self._unstarted.clear()
        return forgotten

    def _look_at_poked(self) -> None:
        """Look now at the buckets that were changed. Not in `next_due`, which a signal handler may read."""
        while self._poked:
            queue = self._queues.get(self._poked.popleft())
            if queue is not None and queue.jobs:
                queue.changes = math.nan
                self._look(queue, 0.0)

    def _hold(
        self,
        arrival: Arrival,
        job: Job,
        demands: Sequence[Demand],
        demand: Demand,
        now: float,
        delay: float,
        changes: float = math.nan,
    ) -> None:
        """Hold a job that has just come, or refuse it."""
        told = delay
        if math.isnan(delay):  # an answer is out; it is looked at again when that has come
            delay = _UNTIL_A_START
        if delay <= demand.limit.patience or not self._refuse(job, demand, delay):
            held = Held(arrival, job, demands, now)
            held.asked = delay != _UNTIL_A_START
            held.told = not math.isnan(told)
            self._enqueue(held, demand, now, delay, changes)
            self._on_hold(held, demand, told)

    def _take(self, held: Held[Job], now: float) -> tuple[float | None, Demand, float]:
        """Take the tokens of a job whose turn has come; or return the delay, and who refused.

        And the counter of changes of the bucket that refused, from before it was asked.
        """
        for demand in held.demands if len(held.demands) > 1 else ():
            queue = self._queues.get(demand.bucket)
            if queue is not None and queue is not held.queue and not queue.serves(held.arrival, held):
                if queue.stopped:
                    return _UNTIL_A_START, demand, math.nan
                return max(math.ulp(now), queue.forecast() - now), demand, math.nan
        if (stopping := self._stopping(held)) is not None:
            return _UNTIL_A_START, stopping, math.nan
        held.queue.ask(True)
        delay, refused, changes = self._take_all(held.demands)
        if math.isnan(delay):
            return _UNTIL_A_START, held.demands[refused], changes
        return delay or None, held.demands[refused], changes

    def _stopping(self, held: Held[Job]) -> Demand | None:
        """Return the demand because of which a job waits until one that was let go has started."""
        if self._unstarted is None:
            return None
        return next(filter(self._unstarted.stops, held.demands), None)

    def _refused(self, held: Held[Job], demand: Demand, delay: float, now: float) -> bool:
        """Refuse a job whose turn has come, if its limit does not let it wait any longer.

        One whose limit lets it not wait at all is refused once: it is held if that cannot be done.
        """
        patience = demand.limit.patience
        if delay == _UNTIL_A_START or (held.asked and not patience):
            return False
        held.asked = True
        return now - held.since + delay > patience and self._refuse(held.job, demand, delay)

    def _take_all(self, demands: Sequence[Demand]) -> tuple[float, int, float]:
        if len(demands) == 1:
            bucket = demands[0].bucket
            changes = changes_of(bucket)
            return bucket.take_or_delay(demands[0].tokens), 0, changes
        before = [changes_of(demand.bucket) for demand in demands]
        self._asks_in = threading.get_ident()
        try:
            delay, refused = take_all_or_delay(demands)
        finally:
            self._asks_in = 0
        return delay, refused, before[refused]

    def _move(self, held: Held[Job], demand: Demand, now: float, delay: float, changes: float) -> None:
        """Let a job whose turn has come wait at another bucket, which has refused it."""
        left = held.queue
        if (
            delay != _UNTIL_A_START
            and now - held.since + delay > demand.limit.patience
            and self._refuse(held.job, demand, delay)
        ):
            self._leave(held, now)
            return
        self._unlink(held)
        first = self._enqueue(held, demand, now, delay, changes)
        self._give_up_claims(held, now, delay)
        if first and left.claimant is None and left.tells is None and _worth_it(held, left, delay):
            left.claimant = held
            held.claims.append(left)

    def _give_up_claims(self, held: Held[Job], now: float, delay: float) -> None:
        """Open what a job has claimed, where it has come to wait for longer than that is worth."""
        for queue in list(held.claims):
            if not _worth_it(held, queue, delay):
                held.claims.remove(queue)
                queue.claimant = None
                if queue.jobs:
                    self._schedule(queue, now, 0.0)
                self._drop_if_empty(queue)

    def _enqueue(
        self, held: Held[Job], demand: Demand, now: float, delay: float, changes: float
    ) -> bool:
        """Put a job into a bucket's queue, and tell whether it is the next one there."""
        bucket, held.limit = demand.bucket, demand.limit
        self._count_one(held.limit, 1)
        queue = self._queues.get(bucket)
        if queue is None:
            queue = self._queues[bucket] = Queue(bucket)
            if hasattr(bucket, "subscribe"):
                bucket.subscribe(self.poke)
                if delay != _UNTIL_A_START and changes_of(bucket) != changes:
                    # It was changed after it was asked and before it could tell.
                    self._poked.append(bucket)
        queue.insert(held)
        claimant = queue.claimant
        if claimant is not None and claimant.arrival > held.arrival:
            claimant.claims.remove(queue)
            claimant = queue.claimant = None
        first = claimant in (None, held) and queue.jobs[0] is held
        if first:  # the moment of the one that was first before may be too late
            queue.changes = changes
            self._wait(queue, now, delay)
        return first

    def _leave(self, held: Held[Job], now: float) -> None:
        """Take out the job whose turn it is, and open what it has claimed."""
        self._unlink(held)
        self._open_claims(held, now)

    def _open_claims(self, held: Held[Job], now: float) -> None:
        for queue in held.claims:
            queue.claimant = None
            if queue.jobs:
                self._schedule(queue, now, 0.0)
            self._drop_if_empty(queue)

    def _unlink(self, held: Held[Job]) -> None:
        assert held.queue.jobs[0] is held  # noqa: S101 - only the one whose turn has come leaves
        held.queue.remove(held)
        self._count_one(held.limit, -1)

    def _count_one(self, limit: Limit, step: int) -> None:
        count = self.held_by.get(limit, 0) + step
        if count:
            self.held_by[limit] = count
        else:
            del self.held_by[limit]
        self.changed.add(limit)

    def _drop_if_empty(self, queue: Queue[Job]) -> None:
        if not queue.jobs and queue.claimant is None and self._queues.get(queue.bucket) is queue:
            self._drop(queue)

    def _drop(self, queue: Queue[Job]) -> None:
        del self._queues[queue.bucket]
        if queue.tells is not None:
            queue.tells(0.0, ())
        if hasattr(queue.bucket, "unsubscribe"):
            queue.bucket.unsubscribe(self.poke)

    def _wait(self, queue: Queue[Job], now: float, delay: float) -> None:
        """Let a queue's first job wait for so long, or until a job that was let go has started."""
        if delay == _UNTIL_A_START:
            queue.stopped = True
            queue.ask(self._stopping(queue.jobs[0]) is None)  # then it waits for an answer
            queue.due = now + (_ANSWER if queue.asks else _LOOK_AGAIN)
            self._look(queue, queue.due)
        else:
            self._schedule(queue, now, delay)

    def _schedule(self, queue: Queue[Job], now: float, delay: float) -> None:
        queue.stopped = False
        queue.ask(True)
        # later than now, also where the delay vanishes in rounding
        queue.due = max(now + delay, math.nextafter(now, math.inf)) if delay else now
        self._look(queue, queue.due if queue.sees_all else min(queue.due, now + _LOOK_AGAIN))

    def _look(self, queue: Queue[Job], moment: float) -> None:
        queue.look = moment
        heapq.heappush(self._due, (moment, next(self._count), queue))


def _worth_it(held: Held[Any], queue: Queue[Any], delay: float) -> bool:
    """Tell whether a bucket that waits for a job loses no more than the job takes from it."""
    takes = sum(each.tokens for each in held.demands if each.bucket is queue.bucket)
    return delay * queue.bucket.tokens_per_second <= takes * _EVEN
