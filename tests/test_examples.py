"""Every example runs as its docstring says."""

import ast
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

#: A folder's script is run.py, or the only one there is.
FOLDERS = [
    folder for folder in sorted(EXAMPLES.iterdir()) if (folder.is_dir() and folder.name[0] != "_")
]

#: These need two terminals, or a Redis, and a test of their own.
APART = {"cluster", "parking", "two_terminals"}


def script(folder):
    scripts = [path for path in folder.glob("*.py") if path.name == "run.py"] or list(
        folder.glob("*.py")
    )
    assert len(scripts) == 1, f"{folder}: which of {scripts} is to be run? Name it run.py"
    return scripts[0]


SCRIPTS = [
    *sorted(EXAMPLES.glob("[!_]*.py")),
    *(script(folder) for folder in FOLDERS if folder.name not in APART),
]


def key_line(path):
    """Return the last indented line of a docstring, which an example prints last."""
    document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    indented = [line.strip() for line in document.splitlines() if line.startswith("    ")]
    assert indented, f"{path} does not say what it prints"
    return indented[-1]


def run(path):
    return subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def outcomes(request):
    """Run the examples that were asked for, a few at a time: they mostly wait."""
    items = [item for item in request.session.items if "outcomes" in item.fixturenames]
    with ThreadPoolExecutor(3) as pool:
        yield {
            path: pool.submit(run, path) for path in [item.callspec.params["path"] for item in items]
        }


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_example(path, outcomes):
    """It exits with 0, prints what its docstring ends with, and nothing that looks like an error."""
    outcome = outcomes[path].result()
    output = outcome.stdout + outcome.stderr
    assert outcome.returncode == 0, output
    assert outcome.stdout.splitlines()[-1] == key_line(path), output
    assert "Traceback" not in output, output


def test_two_terminals(tmp_path):
    """The worker of the one terminal runs what the other sends: two emails at once, and all pictures."""
    folder = EXAMPLES / "two_terminals"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    log = tmp_path / "log"
    # Before the worker: the filesystem transport may read a message that is being written.
    subprocess.run([sys.executable, "send.py"], cwd=folder, env=environment, check=True)
    with log.open("wb") as file:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "tasks", "worker", "--loglevel", "INFO", "-c", "2"],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(log, "Resized", 5)
        assert 2 <= log.read_text().count("Sent to") < 10
        wait_for(log, "Sent to", 3)
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def wait_for(log, text, count):
    end = time.monotonic() + 40
    while log.read_text().count(text) < count:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
