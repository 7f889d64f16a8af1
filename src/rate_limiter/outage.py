"""What a bucket does while it cannot ask its server: ``"open"``, ``"closed"`` or ``"local"``."""

import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import Final, Literal, get_args

from .token_bucket import TokenBucket

__all__ = ["Outages", "Policy", "ServerDownError", "StandIn", "check_policy"]

logger = logging.getLogger("rate_limiter")

Policy = Literal["open", "closed", "local"]
_POLICIES: Final[tuple[str, ...]] = get_args(Policy)

#: Seconds until what has failed is asked again, at first and at most.
_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 1.0

#: The shortest delay, in seconds, that a bucket with ``"closed"`` returns: the server is about to be asked.
_SHORTEST_DELAY: Final = 0.01


def check_policy(on_outage: object) -> None:
    """Raise ``ValueError`` if an ``on_outage`` is no `Policy`."""
    if on_outage not in _POLICIES:
        raise ValueError(
            f"on_outage must be one of {', '.join(map(repr, _POLICIES))}, not {on_outage!r}"
        )


class ServerDownError(Exception):
    """The server does not answer, or has an error for an answer. It never leaves the buckets."""


class Outages:
    """Whether a server answers, or one bucket of a server that does can be used.

    Args:
        what: What to call it in the log.
        server: Of a bucket: those of its server. They are outages of the bucket, too.

    """

    def __init__(self, what: str, server: "Outages | None" = None) -> None:
        self._what = what
        self._server = server
        self._lock = threading.Lock()
        self._pause = _PAUSE
        self._count = 0
        #: Until when it is not asked. ``None``: it answers.
        self._until: float | None = None

    @property
    def count(self) -> int:
        """How many outages there were."""
        return self._count if self._server is None else self._count + self._server.count

    @property
    def left(self) -> float:
        """The seconds until it is asked again; 0.0: it may be asked now."""
        until = self._until
        left = 0.0 if until is None else max(0.0, until - monotonic())
        return left if self._server is None else max(left, self._server.left)

    @property
    def is_down(self) -> bool:
        """Whether it has failed the last time."""
        return self._until is not None or (self._server is not None and self._server.is_down)

    def failed(self, error: Exception) -> None:
        """Take note that it has failed. The first time is logged."""
        with self._lock:
            first = self._until is None
            self._count += first
            self._pause = _PAUSE if first else min(2 * self._pause, _LONGEST_PAUSE)
            self._until = monotonic() + self._pause
        if first:
            logger.error(
                "%s does not answer: %s: %s. Until it does, each bucket there grants this process's share of its "
                "rate, or what its on_outage says"
                if self._server is None
                else "%s cannot be used: %s: %s. Until it can, it grants this process's share of its rate, or "
                "what its on_outage says",
                self._what,
                type(error).__name__,
                str(error).rstrip("."),  # most texts of redis-py end with one
            )

    def answered(self) -> None:
        """Take note that it has answered. The first time after an outage is logged."""
        if self._until is None:
            return
        with self._lock:
            was_down, self._until = self._until is not None, None
        if was_down:
            ended = "answers" if self._server is None else "can be used"
            logger.info("%s %s again", self._what, ended)

    def after_fork(self) -> None:
        """Forget the other threads of the parent, one of which may have held the lock."""
        self._lock = threading.Lock()


class StandIn:
    """Answers for one bucket during an outage.

    Args:
        policy: ``"open"``: all is granted. ``"closed"``: nothing is. ``"local"``: this process has its
            share of the rate.
        outages: Of the bucket.

    """

    def __init__(self, policy: Policy, outages: Outages) -> None:
        self._policy = policy
        self._outages = outages
        #: The share, and the outage that it is for.
        self._bucket: TokenBucket | None = None
        self._outage = 0
        #: The tokens that were granted and that the server does not know of.
        self._granted = 0.0
        self._lock = threading.Lock()

    def take_or_delay(self, tokens: float, share: Callable[[], TokenBucket]) -> float:
        """Take tokens, or return the seconds until that makes sense.

        Args:
            tokens: How many.
            share: Makes the bucket of this process's share, from the last known level.

        """
        if self._policy == "closed":
            return max(self._outages.left, _SHORTEST_DELAY)
        with self._lock:
            if self._policy == "local":
                bucket = self._share(share)
                if tokens <= bucket.capacity:
                    delay = bucket.take_or_delay(tokens)
                elif not (delay := max(0.0, -bucket.tokens) / bucket.tokens_per_second):
                    bucket.charge(tokens)  # more than a share holds at once: in its turn, in debt
                if delay:
                    return delay
            self._granted += tokens
        return 0.0

    def refund(self, tokens: float) -> None:
        """Give back what was just taken."""
        with self._lock:
            self._granted = max(0.0, self._granted - tokens)
            if self._bucket is not None:
                self._bucket.refund(tokens)

    def pause(self, seconds: float, share: Callable[[], TokenBucket]) -> None:
        """Grant nothing for some seconds, if it grants a share."""
        if self._policy == "local":
            with self._lock:
                self._share(share).pause(seconds)

    def resume(self) -> None:
        """End a pause."""
        with self._lock:
            if self._bucket is not None:
                self._bucket.resume()

    @property
    def has_granted(self) -> bool:
        """Whether the server does not know of tokens that were granted."""
        return self._granted > 0.0

    def take_granted(self) -> float:
        """Return the tokens that were granted and that the server does not know of; forget them."""
        with self._lock:
            granted, self._granted = self._granted, 0.0
        return granted

    def put_granted(self, tokens: float) -> None:
        """Remember granted tokens again: the server was not told of them."""
        with self._lock:
            self._granted += tokens

    def after_fork(self) -> None:
        """Begin in a forked child: the parent tells the server what it has granted."""
        self._lock = threading.Lock()
        self._granted, self._bucket = 0.0, None

    def _share(self, share: Callable[[], TokenBucket]) -> TokenBucket:
        if self._bucket is None or self._outage != self._outages.count:
            self._outage = self._outages.count
            self._bucket = share()
        return self._bucket
