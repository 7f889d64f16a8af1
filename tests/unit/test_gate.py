"""Declaring limits at the gate: by name, pattern and queue, in settings, and as a task attribute."""

from operator import itemgetter
from types import SimpleNamespace

import pytest
from celery import Celery, current_app
from celery.exceptions import ImproperlyConfigured

from rate_limiter import AllOf, TokenBucket
from rate_limiter.celery import Gate, throttle
from rate_limiter.celery.declarations import parameters_of
from rate_limiter.celery.unparking import UnparkStep
from rate_limiter.gating.limit import Call
from rate_limiter.gating.record import record_of

bucket = TokenBucket(10, 1)


def nothing(): ...


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


def test_limits_stand_in_the_order_of_their_declaration(app):
    """However they are found: by pattern, by name or by queue."""
    gate = Gate(app)
    gate.limit("jobs.*", bucket="1/s")
    gate.limit(queue="bulk", bucket="1/s")
    gate.limit("jobs.upload", bucket="1/s")
    gate.limit("*", queue="bulk", bucket="1/s")
    assert names(gate, "jobs.upload", "bulk") == [
        "jobs.*",
        "queue bulk",
        "jobs.upload",
        "* in queue bulk",
    ]


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
    """The decorator's limits are enforced at the gate, but for those with a timeout."""

    @app.task(shared=False, name="jobs.sms")
    @throttle(TokenBucket(1, 1), name="fallback", when_limited=print)
    @throttle(TokenBucket(1, 1), name="timeout", timeout=3)
    @throttle(TokenBucket(1, 1), name="drop", when_limited="drop")
    @throttle(TokenBucket(1, 1), name="wait")
    def sms(to): ...

    assert names(Gate(app), "jobs.sms") == ["fallback", "drop", "wait"]


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


def test_settings_have_keys_and_tiers(app):
    """A key makes a bucket for each value, and limits say the rates of some."""
    app.conf.rate_limiter_limits = {
        "jobs.upload": {
            "rate": "5/s",
            "burst": 10,
            "key": "name",
            "tokens": "size",
            "limits": {
                "acme": {"rate": "600/m", "burst": 20},
                "beta": {"rate": "1/d", "burst": 40},
            },
        }
    }
    gate = Gate(app)
    (limit,) = gate.tasks_of()
    found = [
        limit.demands(
            Call("task jobs.upload", args, kwargs, None, parameters_of(app.tasks["jobs.upload"]))
        )[0]
        for args, kwargs in (
            (("acme", 3), {}),
            ((), {"size": 4, "name": "beta"}),
            (("corp",), {"size": 5}),
        )
    ]
    assert [(each.tokens, each.bucket.capacity, each.bucket.tokens_per_second) for each in found] == [
        (3, 20, 10),
        (4, 40, 1 / 86400),
        (5, 10, 5),
    ]


def test_settings_have_tiers_at_a_fixed_cost(app):
    """The burst of a tier is what that of a limit would be: a tenth of a second's worth, the cost, 1."""
    app.conf.rate_limiter_limits = {
        "jobs.upload": {"rate": 5, "key": "name", "tokens": 2, "limits": {"a": "90/s", "b": "60/m"}}
    }
    (limit,) = Gate(app).tasks_of()
    assert [limit.bucket[key].capacity for key in ("a", "b", "c")] == [9, 2, 2]


def test_initial_goes_with_a_rate_for_all_workers_too(app):
    """It is an option of the bucket in Redis, so it is checked, and is no error beside that bucket."""
    app.conf.rate_limiter_redis = "redis://nobody.invalid"
    setting = {"rate": "5/s", "burst": 9, "initial": 3, "per": "cluster"}
    app.conf.rate_limiter_limits = {"jobs.upload": setting}
    (limit,) = Gate(app).tasks_of()
    assert limit.bucket._state.numbers == (9, 5, 3)
    other = Celery("other", broker="redis://nobody.invalid", set_as_current=False)
    other.conf.rate_limiter_limits = {"jobs.*": {**setting, "initial": 10}}
    with pytest.raises(ImproperlyConfigured, match="initial must be at most the capacity 9, not 10"):
        Gate(other).declared  # noqa: B018


def test_keys_for_all_workers(app):
    """Each has a bucket in Redis, with its own numbers where it has some, and the policy that is set."""
    app.conf.rate_limiter_redis = "redis://keys.invalid"
    setting = {
        "rate": "5/s",
        "key": "name",
        "limits": {"acme": {"rate": "50/s", "burst": 7}},
        "initial": 0,
    }
    app.conf.rate_limiter_limits = {"jobs.upload": {**setting, "per": "cluster", "on_outage": "closed"}}
    (limit,) = Gate(app).tasks_of()
    acme, other = limit.bucket["acme"], limit.bucket["other"]
    assert (acme.name, acme._state.numbers) == (f"{app.main}:jobs.upload:acme", (7, 50, 0))
    assert (other._state.numbers, other._state.policy) == ((1, 5, 0), "closed")


def test_an_outage_is_that_of_a_server():
    """A limit of each worker has none."""
    app = Celery("other", set_as_current=False)
    app.conf.rate_limiter_limits = {"jobs.*": {"rate": 1, "on_outage": "open"}}
    with pytest.raises(ImproperlyConfigured, match="on_outage goes with per='cluster'"):
        Gate(app).declared  # noqa: B018


@pytest.mark.parametrize("option", ["tokens", "key", "limits"])
def test_settings_name_callables(app, option):
    """Text with the name of a module is one of its callables: "module:callable" or "module.callable"."""
    value = {"tokens": "operator:itemgetter", "key": "operator.itemgetter", "limits": "builtins:len"}
    setting = {"rate": 1, "burst": 2, "key": "name", option: value[option]}
    app.conf.rate_limiter_limits = {"jobs.upload": setting}
    (limit,) = Gate(app).tasks_of()
    expected = len if option == "limits" else itemgetter
    assert getattr(limit.bucket if option == "limits" else limit, option) is expected


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


@pytest.mark.parametrize("again", [bucket, AllOf(TokenBucket(1, 1), bucket)], ids=["alone", "AllOf"])
def test_same_bucket_twice_for_one_task(app, again):
    """A task that would pay one bucket twice, also in an AllOf, is an error: its jobs may be held for ever."""
    gate = Gate(app)
    gate.limit("jobs.upload", bucket=bucket)
    gate.limit("jobs.*", bucket=again)
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


# -- names ----------------------------------------------------------------------------------------------


def test_no_two_limits_are_called_the_same(app):
    """What is named after its tasks alike gets a number; what the user named keeps its name."""

    @app.task(shared=False, name="jobs.sms", rate_limiter_limit="5/s")
    @throttle("1/s")
    @throttle("100/h", name="hourly")
    @throttle("10/m")
    def sms(to): ...

    gate = Gate(app)
    for bucket in "1/s", "2/s":
        gate.limit("jobs.*", bucket=bucket)
    gate.limit("jobs.*", queue="bulk", bucket="3/s")
    gate.limit("jobs.sms", bucket="4/s", name="jobs.* (2)")
    gate.limit(bucket="4/s", queue="bulk")
    gate.limit("jobs.*", bucket="6/s")
    assert sorted(names(gate, "jobs.sms", "bulk")) == [
        "hourly",
        "jobs.*",
        "jobs.* (2)",
        "jobs.* (2) (2)",
        "jobs.* (3)",
        "jobs.* in queue bulk",
        "jobs.sms",
        "jobs.sms (2)",
        "jobs.sms (3)",
        "queue bulk",
    ]
    gate.limit("jobs.sms", bucket="7/s", name="jobs.* (2) (2)")
    assert "jobs.* (2) (2) (2)" in names(gate, "jobs.sms")
    (named,) = [limit for limit in gate.tasks_of() if limit.name == "jobs.* (2)"]
    assert record_of(named).name == "jobs.* (2)"


def by_gate(app, gate, name):
    gate.limit("jobs.upload", bucket="1/s", name=name)


def by_decorator(app, gate, name):
    app.task(throttle("1/s", name=name)(nothing), shared=False, name="jobs.decorated")


def by_attribute(app, gate, name):
    setting = {"rate": 1, "name": name}
    app.task(nothing, shared=False, name="jobs.attributed", rate_limiter_limit=setting)


def by_settings(app, gate, name):
    app.conf.rate_limiter_limits = {"jobs.set": {"rate": 1, "name": name}}


@pytest.mark.parametrize("other", [by_gate, by_decorator, by_attribute, by_settings])
@pytest.mark.parametrize("one", [by_decorator, by_attribute, by_settings])
def test_a_name_is_given_once(app, one, other):
    """Two limits with the same name=, from wherever, are an error at the worker's start."""
    gate = Gate(app)
    one(app, gate, "first")
    if one is not other:
        other(app, gate, "second")
        assert len([names for names in gate.tasks_of().values() if names]) >= 1
    app = Celery("shop", broker="memory://", set_as_current=False)
    gate = Gate(app)
    one(app, gate, "mails")
    if one is other:
        gate.limit("jobs.send_email", bucket="1/s", name="mails")
    else:
        other(app, gate, "mails")
    with pytest.raises(ImproperlyConfigured, match="name must be different for each limit: 'mails' is"):
        gate.tasks_of()


def test_a_limit_of_two_tasks_has_one_name(app):
    """One decorator on two tasks is one limit, named after the first of them."""
    limited = throttle("1/s")
    for name in "jobs.b", "jobs.a":
        app.task(limited(nothing), shared=False, name=name)
    gate = Gate(app)
    assert [record_of(limit).name for limit in gate.tasks_of()] == ["jobs.a"]
    assert list(gate.tasks_of().values()) == [["jobs.a", "jobs.b"]]


# -- at the worker's start --------------------------------------------------------------------------------


def test_limits_by_exact_name_are_found_without_a_search(app, monkeypatch):
    """A worker's start costs the sum of tasks and limits: only patterns are tried for each task."""
    tried = []
    monkeypatch.setattr(
        "rate_limiter.gating.declared.fnmatchcase", lambda *names: tried.append(names) or False
    )
    gate = Gate(app)
    for number in range(100):
        app.task(nothing, shared=False, name=f"jobs.{number}")
        gate.limit(f"jobs.{number}", bucket="1/s")
    assert all(names == [record_of(limit).name] for limit, names in gate.tasks_of().items())
    assert not tried
    gate.limit("mail.*", bucket="1/s")
    gate.tasks_of()
    assert len(tried) <= 3 * len(app.tasks)


@pytest.mark.parametrize("place", ["option", "annotation", "base class", "assignment"])
def test_a_misspelled_attribute_is_named(app, place):
    """rate_limiter_limits= on a task would limit nothing: the worker does not start."""
    options = {"option": {"rate_limiter_limits": "5/s"}}
    if place == "base class":
        base = type("Base", (app.Task,), {"rate_limiter_limits": "5/s"})
        options[place] = {"base": base}
    if place == "annotation":
        app.conf.task_annotations = {"jobs.sms": {"rate_limiter_limits": "5/s"}}
    task = app.task(nothing, shared=False, name="jobs.sms", **options.get(place, {}))
    if place == "assignment":
        task.rate_limiter_limits = "5/s"
    with pytest.raises(
        ImproperlyConfigured,
        match="rate_limiter_limits of jobs.sms: unknown attribute; expected rate_limiter_limit$",
    ):
        Gate(app).tasks_of()


@pytest.mark.parametrize(
    ("options", "fine"), [({}, False), ({"bind": True}, True), ({"autoretry_for": (OSError,)}, False)]
)
def test_the_parameters_are_those_that_producers_see(app, options, fine):
    """Never ``self`` of a bound task; and those of the function, not of what Celery puts around it."""

    def fetch(job, tenant): ...

    app.task(fetch, shared=False, name="jobs.fetch", **options)
    gate = Gate(app)
    gate.limit("jobs.fetch", bucket="1/s", key="tenant")
    gate.tasks_of()
    assert parameters_of(app.tasks["jobs.fetch"]).names == (["tenant"] if fine else ["job", "tenant"])
    gate.limit("jobs.f*", bucket="1/s", key="job")
    if not fine:
        assert len(gate.tasks_of()) == 2
        return
    with pytest.raises(
        ImproperlyConfigured, match="not 'job': the parameters of `jobs.fetch` are tenant$"
    ):
        gate.tasks_of()


def test_a_task_with_any_keyword_has_every_parameter(app):
    """Where a task takes **kwargs, a job without the argument fails alone."""

    def fetch(url, **others): ...

    app.task(fetch, shared=False, name="jobs.fetch")
    gate = Gate(app)
    gate.limit("jobs.fetch", bucket="1/s", key="tenant")
    assert list(gate.tasks_of().values()) == [["jobs.fetch"]]


def test_a_limit_of_a_queue_fits_the_tasks_that_come_from_it(app):
    """It covers every task, so one without the parameter, or that is async, is no error at the start."""

    async def fetch(url): ...

    app.task(fetch, shared=False, name="jobs.fetch")
    gate = Gate(app)
    gate.limit(queue="bulk", bucket="1/s", key="size")
    (tasks,) = gate.tasks_of().values()
    assert {"jobs.fetch", "jobs.send_email", "jobs.upload"} <= set(tasks)
    gate.limit("jobs.s*", queue="bulk", bucket="1/s", key="size")
    with pytest.raises(ImproperlyConfigured, match="the parameters of `jobs.send_email` are to$"):
        gate.tasks_of()


def test_the_step_that_unparks_ends_before_it_has_started():
    """Celery stops all steps if the connection is lost while it starts them."""
    consumer = SimpleNamespace()
    UnparkStep(consumer).stop(consumer)
