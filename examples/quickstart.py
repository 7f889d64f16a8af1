"""A real Celery worker sends emails at 1/s and uploads at 10 MB/s, while unlimited jobs pass by.

Run it with `uv run examples/quickstart.py`. It needs no services: broker, worker and producer live in
this one process. It prints each job as it runs, then a table of what was set and what was measured,
and ends by itself after about 15 seconds, with 1 if a limit was ever exceeded, and else with

    Every limit was held.
"""

import itertools
import sys
import threading
import time

from celery import Celery

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate, throttle

app = Celery("quickstart", broker="memory://")
app.conf.broker_transport_options = {"polling_interval": 0.02}  # the default is 1 s
app.conf.task_ignore_result = True

Gate(app)  # limited jobs wait in the worker's consumer, and keep no pool slot busy

emails = TokenBucket(capacity=2, tokens_per_second=1)  # a burst of 2, then 1 a second
megabytes = TokenBucket(capacity=20, tokens_per_second=10)  # a burst of 20 MB, then 10 MB/s


@app.task
@throttle(emails)
def send_email(to, sent):
    report("email", f"to {to}", sent)


@app.task
@throttle(megabytes, tokens="size")
def upload(name, size, sent):
    report("upload", f"{name}, {size} MB", sent, size)


@app.task
def resize(picture, sent):
    report("resize", f"{picture} (not limited)", sent)


# -- everything below only sends jobs, and measures -------------------------------------------------

SECONDS = 12
started = time.monotonic()
runs = []  # (kind, tokens, when it ran, how long it waited)
printing = threading.Lock()


def report(kind, text, sent, tokens=1):
    now = time.monotonic()
    with printing:
        runs.append((kind, tokens, now, now - sent))
        print(f"{now - started:6.2f} s  {kind:7} {text}", flush=True)


def send_jobs():
    """Send a backlog of limited jobs at once, then an unlimited one now and then."""
    print(f"Sending 14 emails and 40 uploads at once; they will run for about {SECONDS} s.\n")
    for number in range(14):
        send_email.delay(f"user{number}@example.com", time.monotonic())
    for number, size in zip(range(40), itertools.cycle([2, 5, 1, 8, 3]), strict=False):
        upload.delay(f"video{number}.mp4", size, time.monotonic())
    for number in range(SECONDS):
        resize.delay(f"cat{number}.png", time.monotonic())
        time.sleep(1)


def most_over(jobs, bucket):
    """Return by how many tokens the worst window exceeds capacity + rate × its length."""
    worst = 0.0
    for first, (_, _, begin, _) in enumerate(jobs):
        used = 0
        for _, tokens, end, _ in jobs[first:]:
            used += tokens
            allowed = bucket.capacity + bucket.tokens_per_second * (end - begin)
            worst = max(worst, used - allowed)
    return worst


def print_table():
    """Compare the limits with what ran. Return whether they held."""
    held = True
    print(f"\n{'':8} {'burst':>7} {'set rate':>9} {'measured':>9} {'jobs':>5} {'longest wait':>13}")
    for kind, bucket, unit in (
        ("email", emails, ""),
        ("upload", megabytes, " MB"),
        ("resize", None, ""),
    ):
        jobs = [run for run in runs if run[0] == kind]
        longest = max(waited for *_, waited in jobs)
        if bucket is None:
            print(f"{kind:8} {'-':>7} {'-':>9} {'-':>9} {len(jobs):5} {longest:11.2f} s")
            continue
        used = list(itertools.accumulate(tokens for _, tokens, _, _ in jobs))
        burst = next(i for i, total in enumerate(used) if total >= bucket.capacity)
        rate = (used[-1] - used[burst]) / (jobs[-1][2] - jobs[burst][2])
        print(
            f"{kind:8} {bucket.capacity:4g}{unit:3} {bucket.tokens_per_second:4g}{unit}/s"
            f" {rate:6.2f}{unit}/s {len(jobs):5} {longest:11.2f} s"
        )
        # A job notes its time a moment after it got its tokens, on a busy machine 0.25 s.
        held = held and most_over(jobs, bucket) <= bucket.tokens_per_second * 0.25
    return held


def main():
    app.set_default()  # in all threads: the worker runs in another one here
    worker = app.WorkController(pool="threads", concurrency=4)
    thread = threading.Thread(target=worker.start)
    thread.start()
    try:
        send_jobs()
        while len(runs) < 14 + 40 + SECONDS and time.monotonic() < started + SECONDS + 6:
            time.sleep(0.1)
    finally:
        print("\nStopping the worker: it may take two seconds …", flush=True)
        app.control.shutdown()
        thread.join()
    held = print_table()
    print("\nEvery limit was held." if held else "\nA limit was exceeded!")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
