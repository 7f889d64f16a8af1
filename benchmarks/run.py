# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "celery-token-bucket[celery,redis]",
#     "gevent",
#     "opentelemetry-sdk",
#     "psutil",
#     "rich",
#     # peers; one that is not there is told as not installed
#     "dramatiq",
#     "huey",
#     "limits",
#     "pyrate-limiter",
#     "throttled-py",
# ]
# [tool.uv.sources]
# celery-token-bucket = { path = "..", editable = true }
# ///
"""Runs the benchmarks beside their peers, writes the results, and draws the pictures of the README and the site.

uv run benchmarks/run.py                     # what compares, about half an hour
uv run benchmarks/run.py --short             # the same, roughly, in about ten minutes
uv run benchmarks/run.py core gate.rates     # a file, a part: prints only
uv run benchmarks/run.py --list              # the names of all parts

A run without names writes benchmarks/results/DATE.json, the same as a table in DATE.md, and docs/pictures/*.svg. It
needs `redis-server` and `rabbitmq-server`. uv installs the peers for this script alone. The exit status is 1 if
anything failed that may not be missed: see the files.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import core
import gate
import keys
import kombu_gate
import redis_bucket
import shared
from bench import Bench, Part, benching, command_line
from pictures import drawn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT: Final = Path(__file__).parents[1]

#: By file and name.
PARTS: Final[dict[str, Part]] = {
    f"{file.__name__}.{name}": part
    for file in (core, shared, keys, gate, kombu_gate, redis_bucket)
    for name, part in file.PARTS.items()
}

#: What a run without names measures: what has a peer, or shows what it costs. The others look for faults, or take long.
PLAN: Final = (
    *("core", "shared", "keys"),
    *("gate.rates", "gate.passing", "gate.alone", "gate.cluster", "gate.cut"),
    *("kombu_gate.passing", "kombu_gate.rates", "kombu_gate.cost"),
    *("redis_bucket.speed", "redis_bucket.bound"),
)


def chosen(names: Sequence[str]) -> dict[str, Part]:
    """Return the parts that are named, each by itself or all of its file.

    Raises:
        KeyError: There is none of that name.

    """
    parts = {}
    for name in names:
        found = {each: part for each, part in PARTS.items() if name in (each, each.partition(".")[0])}
        if not found:
            raise KeyError(name)
        parts |= found
    return parts


@contextlib.contextmanager
def progress(
    total: int,
) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Show how far the run is: a bar under the lines that are said; without a terminal, lines alone.

    Yields:
        What says a line; what is called with the name of each part, before it.

    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    bar = Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        console=console,
        refresh_per_second=1,  # more would be measured too
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task("", total=total)
    number = 0

    def begins(name: str) -> None:
        nonlocal number
        bar.update(task, completed=number, description=name)
        number += 1
        console.print(f"\n[{number}/{total}] {name}")

    with bar:
        yield console.print, begins


def table(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in results["about"].items() if value != "")
    lines = ["# Results", "", about, ""]
    for name, part in results["parts"].items():
        lines += [f"## {name}", "", f"In {part['seconds']:g} s.", ""]
        lines += ["| | measured | target | |", "|---|---|---|---|"]
        for result in part["results"]:
            verdict = {None: "", True: "ok", False: "missed"}[result["ok"]]
            cells = [result["what"].strip(), result["measured"], result["target"], verdict]
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def write(bench: Bench) -> None:
    """Write the results, and draw the pictures by them."""
    name = bench.about["date"][:10] + ("-short" if bench.short else "")
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    bench.save(path)
    results = json.loads(path.read_text())
    path.with_suffix(".md").write_text(table(results))
    for picture, svg in drawn(results).items():
        (ROOT / "docs" / "pictures" / f"{picture}.svg").write_text(svg)
    bench.say(
        f"\n{path.relative_to(ROOT)}, its table, and {', '.join(bench.pictures)} in docs/pictures"
    )


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--list", action="store_true", help="list the names of all parts, and end")
    options = parser.parse_args()
    try:
        parts = chosen(options.parts or PLAN)
    except KeyError as error:
        parser.error(f"unknown part {error.args[0]}; see --list")
    if options.list:
        print("\n".join(PARTS))
        return 0
    with progress(len(parts)) as (say, begins), benching(options, say) as bench:
        bench.measure(parts, begins)
        if options.json:
            bench.save(options.json)
        if not options.parts:
            write(bench)
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
