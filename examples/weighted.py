"""Operations have a price: a write costs as much as 5 reads, a delete as much as 10.

`uv run examples/weighted.py` sends 10 reads, 4 writes and 3 deletes (60 tokens) to a database that takes
20 at once and then 10 a second. An operation that costs more waits longer, and is not overtaken:

     0.1 s  read
     ... (9 more reads, and 2 writes)
     0.6 s  write
     1.1 s  write
     2.1 s  delete
     3.1 s  delete
     4.1 s  delete
    60 tokens were spent, never more than 20 + 10/s.
"""

import sys
import time

from _worker import running_worker
from celery import Celery

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate, throttle

app = Celery("weighted", broker="memory://", backend="cache+memory://")
Gate(app)

PRICES = {"read": 1, "write": 5, "delete": 10}


@app.task
@throttle(
    TokenBucket(capacity=20, tokens_per_second=10), tokens=lambda operation: PRICES.get(operation, 1)
)
def execute(operation):
    at = time.monotonic()
    print(f"{at - begin:4.1f} s  {operation}\n", end="", flush=True)
    return at


def main():
    global begin  # noqa: PLW0603
    operations = ["read"] * 10 + ["write"] * 4 + ["delete"] * 3
    with running_worker(app):
        begin = time.monotonic()
        results = [execute.delay(operation) for operation in operations]
        times = [result.get(timeout=20) for result in results]
    spent = 0
    for operation, at in zip(operations, times, strict=True):
        spent += PRICES[operation]
        if spent > 20 + 10 * (at - begin):
            sys.exit(f"{spent} tokens within {at - begin:.2f} s!")
    print(f"{spent} tokens were spent, never more than 20 + 10/s.")


if __name__ == "__main__":
    main()
