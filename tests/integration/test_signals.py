"""The library's own signals: what a receiver is told, by the gate and by the decorator."""

from collections import Counter

import pytest
from celery.contrib.testing.app import setup_default_app
from celery.contrib.testing.worker import start_worker
from harness import ANSWER, app_here, wait_for

from rate_limiter import RateLimitExceeded, TokenBucket
from rate_limiter.celery import Gate, signals, throttle


@pytest.fixture
def told():
    """Collect what each signal tells, by its name."""
    told, receivers = [], []
    for name in signals.__all__:
        signal = getattr(signals, name)

        def receive(signal, sender, *, name=name, **details):
            told.append((name, sender, details))

        signal.connect(receive, weak=False)
        receivers.append((signal, receive))
    yield told
    for signal, receive in receivers:
        signal.disconnect(receive)


def nothing():
    """Do what the tasks of these tests do."""
    return "done"


def test_what_the_gate_tells(told):
    """A job that waits is throttled, then admitted; one that is refused says how; a change tells what."""
    app = app_here()
    gate = Gate(app)
    for name in "wait", "drop":
        app.task(name=name, shared=False)(nothing)
    gate.limit("wait", bucket=TokenBucket(1, 10))
    gate.limit("drop", bucket=TokenBucket(1, 0.01), when_limited="drop", name="few")
    with (
        setup_default_app(app, use_trap=False),
        start_worker(app, pool="threads", perform_ping_check=False),
    ):
        jobs = {name: [app.send_task(name) for _ in range(3)] for name in ("wait", "drop")}
        wait_for(lambda: sum(name != "task_throttled" for name, _, _ in told) >= 6)
        change = {"name": "few", "rate": 5, "reason": "why"}
        reply = app.control.broadcast("limit", arguments=change, reply=True, limit=1, timeout=ANSWER)
        assert "ok" in str(reply)
    app.close()
    # A job may also wait for a moment until the one before it has started: delay 0.
    waited = [(name, sender) for name, sender, details in told if details.get("delay", 1)]
    assert Counter(waited) == {
        ("task_admitted", "wait"): 3,
        ("task_throttled", "wait"): 2,
        ("task_admitted", "drop"): 1,
        ("task_refused", "drop"): 2,
        ("limit_changed", "few"): 1,
    }
    ids = {job.id for job in jobs["wait"]}
    assert {details["task_id"] for name, sender, details in told if sender == "wait"} == ids
    waits = [
        details["waited"]
        for name, sender, details in told
        if (name, sender) == ("task_admitted", "wait")
    ]
    assert waits[0] == 0.0
    assert 0.05 < waits[1] < waits[2]
    refused = [details for name, _, details in told if name == "task_refused"]
    assert {(each["limit"], each["how"]) for each in refused} == {("few", "drop")}
    assert all(99 < each["delay"] <= 100 for each in refused)
    assert told[-1] == (
        "limit_changed",
        "few",
        {"what": "5 tokens_per_second (was 0.01)", "reason": "why"},
    )


def test_what_the_decorator_tells(told):
    """In the task: admitted with its wait, refused with how; the id of the task, or None outside of one."""
    app = app_here()

    @throttle(TokenBucket(1, 0.01), when_limited="raise", name="once")
    def once(): ...

    task = app.task(name="once", shared=False)(once)
    task.apply(task_id="first")
    with pytest.raises(RateLimitExceeded):
        task.apply(task_id="second", throw=True)
    with pytest.raises(RateLimitExceeded):
        once()
    app.close()
    assert [(name, details["task_id"], details["limit"]) for name, _, details in told] == [
        ("task_admitted", "first", "once"),
        ("task_refused", "second", "once"),
        ("task_refused", None, "once"),
    ]
    assert told[1][2]["how"] == "raise"


def test_a_receiver_that_fails_is_logged_once(caplog):
    """The other receivers are told, and the jobs go."""
    told = []

    def fail(**_):
        raise ValueError("no")

    def receive(sender, **_):
        told.append(sender)

    signals.task_admitted.connect(fail)
    signals.task_admitted.connect(receive)

    @throttle(TokenBucket(9, 9), name="limit")
    def job():
        return "done"

    try:
        assert [job() for _ in range(3)] == ["done"] * 3
    finally:
        signals.task_admitted.disconnect(fail)
        signals.task_admitted.disconnect(receive)
    assert len(told) == 3
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "of task_admitted failed. Further failures are not logged" in record.getMessage()
