"""What all benchmarks share: the servers, the results and their format, the command line."""

import argparse
import contextlib
import datetime as dt
import json
import operator
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from gate_lab import BROKERS, LabError, Server

__all__ = ["Bench", "Part", "benching", "command_line", "finished", "main", "per_second"]

_RELATIONS: Final = {"<=": operator.le, ">=": operator.ge}


class Bench:
    """The servers and settings of a benchmark, and its results.

    Args:
        directory: For the servers.
        options: The command line.
        say: Called with each line that is to be read.

    """

    def __init__(
        self, directory: Path, options: argparse.Namespace, say: Callable[[str], object]
    ) -> None:
        self.directory = directory
        self.short: bool = options.short
        self.rounds: int = options.rounds
        self.brokers = [name for name in BROKERS if options.broker in (name, "both")]
        self.say = say
        self.about = about(self.short)
        self.failed = False
        #: By the names of the parts.
        self.parts: dict[str, dict[str, Any]] = {}
        #: What pictures.py draws.
        self.pictures: dict[str, dict[str, Any]] = {}
        self.stack = contextlib.ExitStack()
        self._results: list[dict[str, Any]] = []
        self._servers: dict[tuple[str, bool], Server] = {}

    def servers(self, *, durable: bool = False) -> list[Server]:
        """Return the brokers, started."""
        return [self.server(name, durable=durable) for name in self.brokers]

    def server(self, name: str, *, durable: bool = False) -> Server:
        """Return one broker, started; if durable, what it has confirmed survives a restart."""
        durable = durable or name == "rabbitmq"  # which always is
        if (name, durable) not in self._servers:
            server = BROKERS[name](self.directory, durable=durable)
            self._servers[name, durable] = self.stack.enter_context(server)
            self.about[server.name] = server.version()
        return self._servers[name, durable]

    def report(
        self, what: str, measured: str, target: str = "", ok: bool | None = None, **values: Any
    ) -> None:
        """Say one measurement, and keep it with its plain ``values``."""
        verdict = {None: "", True: "ok", False: "MISS"}[ok]
        self.say(f"{what:<57} {measured:<48} {target:<24} {verdict}".rstrip())
        self._results.append({"what": what, "measured": measured, "target": target, "ok": ok} | values)

    def must(self, what: str, measured: str, target: str, ok: bool, **values: Any) -> None:
        """Report what may not be missed."""
        self.report(what, measured, target, ok, **values)
        self.failed = self.failed or not ok

    def number(
        self, what: str, measured: float, target: str = "", unit: str = "x", *, must: bool = False
    ) -> None:
        """Report a number, by its target (such as ``<= 0.6``). A ratio has the unit ``x``."""
        relation, _, bound = target.partition(" ")
        ok = _RELATIONS[relation](measured, float(bound)) if target else None
        text = f"x {measured:.3f}" if unit == "x" else f"{measured:.3f} {unit}"
        self.report(what, text, target, ok, **{"ratio" if unit == "x" else "value": measured})
        self.failed = self.failed or (must and not ok)

    @contextlib.contextmanager
    def left_out(self, what: str) -> Iterator[None]:
        """Leave out a peer that is not installed, and say so."""
        try:
            yield
        except ImportError as error:
            self.report(what, f"not installed: {error.name}")

    def picture(
        self,
        name: str,
        server: Server,
        begin: float,
        every: float,
        curves: Mapping[str, Sequence[float]],
        **numbers: float,
    ) -> None:
        """Keep what pictures.py draws: the first time of each name.

        Args:
            name: Of the picture.
            server: The broker.
            begin: The first second.
            every: By how many seconds the points of a curve are apart.
            curves: The values, by a name of each curve.
            numbers: What else is drawn, or said.

        """
        data = {"on": server.name, "begin": begin, "every": every, "curves": curves} | numbers
        self.pictures.setdefault(name, data)

    def measure(
        self, parts: Mapping[str, "Part"], begins: Callable[[str], object] = lambda name: None
    ) -> None:
        """Measure parts, one after the other; stop the servers in the end.

        Args:
            parts: By their names.
            begins: Called with the name of each, before.

        """
        with self.stack:
            for name, part in parts.items():
                begins(name)
                self._results, began = [], time.monotonic()
                try:
                    part(self)
                except Exception as error:  # noqa: BLE001 - the others are to be measured all the same
                    if not isinstance(error, LabError):
                        traceback.print_exc()
                    self.must(f"{name}: not measured", str(error) or repr(error), "", ok=False)
                seconds = round(time.monotonic() - began, 1)
                self.parts[name] = {"seconds": seconds, "results": self._results}

    def save(self, path: Path) -> None:
        """Write the results as JSON."""
        results = {"about": self.about, "parts": self.parts, "pictures": self.pictures}
        text = json.dumps(results, indent=1)
        # A curve is one line.
        text = re.sub(r"\[\s+([-\d.,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
        path.write_text(text + "\n")


Part = Callable[[Bench], None]


def about(short: bool) -> dict[str, Any]:
    """Return what the results depend on."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    return {
        "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M}",
        "short": short,
        "commit": commit(),
        "CPU": cpu or platform.machine(),
        "CPUs": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        **{name: version(name) for name in ("celery", "kombu")},
        "redis-py": version("redis"),
    }


def commit() -> str:
    """Return the commit that is measured, with a + if there are changes; nothing outside of a repository."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def per_second(moments: Iterable[float], begin: float, end: float, every: float = 1.0) -> list[float]:
    """Return the rate in each ``every`` seconds from ``begin`` to ``end``."""
    counts = [0] * round((end - begin) / every)
    for moment in moments:
        if 0 <= (bin_ := int((moment - begin) // every)) < len(counts):
            counts[bin_] += 1
    return [count / every for count in counts]


def finished(moments: Iterable[float], end: float, every: float) -> list[int]:
    """Return how many there are after 0 seconds, ``every`` seconds, and so on until ``end``."""
    there = list(moments)
    return [sum(moment <= step * every for moment in there) for step in range(round(end / every) + 1)]


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return what all command lines have."""
    summary, _, more = (description or "").partition("\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=more, formatter_class=layout)
    parser.add_argument("parts", nargs="*", metavar="part", help="default: all")
    parser.add_argument("--short", action="store_true", help="quick and rough")
    parser.add_argument("--broker", choices=[*BROKERS, "both"], default="both")
    parser.add_argument("--rounds", type=int, default=0, help="of parked_kills, of 30 kills each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser


@contextlib.contextmanager
def benching(options: argparse.Namespace, say: Callable[[str], object]) -> Iterator[Bench]:
    """Give a benchmark that has a directory for its servers, and say what it runs on."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave by way of the clean-up
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as directory:
        bench = Bench(Path(directory), options, say)
        say("{CPUs} CPUs ({CPU}), load {load}, Python {Python}".format(**bench.about))
        yield bench


def main(description: str | None, parts: Mapping[str, Part], long: Collection[str] = ()) -> int:
    """Run a benchmark by itself, by its command line.

    Args:
        description: What it is.
        parts: By their names.
        long: The names of those that run only if they are named.

    Returns:
        The exit status.

    """
    parser = command_line(f"{description}\nParts: {', '.join(parts)}")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; expected {', '.join(parts)}")
    with benching(options, partial(print, flush=True)) as bench:
        names = options.parts or [name for name in parts if name not in long]
        bench.measure({name: parts[name] for name in names})
        if options.json:
            bench.save(options.json)
    return int(bench.failed)
