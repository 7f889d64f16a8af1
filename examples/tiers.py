"""Premium, standard and free customers have buckets of their own: nobody waits for a lower tier.

`uv run examples/tiers.py` sends 30 requests of each tier at once, free ones first:

    tier      burst  rate   the last of 30 requests ran after
    premium    1000  1000/s    0.1 s
    standard     20    20/s    0.5 s
    free         10    10/s    2.0 s
    Premium was first, free was last.
"""

import sys
import time

from _worker import running_worker
from celery import Celery

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate, throttle

app = Celery("tiers", broker="memory://", backend="cache+memory://")
Gate(app)

BUCKETS = {
    "premium": TokenBucket(capacity=1000, tokens_per_second=1000),
    "standard": TokenBucket(capacity=20, tokens_per_second=20),
    "free": TokenBucket(capacity=10, tokens_per_second=10),
}
CUSTOMERS = {"ann": "premium", "bob": "standard", "cat": "free"}


@app.task
@throttle(lambda customer: BUCKETS[CUSTOMERS[customer]])
def serve(customer):
    return time.monotonic()


def main():
    with running_worker(app):
        begin = time.monotonic()
        results = {
            customer: [serve.delay(customer) for _ in range(30)] for customer in ("cat", "bob", "ann")
        }
        last = {
            CUSTOMERS[customer]: max(result.get(timeout=10, interval=0.02) for result in sent) - begin
            for customer, sent in results.items()
        }
    print("tier      burst  rate   the last of 30 requests ran after")
    for tier, bucket in BUCKETS.items():
        print(f"{tier:9}{bucket.capacity:6g}{bucket.tokens_per_second:6g}/s{last[tier]:7.1f} s")
    if not last["premium"] < last["standard"] < last["free"]:
        sys.exit("Somebody waited for a lower tier!")
    print("Premium was first, free was last.")


if __name__ == "__main__":
    main()
