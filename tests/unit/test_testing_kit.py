"""What users test their own tasks with: the fixture `rate_limits`, and `charged`."""

import subprocess
import sys

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError
from engine_lab import Lab

from rate_limiter import BucketPerKey, RateLimitExceeded, TokenBucket
from rate_limiter.celery import Gate, throttle
from rate_limiter.gating import limit
from rate_limiter.testing import Charged, charged


def empty():
    bucket = TokenBucket(1, 1e-6)
    bucket.allow()
    return bucket


def function(**options):
    """Return a function that is limited by an empty bucket."""

    @throttle(empty(), **options)
    def mail(to="acme"):
        return f"mail to {to}"

    return mail


def a_task(**options):
    """Return a task whose bucket is full."""

    @throttle(TokenBucket(9, 9), **options)
    def mail(to="acme"):
        return f"mail to {to}"

    return Celery(set_as_current=False).task(name="mail", shared=False)(mail)


class TestLift:
    """`rate_limits.lift()`."""

    @pytest.mark.parametrize("how", ["wait", "raise", "drop", "retry"])
    def test_the_decorator_lets_every_call_pass(self, rate_limits, how):
        """Whatever the bucket has, and costs nothing."""
        rate_limits.lift()
        mail = function(when_limited=how)
        assert [mail("a"), mail("b")] == ["mail to a", "mail to b"]

    def test_a_task_that_is_applied_passes(self, rate_limits):
        """Eagerly, as in many test suites."""
        task = Celery(set_as_current=False).task(name="mail", shared=False)(function())
        rate_limits.lift()
        assert task.apply(("a",)).get() == "mail to a"

    def test_a_gate_lets_every_job_pass(self, rate_limits):
        """Also a kind of job that it knows already."""
        lab = Lab(rate=1e-6)
        assert lab.offer("first", "second") == ["go", "held"]
        rate_limits.lift()
        assert lab.offer("third") == ["go"]

    def test_it_ends(self, rate_limits):
        """`restore` does, or the end of the test."""
        rate_limits.lift()
        rate_limits.restore()
        with pytest.raises(RateLimitExceeded):
            function(when_limited="raise")()


class TestRefuse:
    """`rate_limits.refuse()`."""

    @pytest.mark.parametrize("how", ["wait", "raise", "retry"])
    def test_a_call_is_refused_at_once(self, rate_limits, how):
        """It never waits, and tells the seconds that the test has asked for."""
        rate_limits.refuse(retry_after=30)
        with pytest.raises(RateLimitExceeded) as error:
            a_task(when_limited=how).apply(throw=True)
        assert error.value.retry_after == 30

    def test_what_is_dropped_is_revoked(self, rate_limits):
        """As in a worker."""
        rate_limits.refuse()
        with pytest.raises(TaskRevokedError):
            a_task(when_limited="drop").apply(throw=True)

    def test_a_fallback_is_called(self, rate_limits):
        """With the arguments of the call."""
        rate_limits.refuse()
        task = a_task(when_limited=lambda to: f"later to {to}")
        assert task.apply(("a",)).get() == "later to a"

    def test_a_gate_holds_until_it_ends(self, rate_limits):
        """What was held meanwhile goes then."""
        lab = Lab(capacity=9)
        rate_limits.refuse()
        assert lab.offer("a", "b") == ["held", "held"]
        assert lab.run(200) == []
        rate_limits.restore()
        assert sorted(lab.run(200)) == ["a", "b"]

    def test_a_shadow_refuses_nobody(self, rate_limits):
        """It only counts, whatever becomes of the others."""
        rate_limits.refuse()
        assert function(shadow=True)() == "mail to acme"

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "1"])
    def test_a_delay_that_is_none(self, rate_limits, seconds):
        """The error names the argument and the value; nothing changes."""
        with pytest.raises((TypeError, ValueError), match="retry_after must be"):
            rate_limits.refuse(seconds)
        assert limit.stand_in is None


def test_pytest_finds_the_fixture(tmp_path):
    """In a project of a user's, and each test begins without it."""
    (tmp_path / "test_mail.py").write_text(
        """
import pytest
from rate_limiter import RateLimitExceeded
from rate_limiter.celery import throttle

@throttle("1/h", when_limited="raise")
def mail(): ...

def test_lifted(rate_limits):
    rate_limits.lift()
    for _ in range(9):
        mail()

def test_as_declared():
    mail()
    with pytest.raises(RateLimitExceeded):
        mail()
"""
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


class TestCharged:
    """`charged`."""

    BUCKET, OTHER, TENANTS = TokenBucket(9, 1), TokenBucket(20, 1), BucketPerKey(5, 1)

    @pytest.fixture
    def app(self):
        """Return an app with limited tasks."""
        app = Celery(set_as_current=False)
        app.conf.task_routes = {"routed": {"queue": "slow"}}

        @app.task(name="upload", bind=True, shared=False)
        @throttle(self.BUCKET, tokens="megabytes", timeout=1, name="line")
        @throttle(self.TENANTS, key="tenant", name="tenants")
        def upload(task, tenant, megabytes=3): ...

        @app.task(name="routed", shared=False)
        def routed(): ...

        @app.task(name="free", shared=False)
        @throttle("1/s", shadow=True, name="tried")
        def free(): ...

        return app

    def test_what_a_call_takes(self, app):
        """Of each limit, in the order of the decorators: by position, by keyword, by default."""
        upload = app.tasks["upload"]
        (tenants, line) = sorted(charged(upload.s("acme")), reverse=True)
        assert tenants == Charged("tenants", self.TENANTS["acme"], 1.0)
        assert line == Charged("line", self.BUCKET, 3.0)
        assert {each.tokens for each in charged(upload.s(tenant="a", megabytes=7))} == {7.0, 1.0}
        assert self.BUCKET.tokens == 9

    def test_limits_of_a_gate(self, app):
        """Of a pattern, and of the queue that the job would go to, or that is named."""
        gate = Gate(app)
        gate.limit("up*", bucket=self.OTHER, tokens=2, name="all")
        gate.limit(queue="slow", bucket=self.OTHER, name="slow")
        assert ("all", self.OTHER, 2.0) in charged(app.tasks["upload"].s("acme"))
        assert len(charged(app.tasks["upload"].s("acme"))) == 3
        assert charged(app.tasks["routed"]) == [("slow", self.OTHER, 1.0)]
        assert charged(app.tasks["routed"].s().set(queue="celery")) == []
        assert charged(app.tasks["free"], queue="slow") == [("slow", self.OTHER, 1.0)]

    def test_no_limit(self, app):
        """Nothing is taken, and a limit that is only tried takes nothing."""
        assert charged(app.tasks["free"]) == charged(app.tasks["routed"]) == []

    def test_a_cost_that_is_none(self, app):
        """The error that the job would have as its result."""
        with pytest.raises(
            ValueError, match="limit line: tokens is 10, expected at most the capacity 9"
        ):
            charged(app.tasks["upload"].s("acme", 10))

    def test_what_is_no_call(self):
        """The error says what is expected."""
        with pytest.raises(TypeError, match="a signature or a task, not 'upload'"):
            charged("upload")
