"""Brokers and workers, all of their own and in a temporary directory; and what to make of their runs."""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import kombu
import psutil
import redis
from celery import Celery, uuid

__all__ = [
    "BROKERS",
    "SOON",
    "WARM_UP",
    "LabError",
    "Proxy",
    "RabbitMQ",
    "Ran",
    "Redis",
    "Run",
    "cost",
    "cpu_of",
    "excess",
    "rate_of",
]

#: Jobs that run before the measurement, so that the pool's processes are warm.
WARM_UP: Final = 20

#: For the jobs of a killed worker to come back soon. (They are lost for longer than it takes to run
#: them otherwise: the default is an hour.)
SOON: Final = {"visibility_timeout": 5, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}

#: The length of a line that gate_app writes.
LINE = 8 + 1 + 8 + 1 + 20 + 1

_HERE = Path(__file__).parent
_count = itertools.count(1)


class LabError(Exception):
    """A server or a worker did not do what the measurement needs."""


class Ran(NamedTuple):
    """One line of gate_app: a job that ran, or a worker that was ready."""

    worker: str
    number: int
    moment: float


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], seconds: float, pause: float = 0.05) -> bool:
    """Return whether the condition came true in that time."""
    end = time.monotonic() + seconds
    while not (true := bool(condition())) and time.monotonic() < end:
        time.sleep(pause)
    return true


class Server:
    """A broker in a directory of its own, which survives `kill` and a further `start`.

    Args:
        directory: Where all the servers have their directories.
        durable: Whether what it has confirmed survives `kill`. RabbitMQ always does.

    """

    name: str
    url: str
    command: list[str]

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        self.port = free_port()
        self.directory = directory / f"{self.name.lower()}-{self.port}"
        self.directory.mkdir()
        self.environment = dict(os.environ)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self.directory / "output").open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        if not wait_until(lambda: self.process.poll() is not None or self._answers(), 90, 0.1):
            self.kill()
        if self.process.poll() is not None:
            text = (self.directory / "output").read_text(errors="replace")
            raise LabError(f"{self.name} did not start:\n{text[-2000:]}")

    def kill(self) -> None:
        """Kill it and its children, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Let it do nothing, with all its connections open, as a machine that swaps would."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)

    def close_connections(self) -> None:
        """Close all connections to it, as a network would."""
        raise NotImplementedError

    def control(self, *arguments: str) -> None:
        """Run a command of ``rabbitmqctl``."""
        raise NotImplementedError

    def version(self) -> str:
        """Return what it is, as it says."""
        raise NotImplementedError

    def _answers(self) -> bool:
        try:
            with kombu.Connection(self.url, connect_timeout=2) as connection:
                connection.connect()
        except Exception:  # noqa: BLE001 - not yet
            return False
        return True


class Redis(Server):
    """A Redis, or what $REDIS_SERVER names; if durable, one that has each change on disk before it answers."""

    name = "Redis"

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        super().__init__(directory)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        options = f"--port {self.port} --bind 127.0.0.1 --dir {self.directory}"
        if durable:
            options += " --appendonly yes --appendfsync always"
        binary = os.environ.get("REDIS_SERVER", "redis-server")
        self.command = [binary, *options.split(), "--save", ""]
        if shutil.which(binary) is None:
            raise LabError(f"{binary} is not on PATH")

    def version(self) -> str:
        """Return what it is, as it says."""
        with redis.Redis.from_url(self.url) as client:
            return str(client.info("server")["redis_version"])

    def close_connections(self) -> None:
        """Close all connections to it, as a network would."""
        with redis.Redis.from_url(self.url) as client:
            for kind in "pubsub", "normal":
                client.client_kill_filter(_type=kind, skipme=True)


class Proxy(Server):
    """Another way to a Redis. While it is `stopped`, it takes what is sent and passes nothing on.

    Args:
        directory: As of `Server`.
        target: The Redis.
        late: By how many milliseconds its answers come late.

    """

    name = "Proxy"

    def __init__(self, directory: Path, target: Redis, late: int = 0) -> None:
        super().__init__(directory)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        ports = [str(self.port), str(target.port)]
        self.command = [sys.executable, str(_HERE / "late_proxy.py"), *ports, str(late)]


class RabbitMQ(Server):
    """A RabbitMQ node, and an epmd of its own where there is one to start."""

    name = "RabbitMQ"

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        super().__init__(directory)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        # Debian's wrapper on PATH becomes another user, who may not write here.
        packaged = "/usr/lib/rabbitmq/bin/rabbitmq-server"
        binary = packaged if Path(packaged).exists() else shutil.which("rabbitmq-server")
        if binary is None:
            raise LabError("rabbitmq-server is not on PATH")
        self.command = [binary]
        for variable in [name for name in self.environment if name.startswith("RABBITMQ_")]:
            del self.environment[variable]
        here = str(self.directory)
        (self.directory / "plugins").write_text("[].")
        self.environment |= {
            "HOME": here,
            "ERL_EPMD_PORT": str(free_port()),
            "RABBITMQ_NODENAME": f"bench-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": f"{here}/data",
            "RABBITMQ_LOG_BASE": f"{here}/logs",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{here}/plugins",
            "RABBITMQ_CONFIG_FILE": f"{here}/rabbitmq",
            "RABBITMQ_CONF_ENV_FILE": f"{here}/env.conf",
        }

    def __enter__(self) -> Self:
        self.epmd = None
        if epmd := shutil.which("epmd"):  # else the node starts one, which would outlive it
            self.epmd = subprocess.Popen(
                [epmd],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        try:
            return super().__enter__()
        except BaseException:
            self._stop_epmd()
            raise

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._stop_epmd()

    def version(self) -> str:
        """Return what it is, as it says."""
        with kombu.Connection(self.url) as connection:
            return str(connection.connection.server_properties["version"])

    def close_connections(self) -> None:
        """Close all connections to it, as a network would."""
        self.control("close_all_connections", "a measurement")

    def control(self, *arguments: str) -> None:
        """Run a command of ``rabbitmqctl``.

        Raises:
            LabError: It failed.

        """
        command = self.command[0].replace("rabbitmq-server", "rabbitmqctl")
        done = subprocess.run(
            [command, "-n", self.environment["RABBITMQ_NODENAME"], *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise LabError(f"rabbitmqctl {' '.join(arguments)}: {done.stderr.decode()[-500:]}")

    def _stop_epmd(self) -> None:
        if self.epmd is not None:
            self.epmd.kill()
            self.epmd.wait()


BROKERS = {"redis": Redis, "rabbitmq": RabbitMQ}


class Run:
    """A queue of its own on a server, workers that consume it, and what they ran.

    Args:
        server: The broker.
        rate: Of the limited task.
        capacity: Of its bucket; by default a tenth of a second's worth.
        gate: ``False``: no gate and no limit; ``None``: no gate, the decorator alone.
        max_held: Of the gate.
        native: Celery's own ``rate_limit``, instead of the gate.
        grants: Whether the bucket notes each grant.
        sleep: How long a limited job runs.
        second: The rate of a second limit of that task.
        watched: ``"all"``: receivers of all signals, and metrics. ``"none"``: signals without receivers.
        cluster: The URL of a Redis that has the bucket, for all workers of this run.
        on_outage: What they do while that is away.
        divided: Whether each worker has its share of the rate, without a Redis.
        keyed: How many numbers in a row have a bucket of their own. 0: all have the same bucket.
        asks: Whether to note how often buckets are asked, in each turn of the event loop.
        lateness: Whether to note how late a timer of 10 ms fires there.
        look_up: A host name, and the seconds that its look-up takes, in vain.
        when_limited: What becomes of a limited job that has to wait.
        pause: Seconds that the task ``later`` asks for.
        pool: The worker's pool.
        slots: How many it has.
        gossip: Whether workers learn of each other.
        level: The level of its log.
        arguments: Further arguments of the worker.
        app: The module of the workers' app.
        conf: Further settings.

    """

    def __init__(
        self,
        server: Server,
        *,
        rate: float = 1.0,
        capacity: float | None = None,
        gate: bool | None = True,
        max_held: int | None = None,
        native: str | None = None,
        grants: bool = False,
        sleep: float = 0.0,
        second: float | None = None,
        watched: str | None = None,
        cluster: str | None = None,
        on_outage: str = "local",
        divided: bool = False,
        keyed: int = 0,
        asks: bool = False,
        lateness: bool = False,
        look_up: tuple[str, float] | None = None,
        when_limited: str = "wait",
        pause: float = 10.0,
        pool: str = "prefork",
        slots: int = 2,
        gossip: bool = False,
        level: str = "WARNING",
        arguments: tuple[str, ...] = (),
        app: str = "gate_app",
        conf: dict[str, Any] | None = None,
    ) -> None:
        self.server = server
        self.queue = f"bench-{next(_count)}"
        self.path = server.directory / self.queue
        self.pool = pool
        self.slots = slots
        self.gossip = gossip
        self.level = level
        self.arguments = arguments
        self.module = app
        self.capacity = max(1.0, rate / 10) if capacity is None else capacity
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.conf = {
            "task_default_queue": self.queue,
            "task_ignore_result": True,
            "worker_prefetch_multiplier": 4,
            "worker_cancel_long_running_tasks_on_connection_loss": False,
            "broker_connection_retry_on_startup": True,
            "broker_connection_max_retries": None,
        } | (conf or {})
        if divided:
            limit = {"rate": rate, "burst": self.capacity, "per": "cluster"}
            self.conf["rate_limiter_limits"] = {"limited": limit}
        self.options = {
            "broker": server.url,
            "log": str(self.path),
            "gate": gate if not native else False,
            "second": second,
            "watched": watched,
            "cluster": cluster,
            "on_outage": on_outage,
            "divided": divided,
            "keyed": keyed,
            "asks": asks,
            "lateness": lateness,
            "look_up": look_up,
            "rate": rate,
            "capacity": self.capacity,
            "max_held": max_held,
            "native": native,
            "grants": grants,
            "sleep": sleep,
            "when_limited": when_limited,
            "pause": pause,
            "conf": self.conf,
        }
        self.app = Celery("bench-producer", broker=server.url, set_as_current=False)
        self.app.conf.update(self.conf)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self.workers.values():
            worker.terminate()
        for name in list(self.workers):
            self.stop(name)
        if kind is not None and issubclass(kind, Exception):
            print(self.logs(), file=sys.stderr)
            return
        with self.app.connection_for_write() as connection:
            connection.default_channel.queue_delete(self.queue)

    def send(self, task: str, count: int, first: int = 0) -> list[str]:
        """Send jobs, numbered in order. Return their ids."""
        return self.send_each(task, range(first, first + count))

    def send_each(self, task: str, numbers: Iterable[int]) -> list[str]:
        """Send jobs with these numbers. Return their ids."""
        ids = []
        amqp = self.app.amqp
        with self.app.connection_for_write() as connection:
            amqp.queues[self.queue](connection.default_channel).declare()
            producer = amqp.Producer(connection)
            for number in numbers:
                ids.append(uuid())
                message = amqp.as_task_v2(ids[-1], task, (number,), {})
                producer.publish(
                    message.body,
                    exchange="",
                    routing_key=self.queue,
                    headers=message.headers,
                    serializer="json",
                    delivery_mode=2,
                    **message.properties,
                )
        return ids

    def start(self, name: str = "w", queue: str | None = None, **options: Any) -> None:
        """Start a worker.

        Args:
            name: What it is called.
            queue: What it consumes, instead of the queue of this run.
            options: What it has instead of what this run has.

        """
        environment = dict(os.environ)
        environment["GATE_BENCH"] = json.dumps(self.options | options | {"worker": name})
        paths = [str(_HERE), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        options = f"-c {self.slots} -P {self.pool} -l {self.level}"
        options += "" if self.gossip else " --without-mingle --without-gossip"
        command = [sys.executable, "-m", "celery", "-A", self.module, "worker", *options.split()]
        command += ["-n", self.node(name), "-Q", queue or self.queue, *self.arguments]
        with Path(f"{self.path}.{name}.log").open("ab") as log:
            self.workers[name] = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def node(self, name: str = "w") -> str:
        """Return what Celery calls a worker."""
        return f"{self.queue}-{name}@bench"

    def ready(self, times: int = 1) -> float:
        """Wait until workers have been ready so many times, and return the last moment of it."""
        self.wait("ready", times, 60, "the worker was not ready")
        return max(ran.moment for ran in self.ran("ready"))

    def count(self, kind: str) -> int:
        """Return how many lines there are of a kind."""
        path = Path(f"{self.path}.{kind}")
        return path.stat().st_size // LINE if path.exists() else 0

    def wait(self, kind: str, count: int, seconds: float, error: str = "") -> bool:
        """Wait for so many lines of a kind; with ``error``, raise it when they do not come.

        Raises:
            LabError: They did not come, or a worker ended.

        """
        came = wait_until(lambda: self.count(kind) >= count or self.ended(), seconds)
        if ended := self.ended():
            raise LabError(f"worker {ended[0]} of {self.queue} ended by itself")
        if error and not came:
            raise LabError(f"{error} within {seconds:g} s ({self.queue}, {self.count(kind)}/{count})")
        return came

    def ran(self, kind: str) -> list[Ran]:
        """Return all lines of a kind, by time."""
        path = Path(f"{self.path}.{kind}")
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        ran = [Ran(worker, int(number), float(moment)) for worker, number, moment in lines]
        return sorted(ran, key=lambda each: each.moment)

    def moments(self, kind: str) -> list[float]:
        """Return when each job of a kind ran."""
        return [ran.moment for ran in self.ran(kind)]

    def kill(self, name: str = "w") -> None:
        """Kill a worker and its children."""
        worker = self.workers.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()

    def stop(self, name: str = "w", seconds: float = 8) -> None:
        """Ask a worker to stop, and see to it that it does within so many seconds."""
        self.workers[name].terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.workers[name].wait(seconds)
        self.kill(name)

    def logs(self) -> str:
        """Return the ends of the workers' logs."""
        paths = sorted(self.path.parent.glob(f"{self.path.name}.*.log"))
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-4000:]}" for path in paths)

    def output(self, name: str = "w") -> str:
        """Return what a worker has logged."""
        return Path(f"{self.path}.{name}.log").read_text(errors="replace")

    def ended(self) -> list[str]:
        """Return the workers that have ended by themselves."""
        return [name for name, worker in self.workers.items() if worker.poll() is not None]


def rate_of(moments: Sequence[float]) -> float:
    """Return the rate between the first moment and the last."""
    return (len(moments) - 1) / (moments[-1] - moments[0]) if len(moments) > 1 else 0.0


def excess(moments: Iterable[float], rate: float) -> float:
    """Return the least ``c`` for which no window has more than ``c + rate * t`` jobs."""
    lowest, worst = math.inf, 0.0
    for number, moment in enumerate(moments):
        level = number - rate * moment
        lowest = min(lowest, level)
        worst = max(worst, level - lowest + 1)
    return worst


def cpu_of(run: Run) -> float:
    """Return the CPU seconds that a worker's main process has used."""
    times = psutil.Process(run.workers["w"].pid).cpu_times()
    return times.user + times.system


def cost(server: Server, jobs: int, task: str, **options: Any) -> tuple[float, float]:
    """Return the CPU seconds of the main process per job, and the jobs per second."""
    with Run(server, **options) as run:
        run.send("free", WARM_UP)
        run.send(task, jobs)
        # It starts beside the queue, so that its own start does not count.
        run.start(queue=f"{run.queue}-none")
        run.ready()
        before = cpu_of(run)
        add_consumer = run.app.control.add_consumer  # to which a worker may not listen yet
        if not wait_until(lambda: add_consumer(run.queue, destination=[run.node()], reply=True), 20):
            raise LabError("the worker did not answer `add_consumer`")
        total = jobs + (WARM_UP if task == "free" else 0)
        run.wait(task, total, 180, "the jobs did not all run")
        time.sleep(0.3)
        cpu = cpu_of(run) - before
        return cpu / jobs, rate_of(run.moments(task))
