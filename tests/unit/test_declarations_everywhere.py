"""A wrong declaration gets the same error, wherever it is written."""

import math
from types import SimpleNamespace

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured

from rate_limiter import BucketPerKey, TokenBucket
from rate_limiter.celery import Gate, throttle
from rate_limiter.kombu import Gate as KombuGate

#: What is right, unless a row of the table says otherwise: a bucket of 10 tokens.
RIGHT = {"select": ("jobs.upload",), "bucket": "5/s", "burst": 10}


def upload(size, tenant="acme"): ...


async def upload_async(size): ...


def new_app(function=upload, names=("jobs.upload",), **options):
    app = Celery("shop", broker="memory://", set_as_current=False)
    for name in names:
        app.task(function, shared=False, name=name, **options)
    return app


def as_setting(options):
    others = {option: value for option, value in options.items() if option not in ("select", "bucket")}
    return {"rate": options["bucket"], **others}


# -- the places: each declares what it is given, does what a worker does at its start, returns the limits --


def in_decorator(declarations, function):
    for options in declarations:
        bucket = options.pop("bucket")
        options.pop("select")
        function = throttle(bucket, **options)(function)
    return function.__rate_limits__


def at_celery_gate(declarations, function):
    gate = Gate(new_app(function))
    for options in declarations:
        gate.limit(*options.pop("select"), **options)
    return gate.tasks_of()


def at_kombu_gate(declarations, _function):
    gate = KombuGate()
    for options in declarations:
        gate.limit(*options.pop("select"), **options)
    return gate.limits_for("jobs.upload")


def in_settings(declarations, function):
    app = new_app(function)
    app.conf.rate_limiter_limits = {
        # a pattern is there once only
        each["select"][0] if not number else "jobs.*": as_setting(each)
        for number, each in enumerate(declarations)
    }
    return Gate(app).tasks_of()


def in_attribute(declarations, function):
    app = new_app(function, ())
    for number, each in enumerate(declarations):
        name = "jobs.upload" + str(number or "")
        app.task(function, shared=False, name=name, rate_limiter_limit=as_setting(each))
    return Gate(app).tasks_of()


DECORATOR, GATE, KOMBU, SETTINGS, ATTRIBUTE = PLACES = {
    "decorator": in_decorator,
    "celery gate": at_celery_gate,
    "kombu gate": at_kombu_gate,
    "settings": in_settings,
    "task attribute": in_attribute,
}

# -- why a row is not for a place ----------------------------------------------------------------------

#: The decorator and the attribute stand at their task, so they select none.
NO_SELECTOR = dict.fromkeys((DECORATOR, ATTRIBUTE), "it stands at its task")
#: The settings and the attribute have rates, and make the bucket of it.
NO_BUCKET = dict.fromkeys((SETTINGS, ATTRIBUTE), "it makes its bucket of a rate")
#: Only a gate holds jobs.
NOT_HELD = {DECORATOR: "it holds no jobs, so it has neither max_held nor overflow"}
#: Only the decorator can.
DECORATOR_ONLY = dict.fromkeys((GATE, KOMBU, SETTINGS, ATTRIBUTE), "the decorator alone has it")
#: A call with an argument that there is not is Python's own error.
NO_CALL = dict.fromkeys((DECORATOR, GATE, KOMBU), "Python refuses an argument that there is not")
NO_TASKS = {KOMBU: "it knows messages, and no functions"}
RATE_ALONE = dict.fromkeys((DECORATOR, GATE, KOMBU), "there a BucketPerKey has limits=")


def row(name, error, text, *declarations, function=upload, late=False, **not_for):
    """One wrong declaration.

    ``text`` is how the error begins. ``late``: where only the name of the task is known, it comes at the
    worker's start. ``not_for`` has, by place, the reason why it cannot be written there.
    """
    wrong = SimpleNamespace(error=error, text=text, function=function, late=late, not_for=not_for)
    wrong.declarations = [{**RIGHT, **each} for each in declarations]
    return name, wrong


TABLE = [
    # which jobs
    row("no pattern", ValueError, "tasks must be names or patterns, not ''", {"select": ("",)}, **NO_SELECTOR),
    row("pattern 5", TypeError, "tasks must be names or patterns, not 5", {"select": (5,)}, **NO_SELECTOR),
    row(
        "Celery's own task", ValueError, "tasks must not be Celery's own, as 'celery.group' is",
        {"select": ("celery.group",)}, **NO_SELECTOR, **{KOMBU: "it is a queue like any other"},
    ),
    row("queue 5", TypeError, "queue must be text, not 5", {"queue": 5}, **NO_SELECTOR,
        **{KOMBU: "its patterns are the queues"}),
    row("no queue", ValueError, "queue must be text, not ''", {"queue": ""}, **NO_SELECTOR,
        **{KOMBU: "its patterns are the queues"}),
    # the name
    row("name 7", TypeError, "name must be text, not 7", {"name": 7}),
    row("no name", ValueError, "name must be text, not ''", {"name": ""}),
    row("one name for two", ValueError, "name must be different for each limit: 'mails' is the name of two",
        {"name": "mails"}, {"name": "mails"}, late=True),
    # the bucket
    row("bucket 5", TypeError, "bucket must be a bucket such as", {"bucket": 5, "burst": None}, **NO_BUCKET),
    row("bucket None", TypeError, "bucket must be a bucket such as", {"bucket": None, "burst": None},
        **NO_BUCKET),
    row("bucket class", TypeError, "bucket must be a bucket such as", {"bucket": TokenBucket, "burst": None},
        **NO_BUCKET),
    *(
        row(f"rate {rate!r}", ValueError, "rate must be a number above 0, per second or with a unit (s, m, h or "
            f"d) as in '100/m', not {rate!r}", {"bucket": rate})
        for rate in ("", "fast", "100/", "100/w", "/s", "0/s", "-1/s", "nan", "inf/s", "1/s/s")
    ),
    *(
        row(f"rate {rate!r}", ValueError, f"rate must be a number above 0, per second or with a unit (s, m, h or "
            f"d) as in '100/m', not {rate!r}", {"bucket": rate}, **dict.fromkeys(
                (DECORATOR, GATE, KOMBU), "a number is no rate there: it would not say what it counts"))
        for rate in (None, 0, -1, math.nan, True, [])
    ),
    row("burst 0", ValueError, "burst must be", {"burst": 0}),
    row("burst text", TypeError, "burst must be", {"burst": "x"}),
    row("burst beside a bucket", ValueError, "burst goes with a rate", {"bucket": TokenBucket(1, 1)},
        **NO_BUCKET),
    *(
        row(f"initial {initial!r}{' '.join(['', *others])}", error, f"initial must be {expected}",
            {"initial": initial, **others})
        for others in ({}, {"key": "tenant"})
        for initial, error, expected in (
            (-1, ValueError, "0 or more, not -1"), (math.nan, ValueError, "a finite number, not nan"),
            (11, ValueError, "at most the capacity 10, not 11"), ("x", TypeError, "a number (int or float), not 'x'"))
    ),
    row("initial beside a bucket", ValueError, "initial goes with a rate such as '100/m': <TokenBucket",
        {"bucket": TokenBucket(1, 1), "burst": None, "initial": 0}, **NO_BUCKET),
    row("initial above the default burst", ValueError, "initial must be at most the capacity 1, not 2",
        {"burst": None, "initial": 2}),
    row("no burst", ValueError, "burst is missing", {"burst": None, "tokens": "size"}),
    row("buckets beside a bucket", ValueError, "buckets goes with a callable", {"buckets": [TokenBucket(1, 1)]},
        **NO_BUCKET),
    row("buckets of others", TypeError, "buckets must be buckets, not 5",
        {"bucket": len, "burst": None, "buckets": [5]}, **NO_BUCKET),
    # the cost
    *(
        row(f"tokens {tokens!r}", error, "tokens must be", {"tokens": tokens})
        for tokens, error in ((0, ValueError), (-1, ValueError), (math.nan, ValueError), (math.inf, ValueError),
                              ("2", TypeError), ("", TypeError), (None, TypeError), ([], TypeError))
    ),
    row("tokens above the capacity", ValueError, "tokens must be at most the bucket's capacity 10, not 11",
        {"tokens": 11}),
    row("tokens of no parameter", ValueError, "tokens must be the name of a parameter, not 'sise': the "
        "parameters of `", {"tokens": "sise"}, late=True, **NO_TASKS),
    row("tokens of self", ValueError, "tokens must be the name of a parameter, not 'self'", {"tokens": "self"},
        late=True, **NO_TASKS),
    # the key
    *(
        row(f"key {key!r}", TypeError, "key must be the name of a parameter, or a callable that is given the "
            f"job's arguments, not {key!r}", {"key": key}) for key in (5, "", "my tenant")
    ),
    row("key of no parameter", ValueError, "key must be the name of a parameter, not 'tenat': the parameters of `",
        {"key": "tenat"}, late=True, **NO_TASKS),
    row("key beside a bucket", ValueError, "key goes with a BucketPerKey",
        {"bucket": TokenBucket(1, 1), "burst": None, "key": "tenant"}, **NO_BUCKET),
    row("no key", ValueError, "key is missing", {"bucket": BucketPerKey(1, 1), "burst": None}, **NO_BUCKET),
    row("limits without key", ValueError, "limits goes with key", {"limits": {"acme": "1/s"}}, **RATE_ALONE),
    row("limits 5", TypeError, "limits must map keys to rates, not be 5", {"key": "tenant", "limits": 5},
        **RATE_ALONE),
    row("limits of no rate", ValueError, "limits['acme']: rate must be a number above 0, per second or with a unit "
        "(s, m, h or d) as in '100/m', not 'fast'", {"key": "tenant", "limits": {"acme": "fast"}}, **RATE_ALONE),
    row("limits with another option", ValueError, "limits['acme']: unknown option 'key'; expected burst, rate",
        {"key": "tenant", "limits": {"acme": {"rate": 1, "key": "x"}}}, **RATE_ALONE),
    row("limits below the cost", ValueError, "limits['acme']: tokens must be at most the bucket's capacity 2, not 3",
        {"key": "tenant", "tokens": 3, "limits": {"acme": {"rate": 1, "burst": 2}}}, **RATE_ALONE),
    # what happens
    row("when_limited 'hold'", ValueError, "when_limited must be one of 'wait', 'retry', 'drop', 'raise'",
        {"when_limited": "hold"}),
    row("when_limited None", ValueError, "when_limited must be one of 'wait', 'retry', 'drop', 'raise'",
        {"when_limited": None}),
    row("when_limited=print", ValueError, "when_limited may be a callable in @throttle only, not <built-in function "
        "print> here", {"when_limited": print}, **{DECORATOR: "it calls that instead of the task"}),
    row("timeout -1", ValueError, "timeout must be", {"timeout": -1}, **DECORATOR_ONLY),
    row("timeout text", TypeError, "timeout must be", {"timeout": "1"}, **DECORATOR_ONLY),
    row("timeout of no wait", ValueError, "timeout goes with when_limited='wait', not 'drop'",
        {"timeout": 1, "when_limited": "drop"}, **DECORATOR_ONLY),
    row("max_wait -1", ValueError, "max_wait must be 0 or more, not -1", {"max_wait": -1}),
    row("max_wait text", TypeError, "max_wait must be a number", {"max_wait": "1"}),
    row("max_wait nan", ValueError, "max_wait must be", {"max_wait": float("nan")}),
    row("shadow 1", TypeError, "shadow must be True or False, not 1", {"shadow": 1}),
    row("max_wait and timeout", ValueError, "timeout and max_wait exclude each other", {"max_wait": 1, "timeout": 1},
        **DECORATOR_ONLY),
    *(
        row(f"max_held {held!r}", error, f"max_held must be {expected}, not {held!r}", {"max_held": held}, **NOT_HELD)
        for held, error, expected in ((0, ValueError, "1 or more"), (1.5, TypeError, "a whole number"),
                                      (True, TypeError, "a whole number"), ("8", TypeError, "a whole number"))
    ),
    *(
        row(f"overflow {overflow!r}", ValueError, f"overflow must be one of 'hold', 'pause', 'park', not {overflow!r}",
            {"overflow": overflow}, **NOT_HELD) for overflow in ("x", "", 5)
    ),
    # what there is not
    row("unknown option", ValueError, "unknown option 'brust'; expected burst, initial, key", {"brust": 3}, **NO_CALL),
    row("unknown option 5", ValueError, "unknown option '5'; expected burst, initial, key", {5: 3}, **NO_CALL),
    row("queue in an attribute", ValueError, "unknown option 'queue'; expected burst", {"queue": "bulk"}, **NO_CALL,
        **{SETTINGS: "there it is an option"}),
    row("async", TypeError, " is async; Celery does not await tasks, so it would never run", {},
        function=upload_async, late=True, **NO_TASKS),
]  # fmt: skip


def prefix(place, wrong):
    """Return how an error begins that wraps another."""
    (pattern,) = wrong.declarations[0]["select"]
    return {
        SETTINGS: f"rate_limiter_limits[{pattern!r}]: ",
        ATTRIBUTE: f"rate_limiter_limit of {pattern}: ",
    }[place]


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        pytest.param(place, wrong, id=f"{name}-{place}")
        for name, wrong in TABLE
        for place in PLACES
        if not wrong.not_for.get(place)
    ],
)
def test_wrong_declaration_gets_the_same_error(place, wrong):
    """It names the argument, the value and what was expected; where it stands, or at the worker's start."""
    with pytest.raises((TypeError, ValueError, ImproperlyConfigured)) as raised:
        PLACES[place]([dict(each) for each in wrong.declarations], wrong.function)
    message = str(raised.value)
    text = wrong.text.replace("tasks", "queues") if place == KOMBU else wrong.text
    if raised.type is not ImproperlyConfigured:
        assert place not in (SETTINGS, ATTRIBUTE)
        assert raised.type is wrong.error
        assert text in message
    elif wrong.late:
        assert place != KOMBU
        assert text in message
    else:
        assert message.startswith(prefix(place, wrong) + text)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("options", "tokens"),
    [({}, 10), ({"initial": None}, 10), ({"initial": 0}, 0), ({"initial": 2.5}, 2.5)],
)
def test_initial_is_what_the_bucket_starts_with(place, options, tokens):
    """Wherever it is written, the bucket starts with it, and that of each key; by default full."""
    right = {**RIGHT, "bucket": "1/d", **options}
    (limit,) = PLACES[place]([dict(right)], upload)
    assert limit.bucket.tokens == pytest.approx(tokens, abs=0.01)
    (per_key,) = PLACES[place]([{**right, "key": "tenant"}], upload)
    assert per_key.bucket["acme"].tokens == pytest.approx(tokens, abs=0.01)


@pytest.mark.parametrize("place", [SETTINGS, ATTRIBUTE])
def test_initial_is_cut_at_what_a_key_may_hold(place):
    """A key with a smaller burst of its own starts with that."""
    limits = {"small": {"rate": "1/d", "burst": 2}, "large": {"rate": "1/d", "burst": 50}}
    (limit,) = PLACES[place](
        [{**RIGHT, "bucket": "1/d", "initial": 5, "key": "tenant", "limits": limits}], upload
    )
    assert {key: round(limit.bucket[key].tokens) for key in ("small", "large", "acme")} == {
        "small": 2,
        "large": 5,
        "acme": 5,
    }
