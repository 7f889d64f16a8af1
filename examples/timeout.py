"""A request waits for its token, but no longer than its timeout: then its result is an error.

`uv run examples/timeout.py` sends 4 requests at once, where one a second is allowed and none waits for
longer than 1.5 s. A request that would have to wait longer is refused at once:

    request 0: done after 0.0 s
    request 1: done after 1.0 s
    request 2: refused, may come again in 2.0 s
    request 3: refused, may come again in 2.0 s
    2 requests were done, 2 timed out.
"""

import time

from _worker import running_worker
from celery import Celery

from rate_limiter import RateLimitExceeded, TokenBucket
from rate_limiter.celery import throttle

app = Celery("timeout", broker="memory://", backend="cache+memory://")


@app.task(throws=(RateLimitExceeded,))  # expected: the worker logs no traceback
@throttle(TokenBucket(capacity=1, tokens_per_second=1), timeout=1.5)
def handle(request):
    return time.monotonic()


def main():
    done = 0
    with running_worker(app):
        begin = time.monotonic()
        results = [handle.delay(request) for request in range(4)]
        for request, result in enumerate(results):
            try:
                at = result.get(timeout=10, interval=0.02)
            except RateLimitExceeded as error:
                print(f"request {request}: refused, may come again in {error.retry_after:.1f} s")
            else:
                print(f"request {request}: done after {at - begin:.1f} s")
                done += 1
    print(f"{done} requests were done, {4 - done} timed out.")


if __name__ == "__main__":
    main()
