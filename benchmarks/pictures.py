"""Draws the pictures of the README and of docs/ from the results of run.py, on light and dark, narrow and wide.

uv run benchmarks/pictures.py benchmarks/results/2026-11-29.json docs/pictures

The words are here; each number comes from the file.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["LOOKS", "draw", "drawn"]

#: Legible on white and on black.
GREY: Final = "#7a828d"
BLUE: Final = "#2f81f7"
ORANGE: Final = "#db6d28"
GREEN: Final = "#2da44e"
PURPLE: Final = "#a371f7"

WIDTH: Final = 640
LEFT, RIGHT, BOTTOM, PLOT = 60, 18, 56, 230
LINE: Final = 21

#: What exceeds so many times the limit is cut off, and told by its number.
CUT: Final = 2.5


class Curve(NamedTuple):
    """How a curve is drawn, and its words in the legend."""

    words: str
    colour: str
    dashes: str = ""


class Look(NamedTuple):
    """The words of a picture, in which stand the numbers of its data."""

    title: str
    x: str
    y: str
    curves: Mapping[str, Curve]
    stacked: bool = False


_READY: Final = "seconds since the worker was ready"

LOOKS: Final = {
    "rate": Look(
        "A limit of {limit}/s, with a backlog from the start",
        _READY,
        "jobs per second",
        {"native": Curve("Celery's rate_limit", ORANGE), "gate": Curve("the gate", BLUE)},
    ),
    "behind": Look(
        "{free} jobs without a limit behind {limited:,} limited to {of}/s",
        _READY,
        "jobs without a limit that ran",
        {
            "native": Curve("Celery's rate_limit", ORANGE),
            "default": Curve("the gate, default max_held", BLUE, "3 5"),
            "hold": Curve("the gate, max_held={held}", BLUE),
            "park": Curve('the gate, overflow="park"', GREEN),
            "none": Curve("nothing is limited", PURPLE, "9 5"),
        },
    ),
    "workers": Look(
        "A limit of {limit}/s in Redis: a second worker comes and goes",
        "seconds since the first worker was ready",
        "jobs started per second",
        {"one": Curve("the first worker", BLUE), "two": Curve("the second worker", ORANGE)},
        stacked=True,
    ),
    "outage": Look(
        "A limit of {limit}/s for {workers} workers, while its Redis is away",
        "seconds since Redis went away",
        "jobs per second, of all workers",
        {
            "open": Curve('on_outage="open": all at once', ORANGE),
            "closed": Curve('on_outage="closed": none', PURPLE, "9 5"),
            "local": Curve('on_outage="local": the default', BLUE),
        },
    ),
}


def drawn(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the pictures of which the results have the numbers, as SVG by their names."""
    return {
        name: draw(LOOKS[name], data, results["about"]) for name, data in results["pictures"].items()
    }


def draw(look: Look, data: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Return a picture as SVG.

    Args:
        look: Its words.
        data: Its numbers, as `Bench.picture` keeps them.
        about: What was measured.

    """
    return "\n".join(_Chart(look, data, about).parts()) + "\n"


class _Chart:
    """One picture: its scales, and what is drawn by them."""

    def __init__(self, look: Look, data: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.look, self.data, self.about = look, data, about
        self.curves: dict[str, list[float]] = data["curves"]
        self.limit = data.get("limit", 0)  # with a limit the values are rates
        self.middle = 0.5 if self.limit else 0.0  # a rate is that of the time around its point
        self.begin, self.every = data["begin"], data["every"]
        points = len(next(iter(self.curves.values())))
        self.end = self.begin + self.every * (points if self.limit else points - 1)
        self.plot_top = 58 + LINE * math.ceil(len(self._entries()) / 2)
        self.height = self.plot_top + PLOT + BOTTOM
        columns = zip(*self.curves.values(), strict=True)
        highest = max(map(sum if look.stacked else max, columns))
        self.top = 1.08 * (min(highest, CUT * self.limit) if self.limit else highest) or 1

    def parts(self) -> Iterator[str]:
        """Draw it."""
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self.height}" '
            f'viewBox="0 0 {WIDTH} {self.height}" role="img" font-family="system-ui, sans-serif" '
            f'font-size="14" fill="{GREY}">'
        )
        title = self.look.title.format(**self.data)
        yield f"<title>{escape(title)}</title>"
        yield _text(LEFT, 22, title, size=17, bold=True)
        yield _text(LEFT, 42, self._setup(), size=12)
        yield from self._legend()
        yield from self._axes()
        if away := self.data.get("away"):
            left, right = self._x(0), self._x(away)
            yield _box(left, self.plot_top, right - left, PLOT, GREY, 0.14)
            yield _text(right - 8, self.plot_top + 18, "Redis is away", "end")
        yield from self._bars() if self.look.stacked else self._lines()
        if self.limit:
            level = self._y(self.limit)
            yield _line((LEFT, level), (WIDTH - RIGHT, level), GREY, "6 4", 1.5)
        yield "</svg>"

    def _setup(self) -> str:
        about, broker = self.about, self.data["on"]
        words = f"{broker} {about[broker]}, celery {about['celery']}, Python {about['Python']}; {about['date'][:10]}"
        return words + (", a short run" if about["short"] else "")

    def _entries(self) -> list[Curve]:
        entries = list(self.look.curves.values())
        if self.limit:
            entries.append(Curve(f"the limit, {self.limit:g}/s", GREY, "6 4"))
        return entries

    def _legend(self) -> Iterator[str]:
        for number, curve in enumerate(self._entries()):
            left = LEFT + number % 2 * (WIDTH - LEFT - RIGHT) / 2
            height = 66 + LINE * (number // 2)
            if self.look.stacked and curve.colour != GREY:
                yield _box(left, height - 11, 24, 12, curve.colour)
            else:
                yield _line((left, height - 5), (left + 24, height - 5), curve.colour, curve.dashes, 3)
            yield _text(left + 32, height, curve.words.format(**self.data))

    def _x(self, second: float) -> float:
        return LEFT + (second - self.begin) / (self.end - self.begin) * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        return self.plot_top + PLOT * (1 - min(value, self.top) / self.top)

    def _axes(self) -> Iterator[str]:
        for value in _ticks(0, self.top, 7):
            yield _line((LEFT, self._y(value)), (WIDTH - RIGHT, self._y(value)), GREY, "", 1, 0.3)
            yield _text(LEFT - 8, self._y(value) + 5, f"{value:,g}", "end")
        floor = self.plot_top + PLOT
        for second in _ticks(self.begin, self.end, 8):
            yield _line((self._x(second), floor), (self._x(second), floor + 5), GREY, "", 1)
            yield _text(self._x(second), floor + 20, f"{second:g}", "middle")
        yield _text(self._x((self.begin + self.end) / 2), floor + 44, self.look.x, "middle")
        middle = self.plot_top + PLOT / 2
        turned = _text(16, middle, self.look.y, "middle")
        yield f'<g transform="rotate(-90 16 {middle:g})">{turned}</g>'

    def _moments(self) -> list[float]:
        return [
            self.begin + self.every * (step + self.middle)
            for step in range(len(next(iter(self.curves.values()))))
        ]

    def _lines(self) -> Iterator[str]:
        for name, curve in self.look.curves.items():
            values = self.curves[name]
            points = [
                (self._x(at), self._y(value)) for at, value in zip(self._moments(), values, strict=True)
            ]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            yield (
                f'<polyline points="{path}" fill="none" stroke="{curve.colour}" stroke-width="2.5" '
                f'stroke-linejoin="round"{_dashes(curve.dashes)}/>'
            )
            if (highest := max(values)) > self.top:
                x, y = [at for at, value in zip(points, values, strict=True) if value > self.top][-1]
                yield _text(x + 14, y + 34, f"up to {highest:,.0f}/s", colour=curve.colour)

    def _bars(self) -> Iterator[str]:
        width = self._x(self.every) - self._x(0)
        below = [0.0] * len(self._moments())
        for name, curve in self.look.curves.items():
            for step, value in enumerate(self.curves[name]):
                if value:
                    left = self._x(self.begin + self.every * step)
                    top, floor = self._y(below[step] + value), self._y(below[step])
                    yield _box(left + 1, top, width - 2, floor - top, curve.colour)
                    below[step] += value


def _ticks(low: float, high: float, most: int) -> Sequence[float]:
    """Return round numbers from ``low`` to ``high``, at most so many."""
    least = (high - low) / (most - 1)
    power = 10 ** math.floor(math.log10(least))
    step = next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= least)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(
    x: float,
    y: float,
    words: str,
    anchor: str = "start",
    *,
    size: int = 14,
    bold: bool = False,
    colour: str = GREY,
) -> str:
    style = f' font-size="{size}"' if size != 14 else ""
    style += ' font-weight="600"' if bold else ""
    style += f' fill="{colour}"' if colour != GREY else ""
    style += f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(words, quote=False)}</text>'


def _line(
    a: tuple[float, float],
    b: tuple[float, float],
    colour: str,
    dashes: str,
    width: float,
    opacity: float = 1,
) -> str:
    style = f'stroke="{colour}" stroke-width="{width:g}"{_dashes(dashes)}'
    style += f' stroke-opacity="{opacity:g}"' if opacity < 1 else ""
    return f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}" {style}/>'


def _box(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1) -> str:
    style = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"{style}/>'


def _dashes(dashes: str) -> str:
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    for name, svg in drawn(json.loads(source.read_text())).items():
        (target / f"{name}.svg").write_text(svg)
        print(f"drawn: {target / f'{name}.svg'}")


if __name__ == "__main__":
    main()
