"""What the demo shows: lines with a time, a progress line, a table, a verdict."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence

import attrs

from eventbus.cli.demo_check import Check, Evidence
from eventbus.cli.demo_shop import ORDER, TAKES

_HEADINGS = ("subscription", "order", "handled", "retried", "dead-lettered", "redelivered", "replayed", "p50 ms", "p99 ms")
_NOT_TRIED = (
    "Not tried: a power failure, since a kill ends the process and not the machine. Not judged: attempts",
    "that the kill cut short, since they have left no report; their events came again, and are judged.",
)
_FAULTS_SHOWN = 5
_WIDTH = 100


class Screen:
    """Standard output: whole lines, and on a terminal one line that is written over."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._over = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._last = ""
        self._text = ""
        self._shown = 0.0

    def say(self, text: str = "") -> None:
        """A line that stays, with the time."""
        self.plain(f"{self._time()}  {text}")

    def plain(self, text: str = "") -> None:
        """A line that stays."""
        self._clear()
        print(text, flush=True)

    def progress(self, text: str) -> None:
        """How it stands; a few times a second at most, and only if it has changed."""
        now = time.monotonic()
        if text == self._text or now - self._shown < (0.1 if self._over else 0.5):
            return
        self._shown, self._text = now, text
        line = f"{self._time()}    {text}"
        if self._over:
            self._clear()
            self._last = line[: _columns() - 1]
            print(self._last, end="", flush=True)
        else:
            print(line, flush=True)

    def _clear(self) -> None:
        if self._last:
            print(f"\r{' ' * len(self._last)}\r", end="")
            self._last = ""

    def _time(self) -> str:
        return f"{time.monotonic() - self._began:6.2f} s"


def _columns() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return _WIDTH


@attrs.frozen
class Row:
    """What one subscription has done, in deliveries; times in milliseconds."""

    subscription: str
    handled: int
    retried: int
    dead: int
    redelivered: int
    replayed: int
    p50: float
    p99: float


def rows(evidence: Evidence) -> list[Row]:
    """The table's rows."""
    return [_row(evidence, name) for name in TAKES]


def _row(evidence: Evidence, name: str) -> Row:
    live = [[a for a in run.attempts if a.by == name and not a.replaying] for run in evidence.runs]
    done = [{a.id for a in run if a.final} for run in live]
    times = sorted(latencies(evidence, name))
    return Row(
        name,
        handled=len({a.id for run in live for a in run if a.outcome == "handled"}),
        retried=len({a.id for run in live for a in run if a.outcome == "failed"}),
        dead=sum(1 for subscription, _ in evidence.dead if subscription == name),
        redelivered=len(set.intersection(*done)),
        replayed=sum(1 for run in evidence.runs for a in run.attempts if a.by == name and a.replaying),
        p50=percentile(times, 50),
        p99=percentile(times, 99),
    )


def latencies(evidence: Evidence, name: str) -> Iterable[float]:
    """Milliseconds from the call of `publish` to the end of the handler, for what one process published and handled."""
    for run in evidence.runs:
        began = {report.id: report.began for report in run.published if not report.duplicate}
        for attempt in run.attempts:
            if attempt.by == name and attempt.outcome == "handled" and not attempt.replaying and attempt.id in began:
                yield (attempt.at - began[attempt.id]) * 1000


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that so many in a hundred do not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else float("nan")


def table(evidence: Evidence) -> list[str]:
    """The table, with its notes."""
    body = [
        (r.subscription, ORDER[r.subscription], f"{r.handled:,}", f"{r.retried:,}", f"{r.dead:,}", f"{r.redelivered:,}",
         f"{r.replayed:,}" if r.replayed else "-", f"{r.p50:.1f}", f"{r.p99:.1f}")
        for r in rows(evidence)
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *body, strict=True)]
    lines = [_line(_HEADINGS, widths), _line(["-" * width for width in widths], widths)]
    published = len({report.number for run in evidence.runs for report in run.published})
    return [
        f"published and acknowledged: {published:,} events",
        "",
        *lines,
        *(_line(row, widths) for row in body),
        "",
        "retried: failed at first, and came again.  dead-lettered: given up on, and kept with its error.",
        "redelivered: handled before the kill and once more after it, since the ack had not reached the disk.",
        "p50, p99: from the call of publish to the end of the handler, waiting for retries included, time dead not.",
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    words = [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))]  # noqa: PLR2004  # two columns of text
    return "  ".join(words).rstrip()


def verdict(checks: Sequence[Check]) -> list[str]:
    """What was checked, and how it came out."""
    lines = ["What was checked, from the child's reports and from the file:", ""]
    for check in checks:
        mark = "FAILED  " if check.faults else "ok      "
        lines += textwrap.wrap(check.claim, _WIDTH, initial_indent=mark, subsequent_indent=" " * 8)
        lines += [f"          - {fault}" for fault in check.faults[:_FAULTS_SHOWN]]
        if len(check.faults) > _FAULTS_SHOWN:
            lines.append(f"          - and {len(check.faults) - _FAULTS_SHOWN:,} more")
    lines += ["", *_NOT_TRIED]
    failed = sum(1 for check in checks if check.faults)
    lines += ["", f"{failed} of {len(checks)} checks FAILED." if failed else f"All {len(checks)} checks hold."]
    return lines
