"""The app of run.py: emails at 2/s that are parked, and pictures without a limit, in one queue."""

import os

import redis
from celery import Celery

from rate_limiter.celery import Gate

REDIS = os.environ.get("REDIS_URL", "redis://localhost:6379/0")

app = Celery("parking", broker=REDIS)
app.conf.task_default_queue = "parking"
app.conf.task_ignore_result = True
done = redis.Redis.from_url(REDIS)

gate = Gate(app)
gate.limit("parking.send_email", bucket="2/s", overflow="park")


@app.task(name="parking.send_email")
def send_email(number):
    done.incr("parking.emails")


@app.task(name="parking.resize")
def resize(number):
    done.incr("parking.pictures")
