"""Django: limits in `CELERY_RATE_LIMITER_LIMITS`, or beside a `shared_task`; a gate in the project's app.

`uv run examples/django_shop/run.py` sends 6 newsletters, limited in settings.py, and 6 exports, limited in
shop/tasks.py:

    send_newsletter  6 jobs in 2.0 s, limit 2 at once and then 2/s
    export           6 jobs in 1.0 s, limit 1 at once and then 5/s
    Both limits were held.
"""

import sys
import time
from pathlib import Path

import django
from celeryapp import app

sys.path.append(str(Path(__file__).parents[1]))  # the examples' folder
from _worker import running_worker

django.setup()
from shop.tasks import export, send_newsletter  # noqa: E402 - tasks may import models


def main():
    with running_worker(app):
        begin = time.monotonic()
        results = {
            send_newsletter: [send_newsletter.delay(f"user{number}") for number in range(6)],
            export: [export.delay(f"table{number}") for number in range(6)],
        }
        took = {}
        for task, sent in results.items():
            took[task] = max(result.get(timeout=20) for result in sent) - begin
    print(f"send_newsletter  6 jobs in {took[send_newsletter]:.1f} s, limit 2 at once and then 2/s")
    print(f"export           6 jobs in {took[export]:.1f} s, limit 1 at once and then 5/s")
    if took[send_newsletter] < 2 or took[export] < 1:
        sys.exit("A limit was not held!")
    print("Both limits were held.")


if __name__ == "__main__":
    main()
