"""A job that is sent back is the message that came."""

import pytest
from celery import chain, chord, group
from harness import wait_for
from kombu import Exchange, Queue
from limits import limit, start, unacknowledged

BASE = {"accept_content": ["json", "pickle"], "C_FORCE_ROOT": None}

#: The options of jobs that are sent, by what is particular about each.
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
    "message id": {"message_id": "m-1", "app_id": "an app", "type": "a type"},
    "correlation id": {"correlation_id": "c-1"},
    "reprs": {"argsrepr": "secret", "kwargsrepr": "secret"},
    "ancestors": {"root_id": "root", "parent_id": "parent"},
    "replaced": {"replaced_task_nesting": 2},
    "topic": {"exchange": "sizes", "routing_key": "size.big"},
    "stamped": {"stamped_headers": ["stamp"], "stamp": "value"},
}


def send_all(lab, task):
    """Send a job of each kind, and the members of canvases; return how many of them run."""
    app = lab.app
    for name, options in OPTIONS.items():
        lab.send(task, name, **options)
    sign = lambda name: app.signature(task, args=(name,))
    sign("linked").apply_async(
        link=app.signature("other", args=(1,), immutable=True),
        link_error=app.signature("other", args=(2,)),
    )
    sign("in a group").clone()
    group([sign("in a group"), sign("in a group")], app=app).apply_async()
    chain(sign("in a chain"), app.signature("other", args=(3,), immutable=True), app=app).apply_async()
    chord([sign("in a chord"), sign("in a chord")], app=app)(app.signature("total"))
    return len(OPTIONS) + 6


def normal(arrival):
    """Return what is to be the same each time a job arrives."""
    without = lambda mapping, *names: {k: v for k, v in mapping.items() if k not in names}
    properties = without(arrival["properties"], "delivery_tag")
    if "delivery_info" in properties:
        properties["delivery_info"] = without(properties["delivery_info"], "rate_limiter_moved")
    if "application_headers" in properties:
        properties["application_headers"] = without(properties["application_headers"], "eta")
    return {
        **arrival,
        "headers": without(arrival["headers"], "eta"),
        "properties": properties,
    }


def test_probe(request, tmp_path):
    import os

    os.environ["C_FORCE_ROOT"] = "1"
    broker, way, gate = os.environ["PROBE"].split(",")
    quorum = broker == "quorum"
    broker = "rabbitmq" if quorum else broker
    lab = request.getfixturevalue(f"{broker}_lab")
    if broker == "rabbitmq":
        from harness import Lab

        lab = Lab(tmp_path, lab.settings["broker_url"], request.getfixturevalue("redis_url")())
    name = lab.settings["task_default_queue"]
    queues = (
        (name, "", "direct", name, quorum),
        (f"{name}-sizes", "sizes", "topic", "size.*", False),
        (f"{name}-all", "sizes", "topic", "#", False),
    )
    limits = (limit("job", 1, 20, when_limited="retry"),)
    from limits import declare
    from kombu.common import Broadcast

    declare(lab, *queues)
    lab.app.conf.task_queues = [
        Queue(
            n,
            Exchange(e, type=k),
            routing_key=r,
            queue_arguments={"x-queue-type": "quorum"} if q else {},
        )
        for n, e, k, r, q in queues
    ] + [Broadcast("everybody")]
    lab.app.amqp.queues  # noqa
    task = {"gate": "job", "task": "in its task", "after": "again later"}[way]
    with start(
        lab,
        "-Q",
        f"{name},{name}-sizes,everybody",
        limits=limits if gate == "1" else (),
        gate=gate == "1",
        queues=queues,
        module="sent_back_app",
        accept_content=["json", "pickle"],
    ) as worker:
        count = send_all(lab, task) + 1
        import time

        time.sleep(1)
        lab.send(task, "to all", queue="everybody")
        time.sleep(8)
    arrivals = {}
    for entry in lab.log("arrived"):
        arrivals.setdefault(entry.value["id"], []).append(entry.value)
    runs = lab.runs(task)
    print(worker.output)
    print("RUNS", len(runs), count, sorted(map(str, runs)))
    for id, seen in arrivals.items():
        first, last = normal(seen[0]), normal(seen[-1])
        print(len(seen), seen[0]["headers"]["argsrepr"], seen[0]["queue"])
        for part in first:
            a, b = first[part], last[part]
            if a != b:
                if isinstance(a, dict):
                    for k in sorted({*a, *b}):
                        if a.get(k) != b.get(k):
                            print("    ", part, k, a.get(k), "->", b.get(k))
                else:
                    print("    ", part, a, "->", b)
