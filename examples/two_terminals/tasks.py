"""A worker and a client in two terminals, with a folder as the broker: there is no service to install.

In one terminal, in this folder:

    uv run celery -A tasks worker --loglevel INFO

In a second one:

    uv run send.py

The worker prints "Sent to user0@example.com" and so on, twice at once and then once a second, and
"Resized" at once for every job that is not limited. Stop it with Ctrl-C.
"""

import tempfile
from pathlib import Path

from celery import Celery
from celery.utils.log import get_task_logger

from rate_limiter import TokenBucket
from rate_limiter.celery import Gate, throttle

folder = Path(tempfile.gettempdir()) / "two_terminals"
for name in ("queue", "control"):
    (folder / name).mkdir(parents=True, exist_ok=True)

app = Celery("tasks", broker="filesystem://")
app.conf.broker_transport_options = {
    "data_folder_in": str(folder / "queue"),
    "data_folder_out": str(folder / "queue"),
    "control_folder": str(folder / "control"),
    "polling_interval": 0.1,
}
app.conf.task_ignore_result = True
logger = get_task_logger(__name__)

Gate(app)


@app.task
@throttle(TokenBucket(capacity=2, tokens_per_second=1))
def send_email(to):
    logger.info("Sent to %s", to)


@app.task
def resize(picture):
    logger.info("Resized %s", picture)
