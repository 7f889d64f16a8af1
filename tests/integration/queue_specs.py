"""Queues as the tests write them down, for themselves and for the workers that they start."""

from typing import Any

from kombu import Exchange, Queue

#: A name, an exchange, its type, the routing key that binds it, and whether it is a quorum queue; or what
#: else kombu's ``Queue`` takes.
QueueSpec = tuple[str, str, str, str, bool | dict[str, Any]]


def entity(spec: QueueSpec) -> Queue:
    """Return the queue that is meant."""
    name, exchange, kind, key, options = spec
    if isinstance(options, bool):
        options = {"queue_arguments": {"x-queue-type": "quorum"}} if options else {}
    return Queue(name, Exchange(exchange, type=kind), routing_key=key, **options)
