"""A limit for a queue: one rate for all its jobs, whichever of the worker's four threads runs them.

`uv run examples/queue_with_workers.py` puts 45 requests of two kinds into a queue whose limit is 5 at
once and then 20 a second:

    after 0.5 s: 14 done
    after 1.0 s: 24 done
    after 1.5 s: 34 done
    after 2.0 s: 44 done
    45 requests are done, by 4 threads.
"""

import threading
import time

from _worker import running_worker
from celery import Celery

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate

app = Celery("queue_with_workers", broker="memory://", backend="cache+memory://")
app.conf.task_routes = {"queue_with_workers.*": "requests"}

gate = Gate(app)
gate.limit(queue="requests", bucket=TokenBucket(capacity=5, tokens_per_second=20))


@app.task(name="queue_with_workers.search")
def search(text):
    done.append(threading.current_thread().name)
    time.sleep(0.1)


@app.task(name="queue_with_workers.order")
def order(number):
    done.append(threading.current_thread().name)
    time.sleep(0.1)


done = []


def main():
    with running_worker(app, queues=["requests"]):
        begin = time.monotonic()
        for number in range(45):
            search.delay(f"shoes {number}") if number % 3 else order.delay(number)
        for half in range(1, 5):
            time.sleep(max(0, begin + half / 2 - time.monotonic()))
            print(f"after {half / 2} s: {len(done)} done", flush=True)
        while len(done) < 45:
            time.sleep(0.02)
    print(f"{len(done)} requests are done, by {len(set(done))} threads.")


if __name__ == "__main__":
    main()
