"""A job that is sent back is the message that came: from the gate, from the decorator, by RetryAfter."""

import gc
import itertools
import json
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from celery import chain, chord, group
from harness import DEADLINE, Lab, wait_for
from kombu import Exchange, Queue
from kombu.common import Broadcast
from limits import declare, limit, start, unacknowledged, waiting

#: The options that jobs are sent with, by what is particular about them.
OPTIONS = {
    "plain": {},
    "pickle": {"serializer": "pickle"},
    "zlib": {"compression": "zlib"},
    "bzip2 of pickle": {"compression": "bzip2", "serializer": "pickle"},
    "custom headers": {"headers": {"size": 3, "nested": {"a": [1, "ü"]}}},
    "a header named headers": {"headers": {"headers": "abc", "more": 1}},
    "priority": {"priority": 3},
    "expires": {"expires": 600},
    "reply_to": {"reply_to": "answers"},
    "time limits": {"time_limit": 60, "soft_time_limit": 50},
    "result ignored": {"ignore_result": True},
    "shadow": {"shadow": "another name"},
    "retried": {"retries": 2},
    "transient": {"delivery_mode": 1},
    "properties": {"message_id": "m-1", "app_id": "an app", "type": "a type"},
    "correlation id": {"correlation_id": "c-1"},
    "representations": {"argsrepr": "secret", "kwargsrepr": "secret"},
    "ancestors": {"root_id": "root", "parent_id": "parent"},
    "replaced": {"replaced_task_nesting": 2},
    "stamped": {"stamped_headers": ["stamp"], "stamp": "value"},
    "topic": {"exchange": "sizes", "routing_key": "size.big"},
}

#: The task that is sent back in each way, and whether there is a gate.
WAYS = {
    "gate": ("job", True),
    "parked": ("job", True),
    "decorator": ("in its task", False),
    "RetryAfter": ("again later", False),
    "RetryAfter behind the gate": ("again later", True),
}

RETRY = (limit(rate=20, when_limited="retry"),)

#: The limits in each way.
LIMITS = {"parked": (limit(rate=20, overflow="park"),)}


class Place:
    """A lab with a queue, a topic exchange with two more queues, and a Broadcast; results on Redis."""

    def __init__(self, request, broker, folder):
        url = backend = request.getfixturevalue("redis_url")()
        if broker != "redis":
            server = request.getfixturevalue("rabbitmq")
            url = f"amqp://guest:guest@{server.host}:{server.port}//"
        self.lab = Lab(folder, url, backend)
        name = self.lab.settings["task_default_queue"]
        self.exchange, self.everybody = f"{name}-sizes", f"{name}-everybody"
        self.queues = (
            (name, "", "direct", name, broker == "quorum"),
            (f"{name}-big", self.exchange, "topic", "size.*", False),
            (f"{name}-all", self.exchange, "topic", "#", False),
        )
        declare(self.lab, *self.queues)
        default = Queue(name, Exchange(""), routing_key=name, no_declare=True)
        self.lab.app.conf.task_queues = [default, Broadcast(self.everybody)]
        self.connection = self.lab.app.connection_for_write()
        # A virtual transport knows what was declared on the same connection.
        for exchange in Exchange(self.exchange, "topic"), Exchange(self.everybody, "fanout"):
            exchange(self.connection.default_channel).declare()
        self.producer = self.lab.app.amqp.Producer(self.connection, auto_declare=False)

    def send(self, task, *args, **options):
        """Send a job."""
        if "exchange" in options:
            options["exchange"] = self.exchange
        return self.lab.send(task, *args, producer=self.producer, **options)

    def start(self, *, gate=True, limits=RETRY, **settings):
        """Start a worker of the default queue, one of the topic exchange, and the Broadcast."""
        name = self.lab.settings["task_default_queue"]
        return start(
            self.lab,
            *("-Q", f"{name},{name}-big,{self.everybody}"),
            limits=limits if gate else (),
            gate=gate,
            queues=self.queues,
            module="sent_back_app",
            accept_content=["json", "pickle"],
            environment={"C_FORCE_ROOT": "1"},
            **settings,
        )

    def wait_for_everybody(self, workers):
        """Wait until so many workers get a Broadcast: on Redis one subscribes a moment after it is ready."""
        numbers = itertools.count()

        def all_get_it():
            self.send("free", next(numbers), queue=self.everybody)
            time.sleep(0.1)
            return workers in Counter(self.lab.runs("free")).values()

        wait_for(all_get_it)

    def arrivals(self):
        """Return how each job has arrived, in order, by its id."""
        arrivals = defaultdict(list)
        for line in Path(f"{self.lab.run_log}.arrived").read_text().splitlines():
            arrival = json.loads(line)
            arrivals[arrival["id"]].append(arrival)
        return arrivals


@pytest.fixture
def place(request, tmp_path):
    """Yield a place on the broker that the test is parametrized with, or on RabbitMQ."""
    place = Place(request, getattr(request, "param", "rabbitmq"), tmp_path)
    yield place
    place.connection.release()
    gc.collect()  # results in cycles would ask for Redis when that has stopped
    place.lab.close()


def without(mapping, *names):
    return {name: value for name, value in mapping.items() if name not in names}


def lasting(arrival):
    """Return what is to be the same each time a job arrives."""
    again = "eta", "rate_limiter_pauses"
    properties = without(arrival["properties"], "delivery_tag", "delivery_info")
    if "application_headers" in properties:
        properties["application_headers"] = without(properties["application_headers"], *again)
    return {**arrival, "headers": without(arrival["headers"], *again), "properties": properties}


def send_one_of_each(place, task):
    """Send a job of each kind; return how many."""
    app = place.lab.app

    def sign(name, of=task):
        return app.signature(of, args=(name,), immutable=True)

    for name, options in OPTIONS.items():
        place.send(task, name, **options)
    sign("linked").apply_async(link=sign(1, "other"), link_error=sign(2, "other"))
    group(sign("in a group"), sign("in a group"), app=app).apply_async()
    chain(sign("in a chain"), sign(3, "other"), app=app).apply_async()
    body = chord([sign("in a chord"), sign("in a chord")], app=app)(app.signature("total"))
    return len(OPTIONS) + 6, body


@pytest.mark.parametrize(
    ("place", "way"),
    [
        *(("redis", way) for way in WAYS),
        *(("rabbitmq", way) for way in WAYS),
        ("quorum", "gate"),
        ("quorum", "parked"),
    ],
    indirect=["place"],
)
def test_a_job_that_is_sent_back_is_the_message_that_came(place, way):
    """Body, headers but for the ETA, properties, queue: all the same; and each job runs in the end."""
    task, gate = WAYS[way]
    lab = place.lab
    count, body = send_one_of_each(place, task)
    runs = count * 2 if task == "again later" else count
    with place.start(gate=gate, limits=LIMITS.get(way, RETRY)):
        lab.wait_for_runs(task, runs)
        lab.wait_for_runs("other", 2)
        body.get(DEADLINE)
        if "redis" in lab.settings["broker_url"]:
            wait_for(lambda: not unacknowledged(lab))
    names = [*OPTIONS, "linked", "in a chain", *["in a group", "in a chord"] * 2]
    assert Counter(lab.runs(task)) == Counter(names * (runs // count))
    came = [seen for seen in place.arrivals().values() if len(seen) > 1]
    # Of those that are parked on Redis most are moved inside the server, and come once.
    if way != "parked" or "redis" not in lab.settings["broker_url"]:
        assert len(came) >= count / 2  # the first, and others on a slow machine, found tokens
    # In the pool nobody knows the message's queue for certain: it is sent to the queue by its name.
    irrelevant = () if way in ("gate", "parked") else ("delivery",)
    for first, *_, last in came:
        assert without(lasting(last), *irrelevant) == without(lasting(first), *irrelevant)
    assert waiting(lab, place.queues[2][0]) == 1  # the topic exchange did not get it again


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["redis", "rabbitmq"], indirect=True)
def test_a_broadcast_job_runs_once_in_each_worker(place, way):
    """It goes back to the queue of its worker alone; on Redis that is none, so it waits where it is."""
    task, gate = WAYS[way]
    each = 2 if task == "again later" else 1
    limits = LIMITS.get(way, RETRY)
    with place.start(gate=gate, limits=limits), place.start(gate=gate, limits=limits):
        place.wait_for_everybody(2)
        for number in range(3):
            place.send(task, number, queue=place.everybody)
        place.lab.wait_for_runs(task, 6 * each)
        time.sleep(1)  # for those that would be too many
    assert Counter(place.lab.runs(task)) == dict.fromkeys(range(3), 2 * each)


def test_a_job_of_the_old_protocol_is_held(place):
    """Its body has the ETA, and is not to be changed."""
    place.lab.app.conf.task_protocol = 1
    with place.start() as worker:
        for number in range(4):
            place.lab.app.amqp = place.lab.app.subclass_with_self("celery.app.amqp:AMQP")(
                app=place.lab.app
            )
            place.send("job", number)
        assert place.lab.wait_for_runs("job", 4) == list(range(4))
    assert "Sent back" not in worker.output


@pytest.fixture
def alarm(rabbitmq):
    """Return what turns RabbitMQ's memory alarm on and off."""

    def turn(on):
        rabbitmq.rabbitctl_output("set_vm_memory_high_watermark", "0.00001" if on else "0.9")

    yield turn
    turn(on=False)


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_what_the_broker_does_not_read_is_not_acknowledged(place, alarm, rabbitmq, pool):
    """Memory alarm: other jobs go on, no job that is sent back is acknowledged, and each runs once after it."""
    lab, jobs, free = place.lab, set(range(12)), range(200)
    for number in jobs:
        place.send("job", number)
    for number in free:
        place.send("free", number)
    alarm(on=True)

    def unacknowledged():
        rows = rabbitmq.rabbitctl_output("-q", "list_queues", "name", "messages_unacknowledged")
        text = rows if isinstance(rows, str) else rows.decode()
        return int(dict(line.split("\t") for line in text.splitlines())[place.queues[0][0]])

    limits = (limit(rate=2, when_limited="retry"),)
    with place.start(pool=pool, limits=limits, worker_prefetch_multiplier=50) as worker:
        lab.wait_for_runs("free", len(free))
        assert "Sent back" not in worker.output
        kept = unacknowledged()
        assert kept + len(lab.runs("job")) >= len(jobs)
        alarm(on=False)
        lab.wait_for_runs("job", len(jobs))
        wait_for(lambda: not unacknowledged())
    assert Counter(lab.runs("job")) == dict.fromkeys(jobs, 1)
    assert "Sent back" in worker.output
    assert "Traceback" not in worker.output
