"""The table on a screen, as Markdown, and as the JSON that is kept: `last.json`, the last full run with its machine."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import pytest

from eventbus.cli.bench_machine import Machine
from tests.benchmarks.table import Row, Table

TABLE = pytest.StashKey[Table]()
"""Where pytest's configuration holds the rows of the run."""

LAST = Path(__file__).parent / "last.json"

_HEAD = ("what", "loop", "goal", "figure", "met")
_WIDTHS = (44, 16, 26, 34, 3)


@attrs.frozen
class Run:
    """One run of all benchmarks.

    Attributes:
        commit: of git, with "+" where files were changed since.
        failed: benchmarks that did not come to an end, or lost events.
    """

    date: str
    commit: str
    seconds: float
    machine: Machine
    rows: Sequence[Row]
    failed: Sequence[str] = ()


def now() -> str:
    """The date of a run."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def save(run: Run, path: Path = LAST) -> None:
    """Keep a run."""
    path.write_text(json.dumps(attrs.asdict(run), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load(path: Path = LAST) -> Run:
    """The run that was kept."""
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Run(**{**kept, "machine": Machine(**kept["machine"]), "rows": [Row(**row) for row in kept["rows"]]})


# ------------------------------------------------------------------ for people


def _met(row: Row) -> str:
    return {True: "yes", False: "**no**", None: ""}[row.met]


def _cells(row: Row) -> tuple[str, ...]:
    return (row.what, row.backend, row.goal, row.figure, _met(row))


def lines_of(rows: Sequence[Row]) -> Iterator[str]:
    """The table for a screen; each row's note stands below it."""
    yield from _wrapped(_HEAD)
    yield "  ".join("-" * width for width in _WIDTHS)
    for row in rows:
        yield from _wrapped([cell.replace("**", "") for cell in _cells(row)])
        yield from textwrap.wrap(row.note, sum(_WIDTHS), initial_indent="    ", subsequent_indent="    ")


def _wrapped(cells: Sequence[str]) -> Iterator[str]:
    """One line of the table, in as many lines as its longest cell needs."""
    columns = [textwrap.wrap(cell, width) for cell, width in zip(cells, _WIDTHS, strict=True)]
    for line in itertools.zip_longest(*columns, fillvalue=""):
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, _WIDTHS, strict=True)).rstrip()


def markdown_of(rows: Sequence[Row]) -> Iterator[str]:
    """The table in Markdown."""
    yield "| what | loop | goal | figure | met | what it includes |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in (*_cells(row), row.note)) + " |"


def summary_of(run: Run) -> Iterator[str]:
    """Where and when it was measured, and how many goals are met."""
    it = run.machine
    memory = "" if it.memory_bytes is None else f", {it.memory_bytes / 2**30:.1f} GiB of memory"
    yield f"{it.cpu}, {it.cores} cores{memory}, {it.system}, {it.filesystem}; {it.python}, SQLite {it.sqlite}."
    goals = [row for row in run.rows if row.met is not None]
    load = f"; the load average at the start was {it.load:.1f}" if it.busy else ""
    yield (
        f"{run.date}, commit {run.commit}, {run.seconds / 60:.0f} min{load}. "
        f"{sum(bool(row.met) for row in goals)} of {len(goals)} goals are met."
    )
    for name in run.failed:
        yield f"FAILED: {name}"
