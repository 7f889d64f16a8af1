"""What happened under limits, asked in four ways: remote control, --json, signals and OpenTelemetry."""

import json

import pytest
from celery.exceptions import TaskRevokedError
from harness import DEADLINE, wait_for
from limits import celery, control, limit, start

from rate_limiter import RateLimitExceeded

LIMITS = (limit(rate=40), limit("total", 1, 0.001, when_limited="raise", tokens="values"))


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_all_tell_the_same_and_the_truth(redis_lab, pool):
    """Jobs that ran, waited, were dropped, refused, revoked, or could not pay."""
    lab = redis_lab
    with start(lab, pool=pool, limits=LIMITS, module="watched_app") as worker:
        results = [lab.send("dropped", number) for number in range(6)]
        refused = [lab.send("total", values) for values in (1, 1, "many", 1)]
        for number in range(20):
            lab.send("job", number)
        lab.wait_for_runs("job", 20)
        outcomes = [outcome(result) for result in results + refused]
        assert sum(each is TaskRevokedError for each in outcomes) == 4
        assert [each.__name__ for each in outcomes[6:]] == [
            *("int", "RateLimitExceeded", "ValueError", "RateLimitExceeded")
        ]

        by_control = control(lab, worker, "limits")
        status, printed = celery(lab, "--json")
        assert status == 0
        by_command = json.loads(printed)[worker.node]
        seen = wait_for(lambda: control(lab, worker, "seen"))
        signals, metrics = seen["signals"], seen["metrics"]

    truth = {
        "job": {"admitted": 20, "tokens": 20, "refused": 0, "failed": 0},
        "dropped": {"admitted": 2, "tokens": 2, "refused": 4, "failed": 0},
        "total": {"admitted": 1, "tokens": 1, "refused": 2, "failed": 1},
    }
    for name, numbers in truth.items():
        for told in by_control, by_command:
            assert {kind: told[name][kind] for kind in numbers} == numbers
        assert {kind: metrics.get(f"{name} {kind}", 0) for kind in numbers} == numbers
        for kind in "admitted", "refused":
            assert signals.get(f"{name} {kind}", 0) == numbers[kind]
    assert len(lab.log("job taken")) == 20
    assert 1 <= signals["job throttled"] <= 20
    assert metrics["job wait"] == 20


def outcome(result):
    """Return the type of what a job has returned or raised."""
    try:
        return type(result.get(DEADLINE))
    except (RateLimitExceeded, TaskRevokedError, ValueError) as error:
        return type(error)
