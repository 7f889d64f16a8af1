"""What a job of a task would take, without a worker: for `rate_limiter.testing.charged`."""

from typing import Any

from celery import Signature, Task
from celery.local import Proxy

from ..bucket import Bucket
from ..gating.limit import Call
from ..gating.record import record_of
from .declarations import gates, held_at_gate, limits_of, name_limits, parameters_of

__all__ = ["price_of"]


def price_of(call: Any, queue: str | None) -> list[tuple[str, Bucket, float]]:
    """Return the name of each limit of a job, its bucket, and the tokens that the job takes from it."""
    if isinstance(call, Proxy):
        call = call._get_current_object()
    if isinstance(call, Task):
        call = call.s()
    if not isinstance(call, Signature):
        raise TypeError(f"charged() takes a signature or a task, not {call!r}")
    task, args, kwargs = call.type, tuple(call.args), dict(call.kwargs)
    name_limits(task)
    limits = list(limits_of(task))
    if (gate := gates.get(task.app)) is not None:
        if queue is None:
            route = task.app.amqp.router.route(dict(call.options), task.name, args, kwargs, task)
            queue = getattr(route.get("queue"), "name", None)
        at_gate = gate.limits_for(task, queue)
        limits = [each for each in limits if not held_at_gate(each)] + list(at_gate)
    headers = call.options.get("headers")
    job = Call(f"task {task.name}", args, kwargs, headers, parameters_of(task))
    return [
        (record_of(limit).name, bucket, tokens)
        for limit in limits
        if not limit.shadow  # it takes nothing that a job could have
        for bucket, tokens, _ in limit.demands(job)
    ]
