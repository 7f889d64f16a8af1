"""`celery limits`: as an operator calls it, in a terminal beside real workers."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from harness import Lab, wait_for
from limits import celery, control, environment, limit, start, stats


@pytest.fixture(scope="module")
def held(redis_url, tmp_path_factory):
    """Yield a lab, a worker that holds 9 jobs of the limit "job", and the last of these jobs."""
    lab = Lab(tmp_path_factory.mktemp("cli"), redis_url())
    jobs = [lab.send("job", number) for number in range(10)]
    with start(lab, limits=(limit(rate=0.001, max_held=50),)) as worker:
        wait_for(lambda: stats(lab, worker)["rate_limiter"]["held"].get("job") == 9)
        yield lab, worker, jobs[-1]
    lab.close()


def test_the_table(held):
    """A row for each limit, with what it holds; as JSON it is what inspect says."""
    lab, worker, _ = held
    status, printed = celery(lab)
    assert status == 0
    (row,) = [line for line in printed.splitlines() if line.startswith("job ")]
    assert row.split()[1:7] == [worker.node, "3.6/h", "1", row.split()[4], "9", "1"]
    status, printed = celery(lab, "--json")
    assert status == 0
    assert json.loads(printed)[worker.node].keys() == {
        *control(lab, worker, "limits"),
    }
    assert json.loads(printed)[worker.node]["job"]["held"] == 9


def test_explain(held):
    """A held job: by which limit, how many are before it, and when it runs; another one: exit 2."""
    lab, worker, last = held
    status, printed = celery(lab, "explain", last.id)
    assert status == 0
    assert re.search(
        rf"{worker.node}: job is held by limit job, 8 jobs before it; it runs in [\de.+]+ s", printed
    )
    status, printed = celery(lab, "explain", "no-such-job", "-d", worker.node)
    assert (status, "No worker has the job no-such-job" in printed) == (2, True)


def test_set_pause_and_resume(held):
    """The worker says what it has changed; the table shows it with the reason."""
    lab, worker, _ = held
    status, printed = celery(lab, "set", "sluggish", "--rate", "7/m", "--reason", "a test")
    assert (status, printed) == (0, f"{worker.node}: 0.116667 tokens_per_second (was 100)\n")
    assert celery(lab, "pause", "sluggish", "5m") == (0, f"{worker.node}: paused for 300 s\n")
    printed = celery(lab)[1]
    assert re.search(
        r"^sluggish .* 7/m .* paused for [23]\d\d s, changed .*: paused for 300 s$",
        printed,
        re.MULTILINE,
    )
    assert celery(lab, "resume", "sluggish") == (0, f"{worker.node}: resumed\n")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("set", "mails", "--rate", "5/s"), 2, "there is no limit 'mails', only: "),
        (("set", "job"), 2, "nothing is to change"),
        (("set", "job", "--rate", "0"), 2, "rate must be a number above 0"),
        (("set", "job", "--rate", "5/y"), 2, "rate must be a number above 0"),
        (("pause", "job", "soon"), 2, "pause must be seconds"),
        (("set", "job", "--rate", "5/s", "--key", "acme"), 2, "limit job has no keys"),
        (("--json", "--watch"), 2, "--json and --watch exclude each other"),
        (("-t", "0"), 2, "0.0 is not in the range x>0"),
        (("-t", "0.3", "-d", "nobody@nowhere"), 69, "No worker has answered within 0.3 s"),
        (
            ("set", "job", "--rate", "1", "-d", "nobody@nowhere"),
            69,
            "No worker has answered within 1 s",
        ),
    ],
)
def test_what_cannot_be_done(held, arguments, status, says):
    """The text names the value and what there is; the exit status says whose fault it is."""
    ended, printed = celery(held[0], *arguments)
    assert (ended, says in printed) == (status, True), printed


def watch(lab, *before):
    """Return what `celery limits --watch` draws in a terminal within some seconds, and its exit status."""
    # A background process of a shell is started with SIGINT ignored.
    steps = ["import signal, sys", "signal.signal(signal.SIGINT, signal.default_int_handler)", *before]
    code = "; ".join([*steps, "from celery.__main__ import main", "main()"])
    arguments = ["-A", "tests.integration.limits_app", "limits", "--watch", "-t", "0.5"]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment(lab, (), True) | {"TERM": "xterm", "LINES": "50"},
        cwd=lab.folder,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    drawn, end = b"", time.monotonic() + 30
    while drawn.count(b"longest wait") < 3 and time.monotonic() < end:
        if select.select([master], [], [], 0.5)[0]:
            drawn += os.read(master, 65536)
    process.send_signal(signal.SIGINT)
    try:
        return drawn.decode(), process.wait(20)
    finally:
        os.close(master)


@pytest.mark.parametrize("before", [(), ("sys.modules['rich.live'] = None",)], ids=["rich", "plain"])
def test_watch(held, before):
    """It draws the table again each second, with bars, until Ctrl-C; without rich too."""
    drawn, _status = watch(held[0], *before)
    assert drawn.count("longest wait") >= 3
    assert "9 ██████████" in drawn
    assert "0/s ░░░░░░░░░░" in drawn
    assert "Traceback" not in drawn
    assert ("\x1b[?1049h" in drawn) is not bool(before)  # the terminal's other screen


@pytest.mark.parametrize("arguments", [("--watch",), ("purge",)])
def test_no_broker(tmp_path, arguments):
    """A line says which broker does not answer, without its password; exit 69."""
    lab = Lab(tmp_path, "redis://:secret@nobody.invalid")
    lab.settings["broker_connection_retry"] = False
    status, printed = celery(lab, *arguments)
    assert status == 69
    assert "The broker at redis://:**@nobody.invalid:6379// does not answer: " in printed
    assert "Traceback" not in printed
    assert "secret" not in printed


def test_check_counts_limits(tmp_path):
    """It says how many there are, for whoever has written them where nobody reads them."""
    module = "from celery import Celery\nfrom rate_limiter.celery import Gate\napp = Celery('shop')\nGate(app)\n"
    for name, setting, says in [
        ("none", "", "No limit is declared.\n"),
        (
            "one",
            "app.conf.rate_limiter_limits = {'job': '5/s'}\n@app.task(name='job')\ndef job(): ...",
            "well: 1.\n",
        ),
    ]:
        (tmp_path / f"{name}.py").write_text(module + setting)
        command = [
            sys.executable,
            "-m",
            "celery",
            "--workdir",
            str(tmp_path),
            "-A",
            name,
            "limits",
            "check",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.endswith(says)


def test_no_lanes(tmp_path):
    """Parked jobs are looked for on Redis and RabbitMQ alone: else exit 2."""
    status, printed = celery(Lab(tmp_path, "memory://"), "unpark")
    assert status == 2
    assert "only Redis and RabbitMQ have lanes, and the broker is memory" in printed
    assert "Traceback" not in printed


def test_check(redis_lab):
    """It needs no broker; a line for each problem, and exit 1."""
    lab = redis_lab
    lab.settings["broker_url"] = "redis://nobody.invalid"
    ok = {"task_annotations": {"cello": {"rate_limit": None}, "doubly": {"rate_limit": None}}}
    status, printed = celery(lab, "check", **ok)
    assert (status, re.fullmatch(r"All limits are well: \d\d\.\n", printed) is not None) == (0, True)
    wrong = ok | {
        "task_annotations": {
            **ok["task_annotations"],
            "free": {"rate_limiter_limits": "5/s"},
            "other": {"rate_limiter_limit": {"rate": "5/s", "key": "tenant"}},
        }
    }
    status, printed = celery(lab, "check", limits=(limit("typo"),), **wrong)
    assert status == 1
    assert [line.partition(":")[0] for line in printed.splitlines()] == [
        "rate_limiter_limits of free",
        "key must be the name of a parameter, not 'tenant'",
        "Limit typo matches no registered task; there are",
    ]
    assert ", cello, declare, " in printed
    wrong = {"cello": {"rate": "5/s", "key": "tenant"}}
    status, printed = celery(lab, "check", rate_limiter_limits=wrong, **ok)
    assert status == 1
    assert len(printed.splitlines()) == 1  # not that the limit matches no task, too
    status, printed = celery(lab, "check", gate=False, rate_limiter_limits={"job": "5/s"})
    assert status == 1
    assert "no gate, so nothing obeys rate_limiter_limits: add Gate(app)" in printed
    status, printed = celery(lab, "check", rate_limiter_longest_hold=-5, **ok)
    assert (status, "rate_limiter_longest_hold must be" in printed) == (1, True)
    status, printed = celery(lab, "check", rate_limiter_control="false", **ok)
    assert (status, "rate_limiter_control must be True or False" in printed) == (1, True)
    status, printed = celery(lab, "check", rate_limiter_limits={"job": "5/x"})
    assert (status, "rate must be a number above 0" in printed) == (1, True)
