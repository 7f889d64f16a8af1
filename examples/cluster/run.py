"""Three workers, one limit of 10/s for all of them together. It needs a Redis::

    uv run examples/cluster/run.py                                   # redis://localhost:6379/0
    REDIS_URL=redis://elsewhere/1 uv run examples/cluster/run.py

It starts the workers, sends 100 emails, stops the workers, and prints what each of them has sent, and

    all workers              100 emails, 10.00/s; the limit is 10/s
"""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tasks import send_email, sent

JOBS = 100
WORKERS = ("one", "two", "three")


def main():
    command = f"{sys.executable} -m celery --quiet -A tasks worker -c 2 -P threads".split()
    workers = [
        subprocess.Popen([*command, "-l", "ERROR", "-n", name], cwd=Path(__file__).parent)
        for name in WORKERS
    ]
    try:
        while len(send_email.app.control.ping(timeout=1)) < len(WORKERS):
            time.sleep(0.2)
        send()
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    report()


def send():
    sent.delete("cluster.sent")
    for number in range(JOBS):
        send_email.delay(number)
    while sent.llen("cluster.sent") < JOBS:
        time.sleep(0.2)


def report():
    lines = [line.decode().split() for line in sent.lrange("cluster.sent", 0, -1)]
    moments = sorted(float(moment) for _, moment in lines)
    for name, count in sorted(Counter(name for name, _ in lines).items()):
        print(f"{name:24} {count:3} emails")
    rate = (JOBS - 2) / (moments[-1] - moments[0])  # the burst of 2 comes at once
    print(f"all workers              {JOBS} emails, {rate:.2f}/s; the limit is 10/s")


if __name__ == "__main__":
    main()
