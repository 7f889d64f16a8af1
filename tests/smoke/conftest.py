"""Containers for the whole session: two brokers, a Redis for results and logs, and two workers on each.

Both workers of a broker have limits in a Redis apart from it.

pytest-celery makes its containers anew for each test, which takes most of the time. Here its classes
wrap containers of the session, and ``celery_broker`` gives the matrix, as in the plugin.
"""

import gc
import itertools
import json
import os
import re
import socket
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import docker
import pytest
import pytest_docker_tools.wrappers.container
import smoke_app
import smoke_log
import smoke_tasks
import ungated_tasks
from celery import Celery
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestSetup,
    CeleryTestWorker,
    CeleryWorkerCluster,
    CeleryWorkerContainer,
    RabbitMQContainer,
    RabbitMQTestBroker,
    RedisContainer,
    RedisTestBackend,
    RedisTestBroker,
)
from pytest_docker_tools import build, container, fxtr, network, volume

ROOT = Path(__file__).parents[2]
IMAGE = "celery-token-bucket"

#: What may take long on a loaded machine. Nothing waits for it but a test that fails.
DEADLINE = 60.0

# pytest-celery speaks of localhost, where the engine publishes the ports. On a host that has the mark of
# a container, /.dockerenv, pytest-docker-tools would give it the ports inside the containers instead.
pytest_docker_tools.wrappers.container.tests_inside_container = lambda: False


def wait_for(condition: Callable[[], Any], deadline: float = DEADLINE) -> Any:
    """Return what ``condition`` returns as soon as that is true."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {deadline} s"
        time.sleep(0.05)
    return value


class Entry(NamedTuple):
    """What a run has noted. ``at`` is the monotonic clock, which all containers share."""

    value: Any
    worker: str
    child: int
    at: float


class WorkerContainer(CeleryWorkerContainer):
    """A container of the image's ``smoke`` stage. Consumes a queue of its own and the common one."""

    NAME: str

    @classmethod
    def worker_name(cls):
        """Return the part of the node's name before the @, which its own queue is named for too."""
        return cls.NAME

    @classmethod
    def worker_queue(cls):
        """Return what the worker consumes."""
        return f"celery,{cls.NAME},bulk"

    @classmethod
    def app_module(cls):
        """Return the app that has a gate."""
        return smoke_app

    @classmethod
    def tasks_modules(cls):
        """Return what is mounted beside it."""
        return {smoke_tasks, smoke_log}

    @classmethod
    def command(cls, *args, **kwargs):
        """Return a worker with four children."""
        return super().command("-c", "4", "--without-gossip", "--without-mingle", *args, **kwargs)

    @property
    def ready_prompt(self):
        """Return nothing: the plugin would wait for it for minutes, after the container has ended too."""
        return None

    def ready(self):
        """Whether it consumes. Raises where the container has ended."""
        return super().ready() and " ready." in self.logs()

    def count(self, text):
        """Return how often a text was logged, by earlier lives of the container too."""
        return self.logs().count(text)

    def seconds_to_ready(self):
        """Return how long the container took from its start to its first "ready."."""
        line = next(
            line
            for line in self._container.logs(timestamps=True).decode().splitlines()
            if line.endswith(" ready.")
        )
        started, ready = (
            datetime.fromisoformat(re.sub(r"\.(\d{6})\d*", r".\1", text))
            for text in (self.attrs["State"]["StartedAt"], line.split()[0])
        )
        return (ready - started).total_seconds()

    def end(self, signal):
        """Send a signal, and wait until the container has ended."""
        self.kill(signal)
        self._container.wait(timeout=DEADLINE)
        self.reload()

    def start(self):
        """Start the container again, and wait until it is ready once more."""
        before = self.count(" ready.")
        self._container.start()
        wait_for(lambda: self.count(" ready.") > before)
        self.reload()


class First(WorkerContainer):
    """The first worker of a broker."""

    NAME = "first"


class Second(WorkerContainer):
    """The second."""

    NAME = "second"


class Ungated(WorkerContainer):
    """A worker whose app is the plugin's own, without a gate: the decorator alone holds the limit."""

    NAME = "ungated"

    @classmethod
    def worker_queue(cls):
        """Return what the worker consumes: its own queue alone."""
        return cls.NAME

    @classmethod
    def app_module(cls):
        """Return an app without a gate."""
        return CeleryWorkerContainer.app_module()

    @classmethod
    def tasks_modules(cls):
        """Return what is mounted beside it."""
        return {ungated_tasks, smoke_log}


class Setup(CeleryTestSetup):
    """Everything a test needs: the app that sends, the two workers, and a log of its own."""

    first: WorkerContainer
    second: WorkerContainer
    run: str

    def send(self, task, *args, queue="celery", **options):
        """Send a job."""
        return self.app.send_task(task, (self.run, *args), queue=queue, **options)

    @property
    def runs(self):
        """What ran, in order of time."""
        entries = self.backend.container.redis.lrange(self.run, 0, -1)
        return sorted((Entry(*json.loads(entry)) for entry in entries), key=lambda entry: entry.at)

    def wait_for_runs(self, count):
        """Wait until so many jobs have run, and return them."""
        return wait_for(lambda: len(runs := self.runs) >= count and runs)

    def held(self, worker):
        """Return how many jobs a worker holds, as ``celery inspect stats`` has it."""
        node = f"{worker.NAME}@{worker.id[:12]}"
        stats = wait_for(self.app.control.inspect([node], timeout=2, limit=1).stats)
        return sum(stats[node]["rate_limiter"]["held"].values())


@pytest.fixture(scope="session")
def docker_client():
    """Return a client for the engine. All fixtures here need it."""
    client, reason = None, ""
    with warnings.catch_warnings():
        # Where none answers, docker.from_env leaves a socket open.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            client = docker.from_env()
            client.ping()
        except docker.errors.DockerException as error:
            reason = f"no Docker engine answers: {error}"
        gc.collect()
    if reason and os.environ.get("REQUIRE_SERVICES") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    yield client
    client.close()


# -- brokers and results ------------------------------------------------------------------------------

default_pytest_celery_network = network(scope="session")

#: What a broker has on disk outlasts its restart. (As a named volume, which is removed in the end; the
#: official images would make one without a name.)
redis_data = volume(scope="session")
rabbitmq_data = volume(scope="session")


def _free_port():
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="session")
def redis_ports():
    """Return a port that the broker keeps when it is restarted."""
    return {"6379/tcp": _free_port()}


@pytest.fixture(scope="session")
def rabbitmq_ports():
    """Return a port that the broker keeps when it is restarted."""
    return {"5672/tcp": _free_port()}


default_redis_broker = container(
    scope="session",
    image=RedisContainer.image(),
    command=[*RedisContainer.command(), "--dir", "/data", "--appendonly", "yes"],
    ports=fxtr("redis_ports"),
    network="{default_pytest_celery_network.name}",
    volumes={"{redis_data.name}": {"bind": "/data"}},
    wrapper_class=RedisContainer,
)

default_rabbitmq_broker = container(
    scope="session",
    image=RabbitMQContainer.image(),
    ports=fxtr("rabbitmq_ports"),
    network="{default_pytest_celery_network.name}",
    volumes={"{rabbitmq_data.name}": {"bind": "/var/lib/rabbitmq"}},
    wrapper_class=RabbitMQContainer,
    timeout=120,
)


class ResultsContainer(RedisContainer):
    """Keeps results, and the log of what ran."""

    def __init__(self, *args):
        super().__init__(*args)
        self._client = None

    @property
    def redis(self):
        """One client for the session; ``client`` is a new one each time."""
        self._client = self._client or self.client
        return self._client


default_redis_backend = container(
    scope="session",
    image=RedisContainer.image(),
    command=RedisContainer.command(),
    ports={"6379/tcp": None},
    network="{default_pytest_celery_network.name}",
    tmpfs={"/data": ""},
    wrapper_class=ResultsContainer,
)

#: The jobs of a killed worker come back soon. (Redis: at once, but after a lease that the gate renews.)
REDIS_OPTIONS = {"visibility_timeout": 5, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
#: A job that was sent is on the broker's disk.
RABBITMQ_OPTIONS = {"confirm_publish": True}


@pytest.fixture(scope="session", params=["redis", "rabbitmq"])
def celery_broker(request):
    """Return each broker."""
    container = request.getfixturevalue(f"default_{request.param}_broker")
    return {"redis": RedisTestBroker, "rabbitmq": RabbitMQTestBroker}[request.param](container)


@pytest.fixture(scope="session")
def celery_backend(default_redis_backend):
    """Return the Redis for the results."""
    return RedisTestBackend(default_redis_backend)


# -- workers ------------------------------------------------------------------------------------------

# pytest sees the fixtures that are named in {braces}, and makes what has these labels anew for each broker;
# it does not see those of fxtr().
PER_BROKER = {"labels": {"for": "{celery_broker}"}}

#: Of the limits for both workers together. It has no other use, and no data after its restart.
limits_redis = container(
    scope="session",
    image=RedisContainer.image(),
    command=RedisContainer.command(),
    network="{default_pytest_celery_network.name}",
    tmpfs={"/data": ""},
    wrapper_class=RedisContainer,
    **PER_BROKER,
)

smoke_image = build(
    path=str(ROOT),
    dockerfile="docker/Dockerfile",
    stages={"runtime": f"{IMAGE}:runtime"},
    target="smoke",
    tag=f"{IMAGE}:smoke",
    buildargs={"CELERY_VERSION": os.environ.get("CELERY_VERSION", "")},
)


@pytest.fixture(scope="session")
def producer(celery_broker, celery_backend, limits_redis):
    """Return an app that sends jobs. Its settings are those of the workers too."""
    redis = isinstance(celery_broker, RedisTestBroker)
    app = Celery("producer", set_as_current=False)
    app.conf.update(
        broker_url=celery_broker.config()["host_url"],
        result_backend=celery_backend.config()["host_url"],
        broker_transport_options=REDIS_OPTIONS if redis else RABBITMQ_OPTIONS,
        broker_connection_retry_on_startup=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        rate_limiter_limits={
            "from settings": {"rate": "10/s", "burst": 2},
            "one rate": {"rate": "10/s", "burst": 2, "per": "cluster"},
        },
        rate_limiter_redis=f"redis://{limits_redis.hostname}/0",
    )
    yield app
    app.close()


@pytest.fixture(scope="session")
def urls(celery_broker, celery_backend):
    """Return the URLs inside the network, which win over those in the settings."""
    return WorkerContainer.initial_env(
        {
            "celery_broker_cluster_config": CeleryBrokerCluster(celery_broker).config(),
            "celery_backend_cluster_config": CeleryBackendCluster(celery_backend).config(),
        }
    )


@pytest.fixture(scope="session")
def worker_files(producer):
    """Return what is mounted at /app."""
    return WorkerContainer.initial_content(worker_app=producer)


worker_volume = volume(scope="session", initial_content=fxtr("worker_files"), **PER_BROKER)


@pytest.fixture(scope="session")
def ungated_files(producer):
    """Return what is mounted at /app of the worker without a gate."""
    return Ungated.initial_content(worker_app=producer)


ungated_volume = volume(scope="session", initial_content=fxtr("ungated_files"), **PER_BROKER)


def _worker(cls, files="{worker_volume.name}"):
    return container(
        scope="session",
        image="{smoke_image.id}",
        command=cls.command(),
        environment=fxtr("urls"),
        network="{default_pytest_celery_network.name}",
        volumes={files: {"bind": "/app", "mode": "ro"}},
        # The supervisor that workers are to run under: a broken connection may end one.
        restart_policy={"Name": "on-failure", "MaximumRetryCount": 3},
        wrapper_class=cls,
        timeout=60,
        **PER_BROKER,
    )


first, second = _worker(First), _worker(Second)
ungated = _worker(Ungated, "{ungated_volume.name}")

_runs = itertools.count()


@pytest.fixture
def celery_setup(producer, celery_broker, celery_backend, first, second):
    """Return a setup whose log nobody has used."""
    setup = Setup(
        worker_cluster=CeleryWorkerCluster(
            *(CeleryTestWorker(worker, app=producer) for worker in (first, second))
        ),
        broker_cluster=CeleryBrokerCluster(celery_broker),
        backend_cluster=CeleryBackendCluster(celery_backend),
        app=producer,
    )
    setup.first, setup.second, setup.run = first, second, f"run {next(_runs)}"
    assert setup.ready()
    return setup


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Show what the workers logged, where a test fails."""
    report = yield
    setup = getattr(item, "funcargs", {}).get("celery_setup")
    if report.failed and setup:
        for worker in setup.first, setup.second:
            report.sections.append((f"log of {worker.NAME}", worker.logs()[-6000:]))
    return report
