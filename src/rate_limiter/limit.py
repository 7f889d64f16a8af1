"""A limit: which bucket a job draws on, what it costs, and what happens when the tokens are not there.

The decorator and the gates share this: it checks a declaration where it is written, and prices a job
from its arguments. It knows neither Celery nor kombu.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from .bucket import Bucket
from .token_bucket import positive

__all__ = ["Limit", "Price"]

#: What may be asked of a bucket: all these tokens, each from its bucket, or none.
Price = tuple[Bucket, float]

POLICIES: Final = ("wait", "drop", "raise")


class Limit:
    """One declared limit.

    Args:
        bucket: A `Bucket`, or a callable that is given the job's arguments and returns one.
        tokens: The cost of a job: a number, or a callable that is given the job's arguments.
        when_limited: One of ``"wait"``, ``"drop"``, ``"raise"``, or a callable that is called instead.
        timeout: The most seconds that ``"wait"`` waits in the decorator.
        name: What logs and errors call the limit.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument has an impossible value, for one a cost above the capacity.

    """

    def __init__(
        self,
        bucket: Bucket | Callable[..., Bucket],
        *,
        tokens: float | Callable[..., float] = 1,
        when_limited: str | Callable[..., Any] = "wait",
        timeout: float | None = None,
        name: str = "",
    ) -> None:
        if isinstance(bucket, type) or not (isinstance(bucket, Bucket) or callable(bucket)):
            raise TypeError(
                "bucket must be a bucket such as TokenBucket(capacity=10, tokens_per_second=5), "
                f"or a callable that returns one, not {bucket!r}"
            )
        if not callable(when_limited) and when_limited not in POLICIES:
            raise ValueError(
                f"when_limited must be one of {', '.join(map(repr, POLICIES))} or a callable, "
                f"not {when_limited!r}"
            )
        if timeout is not None:
            if when_limited != "wait":
                raise ValueError(f"timeout goes with when_limited='wait', not {when_limited!r}")
            if timeout != 0:
                positive("timeout", timeout)
        self.bucket = bucket
        self.tokens = tokens
        self.when_limited = when_limited
        self.timeout = timeout
        self.name = name
        self._fixed: Price | None = None
        if not callable(tokens):
            cost = positive("tokens", tokens)
            if isinstance(bucket, Bucket):
                if cost > bucket.capacity:
                    raise ValueError(
                        f"tokens must be at most the bucket's capacity {bucket.capacity:g}, "
                        f"not {tokens!r}: such a job could never run"
                    )
                self._fixed = (bucket, cost)

    def __repr__(self) -> str:
        return f"<Limit {self.name or '(unnamed)'}: {self.bucket!r}>"

    def price(self, task: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Price:
        """Return the bucket that a job draws on, and its cost.

        Args:
            task: The task's name, for errors.
            args: The positional arguments that the producer sent.
            kwargs: The keyword arguments that the producer sent.

        Raises:
            ValueError: The price cannot be computed, or is one that can never be paid. The message
                names the task, the limit and the value; the job is to fail with it.

        """
        if self._fixed is not None:
            return self._fixed
        bucket = self.bucket
        if not isinstance(bucket, Bucket):
            bucket = self._ask("bucket", bucket, task, args, kwargs)
            if not isinstance(bucket, Bucket):
                raise ValueError(self._complaint("bucket", task, bucket, "a bucket"))
        tokens: Any = self.tokens
        if callable(tokens):
            tokens = self._ask("tokens", tokens, task, args, kwargs)
        try:
            cost = positive("tokens", tokens)
        except (TypeError, ValueError):
            raise ValueError(self._complaint("tokens", task, tokens, "a number above 0")) from None
        if cost > bucket.capacity:
            most = f"at most the capacity {bucket.capacity:g}"
            raise ValueError(self._complaint("tokens", task, tokens, most))
        return bucket, cost

    def _ask(
        self,
        argument: str,
        function: Callable[..., Any],
        task: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            # Only the text of the error: its object may not survive the result backend.
            raise ValueError(
                f"task {task}, limit {self.name or task}: {argument}=… raised {error!r}"
            ) from error

    def _complaint(self, argument: str, task: str, value: Any, expected: str) -> str:
        return f"task {task}, limit {self.name or task}: {argument} is {value!r}, expected {expected}"
