"""How the tests of the gate's features start a worker, and what they ask of it."""

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import redis
from harness import ANSWER, ROOT, Lab, Worker, wait_for
from queue_specs import QueueSpec, entity

#: Held jobs that were not renewed, or those of a killed worker, come back soon.
SHORT_LEASE = {"visibility_timeout": 3, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}


def start(
    lab: Lab,
    *arguments: str,
    pool: str = "threads",
    concurrency: int = 2,
    gate: bool = True,
    gossip: bool = False,
    limits: tuple[dict[str, Any], ...] = (),
    queues: tuple[QueueSpec, ...] = (),
    environment: dict[str, str] | None = None,
    module: str = "limits_app",
    **settings: Any,
) -> Worker:
    """Start ``limits_app``, or another app beside it; enter it to wait until it is ready.

    Each of ``limits`` has what ``Gate.limit`` takes; ``bucket`` is name, capacity and rate.
    """
    config = {
        "settings": lab.settings | settings,
        "log": str(lab.run_log),
        "gate": gate,
        "pool": pool,
        "concurrency": concurrency,
        "limits": limits,
        "queues": queues,
    }
    return Worker(
        f"tests.integration.{module}",
        ("-P", pool, "-c", str(concurrency), *arguments),
        lab.folder,
        gossip=gossip,
        LAB=json.dumps(config),
        **(environment or {}),
    )


def limit(name: str = "job", capacity: float = 1, rate: float = 20, **options: Any) -> dict[str, Any]:
    """Return a limit for `start`, of the task or the queue that it is named for."""
    selector = {} if "queue" in options else {"tasks": [name]}
    return {**selector, "bucket": [name, capacity, rate], **options}


def environment(
    lab: Lab, limits: tuple[dict[str, Any], ...], gate: bool, **settings: Any
) -> dict[str, str]:
    """Return the environment of a ``celery`` program for ``limits_app``."""
    config = {
        "settings": lab.settings | settings,
        "log": str(lab.run_log),
        "gate": gate,
        "pool": "threads",
        "limits": limits,
        "queues": (),
    }
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "LAB": json.dumps(config), "COLUMNS": "200"}


def celery(
    lab: Lab,
    *arguments: str,
    limits: tuple[dict[str, Any], ...] = (),
    gate: bool = True,
    **settings: Any,
) -> tuple[int, str]:
    """Run `celery limits`; return its exit status and what it printed."""
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "tests.integration.limits_app",
        "limits",
        *arguments,
    ]
    done = subprocess.run(
        command,
        env=environment(lab, limits, gate, **settings),
        cwd=lab.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def run_example(name: str, url: str) -> list[str]:
    """Run an example that needs a Redis; return the lines that it printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name / "run.py")],
        env={**os.environ, "REDIS_URL": url, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def declare(lab: Lab, *queues: QueueSpec) -> None:
    """Make queues before there is a worker."""
    with lab.app.connection_for_write() as connection:
        for spec in queues:
            entity(spec)(connection.default_channel).declare()


def waiting(lab: Lab, queue: str | None = None) -> int:
    """Return how many jobs of a queue the broker has not given out."""
    queue = queue or lab.settings["task_default_queue"]
    if (url := lab.settings["broker_url"]).startswith("redis"):
        with redis.Redis.from_url(url) as client:
            return client.llen(queue)
    with lab.app.connection_for_read() as connection:
        return connection.default_channel.queue_declare(queue, passive=True).message_count


def unacknowledged(lab: Lab) -> int:
    """Return how many jobs Redis would give out again."""
    with redis.Redis.from_url(lab.settings["broker_url"]) as client:
        return client.hlen("unacked")


def stats(lab: Lab, worker: Worker) -> Any:
    """Return ``celery inspect stats`` of a worker."""
    return lab.inspect(worker, "stats")


def held(lab: Lab, worker: Worker, name: str | None = None) -> int:
    """Return how many jobs a worker holds: for the limit of a name, or for all."""
    by_limit = stats(lab, worker)["rate_limiter"]["held"]
    return sum(by_limit.values()) if name is None else by_limit.get(name, 0)


def wait_until_idle(lab: Lab, worker: Worker, prefetch: int) -> None:
    """Wait until nothing is held, and the prefetch count is what it was."""

    def idle() -> bool:
        now = stats(lab, worker)
        return not now["rate_limiter"]["held"] and now["prefetch_count"] == prefetch

    wait_for(idle)


def repeated(values: list[Any]) -> dict[Any, int]:
    """Return what is there more than once."""
    return {value: count for value, count in Counter(values).items() if count > 1}


def break_connections(lab: Lab, request: Any) -> None:
    """Close all connections to the broker, or to the lab's database on Redis, as a network would."""
    if (url := lab.settings["broker_url"]).startswith("redis"):
        database = url.rsplit("/", 1)[1]
        with redis.Redis.from_url(url) as client:
            me = str(client.client_id())
            for other in client.client_list():
                if other["db"] == database and other["id"] != me:
                    client.client_kill_filter(_id=other["id"])
    else:
        rabbitmq = request.getfixturevalue("rabbitmq")
        rabbitmq.rabbitctl_output("close_all_connections", "a test")


def fail_at_start(worker: Worker) -> str:
    """Wait until a worker has ended with an error; return what it printed."""
    wait_for(lambda: not worker.running)
    assert worker.process.returncode != 0
    return worker.output


def control(lab, worker, command, **arguments):
    """Return a worker's reply to a command."""
    options = {"destination": [worker.node], "reply": True, "timeout": ANSWER}
    with lab.app.connection_for_write() as options["connection"]:  # those of the pool may be broken
        # On Redis a worker listens a moment after it is ready.
        (reply,) = wait_for(lambda: lab.app.control.broadcast(command, arguments=arguments, **options))
    return reply[worker.node]
