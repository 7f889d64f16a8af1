"""A limit with shadow=True: no job waits or is refused, and what would have been is counted."""

import pytest
from celery import Celery
from engine_lab import Gate, Lab, numbers

from rate_limiter import AllOf, BucketPerKey, TokenBucket
from rate_limiter.celery import current_charge, throttle
from rate_limiter.gating.declared import new_limit
from rate_limiter.gating.engine import Engine
from rate_limiter.gating.limit import Call, Limit
from rate_limiter.testing import ManualClock


def test_jobs_that_would_have_waited():
    """Each goes at once, also with slots; the waits are those of a queue."""
    lab = Lab(1, 1, shadow=True)
    assert lab.offer(*"abcd") == ["go"] * 4
    lab.clock.advance(2)
    lab.offer("e")
    assert lab.numbers() == {
        "admitted": 5,
        "tokens": 5,
        "shadowed": 4,
        "waited": 1 + 2 + 3 + 2,
        "longest": 3,
    }
    lab.bucket.pause(10)
    lab.offer("f")
    assert lab.numbers()["longest"] == pytest.approx(11)


@pytest.mark.parametrize("policy", ["drop", "raise"])
def test_jobs_that_would_have_been_refused(policy):
    """They cost nothing, as a refused one does; one above the capacity is counted too."""
    lab = Lab(2, 1, shadow=True, when_limited=policy, tokens=len)
    assert lab.offer("aa", "b", "ccc") == ["go"] * 3
    assert lab.bucket.tokens == 0
    assert lab.numbers() == {"admitted": 3, "tokens": 6, "shadowed": 2, "waited": 1, "longest": 1}


def test_slots_hold_nobody():
    """Where jobs wait for the start of others, those of a shadow do not."""
    host, clock = Gate(), ManualClock()
    host.has_slots = True
    host.unstarted = lambda _job: True
    limit = Limit(TokenBucket(1, 1, clock=clock), shadow=True, name="shadow")
    engine = Engine(host, lambda _: (limit,), clock=clock)
    plan = engine.plan("job")
    assert [engine.offer(job, plan)[0] for job in "abc"] == ["go"] * 3


def test_beside_a_real_limit():
    """The other limits of a job hold it as ever."""
    clock = ManualClock()
    real = Limit(TokenBucket(1, 1, clock=clock), name="real")
    shadow = Limit(TokenBucket(1, 0.1, clock=clock), shadow=True, name="shadow")
    lab = Lab()
    lab.engine = engine = Engine(lab.gate, lambda _: (shadow, real), clock=clock)
    lab.clock = clock
    engine.room.window = lambda _limit: 4
    assert [engine.offer(job, engine.plan("x"))[0] for job in "abc"] == ["go", "held", "held"]
    assert lab.run(10) == ["b", "c"]
    assert numbers(real)["admitted"] == numbers(shadow)["admitted"] == 3
    assert numbers(shadow)["shadowed"] == 2


@pytest.mark.parametrize(
    ("bucket", "options"),
    [
        (AllOf(TokenBucket(2, 1), TokenBucket(3, 1)), {}),
        (BucketPerKey(2, 1), {"key": "tenant"}),
        (lambda _tenant: CALLED, {}),
    ],
)
def test_other_kinds_of_buckets(bucket, options):
    """Each job counts once."""
    job = throttle(bucket, shadow=True, name="shadow", **options)(lambda tenant: tenant)
    assert [job("acme") for _ in range(5)] == ["acme"] * 5
    (limit,) = job.__rate_limits__
    assert numbers(limit)["shadowed"] == 3


CALLED = TokenBucket(2, 1)


def test_a_bucket_is_not_for_a_shadow_and_for_others():
    """Its debt would make real jobs wait. Also inside an AllOf, and whatever is declared first."""
    bucket = TokenBucket(1, 1)
    real = new_limit(bucket)
    with pytest.raises(ValueError, match="shadow must be the same for all limits of one bucket"):
        new_limit(AllOf(TokenBucket(2, 2), bucket), shadow=True)
    tried = BucketPerKey(1, 1)
    both = [new_limit(tried, key="tenant", shadow=True) for _ in range(2)]
    with pytest.raises(ValueError, match="limits others with shadow=True; give this limit a bucket"):
        new_limit(tried, key="tenant")
    assert [real.shadow, *(limit.shadow for limit in both)] == [False, True, True]


def test_a_job_that_pays_again_does_not_wait():
    """RetryAfter, where the job runs again in its slot: the shadow's debt is no reason to wait."""
    bucket = TokenBucket(1, 1e-6)
    limit = Limit(bucket, shadow=True, name="shadow")
    bucket.charge(100)
    (found,) = limit.buckets_of(Call("job", (), {}))
    found.wait(1)
    assert bucket.tokens < -99.9


def test_a_charge_is_settled():
    """What a job gives back, its bucket has again."""
    bucket = TokenBucket(10, 0.001)

    @throttle(bucket, tokens=8, shadow=True, name="shadow")
    def job():
        current_charge().settle(2)

    job()
    job()
    assert bucket.tokens == pytest.approx(6, abs=0.01)
    (limit,) = job.__rate_limits__
    assert numbers(limit)["tokens"] == 4


def test_beside_a_real_limit_in_the_decorator():
    """A job that the other limit refuses is not counted."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    real, shadow = TokenBucket(1, 0.001), TokenBucket(5, 0.001)

    @app.task(shared=False)
    @throttle(shadow, shadow=True, name="shadow")
    @throttle(real, when_limited=lambda: "refused", name="real")
    def job():
        return "ran"

    assert [job.apply().get() for _ in range(3)] == ["ran", "refused", "refused"]
    assert shadow.tokens == pytest.approx(4, abs=0.01)
    app.close()
