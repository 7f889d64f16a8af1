"""@throttle: how it is written, and what a job costs that is called here, without a worker."""

import functools
import sys

import pytest
from celery import Celery, Task, shared_task
from engine_lab import numbers

from rate_limiter import BucketPerKey, RateLimitExceeded, TokenBucket
from rate_limiter.celery import current_charge, throttle
from rate_limiter.gating.limit import Call
from rate_limiter.gating.record import record_of
from rate_limiter.testing import ManualClock

app = Celery("shop", broker="memory://", set_as_current=False)


def limit_of(function):
    (limit,) = function.__rate_limits__
    return limit


@pytest.mark.parametrize(
    ("arguments", "capacity", "rate"),
    [
        ({"bucket": "5/s"}, 1, 5),
        ({"bucket": "5"}, 1, 5),
        ({"bucket": " 50 / s "}, 5, 50),
        ({"bucket": "90/m"}, 1, 1.5),
        ({"bucket": "7.2/h"}, 1, 0.002),
        ({"bucket": "864/d"}, 1, 0.01),
        ({"bucket": "864/d", "burst": 864}, 864, 0.01),
        ({"bucket": "5/s", "tokens": 3}, 3, 5),
        ({"bucket": "5/s", "tokens": 0.5}, 1, 5),
        ({"bucket": "5/s", "burst": 0.5, "tokens": 0.5}, 0.5, 5),
        ({"bucket": "5/s", "burst": 9, "tokens": "size"}, 9, 5),
    ],
)
def test_a_rate_is_a_bucket(arguments, capacity, rate):
    """Text with a unit, or without one per second; the burst is a tenth of a second's worth, the cost, 1."""
    bucket = limit_of(throttle(**arguments)(lambda size: None)).bucket
    assert type(bucket) is TokenBucket
    assert (bucket.capacity, bucket.tokens_per_second) == (capacity, pytest.approx(rate, rel=1e-15))


def test_a_rate_with_a_key_is_a_bucket_per_key():
    """Each value of the parameter has the rate."""
    bucket = limit_of(throttle("5/s", burst=7, key="tenant")(lambda tenant: None)).bucket
    assert type(bucket) is BucketPerKey
    assert bucket["acme"].capacity == 7


# -- without parentheses ----------------------------------------------------------------------------------


def plain(function):
    return function


MISSING = r"not the function .*; write:\s+@app.task\s+@throttle\("


@pytest.mark.parametrize("decorate", [app.task, shared_task, plain, staticmethod])
def test_parentheses_cannot_be_left_out(decorate):
    """@throttle without a bucket is an error at the line, whatever stands above it."""
    with pytest.raises(TypeError, match=MISSING):

        @decorate
        @throttle
        def send_email(to): ...


def test_parentheses_cannot_be_left_out_above_others():
    """Nor where another decorator stands below it, or in a class."""

    def other(function):
        @functools.wraps(function)
        def wrapper(*args):
            return function(*args)

        return wrapper

    with pytest.raises(TypeError, match=MISSING):

        @throttle
        @other
        def send_email(to): ...

    with pytest.raises(TypeError, match=MISSING):

        class Upload(Task):
            @throttle
            def run(self, to): ...


def test_a_callable_bucket_is_no_missing_parenthesis():
    """A function that returns a bucket may stand where a bucket does, wherever it was written."""
    bucket = TokenBucket(1, 1)

    def pick(to):
        return bucket

    @throttle(pick)
    @throttle(lambda to: TokenBucket(1, 1))
    def send_email(to): ...

    outer, _ = send_email.__rate_limits__
    assert outer.demands(Call("task t", ("x",), {}))[0].bucket is bucket


def test_a_callable_bucket_is_told_by_its_code(tmp_path):
    """A function of another file is not mistaken for the one that stands on these lines here."""
    code = "\n" * (sys._getframe().f_lineno - 5) + "def pick(to):" + "\n" * 20 + "    return to"
    names = {}
    exec(compile(code, __file__, "exec"), names)
    throttle(names["pick"])


def nothing(): ...


@pytest.mark.parametrize(
    "task", [app.task(nothing, name="t", lazy=False, shared=False), shared_task(nothing)]
)
def test_a_task_is_no_bucket(task):
    """@throttle without parentheses and above @app.task is wrong twice."""
    with pytest.raises(TypeError, match="is given a rate or a bucket, and stands below @app.task"):
        throttle(task)


# -- arguments by their names -------------------------------------------------------------------------------


def paid(run, *calls):
    """Return what each call took from the buckets of its tenant."""
    took = []
    for args, kwargs in calls:
        bucket = run.bucket[kwargs.get("tenant", args[0] if args else "acme")]
        before = bucket.tokens
        run(*args, **kwargs)
        took.append(round(before - bucket.tokens))
    return took


WAYS = [
    (("beta", 3), {}),
    (("beta",), {"size": 3}),
    ((), {"size": 3, "tenant": "beta"}),
    (("beta",), {}),
    ((), {"size": 5}),
]
TOOK = [3, 3, 3, 2, 5]


def new_task(**options):
    tenants = BucketPerKey(100, 1e-9)
    if options.get("bind"):

        @throttle(tenants, key="tenant", tokens="size")
        def upload(self, tenant="acme", size=2): ...
    else:

        @throttle(tenants, key="tenant", tokens="size")
        def upload(tenant="acme", size=2): ...

    own = Celery("shop", broker="memory://", set_as_current=False)
    return tenants, own.task(upload, name="upload", lazy=False, shared=False, **options)


@pytest.mark.parametrize("options", [{}, {"bind": True}, {"autoretry_for": (OSError,)}], ids=str)
@pytest.mark.parametrize("how", ["apply", "call", "run"])
def test_arguments_are_found_by_name(options, how):
    """By position or by keyword, with the function's defaults; in a bound task too."""
    tenants, task = new_task(**options)

    def run(*args, **kwargs):
        if how == "apply":
            task.apply(args, kwargs).get()
        else:
            (task if how == "call" else task.run)(*args, **kwargs)

    run.bucket = tenants
    assert paid(run, *WAYS) == TOOK


def test_arguments_are_found_by_name_in_a_class():
    """So they are in a task that is a class."""
    tenants = BucketPerKey(100, 1e-9)

    class Upload(Task):
        name = "upload"

        @throttle(tenants, key="tenant", tokens="size")
        def run(self, tenant="acme", size=2): ...

    own = Celery("shop", broker="memory://", set_as_current=False)
    task = own.register_task(Upload())

    def run(*args, **kwargs):
        task.apply(args, kwargs).get()

    run.bucket = tenants
    assert paid(run, *WAYS) == TOOK


def test_self_is_no_parameter():
    """Producers do not send it."""

    def upload(self, size): ...

    with pytest.raises(ValueError, match="not 'self': the parameters of .*upload` are size$"):
        throttle("1/s", burst=2, tokens="self")(upload)


def test_a_job_without_the_argument_fails_alone():
    """Where the task takes **kwargs, only the job tells."""

    @app.task(name="fetch", lazy=False, shared=False)
    @throttle("5/s", key="tenant")
    def fetch(url, **others):
        return others

    assert fetch.apply(("x",), {"tenant": "acme"}).get() == {"tenant": "acme"}
    with pytest.raises(
        ValueError, match="task fetch, limit fetch: key='tenant': the job has no such arg"
    ):
        fetch.apply(("x",)).get()


def test_the_name_is_the_tasks_once_it_is_known():
    """A limit without a name is called after its task; a second one there gets a number."""

    @throttle("1/s")
    @throttle("2/s")
    def fetch(): ...

    own = Celery("shop", broker="memory://", set_as_current=False)
    task = own.task(fetch, name="jobs.fetch", lazy=False, shared=False)
    assert [record_of(limit).name for limit in fetch.__rate_limits__] == ["", ""]
    task.apply().get()
    assert [record_of(limit).name for limit in fetch.__rate_limits__] == [
        "jobs.fetch",
        "jobs.fetch (2)",
    ]


# -- what the producer sent -----------------------------------------------------------------------------------


class Model:
    """Made of what was sent, as Celery makes pydantic's."""

    def __init__(self, sent):
        self.prompt = sent["prompt"]


def with_models(function):
    """Do what Celery does with ``pydantic=True``: it puts itself around what stands below @app.task."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*map(Model, args), **{name: Model(value) for name, value in kwargs.items()})

    return wrapper


@pytest.mark.parametrize("how", ["apply", "call"])
@pytest.mark.parametrize(
    ("args", "kwargs"), [(({"prompt": "abc"},), {}), ((), {"text": {"prompt": "abc"}})]
)
def test_callables_are_given_what_the_producer_sent(how, args, kwargs):
    """Not the models that Celery makes of it; a fallback gets these, as the function does."""
    bucket = TokenBucket(5, 1e-9)
    ran = []

    @throttle(
        bucket,
        tokens=lambda text: len(text["prompt"]),
        when_limited=lambda text: ran.append(text),  # noqa: PLW0108 - append takes no keyword
    )
    def complete(text):
        ran.append(text)

    own = Celery("shop", broker="memory://", set_as_current=False)
    task = own.task(with_models(complete), name="complete", lazy=False, shared=False)
    for _ in range(2):
        task.apply(args, kwargs).get() if how == "apply" else task(*args, **kwargs)
    assert round(bucket.tokens) == 2
    assert [each.prompt for each in ran] == ["abc", "abc"]


def test_pydantic_models_are_priced_as_sent():
    """And so it is with Celery's own."""
    pydantic = pytest.importorskip("pydantic")

    class Text(pydantic.BaseModel):
        prompt: str

    bucket = TokenBucket(5, 1e-9)

    @throttle(bucket, tokens=lambda text: len(text["prompt"]))
    def complete(text: Text) -> None:
        assert text.prompt == "abc"

    own = Celery("shop", broker="memory://", set_as_current=False)
    task = own.task(complete, name="complete", lazy=False, shared=False, pydantic=True)
    task.apply(({"prompt": "abc"},)).get()
    assert round(bucket.tokens) == 2


# -- what is counted --------------------------------------------------------------------------------------


def as_task(function):
    """Make it a task of an app of its own. To call it pays for all its limits together."""
    return Celery("counted", broker="memory://", set_as_current=False).task(shared=False)(function)


def counted(task):
    """Return what was counted and is not 0, by the name of the limit."""
    return {record_of(limit).name: numbers(limit) for limit in task.run.__rate_limits__}


def test_a_call_that_has_paid_is_counted(monkeypatch):
    """Admitted, with what it paid; it has waited only if it had to."""
    clock = ManualClock()
    monkeypatch.setattr(sys.modules["rate_limiter.celery.throttle"], "monotonic", clock)

    @as_task
    @throttle(TokenBucket(6, 20, clock=clock), name="cost", tokens="size")
    @throttle(TokenBucket(9, 1), name="one")
    def upload(size): ...

    upload(2)
    upload(4)
    assert counted(upload) == {
        "cost": {"admitted": 2, "tokens": 6},
        "one": {"admitted": 2, "tokens": 2},
    }
    upload(1)
    found = counted(upload)
    assert found["cost"].pop("waited") == found["cost"].pop("longest") == pytest.approx(0.05)
    assert found == {"cost": {"admitted": 3, "tokens": 7}, "one": {"admitted": 3, "tokens": 3}}


@pytest.mark.parametrize(
    ("options", "raises"),
    [
        ({"when_limited": "raise"}, RateLimitExceeded),
        ({"timeout": 0.01}, RateLimitExceeded),
        ({"timeout": 0}, RateLimitExceeded),
        ({"when_limited": lambda: None}, None),
    ],
)
def test_a_refusal_is_counted(options, raises):
    """Under the limit that refuses, and nothing under another that had the tokens."""

    @as_task
    @throttle(TokenBucket(9, 1), name="other")
    @throttle(TokenBucket(1, 0.1), name="this", **options)
    def send(): ...

    send()
    if raises:
        with pytest.raises(raises):
            send()
    else:
        send()
    assert counted(send) == {
        "other": {"admitted": 1, "tokens": 1},
        "this": {"admitted": 1, "tokens": 1, "refused": 1},
    }


@pytest.mark.parametrize("cost", [0, 7, "much", None])
def test_a_cost_that_cannot_be_paid_is_counted(cost):
    """Failed, under the limit whose cost it is."""

    @as_task
    @throttle(TokenBucket(9, 1), name="other")
    @throttle(TokenBucket(6, 1), name="this", tokens="size")
    def upload(size): ...

    with pytest.raises(ValueError, match="this: tokens is"):
        upload(cost)
    assert counted(upload) == {"other": {}, "this": {"failed": 1}}


def test_a_capacity_below_the_cost_is_counted():
    """Failed too, where the bucket has become too small for a cost that is fixed."""
    bucket = TokenBucket(6, 1)

    @as_task
    @throttle(TokenBucket(9, 1), name="other")
    @throttle(bucket, name="this", tokens=5)
    def upload(): ...

    bucket.configure(capacity=4)
    with pytest.raises(ValueError, match="capacity"):
        upload()
    assert counted(upload) == {"other": {}, "this": {"failed": 1}}


def test_what_is_settled_is_counted():
    """The tokens of a limit are what was used in the end, less or more than what was paid."""

    @as_task
    @throttle(TokenBucket(100, 1), name="cost", tokens=10)
    def complete(used):
        for tokens in used:
            current_charge().settle(tokens)

    for used, total in (((4,), 4), ((30,), 34), ((10,), 44), ((0, 5, 5), 49)):
        complete(used)
        assert counted(complete)["cost"]["tokens"] == total
