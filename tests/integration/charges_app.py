"""The app of tests about what a job is charged: settled, refunded, paused, per key."""

from tests.integration.app import CONFIG, SPAWNED, NotedBucket, app, gate, note

from rate_limiter import AllOf, BucketPerKey, RetryAfter
from rate_limiter.celery import current_charge, throttle

#: It does not fill within a test: what is there was given back.
tank = NotedBucket("tank", 10, 0.001)
days = NotedBucket("days", 100, 0.001)


@app.task(name="estimated", bind=True)
@throttle(AllOf(tank, days), tokens=lambda estimate, *_: estimate, name="estimate")
def estimated(self, estimate, *actual):
    """Cost something else than was estimated."""
    for figure in actual:
        current_charge().settle(figure)
    note("estimated", [current_charge().tokens(), round(tank.tokens), round(days.tokens)])


@app.task(name="loose")
def loose(*actual):
    """Be limited by the gate only; settle, too."""
    for figure in actual:
        current_charge().settle(figure)
    note("loose", round(loose_bucket.tokens))


loose_bucket = NotedBucket("loose", 10, 0.001)


if not SPAWNED:

    @app.task(name="twice")
    @throttle(NotedBucket("strict", 1, 0.001), when_limited=lambda: note("twice", "instead"))
    @throttle(NotedBucket("easy", 5, 0.001), name="easy")
    def twice():
        note("twice", "ran")


@app.task(name="inner")
@throttle(NotedBucket("inner tank", 100, 0.001), tokens=50)
def inner():
    current_charge().settle(1)


@app.task(name="outer")
@throttle(NotedBucket("outer tank", 100, 0.001), tokens=10)
def outer():
    """Pay for what it calls, too, and settle each by itself."""
    inner.run()
    inner()
    current_charge().settle(4)


if not SPAWNED:

    @app.task(name="late")
    @throttle(NotedBucket("busy", 1, 0.001), timeout=0.05)
    @throttle(NotedBucket("late", 5, 0.001), name="late")
    def late():
        note("late", "ran")


@app.task(name="remote", bind=True, max_retries=0)
@throttle(NotedBucket("remote", 5, 20))
def remote(self, number, pauses=1, seconds=1.0):
    """Call a remote that asks for a pause some times."""
    note("remote tried", [number, self.request.retries])
    if len([1 for line in tried(number)]) <= pauses:
        raise RetryAfter(seconds)
    note("remote", number)
    return number


@app.task(name="loose remote", bind=True, autoretry_for=(Exception,), max_retries=0)
def loose_remote(self, number):
    """Be limited by the gate only, and retried by Celery."""
    note("remote tried", [number, self.request.retries])
    if len(tried(number)) == 1:
        raise RetryAfter(0.3)
    return number


def tried(number):
    """Return the lines of the run log about a number."""
    with open(CONFIG["log"]) as log:  # noqa: PTH123
        return [line for line in log if line.startswith(f'["remote tried", [{number},')]


@app.task(name="faster")
def faster(rate):
    slow_bucket.configure(tokens_per_second=rate)


slow_bucket = NotedBucket("changed", 1, 0.01)


@app.task(name="changed")
@throttle(slow_bucket)
def changed(number):
    note("changed", number)


# Without a gate, several processes of a prefork pool would be refused.
if gate or CONFIG["pool"] != "prefork" or CONFIG.get("concurrency") == 1:

    class Tenants(BucketPerKey):
        """Notes what is taken, by key."""

        def __getitem__(self, key):
            made = super().__getitem__(key)
            if key not in noted:
                noted[key] = NotedBucket(f"tenant {key}", made.capacity, made.tokens_per_second)
            return noted[key]

    noted = {}

    @app.task(name="tenant's")
    @throttle(Tenants(1, 5), key=lambda tenant, *_: tenant)
    def tenants(tenant, number, *actual):
        for figure in actual:
            current_charge().settle(figure)
        note("tenant's", [tenant, number])


if gate:
    gate.limit("loose", bucket=loose_bucket, tokens=5)
    gate.limit("loose remote", bucket=NotedBucket("loose remote", 5, 20))
    for each in CONFIG["limits"]:
        gate.limit(*each["tasks"], bucket=NotedBucket(*each["bucket"]))
