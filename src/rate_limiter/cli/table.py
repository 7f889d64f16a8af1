"""The table of limits, drawn from the workers' replies to ``inspect limits``."""

import time
from collections import defaultdict
from typing import Any, Final

__all__ = ["Table", "rate_text"]

_COLUMNS: Final = (
    *("limit", "worker", "rate", "burst", "tokens", "held", "admitted", "refused", "failed"),
    *("longest wait", "state"),
)

#: The columns whose texts stand at the right.
_NUMBERS: Final = frozenset(_COLUMNS) - {"limit", "worker", "state"}

_UNITS: Final = (("s", 1), ("m", 60), ("h", 3600), ("d", 86400))

#: How many characters a bar has.
_BAR: Final = 10


class Table:
    """One look at the limits.

    Args:
        replies: What each worker has replied, by its name.
        watched: Whether there is a column for the rate since the last look, and bars.
        before: The last look.

    """

    def __init__(
        self, replies: dict[str, Any], *, watched: bool = False, before: "Table | None" = None
    ) -> None:
        self.at = time.monotonic()
        self.errors = {
            node: reply["error"]
            for node, reply in replies.items()
            if isinstance(reply.get("error"), str)
        }
        self.limits = {
            (name, node): limit
            for node, reply in replies.items()
            if node not in self.errors
            for name, limit in reply.items()
        }
        self.answered = bool(replies)
        self.watched = watched
        self.before = before

    def lines(self) -> list[str]:
        """Return the lines of the table, and below them which workers failed and which limits differ."""
        columns = list(_COLUMNS)
        if self.watched:
            columns.insert(3, "now")
        rows = [dict(zip(columns, columns, strict=True)), *self._rows()]
        widths = {column: max(len(row[column]) for row in rows) for column in columns}
        lines = [
            "  ".join(
                row[column].rjust(widths[column])
                if column in _NUMBERS
                else row[column].ljust(widths[column])
                for column in columns
            ).rstrip()
            for row in rows
        ]
        if not self.limits:
            nothing = "No worker has limits." if self.answered else "No worker has answered."
            lines = [] if self.errors else [nothing]
        return [*lines, *self._remarks()]

    def _rows(self) -> list[dict[str, str]]:
        most = max((limit["held"] for limit in self.limits.values()), default=0)
        rows, last = [], None
        for (name, node), limit in sorted(self.limits.items()):
            bucket = min(limit["buckets"], key=lambda each: each["rate"], default=None)
            rows.append(
                {
                    "limit": name if name != last else "",
                    "worker": node,
                    "rate": "by job" if bucket is None else rate_text(bucket["rate"]),
                    "now": self._now(name, node, limit, bucket),
                    "burst": "" if bucket is None else f"{bucket['capacity']:g}",
                    "tokens": _tokens(bucket),
                    "held": f"{limit['held']}"
                    + (f" {_bar(limit['held'] / most)}" if most and self.watched else ""),
                    "admitted": f"{limit['admitted']:.0f}",
                    "refused": f"{limit['refused']:.0f}",
                    "failed": f"{limit['failed']:.0f}",
                    "longest wait": f"{limit['longest']:.3g} s",
                    "state": _state(limit),
                }
            )
            last = name
        return rows

    def _now(self, name: str, node: str, limit: dict[str, Any], bucket: dict[str, Any] | None) -> str:
        """Return the tokens per second that were taken since the last look, and a bar: their part of the rate."""
        if self.before is None or (old := self.before.limits.get((name, node))) is None:
            return ""
        now = max(0.0, limit["tokens"] - old["tokens"]) / (self.at - self.before.at)
        return f"{now:.3g}/s" + ("" if bucket is None else f" {_bar(now / bucket['rate'])}")

    def _remarks(self) -> list[str]:
        """Return a line for each worker that replied with an error, and for each limit that workers do not agree on."""
        remarks = [f"{node}: {error}" for node, error in sorted(self.errors.items())]
        numbers: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for (name, node), limit in sorted(self.limits.items()):
            each = [f"{rate_text(b['rate'])} with burst {b['capacity']:g}" for b in limit["buckets"]]
            numbers[name][node] = " and ".join(each)
        for name, by_node in numbers.items():
            if len(set(by_node.values())) > 1:
                differ = "; ".join(f"{node}: {text}" for node, text in by_node.items())
                remarks.append(f"Limit {name} differs between workers. {differ}")
        return remarks


def rate_text(rate: float) -> str:
    """Return a rate in the unit that gives the smallest number of 1 or more: ``"5/s"``, ``"2/h"``."""
    unit, seconds = next((each for each in _UNITS if rate * each[1] >= 1.0), _UNITS[-1])
    return f"{rate * seconds:.6g}/{unit}"


def _tokens(bucket: dict[str, Any] | None) -> str:
    if bucket is None:
        return ""
    return f"{bucket['keys']} keys" if "keys" in bucket else f"{bucket['tokens']:.3g}"


def _state(limit: dict[str, Any]) -> str:
    paused = max((each.get("paused", 0.0) for each in limit["buckets"]), default=0.0)
    states = [f"paused for {paused:.3g} s"] if paused else []
    states += [
        f"1/{each['share_of']} of {rate_text(each['whole']['rate'])}"
        for each in limit["buckets"]
        if "share_of" in each
    ]
    if any("declared" in each for each in limit["buckets"]):
        states.append("one rate for all workers")
    for lane, each in sorted(limit.get("lanes", {}).items()):
        if each["jobs"]:
            states.append(f"{each['jobs']} parked in {lane} for up to {each['seconds']:.3g} s")
    if limit["shadow"]:
        states.append(f"shadow: {limit['shadowed']:.0f} would have waited")
    if limit["enforced"].startswith("in the task"):
        states.append(limit["enforced"])
    if any(each.get("outage") for each in limit["buckets"]):
        states.append("Redis does not answer")
    stored = [each["stored"] for each in limit["buckets"] if each.get("stored")]
    if stored:
        states += [_change_text(each["at"], "", each["reason"], each["who"]) for each in stored]
    elif changed := limit["changed"]:
        states.append(
            _change_text(changed["at"], changed["what"], changed["reason"], changed.get("who", ""))
        )
    return ", ".join(states)


def _change_text(at: str, what: str, reason: str, who: str) -> str:
    text = f"changed {at}" + (f" by {who}" if who else "") + (f": {what}" if what else "")
    return text + (f" ({reason})" if reason else "")


def _bar(part: float) -> str:
    full = min(_BAR, round(part * _BAR))
    return "█" * full + "░" * (_BAR - full)
