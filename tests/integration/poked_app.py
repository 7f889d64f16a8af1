"""The app of the test of buckets that are changed while jobs are held for them."""

import threading
import time

from celery.worker.control import control_command
from tests.integration.app import app, note

from rate_limiter import TokenBucket
from rate_limiter.celery import throttle

#: It would let a second job go after a quarter of an hour.
bucket = TokenBucket(1, 0.001)


@app.task(name="poked")
@throttle(bucket)
def poked(number):
    ran_at = time.monotonic()
    bucket.configure(tokens_per_second=0.001)
    bucket.pause(0)  # it is empty again
    note("poked", number, ran_at)


def change(how):
    note("changed", how)
    if how == "refund":
        bucket.refund(1)
    else:
        if how == "pause":
            bucket.pause(0.5)
        bucket.configure(tokens_per_second=1000)


@app.task(name="change")
def change_in_pool(how):
    change(how)


@control_command(name="change", args=[("how", str)])
def change_in_main(state, how):
    change(how)
    return how


@control_command(name="change_in_thread", args=[("how", str)])
def change_in_thread(state, how):
    threading.Timer(0.2, change, [how]).start()
    return how
