"""A refusal is the same to a task whether the gate or the decorator refuses: hooks, retries, errbacks."""

import contextlib

import pytest
from celery import chord
from celery.exceptions import ChordError
from harness import DEADLINE, Lab, wait_for
from limits import start

from rate_limiter import RateLimitExceeded

#: A gate, and which of its two tasks.
PLACES = {"decorator": (False, "d"), "gate": (True, "d"), "gate by name": (True, "g")}


@pytest.fixture(scope="module", params=["prefork", "threads"])
def pool(request):
    return request.param


@pytest.fixture(scope="module")
def labs(pool, redis_url, tmp_path_factory):
    """Yield a lab and a worker without a gate, and others with one."""
    found = {}
    for gate in False, True:
        url = redis_url()
        lab = Lab(tmp_path_factory.mktemp("refused"), url, url)
        found[gate] = lab, start(lab, pool=pool, gate=gate, module="refusals_app")
    for _, worker in found.values():
        worker.wait_until_ready()
    yield found
    for lab, worker in found.values():
        worker.kill()
        lab.close()


@pytest.fixture(params=PLACES)
def place(request, labs):
    """Return a lab, its worker, and what gives a task's name there."""
    gate, prefix = PLACES[request.param]
    return *labs[gate], lambda name: f"{prefix} {name}"


def ended(lab, job):
    """Wait until a job's hooks have run; return what they have noted, and the errback."""
    wait_for(lambda: [job.id] in [value[:1] for value in lab.runs("after_return")])
    hooks = [
        (hook, *values)
        for hook in ("on_failure", "after_return")
        for task_id, *values in lab.runs(hook)
        if task_id == job.id
    ]
    wait_for(lambda: job.id in lab.runs("errback"))
    return hooks


def test_hooks_and_errbacks_see_a_refusal(place):
    """on_failure, after_return and link_error run; RateLimitExceeded with retry_after is the result."""
    lab, _, name = place
    errback = lab.app.signature("note error", immutable=False)
    with contextlib.suppress(RateLimitExceeded):  # another test may have run before
        lab.send(name("refused"), 0).get(DEADLINE)
    job = lab.send(name("refused"), 1, link_error=errback)
    with pytest.raises(RateLimitExceeded, match="rate limit exceeded: . refused") as error:
        job.get(DEADLINE)
    assert error.value.retry_after == pytest.approx(1e6, rel=0.01)
    assert ended(lab, job) == [("on_failure", "RateLimitExceeded"), ("after_return", "FAILURE")]


@pytest.mark.parametrize("price", ["raises", "exits"])
def test_hooks_and_errbacks_see_a_bad_price(place, price):
    """So they do where the cost cannot be computed: ValueError is the result, and other jobs go on."""
    lab, worker, name = place
    job = lab.send(name("priced"), price, link_error=lab.app.signature("note error"))
    with pytest.raises(ValueError, match=r"priced: tokens=… raised (KeyError|SystemExit)"):
        job.get(DEADLINE)
    assert ended(lab, job) == [("on_failure", "ValueError"), ("after_return", "FAILURE")]
    assert lab.send(name("priced"), "one").get(DEADLINE) == "one"
    assert worker.running


def test_an_interrupt_that_nobody_sent_fails_its_job(place):
    """A callable that raises KeyboardInterrupt by itself: its job fails alone, and the worker goes on."""
    lab, worker, name = place
    with pytest.raises(ValueError, match="raised KeyboardInterrupt"):
        lab.send(name("priced"), "interrupts").get(DEADLINE)
    assert lab.send(name("priced"), "one").get(DEADLINE) == "one"
    assert worker.running


def test_a_chord_of_a_refused_job_fails(place):
    """Its body does not run, and nobody waits for it for ever."""
    lab, _, name = place
    with contextlib.suppress(RateLimitExceeded):  # another test may have run before
        lab.send(name("refused"), 0).get(DEADLINE)
    members = [lab.app.signature(name("refused"), (number,)) for number in (1, 2)]
    body = chord(members, app=lab.app)(lab.app.signature("total"))
    # Which of the two it is, is Celery's affair.
    with pytest.raises((ChordError, RateLimitExceeded), match="rate limit exceeded"):
        body.get(DEADLINE)


def test_autoretry_obeys_a_refusal(place):
    """autoretry_for=(RateLimitExceeded,): Celery retries the job, which runs once there are tokens."""
    lab, _, name = place
    jobs = [lab.send(name("persistent"), number) for number in range(3)]
    results = [job.get(DEADLINE) for job in jobs]
    assert [number for number, _ in results] == [0, 1, 2]
    assert sum(retries > 0 for _, retries in results) >= 2


def test_throws_obeys_a_refusal(place):
    """throws=(RateLimitExceeded,): Celery logs it as expected, at INFO and without a traceback."""
    lab, worker, name = place
    lab.send(name("expected"), 0).get(DEADLINE)
    job = lab.send(name("expected"), 1)
    with pytest.raises(RateLimitExceeded):
        job.get(DEADLINE)
    text = f"Task {name('expected')}[{job.id}] raised expected"
    wait_for(lambda: text in worker.output)
    here = worker.output.index(text)
    assert "INFO" in worker.output[:here].splitlines()[-1]
    assert "Traceback" not in worker.output[here : here + 300]


def test_costs_of_pydantic_tasks_see_what_was_sent(place):
    """The cost callable is given the dict that the producer sent, and the task the model."""
    lab, _, name = place
    assert lab.send(name("ordered"), {"size": 3}).get(DEADLINE) == 3
    with pytest.raises(ValueError, match="tokens is 11, expected at most the capacity 10"):
        lab.send(name("ordered"), {"size": 11}).get(DEADLINE)


def test_a_fallback_is_the_result(labs):
    """when_limited=callable: what it returns is the job's result, with a bucket per key too."""
    lab, _ = labs[True]  # without a gate a BucketPerKey cannot be shared
    for tenant in "ab":
        results = [lab.send("fallen", tenant, number) for number in range(3)]
        assert sorted(result.get(DEADLINE) for result in results) == [
            *(["instead", tenant, number] for number in (1, 2)),
            ["ran", tenant, 0],
        ]


def test_the_limits_of_a_key_that_exit_fail_their_job(labs):
    """limits= of a BucketPerKey that raises SystemExit: ValueError is the job's result."""
    lab, worker = labs[True]
    with pytest.raises(ValueError, match="fallen: .*the plans are gone"):
        lab.send("fallen", "lost", 0).get(DEADLINE)
    assert worker.running
