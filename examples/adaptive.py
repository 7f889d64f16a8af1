"""The larger a request, the more it costs; a request that is refused learns when to try again.

`uv run examples/adaptive.py` sends four requests that cost 1, 20, 60 and 40 tokens, where 100 are there
and 20 a second come back:

       500 bytes: done
     20000 bytes: done
     60000 bytes: done
     40000 bytes: come again in 1.0 s
     40000 bytes: done
    4 requests were done, 1 of them at its second try.
"""

import time

from _worker import running_worker
from celery import Celery

from rate_limiter import RateLimitExceeded, TokenBucket
from rate_limiter.celery import throttle

app = Celery("adaptive", broker="memory://", backend="cache+memory://")


def price(payload):
    return max(1, len(payload) // 1000)


@app.task(throws=(RateLimitExceeded,))  # expected: the worker logs no traceback
@throttle(TokenBucket(capacity=100, tokens_per_second=20), tokens=price, when_limited="raise")
def process(payload):
    return len(payload)


def main():
    again = 0
    with running_worker(app):
        for size in 500, 20_000, 60_000, 40_000:
            while True:
                try:
                    process.delay("x" * size).get(timeout=10, interval=0.02)
                except RateLimitExceeded as error:
                    print(f"{size:6} bytes: come again in {error.retry_after:.1f} s")
                    again += 1
                    time.sleep(error.retry_after)
                else:
                    print(f"{size:6} bytes: done")
                    break
    print(f"4 requests were done, {again} of them at its second try.")


if __name__ == "__main__":
    main()
