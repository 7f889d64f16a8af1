"""All tasks that send emails share a limit from the settings; nothing is written beside the tasks.

`uv run examples/emails.py` sends 8 emails of two kinds and 4 jobs that are not limited, where 2 emails go
at once and then 2 a second ("120/m"):

     0.0 s  welcome to ann
     0.0 s  invoice for ann
     0.0 s  resized ann.png
     0.0 s  resized bob.png
     0.0 s  resized cat.png
     0.0 s  resized dan.png
     0.5 s  welcome to bob
     1.0 s  invoice for bob
     1.5 s  welcome to cat
     2.0 s  invoice for cat
     2.5 s  welcome to dan
     3.0 s  invoice for dan
    8 emails were sent at 2/s, and no picture waited for them.
"""

import sys
import time

from _worker import running_worker
from celery import Celery

from rate_limiter.celery import Gate

app = Celery("emails", broker="memory://", backend="cache+memory://")
app.conf.rate_limiter_limits = {"emails.send_*": {"rate": "120/m", "burst": 2}}
Gate(app)


@app.task(name="emails.send_welcome")
def send_welcome(to):
    return note(f"welcome to {to}")


@app.task(name="emails.send_invoice")
def send_invoice(to):
    return note(f"invoice for {to}")


@app.task(name="pictures.resize")
def resize(picture):
    return note(f"resized {picture}")


def note(text):
    at = time.monotonic() - begin
    print(f"{at:4.1f} s  {text}\n", end="", flush=True)
    return at


def main():
    global begin  # noqa: PLW0603
    people = ("ann", "bob", "cat", "dan")
    with running_worker(app):
        begin = time.monotonic()
        emails = [task.delay(person) for person in people for task in (send_welcome, send_invoice)]
        pictures = [resize.delay(f"{person}.png") for person in people]
        sent = [result.get(timeout=20) for result in emails]
        resized = [result.get(timeout=20) for result in pictures]
    if max(resized) > sent[3] or sent[-1] < 3:
        sys.exit("The limit was not held, or a picture waited!")
    print(f"{len(sent)} emails were sent at 2/s, and no picture waited for them.")


if __name__ == "__main__":
    main()
