"""A request that finds no token is answered from the cache at once.

`uv run examples/fallback.py` sends 8 requests at once, where 5 are allowed, and 2 more after two seconds:

    user 0: computed
    user 1: computed
    user 2: computed
    user 3: computed
    user 4: computed
    user 5: from the cache
    user 6: from the cache
    user 7: from the cache
    user 8: computed
    user 9: computed
    7 requests were computed, 3 came from the cache.
"""

import time

from _worker import running_worker
from celery import Celery

from rate_limiter import TokenBucket
from rate_limiter.celery import throttle

app = Celery("fallback", broker="memory://", backend="cache+memory://")


def from_cache(user):
    return f"user {user}: from the cache"


@app.task
@throttle(TokenBucket(capacity=5, tokens_per_second=1), when_limited=from_cache)
def recommend(user):
    return f"user {user}: computed"


def main():
    with running_worker(app):
        results = [recommend.delay(user) for user in range(8)]
        time.sleep(2.5)  # two tokens have come back
        results += [recommend.delay(user) for user in (8, 9)]
        answers = [result.get(timeout=10) for result in results]
    print(*answers, sep="\n")
    computed = sum("computed" in answer for answer in answers)
    print(f"{computed} requests were computed, {10 - computed} came from the cache.")


if __name__ == "__main__":
    main()
