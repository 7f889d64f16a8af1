"""What the monitoring of the Docker demo shows: a real Prometheus beside its worker, and each query."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request

import pytest
from harness import DEADLINE, ROOT, Worker, wait_for
from port_for import get_port

MONITORING = ROOT / "docker" / "monitoring"
PROMETHEUS, PROMTOOL = map(shutil.which, ("prometheus", "promtool"))


@pytest.fixture
def query(redis_url, tmp_path):
    """Yield what asks a Prometheus that watches a worker of the demo, with its producer."""
    if not PROMETHEUS:
        reason = "prometheus is not installed"
        pytest.fail(reason) if os.environ.get("REQUIRE_SERVICES") == "1" else pytest.skip(reason)
    metrics, port = get_port(None), get_port(None)
    config = (MONITORING / "prometheus.yml").read_text()
    config = config.replace('"worker-1:9464", "worker-2:9464"', f'"127.0.0.1:{metrics}"')
    config = config.replace("scrape_interval: 5s", "scrape_interval: 1s")
    (tmp_path / "prometheus.yml").write_text(config)
    shutil.copy(MONITORING / "alerts.yml", tmp_path)
    url = redis_url()
    environment = {"BROKER_URL": url, "REDIS_URL": url, "METRICS_PORT": str(metrics)}
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "docker", MONITORING)))
    environment["PYTHONPATH"] = path
    with contextlib.ExitStack() as stack:

        def run(*command):
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                env={**os.environ, **environment},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(process.wait, DEADLINE)
            stack.callback(process.terminate)

        arguments = ("-c", "2", "--include", "metrics")
        stack.enter_context(Worker("shop", arguments, tmp_path, **environment))
        run(sys.executable, str(ROOT / "docker" / "shop.py"))
        run(
            PROMETHEUS,
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        )

        def ask(expression):
            page = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode(
                {"query": expression}
            )
            with contextlib.suppress(OSError), urllib.request.urlopen(page, timeout=DEADLINE) as answer:
                return json.load(answer)["data"]["result"]
            return []

        yield ask


def test_every_query_of_the_dashboard_has_data(query):
    """Of each panel, in a worker that does something under each kind of limit; and the numbers are right."""
    board = json.loads((MONITORING / "rate_limits.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(queries) >= 8
    for expression in queries:
        assert wait_for(lambda expression=expression: query(expression)), expression
    (emails,) = query('rate_limiter_admitted_total{limit="shop.send_email"}')
    assert emails["metric"]["task"] == "shop.send_email"
    wait_for(lambda: query('rate_limiter_held{limit="shop.send_email"} > 3'))
    wait_for(lambda: query('rate(rate_limiter_tokens_total{limit="shop.upload"}[10s]) > 8'))
    assert query('rate(rate_limiter_tokens_total{limit="shop.upload"}[10s]) < 14')
    assert not query('rate_limiter_held{limit="tried"}')
    assert not query("count by (key) (rate_limiter_held)")[0]["metric"]


def test_prometheus_takes_the_alerts():
    """And knows each metric that they, and the dashboard, name."""
    if not PROMTOOL:
        pytest.skip("prometheus is not installed")
    done = subprocess.run(
        [PROMTOOL, "check", "rules", str(MONITORING / "alerts.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "3 rules found" in done.stdout, done.stdout + done.stderr
