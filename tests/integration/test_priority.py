"""Held jobs that are urgent go first, as their broker counts priorities."""

import pytest
from harness import wait_for
from kombu_lab import Worker, running
from limits import declare, held, limit, start

from rate_limiter import TokenBucket
from rate_limiter.kombu import Gate

#: For each broker: the arguments of a queue that knows priorities, a low priority, and a high one.
PRIORITIES = {
    "redis": ({}, 6, 0),
    "rabbitmq": ({"x-max-priority": 3}, 1, 200),  # counted as 3
}


def went_in_order(ran):
    """Tell whether the urgent ones came before all that were held but the first two."""
    return [job for job in ran if job >= 10] == [10, 11] and max(map(ran.index, (10, 11))) <= 3


@pytest.mark.parametrize("broker_name", PRIORITIES)
def test_urgent_jobs_go_before_held_ones(request, broker_name):
    """In a worker: what comes later and is more urgent starts first."""
    lab = request.getfixturevalue(f"{broker_name}_lab")
    arguments, low, high = PRIORITIES[broker_name]
    name = f"{lab.settings['task_default_queue']}-urgent"
    queue = (name, name, "direct", name, {"queue_arguments": arguments})
    declare(lab, queue)
    with start(lab, concurrency=1, queues=(queue,), limits=(limit(rate=1),)) as worker:
        for number in range(6):
            lab.send("job", number, exchange=name, routing_key=name, priority=low)
        wait_for(lambda: held(lab, worker, "job") >= 4)
        for number in 10, 11:
            lab.send("job", number, exchange=name, routing_key=name, priority=high)
        assert went_in_order(lab.wait_for_runs("job", 8))


def test_urgent_messages_go_before_held_ones(request, broker):
    """In a kombu consumer: the same."""
    arguments, low, high = PRIORITIES["redis" if broker.rabbitmq is None else "rabbitmq"]
    queue = broker.queue(queue_arguments=arguments)
    gate = Gate()
    gate.limit(queue.name, bucket=TokenBucket(1, 1), name="limit")
    with running(Worker(broker, gate, queue)) as worker:
        broker.send(queue, *range(6), priority=low)
        wait_for(lambda: gate.held.get("limit", 0) >= 4)
        broker.send(queue, 10, 11, priority=high)
        assert went_in_order(worker.wait_for_runs(8))


def test_a_queue_without_priorities_keeps_its_order(rabbitmq_lab):
    """RabbitMQ delivers its messages in order whatever priority they have, and so does the gate."""
    lab = rabbitmq_lab
    with start(lab, concurrency=1, limits=(limit(rate=5),)):
        for number in range(6):
            lab.send("job", number, priority=number)
        assert lab.wait_for_runs("job", 6) == list(range(6))
