"""What holds for all tests."""

import shutil
import subprocess

import pytest
from celery.signals import setup_logging

epmd = pytest.StashKey[subprocess.Popen]()


@setup_logging.connect
def keep_logging(**_options):
    """Leave the loggers of the test process to pytest.

    A worker in this process would set the root logger to "error", for the tests that come after it too.
    """


def pytest_configure(config):
    """Start what RabbitMQ's nodes find each other by: one for both halves of the tests.

    The first node would start it otherwise, and take it along as it ends, while the other half still runs.
    If there is one on this machine already, this one ends by itself.
    """
    command = shutil.which("epmd")
    if command and not hasattr(config, "workerinput"):  # not in a process of pytest-xdist
        config.stash[epmd] = subprocess.Popen(
            [command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )


def pytest_unconfigure(config):
    """Stop it."""
    process = config.stash.get(epmd, None)
    if process is not None:
        process.terminate()
        process.wait()


def pytest_ignore_collect(collection_path, config):
    """Leave the smoke tests alone unless they are asked for: their tasks would be every app's."""
    return True if collection_path.name == "smoke" and config.option.markexpr != "smoke" else None
