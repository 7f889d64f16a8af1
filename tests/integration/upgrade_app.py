"""An app in several versions: with limits in its settings, or without the library in its code."""

import json
import os
import time

from celery import Celery

CONFIG = json.loads(os.environ["LAB"])

app = Celery("lab")
app.conf.update(CONFIG["settings"])

if CONFIG["version"] is not None:
    from rate_limiter.celery import Gate

    Gate(app)
    app.conf.rate_limiter_limits = CONFIG["version"]


def note(kind, value):
    line = json.dumps([kind, value, time.monotonic()]) + "\n"
    file = os.open(CONFIG["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())
    os.close(file)


@app.task(name="job", bind=True, ignore_result=True)
def job(self, number):
    note("job", number)
    note("job by", self.request.hostname)


@app.task(name="again", ignore_result=True)
def again(number):
    note("again", number)
