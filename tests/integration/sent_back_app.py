"""The app of `test_sent_back`: it notes each message that arrives, as kombu gives it to Celery."""

import base64
import json
from pathlib import Path

from celery import signals
from kombu.common import Broadcast
from tests.integration.app import app, note
from tests.integration.limits_app import CONFIG, NotedBucket

from rate_limiter import RetryAfter
from rate_limiter.celery import throttle

if CONFIG["queues"]:
    app.conf.task_queues += [Broadcast(f"{app.conf.task_default_queue}-everybody")]


def plain(value):
    """Return something that JSON can say."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else repr(value)


@signals.task_received.connect
def note_message(request, **_):
    message, info = request.message, request.message.delivery_info
    body = message.body.encode() if isinstance(message.body, str) else bytes(message.body)
    arrival = {
        "id": request.id,
        "body": base64.b64encode(body).decode(),
        "content": [message.content_type, message.content_encoding],
        "headers": plain(message.headers),
        "properties": plain(message.properties),
        "delivery": plain(request.delivery_info),
        "queue": info.get("rate_limiter_queue"),
    }
    # Not in the run log, which is read while it is written: these lines are too long for that.
    with Path(CONFIG["log"] + ".arrived").open("a") as file:
        file.write(json.dumps(arrival) + "\n")


@app.task(name="again later", bind=True)
@throttle(NotedBucket("again later", 100, 100))
def again_later(self, number):
    """Raise RetryAfter once."""
    note("again later", number)
    if not (self.request.headers or {}).get("rate_limiter_pauses"):
        raise RetryAfter(0.2)
    return [number, self.request.retries]


@app.task(name="in its task", bind=True)
@throttle(NotedBucket("in its task", 1, 20), when_limited="retry")
def in_its_task(self, number):
    note("in its task", number)
    return [number, self.request.retries]
