"""The table of peers, as Markdown, and the JSON that is kept: `peers.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from eventbus.cli.bench_machine import Machine
from tests.benchmarks.peers.catalogue import LATENCY, MANY, ONE, PEERS, THREE
from tests.benchmarks.peers.runner import Line

KEPT = Path(__file__).resolve().parents[1] / "peers.json"

_HEAD = (
    "peer",
    "setting",
    "one at a time, events/s",
    "many at once, events/s",
    "3 subscribers, events/s",
    "publish → handler, p50 / p99 ms",
    "bare commits/s then",
    "on disk when publish returns",
    "if the process dies while it is handled",
)


# ------------------------------------------------------------------ as it is kept


@attrs.frozen
class Run:
    """What is kept: of one run, or of several on one machine.

    Attributes:
        lines: of the table, in its order, each with its date.
    """

    machine: Machine
    lines: Sequence[Mapping[str, Any]]


def kept_of(line: Line, date: str, commit: str) -> dict[str, Any]:
    """A line, with everything that was found out."""
    return {
        "peer": line.peer.name,
        "setting": line.setting.name,
        "title": line.setting.title,
        "version": line.versions.get(line.peer.package, ""),
        "date": date,
        "commit": commit if line.peer.name == "eventbus" else "",
        "on_disk": on_disk(line),
        "delivery": line.setting.delivery,
        "connection": dict(line.settings),
        "how": line.how,
        "figures": {measure: _medians(line, measure) for measure in line.turns},
        "turns": line.turns,
        "bare_commits_per_second": line.bare_commits_per_second,
        "failed": line.failed,
        "installed": dict(line.versions),
    }


def _medians(line: Line, measure: str) -> dict[str, float | None]:
    return {name: line.figure(measure, name) for name in line.turns[measure][0]}


def save(run: Run, path: Path = KEPT) -> None:
    """Keep a run. Lines of peers that are not in it stay, if they come from the same machine."""
    lines = list(run.lines)
    if path.exists() and _same(load(path).machine, run.machine):
        new = {line["peer"] for line in lines}
        lines += [line for line in load(path).lines if line["peer"] not in new]
    order = {peer.name: number for number, peer in enumerate(PEERS)}
    lines.sort(key=lambda line: order.get(line["peer"], len(order)))
    kept = {"machine": attrs.asdict(run.machine), "lines": lines}
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _same(one: Machine, other: Machine) -> bool:
    return (one.cpu, one.cores, one.system, one.device) == (other.cpu, other.cores, other.system, other.device)


def load(path: Path = KEPT) -> Run:
    """What was kept."""
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Run(Machine(**kept["machine"]), kept["lines"])


def on_disk(line: Line) -> str:
    """What a publisher knows when publish has returned, by what the connection is set to."""
    if not line.settings:
        return "?"
    if not line.peer.stores:
        return "no, in memory"
    journal, synchronous = line.settings["journal_mode"], line.settings["synchronous"]
    synced = synchronous in {"FULL", "EXTRA"}
    return f"yes, synced ({journal}, {synchronous})" if synced else f"written, not synced ({journal}, {synchronous})"


# ------------------------------------------------------------------ for people


def markdown_of(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table, its columns padded so that it can be read as it is."""
    rows = [_HEAD, *(_cells(line) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    for number, row in enumerate(rows):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def _cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    bare = sorted(line["bare_commits_per_second"])
    reasons = "; ".join(dict.fromkeys(line["failed"].values()))
    return (
        f"{line['peer']} {line['version']}".strip(),
        line["title"] + (f" ({reasons})" if reasons else ""),
        *(_rate(line, measure) for measure in (ONE, MANY, THREE)),
        _latency(line),
        f"{_rounded(bare[len(bare) // 2])}" if bare else "–",
        line["on_disk"],
        line["delivery"],
    )


def _rate(line: Mapping[str, Any], measure: str) -> str:
    if measure in line["figures"]:
        return _rounded(line["figures"][measure]["events_per_second"])
    return "failed" if measure in line["failed"] else "–"


def _latency(line: Mapping[str, Any]) -> str:
    found = line["figures"].get(LATENCY)
    if found is None:
        return "failed" if LATENCY in line["failed"] else "–"
    return f"{found['p50_ms']:.2f} / {found['p99_ms']:.2f}"


def _rounded(rate: float) -> str:
    """Three digits are more than such a figure is worth."""
    digits = 2 - len(str(int(rate))) + 1
    return f"{round(rate, min(digits, 0)):,.0f}"


def notes_of(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How each was called, and how its durability is known."""
    for line in lines:
        yield f"{line['peer']}, {line['title']}:"
        for measure, how in line["how"].items():
            yield f"    {measure}: {how}"
        if line["connection"]:
            yield f"    durability: {line['connection']['how_we_know']}"
        for measure, reason in line["failed"].items():
            yield f"    {measure} FAILED: {reason}"
