"""Token buckets that throttle background jobs. The core, which depends on nothing.

`rate_limiter.celery` and `rate_limiter.kombu` enforce them in workers and consumers.
"""

from .all_of import AllOf
from .bucket import Bucket
from .bucket_per_key import BucketPerKey
from .exceptions import RateLimitExceeded, RetryAfter
from .shared_bucket import SharedTokenBucket
from .token_bucket import TokenBucket

__version__ = "0.1.0"

__all__ = [
    "AllOf",
    "Bucket",
    "BucketPerKey",
    "RateLimitExceeded",
    "RetryAfter",
    "SharedTokenBucket",
    "TokenBucket",
]
