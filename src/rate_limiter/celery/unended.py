"""Jobs that are to end and cannot: the result backend or the broker is down. It is tried again each second.

Until then they stay unacknowledged, so the broker has them still.
"""

import logging
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Final

from ..gating.engine import Engine

__all__ = ["Unended"]

logger = logging.getLogger("rate_limiter")

#: Seconds until it is tried again.
_AGAIN: Final = 1.0


class Unended:
    """Ends the jobs of one worker.

    Args:
        engine: The gate's engine. It counts jobs that are not acknowledged yet.
        look: Called when the moment in `due` has become an earlier one.

    """

    def __init__(self, engine: Engine[Any], look: Callable[[], None]) -> None:
        self._engine = engine
        self._look = look
        self._unended: deque[Callable[[], Any]] = deque()
        self._again_at = 0.0

    def __bool__(self) -> bool:
        """Whether there are such jobs."""
        return bool(self._unended)

    @property
    def due(self) -> float:
        """The moment, by the monotonic clock, at which `work` is to be called; infinite: never."""
        return self._again_at if self._unended else math.inf

    def end(self, request: Any, end: Callable[[], Any], *, later: bool = False) -> bool:
        """End a job; or go on, and try again later, where that fails.

        Args:
            request: The job.
            end: Ends it. It returns ``False`` if the job is not to end.
            later: Do not try now.

        """
        ended = True
        try:
            if not later:
                ended = end() is not False
        except Exception:
            logger.exception("Could not end %s[%s] yet", request.name, request.id)
            later = True
        if later:
            self.later(partial(self._end_kept, request, end))
            self._look()
        if ended and not request.acknowledged:
            self._engine.room.keep(request)
        return ended

    def later(self, end: Callable[[], Any]) -> None:
        """Call a function in a second that ends a job, and then each second, until it does not raise."""
        with self._engine.lock:
            self._unended.append(end)
            if len(self._unended) == 1:
                self._again_at = monotonic() + _AGAIN

    def acknowledged(self, request: Any) -> None:
        """Make use of the room that a job took up which is acknowledged now."""
        if self._engine.room.let_go(request):
            self._engine.settle()

    def work(self) -> None:
        """End what could not be ended, if it is time; at the first that fails, leave the others for the next time."""
        if self.due > monotonic():
            return
        for _ in range(len(self._unended)):
            end = self._unended.popleft()
            try:
                end()
            except Exception:  # noqa: BLE001 - it has been logged
                self.later(end)
                break
        self._again_at = monotonic() + _AGAIN

    def clear(self) -> None:
        """Forget all jobs, with their connection: they are the broker's again."""
        self._unended.clear()

    def _end_kept(self, request: Any, end: Callable[[], Any]) -> None:
        end()
        if request.acknowledged:
            self.acknowledged(request)
