"""The app of compose.yaml: two workers with limits, and a producer that reports what ran.

Each of the two workers sends emails at 1/s and uploads at 10 MB/s. News are dropped beyond 1 in 2 s. Pictures are
not limited: a limit of 1/s is tried on them, which only counts.
"""

import itertools
import os
import time
from collections import Counter

import redis
from celery import Celery
from celery.utils.log import get_task_logger

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate, throttle

app = Celery("shop", broker=os.environ["BROKER_URL"])
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True
logger = get_task_logger(__name__)
counters = redis.Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)

gate = Gate(app)
gate.limit("shop.resize", bucket="1/s", shadow=True, name="tried")


@app.task
@throttle(TokenBucket(capacity=2, tokens_per_second=1))
def send_email(to):
    logger.info("Sent to %s", to)
    counters.hincrby("done", "emails")


@app.task
@throttle(TokenBucket(capacity=20, tokens_per_second=10), tokens="megabytes")
def upload(name, megabytes):
    logger.info("Uploaded %s, %s MB", name, megabytes)
    counters.hincrby("done", "uploads")
    counters.hincrby("done", "megabytes", megabytes)


@app.task
@throttle("30/m", when_limited="drop")
def send_news(to):
    logger.info("News to %s", to)


@app.task
def resize(picture):
    logger.info("Resized %s", picture)
    counters.hincrby("done", "pictures")


# -- the producer -------------------------------------------------------------------------------------

BACKLOG = 15  # emails, and as many uploads
INTERVAL = 5
SIZES = (2, 5, 1, 8, 3)
LOOK = """
15 emails and 15 uploads wait at any time, and 4 pictures a second are sent behind them. Look at

    what ran       the lines below
    each job       docker compose -f docker/compose.yaml logs -f worker-1 worker-2
    what is held   docker compose -f docker/compose.yaml exec worker-1 celery -A shop limits --watch
    the limits     docker/shop.py: 1 email/s and 10 MB/s in each of the two workers

               emails/s     MB/s  pictures/s
    two limits     2.00    20.00           -"""


def produce():
    """Keep the backlog, and print what ran."""
    counters.delete("done")
    print(LOOK, flush=True)
    emails = uploads = 0
    start, before = time.monotonic(), Counter()
    for second in itertools.count(1):
        done = Counter({kind: int(count) for kind, count in counters.hgetall("done").items()})
        while emails < done["emails"] + BACKLOG:
            send_email.delay(f"user{emails}@example.com")
            emails += 1
        while uploads < done["uploads"] + BACKLOG:
            upload.delay(f"video{uploads}.mp4", SIZES[uploads % len(SIZES)])
            uploads += 1
        send_news.delay("everybody@example.com")
        for number in range(4):
            resize.delay(f"cat{second}.{number}.png")
        if second % INTERVAL == 0:
            emails_a_second, megabytes, pictures = (
                (done[kind] - before[kind]) / INTERVAL for kind in ("emails", "megabytes", "pictures")
            )
            print(f"    {'ran':10}{emails_a_second:9.2f}{megabytes:9.2f}{pictures:12.2f}", flush=True)
            before = done
        time.sleep(max(0, start + second - time.monotonic()))


if __name__ == "__main__":
    produce()
