"""How the tasks in the worker containers note what ran, where and when.

The log is in the Redis that keeps the results too, and the time is the monotonic clock, which all
containers of one engine share.
"""

import json
import os
import time

import redis
from celery import current_task

log = redis.Redis.from_url(os.environ.get("CELERY_RESULT_BACKEND", "redis://"))


def note(run, value):
    entry = [value, current_task.request.hostname, os.getpid(), time.monotonic()]
    log.rpush(run, json.dumps(entry))
