"""@throttle on every kind of task: eagerly, in a worker without a gate, and in one with a gate."""

import logging
from types import SimpleNamespace

import pytest
from celery import Task, chain, chord, group, shared_task, signals
from celery.contrib.testing.app import setup_default_app
from celery.contrib.testing.worker import start_worker
from celery.exceptions import TaskRevokedError
from harness import DEADLINE, app_here

from rate_limiter import RateLimitExceeded, TokenBucket
from rate_limiter.celery import Gate, throttle

#: No token comes back within a test.
NEVER = 1e-6


def declare(app):
    """Make the tasks, and their buckets."""
    buckets = {}

    def limit(name, capacity=100, **options):
        buckets[name] = TokenBucket(capacity, NEVER)
        return throttle(buckets[name], **options)

    @app.task
    @limit("plain")
    def plain(x, y=1):
        return x + y

    @shared_task(name=f"{app.main}.shared")
    @limit("shared")
    def shared(x, y=1):
        return x + y

    @app.task(bind=True)
    @limit("bound")
    def bound(self, x, y=1):
        assert isinstance(self, Task)
        return x + y

    class OfClass(Task):
        name = "of_class"

        @limit("of_class")
        def run(self, x, y=1):
            return x + y

    class Doubling(Task):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) * 2 / 2

    @app.task(base=Doubling)
    @limit("custom_call")
    def custom_call(x, y=1):
        return x + y

    @app.task(bind=True, autoretry_for=(KeyError,), default_retry_delay=0)
    @limit("autoretry")
    def autoretry(self, x, y=1):
        if not self.request.retries:
            raise KeyError(x)
        return x + y

    @app.task
    def total(numbers):
        return sum(numbers)

    @app.task
    @limit("waits", 1, timeout=0.05)
    def waits():
        return "ran"

    @app.task
    @limit("raises", 1, when_limited="raise")
    def raises():
        return "ran"

    @app.task
    @limit("drops", 1, when_limited="drop")
    def drops(x):
        return x

    @app.task
    @limit("drops_in_chord", 1, when_limited="drop")
    def drops_in_chord(x):
        return x

    @app.task(bind=True)
    @limit("falls_back", 1, when_limited=lambda *args, **kwargs: ["instead", list(args), kwargs])
    def falls_back(self, x, *, y):
        return "ran"

    buckets |= {tier: TokenBucket(100, NEVER) for tier in ("premium", "free")}

    @app.task(bind=True)
    @throttle(lambda tier, size: buckets[tier], tokens=lambda tier, size: size)
    def tiered(self, tier, size):
        return tier

    @app.task
    @limit("priced", 10, tokens=lambda price: price)
    def priced(price):
        return price

    tasks = {name: task for name, task in locals().items() if hasattr(task, "delay")}
    tasks["of_class"] = app.register_task(OfClass())
    del tasks["OfClass"], tasks["Doubling"]
    return SimpleNamespace(**tasks), buckets


@pytest.fixture(scope="module", params=["eager", "solo", "threads", "gate"])
def shop(request):
    """Yield the tasks in one of the places that enforce their limits."""
    app = app_here(task_always_eager=request.param == "eager")
    if request.param == "gate":
        Gate(app)
    with setup_default_app(app, use_trap=False):
        tasks, buckets = declare(app)
        app.finalize()

        def paid(name):
            return round(buckets[name].capacity - buckets[name].tokens, 3)

        shop = SimpleNamespace(app=app, place=request.param, tasks=tasks, paid=paid)
        if request.param == "eager":
            yield shop
        else:
            pool = "solo" if request.param == "solo" else "threads"
            with start_worker(app, pool=pool, concurrency=2, perform_ping_check=False):
                yield shop
    app.close()


def get(result):
    """Wait for a result."""
    return result.get(timeout=DEADLINE, interval=0.02)


@pytest.mark.parametrize(
    ("kind", "runs"),
    [("plain", 1), ("shared", 1), ("bound", 1), ("of_class", 1), ("custom_call", 1), ("autoretry", 2)],
)
def test_every_kind_of_task_runs_and_pays(shop, kind, runs):
    """A throttled task of any kind gets its arguments, returns its result, and pays for each run."""
    task, before = getattr(shop.tasks, kind), shop.paid(kind)
    assert get(task.delay(2, y=3)) == 5
    assert get(task.apply_async((4,))) == 5
    assert shop.paid(kind) == before + 2 * runs


def test_each_task_of_a_canvas_pays(shop):
    """chain, group and chord work with throttled tasks, and each member pays."""
    plain, total, before = shop.tasks.plain, shop.tasks.total, shop.paid("plain")
    assert get(chain(plain.s(1), plain.s(1), plain.s(1))()) == 4
    assert get(group(plain.s(number) for number in range(4))()) == [1, 2, 3, 4]
    assert get(chord([plain.s(number) for number in range(4)])(total.s())) == 10
    assert shop.paid("plain") == before + 3 + 4 + 4


def test_apply_pays(shop):
    """task.apply() runs in the caller, where no gate is, and pays."""
    before = shop.paid("bound")
    assert shop.tasks.bound.apply((1,)).get() == 2
    assert shop.paid("bound") == before + 1


@pytest.mark.parametrize("kind", ["plain", "bound", "shared"])
@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1})])
def test_wrong_arguments_are_refused_where_they_are_sent(shop, kind, args, kwargs):
    """Celery's check of the caller's arguments sees the signature of the function."""
    if shop.place == "eager":
        shop.app.conf.task_always_eager = False  # Celery checks only what it sends
    try:
        with pytest.raises(TypeError):
            getattr(shop.tasks, kind).delay(*args, **kwargs)
    finally:
        shop.app.conf.task_always_eager = shop.place == "eager"


@pytest.mark.parametrize("kind", ["waits", "raises"])
def test_a_refused_job_fails_with_rate_limit_exceeded(shop, kind):
    """when_limited="raise", or a timeout that is too short: RateLimitExceeded is the result."""
    task = getattr(shop.tasks, kind)
    assert get(task.delay()) == "ran"
    with pytest.raises(RateLimitExceeded, match="rate limit exceeded") as error:
        get(task.delay())
    assert error.value.retry_after == pytest.approx(1 / NEVER, rel=0.01)
    assert shop.paid(kind) == 1


def test_a_dropped_job_ends_as_a_revoked_one(shop, caplog):
    """when_limited="drop": .get() raises TaskRevokedError; one log line, and task_revoked is sent."""
    revoked = []

    def note(request, **_):
        revoked.append(request.id)

    signals.task_revoked.connect(note)
    try:
        with caplog.at_level(logging.INFO, "rate_limiter"):
            assert get(shop.tasks.drops.delay(1)) == 1
            dropped = shop.tasks.drops.delay(2)
            with pytest.raises(TaskRevokedError):
                get(dropped)
            get(shop.tasks.plain.delay(1))  # the worker has gone on
    finally:
        signals.task_revoked.disconnect(note)
    if shop.place != "eager":
        assert dropped.state == "REVOKED"
        assert revoked == [dropped.id]
        (line,) = [text for text in caplog.messages if "Dropped" in text]
        assert dropped.id in line


def test_a_chord_with_a_dropped_member_fails(shop):
    """The body of such a chord does not run, and nobody waits for it for ever."""
    member = shop.tasks.drops_in_chord
    with pytest.raises(Exception, match=r"rate limit exceeded|revoked"):
        get(chord([member.s(1), member.s(2)])(shop.tasks.total.s()))


def test_a_fallback_gets_the_jobs_arguments(shop):
    """when_limited=callable: it is called with what the producer sent, never self."""
    assert get(shop.tasks.falls_back.delay(1, y=2)) == "ran"
    assert get(shop.tasks.falls_back.delay(1, y=2)) == ["instead", [1], {"y": 2}]


def test_bucket_and_tokens_may_be_callables(shop):
    """They get what the producer sent, never self, and choose the tier and the price."""
    assert get(shop.tasks.tiered.delay("premium", 5)) == "premium"
    assert get(shop.tasks.tiered.delay("free", size=2)) == "free"
    assert (shop.paid("premium"), shop.paid("free")) == (5, 2)


@pytest.mark.parametrize("price", [0, -1, 11, "much", None])
def test_a_bad_price_fails_its_job(shop, price):
    """The ValueError names the task and the value; nothing is paid."""
    before = shop.paid("priced")
    with pytest.raises(ValueError, match=r"priced, limit .*priced: tokens") as error:
        get(shop.tasks.priced.delay(price))
    assert repr(price) in str(error.value)
    assert shop.paid("priced") == before
