"""Which limits are parked, what their lanes are called, and when the engine parks a job."""

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured
from engine_lab import Lab
from kombu import Queue

from rate_limiter import AllOf, BucketPerKey, TokenBucket
from rate_limiter.broker.lane import lane_entity, lane_name
from rate_limiter.celery import Gate
from rate_limiter.celery.check import problems
from rate_limiter.celery.parkable import parked_limits
from rate_limiter.gating.declared import Declared, new_limit
from rate_limiter.kombu import Gate as KombuGate


def test_a_limit_for_tasks_with_one_bucket_is_parked():
    """Also with several tokens a job, or several buckets at once; each only if it was asked for."""
    limits = [
        new_limit("100/s", overflow="park"),
        new_limit("500/s", burst=10, tokens=5, overflow="park"),
        new_limit(AllOf(TokenBucket(1, 5), TokenBucket(9, 1)), overflow="park"),
        new_limit("5/s", burst=9, tokens=lambda _: 1, overflow="park"),
    ]
    others = [new_limit("5/s"), new_limit("5/s", overflow="pause"), new_limit("5/s", overflow="hold")]
    declared = {limits[0]: Declared(limits[0], ("mail.*",), "bulk")}
    for broker in "redis", "amqp":
        assert parked_limits([*limits, *others], declared, broker, by_default=False) == limits
        by_default = parked_limits([*limits, *others], declared, broker, by_default=True)
        assert by_default == [*limits, others[0]]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bucket": BucketPerKey(1, 1), "key": "tenant"}, "its bucket depends on the job"),
        ({"bucket": lambda _: TokenBucket(1, 1)}, "its bucket depends on the job"),
        ({"shadow": True}, "a shadow makes no job wait"),
        ({"when_limited": "drop"}, "its jobs do not wait: when_limited is 'drop'"),
        ({"when_limited": "retry"}, "its jobs do not wait: when_limited is 'retry'"),
        ({"max_wait": 5}, "max_wait does not count the time in the broker"),
        ({"bucket": "101/s"}, "it lets 101 jobs go in a second, and more than 100 cannot be moved"),
        ({"queue": "mails"}, "its queue carries only this limit"),
        ({"patterns": ("*",)}, "its queue carries only this limit"),
        ({"broker": "mongodb"}, "only Redis and RabbitMQ can park jobs, and the broker is mongodb"),
    ],
)
def test_what_cannot_be_parked_says_why(options, why, caplog):
    """Asked for by name it is an error; by the setting for all limits it is held, and said."""
    caplog.set_level("INFO", "rate_limiter")
    options = {"bucket": "5/s", **options}
    broker = options.pop("broker", "redis")
    queue, patterns = options.pop("queue", None), options.pop("patterns", ())
    for overflow in "park", None:
        limit = new_limit(**options, name="mails", overflow=overflow)
        declared = {limit: Declared(limit, patterns, queue)} if queue or patterns else {}
        if overflow:
            with pytest.raises(ImproperlyConfigured, match="limit mails: overflow must be") as raised:
                parked_limits([limit], declared, broker, by_default=False)
            assert why in str(raised.value)
        else:
            assert parked_limits([limit], declared, broker, by_default=True) == []
            assert f"Limit mails: its jobs are held, not parked: {why}" in caplog.text


@pytest.mark.parametrize(
    ("overflow", "options", "problem"),
    [
        ("hold", {"overflow": "park", "max_wait": 5}, "limit job: overflow must be 'hold' or 'pause'"),
        ("pork", {}, "rate_limiter_overflow must be 'hold' or 'park', not 'pork'"),
        ("park", {"max_wait": 5}, None),
    ],
)
def test_limits_check_tells_of_what_cannot_be_parked(overflow, options, problem):
    """`celery limits check` finds what a worker would not start for."""
    app = Celery("shop", broker="redis://", set_as_current=False)
    app.conf.rate_limiter_overflow = overflow
    gate = Gate(app)
    gate.limit("job *", bucket="5/s", name="job", **options)

    @app.task(shared=False, name="job 1")
    def job():
        """Do nothing."""

    found = problems(app)
    assert [each.startswith(problem) for each in found] == [True] if problem else found == []


def test_the_gate_for_kombu_parks_nothing():
    """overflow="park" is refused there."""
    with pytest.raises(ValueError, match="overflow='park' is for Celery"):
        KombuGate().limit("mails", bucket=TokenBucket(1, 1), overflow="park")


@pytest.mark.parametrize(
    ("queue", "limits", "name"),
    [
        ("celery", ["jobs.send"], "celery.parked.jobs.send"),
        ("celery", ["b", "a"], "celery.parked.a+b"),
        ("a b", ["x_1-2"], "a b.parked.x_1-2"),
    ],
)
def test_lanes_are_named_for_queue_and_limits(queue, limits, name):
    """Plain names stay as they are; the order of limits means nothing."""
    assert lane_name(queue, limits) == name


@pytest.mark.parametrize("queue", ["celery", "q" * 230])
@pytest.mark.parametrize(
    "limit", ["mail.*", "é", "a, b", "all tasks", "x" * 300, "a\x06\x16b", "***", "workers"]
)
def test_lanes_have_short_and_safe_names(queue, limit):
    """Any name becomes one that every broker takes, another one for each; the same in each worker."""
    name = lane_name(queue, [limit])
    assert name == lane_name(queue, [limit])
    assert len(name.encode()) <= 255
    assert set(name.removeprefix(f"{queue}.parked.")) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-"
    )
    others = {lane_name(queue, [other]) for other in (f"{limit}?", f"{limit}!", f"{limit}x")}
    assert len(others | {name}) == 4
    assert not name.endswith(".workers")  # which tell who uses a lane
    assert lane_name(queue, ["job.workers"]) != f"{lane_name(queue, ['job'])}.workers"


def test_a_lane_is_of_the_kind_of_its_queue():
    """Type, priorities and durability are those of the queue; nothing that would delete jobs is."""
    queue = Queue(
        "q",
        durable=False,
        auto_delete=True,
        max_priority=5,
        expires=9,
        max_length=3,
        queue_arguments={"x-queue-type": "classic", "x-dead-letter-exchange": "dead"},
    )
    lane = lane_entity(queue, "q.parked.a")
    assert (lane.name, lane.routing_key, lane.exchange.name) == ("q.parked.a", "q.parked.a", "")
    assert (lane.durable, lane.auto_delete, lane.expires, lane.max_length) == (False, False, None, None)
    assert lane.queue_arguments == {"x-queue-type": "classic", "x-max-priority": 5}


def parking_lab(**options):
    lab = Lab(**options)
    lab.engine.room.parking = frozenset([lab.limit])
    return lab


def offer(lab, *jobs, behind=False):
    plan = lab.engine.plan("job")
    return [lab.engine.offer(job, plan, "queue", behind=behind)[0] for job in jobs]


def test_jobs_are_parked_beyond_what_a_second_brings():
    """Held is a second's worth, at most half a window; the window is not raised for them."""
    lab = parking_lab(rate=2)
    assert offer(lab, *"abcde") == ["go", "held", "held", "park", "park"]
    assert lab.gate.room == (0, 0)
    assert offer(parking_lab(rate=50), *"abcd") == ["go", "held", "held", "park"]
    assert offer(parking_lab(rate=0.1), *"abc") == ["go", "held", "park"]
    assert offer(parking_lab(rate=50, max_held=1), *"abc") == ["go", "held", "park"]


def test_a_job_goes_behind_those_that_are_parked():
    """Even if there are tokens for it; and nothing is taken."""
    lab = parking_lab(capacity=5)
    assert offer(lab, "a", "b", behind=True) == ["park", "park"]
    assert lab.bucket.tokens == 5
    assert lab.numbers() == {}


def test_a_job_that_comes_back_is_held():
    """However many are held; they go in order, at the rate."""
    lab = parking_lab()
    assert offer(lab, *"abcdef", behind=None) == ["go", *["held"] * 5]
    assert lab.gate.room == (0, 0)
    assert lab.run(9) == list("bcdef")


def test_a_limit_that_cannot_be_parked_any_more_holds():
    """Then there is room for what it holds, as for any limit; and it is taken back when it can again."""
    lab = parking_lab()
    offer(lab, *"abc", behind=None)
    assert lab.gate.room == (0, 0)
    lab.engine.room.parking = frozenset()
    assert offer(lab, "d", behind=None) == ["held"]
    assert lab.gate.room == (3, 600)
    lab.engine.room.parking = frozenset([lab.limit])
    lab.engine.settle()
    assert lab.gate.room == (0, 0)


def test_a_bucket_says_when_it_has_tokens_for_a_job():
    """Seconds from now, with a pause; 0.0 while they are there."""
    lab = Lab(rate=0.01)
    plan = lab.engine.plan("job")
    assert lab.engine.due_in(plan) == 0.0
    lab.offer("a")
    assert lab.engine.due_in(plan) == pytest.approx(100)
    lab.clock.now += 60
    assert lab.engine.due_in(plan) == pytest.approx(40)
    lab.bucket.pause(500)
    assert lab.engine.due_in(plan) == pytest.approx(600)


def test_what_is_held_for_too_long_can_be_withdrawn():
    """From its end, the latest first; the first ones are held on, and it counts as returned."""
    lab = parking_lab()
    offer(lab, *"abcdef", behind=None)
    assert lab.engine.withdraw({"c", "e", "f", "x"}, keep=1) == ["f", "e"]
    assert lab.run(9) == list("bcd")
    assert lab.numbers()["returned"] == 2
