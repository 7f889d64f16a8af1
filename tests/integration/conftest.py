"""Servers for the whole session, and a fresh place on them for each test."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import redis
from harness import DEADLINE, Lab, wait_for, workers
from kombu_lab import Broker
from lanes_lab import place_in
from port_for import get_port
from pytest_rabbitmq.factories import rabbitmq_proc
from pytest_redis.factories import redis_proc

DATABASES = 256

_database = itertools.count()


def _find(command):
    # Debian's commands in the PATH are wrappers that change the user.
    debian = Path("/usr/lib/rabbitmq/bin", command)
    return str(debian) if debian.exists() else shutil.which(command)


RABBITMQ, RABBITMQCTL = map(_find, ("rabbitmq-server", "rabbitmqctl"))
# Another server of the same kind may be tested: $REDIS_SERVER, such as a valkey-server.
REDIS = shutil.which(os.environ.get("REDIS_SERVER", "redis-server"))

# timeout: pytest-redis has the server close connections that are idle for 15 s. A real one keeps them
# (0, which the factory takes for "not given").
redis_server = redis_proc(executable=REDIS, port=None, db_count=DATABASES, timeout=3600)
rabbitmq_server = rabbitmq_proc(server=RABBITMQ, ctl=RABBITMQCTL, port=None, distribution_port=None)


def _server(request, name, *commands):
    if not all(commands):
        reason = f"{name} is not installed"
        if os.environ.get("REQUIRE_SERVICES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return request.getfixturevalue(name)


@pytest.fixture(scope="session")
def redis_url(request):
    """Return what makes the URL of a database that nobody has used."""
    server = _server(request, "redis_server", REDIS)
    return lambda: f"redis://{server.host}:{server.port}/{next(_database) % DATABASES}"


@pytest.fixture(scope="session")
def rabbitmq(request):
    """Return the RabbitMQ server."""
    return _server(request, "rabbitmq_server", RABBITMQ, RABBITMQCTL)


@pytest.fixture
def redis_lab(redis_url, tmp_path):
    """Yield a lab on Redis, with results."""
    url = redis_url()
    lab = Lab(tmp_path, url, url)
    yield lab
    lab.close()


@pytest.fixture
def rabbitmq_lab(rabbitmq, tmp_path):
    """Yield a lab on RabbitMQ, without results."""
    lab = Lab(tmp_path, f"amqp://guest:guest@{rabbitmq.host}:{rabbitmq.port}//")
    yield lab
    lab.close()


@pytest.fixture(params=["redis", "rabbitmq"])
def lab(request):
    """Return a lab on each broker."""
    return request.getfixturevalue(f"{request.param}_lab")


@pytest.fixture(params=["redis", "rabbitmq", "quorum"])
def place(request):
    """Return a lab, and a queue of it on each kind of broker."""
    lab = request.getfixturevalue("redis_lab" if request.param == "redis" else "rabbitmq_lab")
    return place_in(lab, quorum=request.param == "quorum")


@pytest.fixture
def redis_broker(redis_url):
    """Yield a Redis for plain kombu consumers."""
    broker = Broker(redis_url())
    yield broker
    broker.close()


@pytest.fixture
def rabbitmq_broker(rabbitmq):
    """Yield a RabbitMQ for plain kombu consumers."""
    broker = Broker(f"amqp://guest:guest@{rabbitmq.host}:{rabbitmq.port}//", rabbitmq)
    yield broker
    broker.close()


@pytest.fixture(params=["redis", "rabbitmq"])
def broker(request):
    """Return each broker for plain kombu consumers."""
    return request.getfixturevalue(f"{request.param}_broker")


@pytest.fixture
def filesystem_lab(tmp_path):
    """Yield a lab without servers. Its workers have no event loop."""
    for name in ("jobs", "sent", "control"):
        (tmp_path / name).mkdir()
    options = {
        "data_folder_in": str(tmp_path / "jobs"),
        "data_folder_out": str(tmp_path / "jobs"),
        "control_folder": str(tmp_path / "control"),
        "polling_interval": 0.02,
    }
    lab = Lab(tmp_path, "filesystem://", broker_transport_options=options)
    # kombu would let a worker read a file that is not all written, which ends the worker.
    lab.app.conf.broker_transport_options = options | {"data_folder_out": str(tmp_path / "sent")}
    send = lab.send

    def send_whole(*args, **options):
        result = send(*args, **options)
        for file in (tmp_path / "sent").iterdir():
            file.rename(tmp_path / "jobs" / file.name)
        return result

    lab.send = send_whole
    yield lab
    lab.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Forget the workers of the tests before."""
    workers[:] = [worker for worker in workers if worker.running]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Show what the workers printed, where a test fails."""
    report = yield
    if report.failed:
        for worker in workers:
            report.sections.append((f"output of {worker.node}", worker.output[-6000:]))
    return report


#: Options of a Redis that has its data again when it is started after a kill.
KEEPS_DATA = ("--appendonly", "yes", "--appendfsync", "always")


def answers(client):
    """Tell whether a Redis is there, whatever it says."""
    with contextlib.suppress(redis.RedisError):
        try:
            return client.ping()
        except (redis.AuthenticationError, redis.exceptions.BusyLoadingError):
            return True


class OwnRedis:
    """A Redis that may be stopped."""

    def __init__(self, folder, executable, *options):
        self.port = get_port(None)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        command = [executable, "--port", str(self.port), "--save", "", "--dir", str(folder)]
        self.command = [*command, *options]
        self.start()

    def start(self, *options):
        """Start it, with further options. It is empty, unless it keeps its data."""
        self.process = subprocess.Popen([*self.command, *options], stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            wait_for(lambda: answers(client))

    def kill(self):
        """End it at once."""
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait(DEADLINE)

    def restart(self):
        """Take it away for a moment."""
        self.kill()
        time.sleep(0.3)
        self.start()


@pytest.fixture
def own_redis(request, tmp_path):
    """Yield what starts a Redis for this test alone, with further options."""
    if not REDIS:
        _server(request, "redis_server", REDIS)
    servers = []

    def start(*options):
        folder = tmp_path / f"redis{len(servers)}"
        folder.mkdir(exist_ok=True)
        servers.append(OwnRedis(folder, REDIS, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def own(own_redis):
    """Return a Redis for this test alone."""
    return own_redis()
