"""`python -m eventbus doctor`: *what is reported*, and how it is shown: as text of at most 100 columns, or as JSON.

The parts (`doctor_file`, `doctor_health`, `doctor_instances`, `doctor_subscriptions`) fill sections.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs

Verdict = Literal["ok", "note", "trouble"]

WIDTH = 100
"""Columns of the text."""

_MEANING = {0: "fine", 1: "trouble", 2: "could not look"}


@attrs.frozen
class Finding:
    """One thing that was found.

    Attributes:
        code: its name, which does not change from one version to the next.
        do: what to do about it; "" where nothing need be done.
    """

    code: str
    verdict: Verdict
    text: str
    do: str = ""


@attrs.define
class Section:
    """What was found of one thing.

    Attributes:
        lines: what is so, for people. facts: the same for machines, with keys that stay.
    """

    name: str
    lines: list[str] = attrs.field(factory=list)
    facts: dict[str, Any] = attrs.field(factory=dict)
    findings: list[Finding] = attrs.field(factory=list)

    def say(self, line: str) -> None:
        """A line of what is so."""
        self.lines.append(line)

    def note(self, code: str, text: str, do: str = "") -> None:
        """Something that an operator may want to know."""
        self.findings.append(Finding(code, "note", text, do))

    def trouble(self, code: str, text: str, do: str) -> None:
        """Something that is wrong."""
        self.findings.append(Finding(code, "trouble", text, do))

    @property
    def verdict(self) -> Verdict:
        """The worst of its findings."""
        verdicts = {finding.verdict for finding in self.findings}
        return "trouble" if "trouble" in verdicts else "note" if "note" in verdicts else "ok"


@attrs.define
class Report:
    """All of it.

    Attributes:
        unreadable: why nothing, or not the tables, could be looked at; None if they could.
        seconds: how long it was watched.
    """

    path: str
    at: float
    sections: list[Section] = attrs.field(factory=list)
    unreadable: Finding | None = None
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0: fine, notes allowed. 1: trouble. 2: it could not be looked at."""
        if self.unreadable is not None:
            return 2
        return 1 if any(section.verdict == "trouble" for section in self.sections) else 0

    def first(self) -> str:
        """What to do first."""
        if self.unreadable is not None:
            return self.unreadable.do
        troubles = [each for section in self.sections for each in section.findings if each.verdict == "trouble"]
        if troubles:
            return troubles[0].do
        notes = any(section.findings for section in self.sections)
        return "nothing has to be done; the notes are for when there is time" if notes else "nothing has to be done"


# ------------------------------------------------------------------ for people


def lines_of(report: Report) -> Iterator[str]:
    """The report as text."""
    yield from _wrapped(f"eventbus doctor: {report.path}", "", "  ")
    for section in report.sections:
        yield ""
        yield f"{section.name:<15}{section.verdict}"
        for line in section.lines:
            yield from _wrapped(line, "  ", "    ")
        for finding in section.findings:
            yield from _wrapped(
                f"{finding.verdict.upper() if finding.verdict == 'trouble' else 'note'}: {finding.text}", "  ", "    "
            )
            if finding.do:
                yield from _wrapped(f"→ {finding.do}", "    ", "      ")
    yield ""
    if report.unreadable is not None:
        yield from _wrapped(f"CANNOT LOOK: {report.unreadable.text}", "", "  ")
    yield from _wrapped(f"{_MEANING[report.exit_code]} ({report.exit_code}). First: {report.first()}", "", "  ")


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    """Text from files and other programs may hold anything; what would move the cursor is shown, not sent."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return textwrap.wrap(shown, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows with their columns below one another, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def size(count: float) -> str:
    """Bytes, with a unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":  # noqa: PLR2004
            return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 10 else f"{count:.1f} {unit}"  # noqa: PLR2004
        count /= 1024
    raise AssertionError(count)


def duration(seconds: float) -> str:
    """A time in the unit that fits it."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} s" if seconds >= 10 or seconds == int(seconds) else f"{seconds:.1f} s"  # noqa: PLR2004


def few(things: Sequence[str], most: int = 5) -> str:
    """The first of many."""
    more = len(things) - most
    return ", ".join(things[:most]) + (f" and {more:,} more" if more > 0 else "")


# ------------------------------------------------------------------ for machines


def json_of(report: Report, version: str) -> str:
    """The report as JSON; its keys are those of docs/reference/doctor.md."""
    findings = [] if report.unreadable is None else [attrs.asdict(report.unreadable)]
    whole: Mapping[str, Any] = {
        "eventbus": version,
        "path": report.path,
        "at": report.at,
        "watched_seconds": report.seconds,
        "exit_code": report.exit_code,
        "verdict": {0: "note" if any(s.findings for s in report.sections) else "ok", 1: "trouble", 2: "unreadable"}[
            report.exit_code
        ],
        "first": report.first(),
        "unreadable": findings[0] if findings else None,
        "sections": {
            section.name: {
                "verdict": section.verdict,
                "facts": section.facts,
                "findings": [attrs.asdict(finding) for finding in section.findings],
            }
            for section in report.sections
        },
    }
    return json.dumps(whole, indent=2, ensure_ascii=True)
