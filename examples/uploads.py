"""Uploads at 10 MB/s in total, in any number of jobs.

`uv run examples/uploads.py` sends 60 MB, where 20 MB may go at once:

     0.0 s  video0.mp4, 12 MB
     0.0 s  video1.mp4, 5 MB
     0.1 s  video2.mp4, 4 MB
     1.9 s  video3.mp4, 18 MB
     2.1 s  video4.mp4, 2 MB
     2.9 s  video5.mp4, 8 MB
     4.0 s  video6.mp4, 11 MB
    60 MB were uploaded, never more than 20 MB + 10 MB/s.
"""

import sys
import time

from _worker import running_worker
from celery import Celery

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate, throttle

app = Celery("uploads", broker="memory://", backend="cache+memory://")
Gate(app)


@app.task
@throttle(TokenBucket(capacity=20, tokens_per_second=10), tokens="megabytes")
def upload(name, megabytes):
    at = time.monotonic() - begin
    print(f"{at:4.1f} s  {name}, {megabytes} MB\n", end="", flush=True)
    return at


def main():
    global begin  # noqa: PLW0603
    sizes = [12, 5, 4, 18, 2, 8, 11]
    with running_worker(app):
        begin = time.monotonic()
        results = [upload.delay(f"video{number}.mp4", size) for number, size in enumerate(sizes)]
        times = [result.get(timeout=20) for result in results]
    uploaded = 0
    for size, at in zip(sizes, times, strict=True):
        uploaded += size
        if uploaded > 20 + 10 * at:
            sys.exit(f"{uploaded} MB within {at:.2f} s!")
    print(f"{uploaded} MB were uploaded, never more than 20 MB + 10 MB/s.")


if __name__ == "__main__":
    main()
