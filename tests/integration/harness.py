"""Real workers as subprocesses, a producer, and the log of what ran."""

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from celery import Celery
from celery.result import AsyncResult

ROOT = Path(__file__).resolve().parents[2]

#: What may take long on a loaded machine. Nothing waits for it but a test that fails.
DEADLINE = 40.0

#: Seconds to wait for a worker's answer before it is asked again.
ANSWER = 5.0

#: The workers whose output is shown if a test fails.
workers: list["Worker"] = []

_names = itertools.count()


def wait_for(condition: Callable[[], Any], deadline: float = DEADLINE) -> Any:
    """Return what ``condition`` returns as soon as that is true."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {deadline} s"
        time.sleep(0.03)
    return value


def excess(moments: Iterable[float], rate: float) -> float:
    """Return the least ``c`` for which no span of time has more than ``c + rate * t`` starts."""
    lowest, worst = math.inf, 0.0
    for number, moment in enumerate(moments):
        lowest = min(lowest, number - rate * moment)
        worst = max(worst, number - rate * moment - lowest + 1)
    return worst


def app_here(broker: str = "memory://", **settings: Any) -> Celery:
    """Return an app whose worker runs in this process, with a queue of its own."""
    app = Celery(uuid4().hex, broker=broker, backend="cache+memory://")
    app.conf.update(
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        task_default_queue=uuid4().hex,
        broker_transport_options={"polling_interval": 0.02} if broker.startswith("memory") else {},
        **settings,
    )
    return app


class Entry(NamedTuple):
    """A line of the run log. ``at`` is the monotonic clock, which all processes share."""

    name: str
    value: Any
    at: float


class Worker:
    """A process that runs ``celery worker``, in a process group of its own.

    Args:
        module: Its app.
        arguments: Further arguments of the command.
        folder: Where it runs.
        gossip: Whether workers learn of each other. It takes a second at the start.
        environment: What its environment has beside this process's.

    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        *,
        gossip: bool = False,
        **environment: str,
    ) -> None:
        self.node = f"worker{next(_names)}@lab"
        self.log = folder / f"{self.node}.log"
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT), str(folder)])
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            module,
            "worker",
            "-l",
            "INFO",
            "-n",
            self.node,
        ]
        if not gossip:
            command += ["--without-mingle", "--without-gossip", "--without-heartbeat"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        workers.append(self)

    @property
    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether its main process lives."""
        return self.process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait until it consumes. It must not end before."""
        wait_for(lambda: " ready." in self.output or not self.running)
        assert self.running, f"the worker has not started:\n{self.output[-3000:]}"

    def stop(self) -> None:
        """Warm shutdown."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(DEADLINE)

    def kill(self) -> None:
        """End all its processes, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE)

    def __enter__(self) -> "Worker":
        try:
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()  # Celery's warm shutdown takes 8 s on RabbitMQ without an event loop


class Lab:
    """A queue of its own on a broker, a producer for it, the workers it starts, and their run log."""

    def __init__(self, folder: Path, broker: str, backend: str | None = None, **settings: Any) -> None:
        self.folder = folder
        self.run_log = folder / "runs"
        self.settings = {
            "broker_url": broker,
            "result_backend": backend,
            "task_ignore_result": backend is None,
            "task_default_queue": f"lab{os.getpid()}-{next(_names)}",
            "worker_prefetch_multiplier": 4,
            "broker_connection_retry_on_startup": True,
            "worker_cancel_long_running_tasks_on_connection_loss": False,
            **settings,
        }
        self.app = Celery("producer", set_as_current=False)
        self.app.conf.update(self.settings)

    def send(self, task: str, *args: Any, **options: Any) -> AsyncResult:
        """Send a job."""
        return self.app.send_task(task, args, **options)

    def worker(
        self, pool: str = "threads", concurrency: int = 2, *, gate: bool = True, **settings: Any
    ) -> Worker:
        """Start ``tests.integration.app``; enter it to wait until it is ready."""
        config = {
            "settings": self.settings | settings,
            "log": str(self.run_log),
            "gate": gate,
            "pool": pool,
        }
        arguments = ("-P", pool, "-c", str(concurrency))
        return Worker("tests.integration.app", arguments, self.folder, LAB=json.dumps(config))

    def log(self, name: str) -> list[Entry]:
        """Return what has been noted under a name, in order."""
        with contextlib.suppress(FileNotFoundError):
            # The last line may be half written.
            lines = self.run_log.read_text().rpartition("\n")[0].splitlines()
            return [entry for line in lines if (entry := Entry(*json.loads(line))).name == name]
        return []

    def runs(self, task: str) -> list[Any]:
        """Return what each run of a task has noted, in order."""
        return [entry.value for entry in self.log(task)]

    def taken(self, bucket: str) -> list[float]:
        """Return the tokens that were taken from a bucket, in order."""
        return [entry.value for entry in self.log(f"{bucket} taken")]

    def wait_for_runs(self, task: str, count: int) -> list[Any]:
        """Wait until a task has run so often, and return what the runs have noted."""
        wait_for(lambda: len(self.log(task)) >= count)
        return self.runs(task)

    def inspect(self, worker: Worker, what: str, *args: Any) -> Any:
        """Return what a worker answers to ``celery inspect``."""
        ask = getattr(self.app.control.inspect([worker.node], timeout=ANSWER), what)
        # On Redis a worker listens a moment after it is ready: what is asked before is not heard.
        return wait_for(lambda: ask(*args))[worker.node]

    def assert_bound(self, name: str, capacity: float, rate: float) -> None:
        """Never more than capacity + rate × t in any window, and no job runs before it is paid."""
        taken = self.log(f"{name} taken")
        for first, start in enumerate(taken):
            used = 0.0
            for entry in taken[first:]:
                used += entry.value
                allowed = capacity + rate * (entry.at - start.at)
                assert used <= allowed + 1e-6, f"{used} tokens where {allowed} were allowed"
        # By time: a busy thread may read the clock before another one, and write after it.
        runs = sorted(self.log(name), key=lambda run: run.at)
        assert len(runs) <= len(taken)
        for run, paid in zip(runs, taken, strict=False):
            assert paid.at <= run.at

    def close(self) -> None:
        """Close the producer's connections."""
        self.app.close()


def at_once(entries: list[Entry]) -> int:
    """Return the most jobs that were between their "begin" and their "end" at a time."""
    running = itertools.accumulate(1 if entry.value == "begin" else -1 for entry in entries)
    return max(running, default=0)
