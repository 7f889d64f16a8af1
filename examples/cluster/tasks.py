"""The app of run.py: emails at 10/s, however many workers there are."""

import os
import time

import redis
from celery import Celery

from rate_limiter.celery import Gate

REDIS = os.environ.get("REDIS_URL", "redis://localhost:6379/0")

app = Celery("cluster", broker=REDIS)
app.conf.task_ignore_result = True
app.conf.rate_limiter_limits = {
    "cluster.send_email": {"rate": "10/s", "burst": 2, "per": "cluster", "max_held": 20}
}
sent = redis.Redis.from_url(REDIS)

Gate(app)


@app.task(name="cluster.send_email", bind=True)
def send_email(self, number):
    sent.rpush("cluster.sent", f"{self.request.hostname} {time.time()}")
