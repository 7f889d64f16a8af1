"""The thread that asks a Redis for all gates of this process.

One call at a time is out to each server. It brings what all held jobs need next, bucket by bucket, with the moment at
which there will be more.
"""

import heapq
import itertools
import logging
import math
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from .redis_server import ERRORS, Server

if TYPE_CHECKING:
    from .redis_gate_bucket import GateBucket

__all__ = ["Asker", "asker_of"]

logger = logging.getLogger("rate_limiter")

#: A batch is what the rate gives this process in so many seconds, or in two round trips if these take longer.
_SPAN: Final = 0.05

#: How often it is asked, in seconds, whether somebody has changed a bucket on the server.
_LOOK: Final = 1.0

#: Seconds after which an answer is overdue.
_OVERDUE: Final = 0.55

#: So many void entries of the heap are left in it.
_VOID: Final = 10

#: The most buckets in one call.
_MOST: Final = 100


class Asker:
    """Asks one server for the buckets of this process.

    Args:
        server: The server.

    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._changed = threading.Condition(threading.Lock())
        self._needed: dict[GateBucket, None] = {}
        #: When something is to be asked for a bucket. An entry is void if its bucket has another moment.
        self._later: list[tuple[float, int, GateBucket]] = []
        self._moments: dict[GateBucket, float] = {}
        self._count = itertools.count()
        self._thread: threading.Thread | None = None
        #: Those that wait for a promised moment. What has changed on the server may be for them.
        self._waiting: set[GateBucket] = set()
        self._look_at = 0.0
        #: When the call that is out was sent, and the seconds that calls have taken.
        self._sent: float | None = None
        self._took = 0.0

    def is_overdue(self, now: float) -> bool:
        """Tell whether an answer is overdue: a look-up of the server's name has no timeout."""
        sent = self._sent
        return sent is not None and now - sent > _OVERDUE

    def note(self, bucket: "GateBucket", *, waits: bool) -> None:
        """Take note whether a bucket waits for a promised moment."""
        if waits:
            self._waiting.add(bucket)
        else:
            self._waiting.discard(bucket)

    def need(self, bucket: "GateBucket") -> None:
        """Have something asked for a bucket soon."""
        with self._changed:
            self._needed[bucket] = None
            self._start()
            self._changed.notify()

    def need_at(self, moment: float, bucket: "GateBucket") -> None:
        """Have something asked for a bucket at a moment, if not before."""
        with self._changed:
            if self._moments.get(bucket, math.inf) <= moment:
                return
            self._moments[bucket] = moment
            if len(self._later) > 2 * len(self._moments) + _VOID:
                self._later = [(at, next(self._count), each) for each, at in self._moments.items()]
                heapq.heapify(self._later)
            else:
                heapq.heappush(self._later, (moment, next(self._count), bucket))
            self._start()
            self._changed.notify()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rate_limiter redis", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            due = self._due()
            try:
                if due:
                    self._ask(due)
                else:
                    self._look()
            except Exception:
                logger.exception("The thread that asks Redis at %s goes on", self._server.where)
                time.sleep(1.0)
            finally:
                self._sent = None

    def _due(self) -> "list[GateBucket]":
        """Wait until something is to be asked; return for which buckets. None: for a change of any bucket."""
        with self._changed:
            while True:
                now = time.monotonic()
                while self._later and self._later[0][0] <= now:
                    moment, _, bucket = heapq.heappop(self._later)
                    if self._moments.get(bucket) == moment:
                        del self._moments[bucket]
                        self._needed[bucket] = None
                outage = self._server.outages.left
                if self._waiting and now >= self._look_at and not outage:
                    return []  # time for a look
                if self._needed and not outage:
                    asked = (bucket for bucket in self._needed if not bucket.outage_left)
                    if due := list(itertools.islice(asked, _MOST)):
                        for bucket in due:
                            del self._needed[bucket]
                        return due
                    outage = min(bucket.outage_left for bucket in self._needed)
                until = self._later[0][0] - now if self._later else math.inf
                if self._waiting:
                    until = min(until, max(self._look_at - now, self._server.outages.left))
                if self._needed:
                    until = min(until, outage)
                self._changed.wait(None if until == math.inf else max(until, 1e-4))

    def _ask(self, due: "list[GateBucket]") -> None:
        server = self._server
        span = max(_SPAN, 2 * self._took)
        questions = [(bucket, asked) for bucket in due if (asked := bucket.question(span))]
        if not questions:
            return
        sent = self._sent = time.monotonic()
        replies: list[Any]
        try:
            replies = server.run_all([question for _, question in questions])
        except Exception as error:
            if not isinstance(error, ERRORS):
                logger.exception("Redis at %s cannot be asked", server.where)
            server.outages.failed(error)
            replies = [error] * len(questions)
        now = self._sent = time.monotonic()
        self._took += (min(now - sent, 1.0) - self._took) / 8
        for (bucket, question), reply in zip(questions, replies, strict=True):
            try:
                if isinstance(reply, Exception):
                    raise reply
                bucket.answer(sent, question, reply)
            except Exception as error:  # noqa: BLE001 - or the bucket would be asked for no more
                if not server.outages.left:  # else it is known already that the server is down
                    server.failed(question, error)
                bucket.failed(question)
                self.need(bucket)
                continue
            if not server.outages.left:
                server.answered(question)
                for state in question.states:
                    state.tell_rest()

    def _look(self) -> None:
        """Ask whether somebody has changed a bucket; if so, look at each that somebody waits for."""
        self._sent = time.monotonic()
        self._look_at = self._sent + _LOOK
        if self._server.has_changed():
            for bucket in list(self._waiting):
                bucket.look()


def asker_of(server: Server) -> Asker:
    """Return what asks a server for the gates of this process."""
    if server.asker is None:
        server.asker = Asker(server)
    return server.asker  # type: ignore[no-any-return]
