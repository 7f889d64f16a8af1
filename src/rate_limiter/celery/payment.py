"""One bucket is paid once for a job."""

from collections.abc import Iterable
from typing import Any

from ..bucket import AllOf

__all__ = ["refuse_to_pay_twice"]


def refuse_to_pay_twice(buckets: Iterable[Any], task: str) -> None:
    """Check that no bucket stands among the others twice, in an `AllOf` neither.

    A job could never take from a bucket twice that holds enough for once only: it would be held for
    ever.

    Raises:
        ValueError: One does. The message names it and the task.

    """
    seen: set[int] = set()
    waiting = list(buckets)
    while waiting:
        bucket = waiting.pop()
        if isinstance(bucket, AllOf):
            waiting += bucket.buckets
        elif id(bucket) in seen:
            raise ValueError(f"`{task}`: the same bucket limits it twice; declare it once: {bucket!r}")
        seen.add(id(bucket))
