"""50 pictures wait behind 2,000 emails that may go at 2/s: with parking they are done in seconds. It needs a Redis::

    uv run examples/parking/run.py                                   # redis://localhost:6379/0
    REDIS_URL=redis://elsewhere/1 uv run examples/parking/run.py

It sends the jobs, starts a worker, waits for the pictures, stops the worker, and prints (the numbers vary):

    50 pictures are done 0.2 s after the first email, and 2 emails are sent.
    1,989 emails wait in the lane parking.parked.parking.send_email.
    The worker has stopped: 1,998 emails wait in their queue, and none in a lane.
"""

import subprocess
import sys
import time
from pathlib import Path

from tasks import app, done, resize, send_email

EMAILS, PICTURES = 2_000, 50
LANE = "parking.parked.parking.send_email"


def main():
    done.delete("parking", LANE, "parking.emails", "parking.pictures")
    with app.connection_for_write() as connection:
        for number in range(EMAILS):
            send_email.apply_async((number,), connection=connection)
        for number in range(PICTURES):
            resize.apply_async((number,), connection=connection)
    command = f"{sys.executable} -m celery --quiet -A tasks worker -c 2 -P threads -l ERROR".split()
    worker = subprocess.Popen(command, cwd=Path(__file__).parent)
    try:
        while not count("emails"):
            time.sleep(0.02)
        began = time.monotonic()
        while count("pictures") < PICTURES:
            time.sleep(0.02)
        took = time.monotonic() - began
        print(
            f"{PICTURES} pictures are done {took:.1f} s after the first email, and {count('emails')} emails are sent."
        )
        print(f"{done.llen(LANE):,} emails wait in the lane {LANE}.", flush=True)
    finally:
        worker.terminate()
        worker.wait()
    left = done.llen("parking")
    print(
        f"The worker has stopped: {left:,} emails wait in their queue, and {done.llen(LANE) or 'none'} in a lane."
    )
    done.delete("parking")  # nobody sends them


def count(what):
    return int(done.get(f"parking.{what}") or 0)


if __name__ == "__main__":
    main()
