"""Declaring limits at the gate: by name, pattern and queue, in settings, and as a task attribute."""

import pytest
from celery import Celery, current_app
from celery.exceptions import ImproperlyConfigured

from rate_limiter import AllOf, TokenBucket
from rate_limiter.celery import Gate, throttle
from rate_limiter.gating.tally import record_of

bucket = TokenBucket(10, 1)


@pytest.fixture
def app():
    app = Celery("shop", broker="memory://", set_as_current=False)

    @app.task(shared=False, name="jobs.send_email")
    def send_email(to): ...

    @app.task(shared=False, name="jobs.upload")
    def upload(name, size): ...

    return app


def names(gate, task, queue=None):
    return [record_of(limit).name for limit in gate.limits_for(gate.app.tasks[task], queue)]


def test_finds_limits_by_name_and_pattern(app):
    """A limit is for the tasks it names, and no pattern reaches Celery's own."""
    gate = Gate(app)
    gate.limit("jobs.upload", bucket=TokenBucket(1, 1))
    gate.limit("jobs.send_*", "other", bucket=TokenBucket(1, 1), name="mails")
    gate.limit("*", bucket=TokenBucket(1, 1))
    assert names(gate, "jobs.upload") == ["jobs.upload", "*"]
    assert names(gate, "jobs.send_email") == ["mails", "*"]
    assert names(gate, "celery.chord_unlock") == []


def test_finds_limits_by_queue(app):
    """A limit with a queue is for the jobs that came from it, of all tasks or of those it names."""
    gate = Gate(app)
    gate.limit(queue="bulk", bucket=TokenBucket(1, 1))
    gate.limit("jobs.upload", queue="video", bucket=TokenBucket(1, 1))
    assert names(gate, "jobs.send_email", "bulk") == ["queue bulk"]
    assert names(gate, "jobs.upload", "video") == ["jobs.upload in queue video"]
    assert names(gate, "jobs.send_email", "video") == []
    assert names(gate, "jobs.upload") == []


def test_finds_what_throttle_declares(app):
    """The decorator's limits are enforced at the gate, but for those with a fallback or a timeout."""

    @app.task(shared=False, name="jobs.sms")
    @throttle(TokenBucket(1, 1), name="fallback", when_limited=print)
    @throttle(TokenBucket(1, 1), name="timeout", timeout=3)
    @throttle(TokenBucket(1, 1), name="drop", when_limited="drop")
    @throttle(TokenBucket(1, 1), name="wait")
    def sms(to): ...

    assert names(Gate(app), "jobs.sms") == ["drop", "wait"]


def test_reads_the_settings(app):
    """A rate string is enough; a mapping says more. The burst is a tenth of a second's worth, at least 1."""
    app.conf.rate_limiter_limits = {
        "jobs.send_*": "100/m",
        "jobs.upload": {"rate": "50/s", "tokens": 2, "when_limited": "drop", "name": "uploads"},
    }
    gate = Gate(app)
    (mails,) = gate.limits_for(app.tasks["jobs.send_email"])
    assert (record_of(mails).name, mails.bucket.tokens_per_second) == (
        "jobs.send_*",
        pytest.approx(100 / 60),
    )
    assert mails.bucket.capacity == 1
    (uploads,) = gate.limits_for(app.tasks["jobs.upload"])
    assert (record_of(uploads).name, uploads.when_limited, uploads.bucket.capacity) == (
        "uploads",
        "drop",
        5,
    )


def test_reads_namespaced_settings():
    """Django's CELERY_RATE_LIMITER_LIMITS is the same setting."""
    app = Celery("site", set_as_current=False)
    app.config_from_object(
        {"CELERY_RATE_LIMITER_LIMITS": {"jobs.*": "1/s"}, "CELERY_BROKER_URL": "memory://"},
        namespace="CELERY",
    )
    assert [declared.patterns for declared in Gate(app).declared] == [("jobs.*",)]


def test_reads_the_task_attribute():
    """rate_limiter_limit on a task, also by task_annotations, is a limit of its own."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.task_annotations = {"jobs.send_email": {"rate_limiter_limit": "5/s"}}

    @app.task(shared=False, name="jobs.send_email")
    def send_email(to): ...

    @app.task(shared=False, name="jobs.upload", rate_limiter_limit={"rate": 2, "burst": 7})
    def upload(name): ...

    app.finalize()
    gate = Gate(app)
    (mails,) = gate.limits_for(app.tasks["jobs.send_email"])
    (uploads,) = gate.limits_for(app.tasks["jobs.upload"])
    assert (record_of(mails).name, mails.bucket.tokens_per_second) == ("jobs.send_email", 5)
    assert (uploads.bucket.capacity, uploads.bucket.tokens_per_second) == (7, 2)
    assert gate.limits_for(app.tasks["jobs.upload"]) == (uploads,)  # the same bucket each time


def test_what_a_setting_cannot_import_is_named(app):
    """A callable that is not there is an error of the setting that names it."""
    app.conf.rate_limiter_limits = {"jobs.upload": {"rate": 1, "tokens": "no.such:cost", "burst": 1}}
    with pytest.raises(ImproperlyConfigured, match=r"rate_limiter_limits\['jobs.upload'\]: No module"):
        Gate(app).declared  # noqa: B018 - reading it is the test


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("rate_limiter_limit", {}, "rate_limiter_limit: unknown setting"),
        ("rate_limiter_limits", ["jobs.upload"], "must map tasks to limits"),
    ],
)
def test_wrong_settings_are_named(app, setting, value, message):
    """An unknown setting, or one of the wrong shape, is an error that names it."""
    app.conf[setting] = value
    with pytest.raises(ImproperlyConfigured, match=message):
        Gate(app).declared  # noqa: B018


def test_a_limit_is_for_something(app):
    """limit() without a task and a queue is refused: all tasks are "*"."""
    with pytest.raises(ValueError, match="needs the name of a task"):
        Gate(app).limit(bucket=bucket)


def test_same_bucket_twice_for_one_task(app):
    """A task that would pay one bucket twice is an error, not a rate of half."""
    gate = Gate(app)
    gate.limit("jobs.upload", bucket=bucket)
    gate.limit("jobs.*", bucket=bucket)
    with pytest.raises(ImproperlyConfigured, match="the same bucket limits it twice"):
        gate.limits_for(app.tasks["jobs.upload"])


def test_same_bucket_twice_within_all_of(app):
    """A bucket that stands alone and in an AllOf is found too: such a job would be held for ever."""
    gate = Gate(app)
    gate.limit("jobs.upload", bucket=bucket)
    gate.limit("jobs.*", bucket=AllOf(TokenBucket(1, 1), bucket))
    with pytest.raises(ImproperlyConfigured, match="the same bucket limits it twice"):
        gate.limits_for(app.tasks["jobs.upload"])


def test_one_gate_an_app(app):
    """A second gate on the same app is an error; so is something that is no app, or a bad bound."""
    Gate(app)
    with pytest.raises(RuntimeError, match="has a Gate"):
        Gate(app)
    with pytest.raises(TypeError, match="app must be a Celery app"):
        Gate("shop")
    with pytest.raises(ValueError, match="max_held must be 1 or more, not 0"):
        Gate(Celery(set_as_current=False), max_held=0)


def test_takes_the_current_app(app):
    """Gate(celery.current_app) is a gate on the app that it stands for."""
    app.set_current()
    Gate(current_app)
    with pytest.raises(RuntimeError, match="has a Gate"):
        Gate(app)
