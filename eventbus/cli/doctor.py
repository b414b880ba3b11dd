"""`python -m eventbus doctor PATH`: what is wrong with a bus, told from its file and from the processes that have it open.

It looks and changes nothing, so it may run beside the bus at any time. In comes a path; out come sections, each with a verdict,
and an exit code. The parts: `sqlite_inspect` reads the file, `doctor_processes` asks the kernel, `doctor_watch` looks twice;
`doctor_file`, `doctor_health`, `doctor_instances` and `doctor_subscriptions` judge; `doctor_report` shows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from eventbus.cli.doctor_file import file_section, header, sqlite_section
from eventbus.cli.doctor_health import health_section
from eventbus.cli.doctor_instances import instances_section
from eventbus.cli.doctor_report import Finding, Report, Section, json_of, lines_of
from eventbus.cli.doctor_subscriptions import subscriptions_section
from eventbus.cli.doctor_watch import watch
from eventbus.errors import StoreCorrupt, StoreError, StoreTooNew
from eventbus.stores.sqlite_inspect import VERSION, Inspection

SUMMARY = "what is wrong with a bus: its file, its processes, its subscriptions; changes nothing"
DESCRIPTION = (
    "Looks at the database file of a bus, running or not, and at the processes that have it open, and says what is wrong and "
    "what to do first. It changes nothing and may run beside the bus. Exit code 0: fine (notes are allowed); 1: trouble; "
    "2: it could not be looked at."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", metavar="PATH", help="the database file, as it is given to EventBus")
    parser.add_argument(
        "--watch",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="how long to watch for lanes and locks that stand still (default: 1; lanes that stand for 60 are trouble)",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="integrity_check instead of quick_check, and the checksums of all events; reads all of the file",
    )
    parser.add_argument("--json", action="store_true", help="for machines; the keys stand in docs/reference/doctor.md")


def run(options: argparse.Namespace) -> int:
    """Look and print; the exit code says how it is."""
    if not (math.isfinite(options.watch) and options.watch >= 0):
        print(f"--watch {options.watch}: expected a number of seconds, 0 or more")
        return 2
    report = examine(os.path.abspath(options.path), seconds=options.watch, full=options.full)  # noqa: PTH100  # links stay as they are
    if options.json:
        print(json_of(report, importlib.metadata.version("eventbus")))
    else:
        print("\n".join(lines_of(report)))
    return report.exit_code


def examine(path: str, *, seconds: float, full: bool) -> Report:
    """Look at a file. Whatever is found, also that there is none, is in the report."""
    report, disturbed = _examine(path, seconds, full=full, quiet=True)
    return _examine(path, seconds, full=full, quiet=False)[0] if disturbed else report


def _examine(path: str, seconds: float, *, full: bool, quiet: bool) -> tuple[Report, bool]:
    """The report, and whether it means nothing: it was read without locks, and somebody has come in between."""
    report = Report(path, time.time(), seconds=seconds)
    report.sections.append(sqlite_section())
    try:
        inspection = Inspection(path, quiet=quiet)
    except StoreError as error:
        if Path(path).is_file():
            report.sections.append(file_section(path))
        report.unreadable = _unreadable(error)
        return report, False
    with inspection:
        _fill(report, inspection, seconds, full=full)
    return report, inspection.quiet and not inspection.undisturbed()


def _fill(report: Report, inspection: Inspection, seconds: float, *, full: bool) -> None:
    about = file_section(inspection.path)
    report.sections.append(_guarded(about, lambda: header(about, inspection)))
    if inspection.cut_off is not None:
        about.trouble("damaged-wal", inspection.cut_off, "copy the file and its -wal; then as said here")
    if not inspection.version:
        if inspection.cut_off is not None:
            return  # what tables it has stands beyond the break
        report.unreadable = Finding(
            "no-tables",
            "trouble",
            f"{inspection.path} has no tables of a bus",
            "give the path that the bus has; no bus has used this file",
        )
        return
    current = inspection.version == VERSION
    if current:
        watching = Section("watch")
        try:
            watched = watch(inspection, seconds)
        except StoreError as error:
            watching.trouble("unreadable", f"instances and lanes cannot be read: {error}", _DAMAGED)
            report.sections += [health_section(inspection, full=full, now=time.time()), watching]
            return
        report.seconds = watched.seconds
    report.sections.append(health_section(inspection, full=full, now=time.time()))
    if current:
        report.sections.append(instances_section(watched, about.facts["beside"].get("-wal", 0)))
        subscriptions = Section("subscriptions")
        try:
            subscriptions = subscriptions_section(watched, inspection)
        except StoreError as error:
            subscriptions.trouble("unreadable", f"dead letters cannot be read: {error}", _DAMAGED)
        report.sections.append(subscriptions)


def _guarded(section: Section, fill: Callable[[], None]) -> Section:
    try:
        fill()
    except StoreError as error:
        section.trouble("unreadable", f"the header cannot be read: {error}", _DAMAGED)
    return section


_DAMAGED = "stop the bus and keep a copy of all its files; then restore a backup, or see SQLite's .recover"


def _unreadable(error: StoreError) -> Finding:
    if isinstance(error, StoreTooNew):
        return Finding("newer", "trouble", str(error), "run the doctor of the eventbus that the bus has")
    if isinstance(error, StoreCorrupt):
        return Finding("not-a-database", "trouble", str(error), f"if this is the right path: {_DAMAGED}")
    return Finding("unavailable", "trouble", str(error), "see to the path, and to who may read it, and call this again")
