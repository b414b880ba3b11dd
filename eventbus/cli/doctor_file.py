"""`python -m eventbus doctor`: the sections on *SQLite* and on *the file*: what they are, before a row is read."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import sys
from pathlib import Path

from eventbus.cli.doctor_report import Section, duration, few, size
from eventbus.stores.sqlite_inspect import (
    APPLICATION_ID,
    NETWORK_FILE_SYSTEMS,
    OLDEST,
    VERSION,
    Inspection,
    file_system_of,
    loses_commits,
)

IN_MEMORY = ("tmpfs", "ramfs")

LARGE_WAL = 32 * 1_048_576
"""Bytes; a bus carries the WAL over at 4 MiB and keeps a file of at most 16."""

LITTLE_ROOM = 500 * 1_048_576
NO_ROOM = 50 * 1_048_576
"""Bytes free on the disk."""

_OPTIONS = ("THREADSAFE", "DEFAULT_SYNCHRONOUS", "DEFAULT_WAL_SYNCHRONOUS", "DEFAULT_MMAP_SIZE", "OMIT_")
"""Compile-time options that a bus cares for."""


def sqlite_section() -> Section:
    """The library that this Python has."""
    section = Section("sqlite")
    connection = sqlite3.connect(":memory:")
    try:
        (source,) = connection.execute("SELECT sqlite_source_id()").fetchone()
        options = [name for (name,) in connection.execute("PRAGMA compile_options") if name.startswith(_OPTIONS)]
    finally:
        connection.close()
    affected = loses_commits(sqlite3.sqlite_version_info)
    section.facts |= {
        "version": sqlite3.sqlite_version,
        "source_id": source,
        "threadsafety": sqlite3.threadsafety,
        "compile_options": options,
        "loses_commits": affected,
        "python": sys.version.split()[0],
        "executable": sys.executable,
    }
    section.say(f"SQLite {sqlite3.sqlite_version} (source {source[:30]}…), that of {sys.executable}")
    section.say(f"threadsafety {sqlite3.threadsafety}; built with {few(options, 8) or 'no option that matters'}")
    if affected:
        section.say(
            "this SQLite can lose commits when a WAL checkpoint overlaps another connection's write (3.7.0 to 3.51.2, but for "
            "3.44.6 and 3.50.7); eventbus keeps the two apart with its lock file, other programs that write to the file do not"
        )
    else:
        section.say("this SQLite does not have the fault of 3.7.0 to 3.51.2 that loses commits")
    if sqlite3.sqlite_version_info < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        section.trouble(
            "sqlite-old", f"a bus needs SQLite {wanted} or newer", "run the bus with a Python that has a newer SQLite"
        )
    if sqlite3.threadsafety == 0:
        section.trouble("sqlite-threads", "it was built without threads", "run the bus with a Python whose SQLite has threads")
    return section


# ------------------------------------------------------------------ the file


def file_section(path: str) -> Section:
    """The file and what lies beside it."""
    section = Section("file")
    there = Path(path).stat()
    folder = Path(path).parent
    kind = file_system_of(os.path.realpath(path))
    free = shutil.disk_usage(folder).free
    beside = {
        each.name.removeprefix(Path(path).name): each.stat().st_size
        for each in sorted(folder.iterdir())
        if each.name.startswith(f"{Path(path).name}-") and each.is_file()
    }
    mode = stat.S_IMODE(there.st_mode)
    section.facts |= {
        "size_bytes": there.st_size,
        "owner": _name_of(there.st_uid),
        "mode": f"{mode:04o}",
        "file_system": kind,
        "free_bytes": free,
        "beside": beside,
    }
    section.say(
        f"{size(there.st_size)}, owner {_name_of(there.st_uid)}, mode {mode:04o}; {size(free)} free on {kind or 'its disk'}"
    )
    section.say("beside it: " + (few([f"{suffix} {size(count)}" for suffix, count in beside.items()], 8) or "nothing"))
    _judge_place(section, path, kind, free)
    _judge_access(section, path, there, mode)
    if beside.get("-wal", 0) > LARGE_WAL:
        section.note(
            "wal-large",
            f"the WAL has {size(beside['-wal'])}: something keeps a read transaction open, so that it cannot be carried over",
            "end the tools that read the file (a shell, a browser, a backup); `instances` names who has it open",
        )
    return section


def _judge_place(section: Section, path: str, kind: str | None, free: int) -> None:
    if kind in NETWORK_FILE_SYSTEMS:
        section.trouble(
            "network-file-system",
            f"{path} lies on a network file system ({kind}), on which SQLite's locks and WAL cannot be relied upon",
            "stop all programs that have it open, and move the file to a local disk",
        )
    if kind in IN_MEMORY:
        section.note("in-memory", f"{kind} lies in memory: everything is lost with the power")
    if free < NO_ROOM:
        section.trouble(
            "disk-full", f"only {size(free)} are free: soon, or already, nothing can be published or settled", _MAKE_ROOM
        )
    elif free < LITTLE_ROOM:
        section.note("disk-nearly-full", f"only {size(free)} are free", _MAKE_ROOM)


_MAKE_ROOM = "make room on the disk; leave the files of the bus alone (-wal holds events that are nowhere else)"


def _judge_access(section: Section, path: str, there: os.stat_result, mode: int) -> None:
    if mode & 0o077:
        section.note(
            "others-may-read",
            f"mode {mode:04o} lets other users read or write it; who can write it can publish",
            f"chmod 600 {path}, and -wal, -shm, -lock and -ballast alike",
        )
    if there.st_uid != os.geteuid() and os.geteuid() != 0:
        section.note("another-owner", f"it belongs to {_name_of(there.st_uid)}, and this runs as {_name_of(os.geteuid())}")
    for suffix in ("-wal", "-shm", "-lock", "-ballast"):
        owner = Path(f"{path}{suffix}").stat().st_uid if Path(f"{path}{suffix}").exists() else there.st_uid
        if owner != there.st_uid:
            section.trouble(
                "mixed-owners",
                f"{path}{suffix} belongs to {_name_of(owner)}, the database to {_name_of(there.st_uid)}",
                f"stop the bus, then chown {_name_of(there.st_uid)} {path}{suffix}",
            )


def _name_of(uid: int) -> str:
    try:
        import pwd  # noqa: PLC0415  # not on every platform

        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):
        return str(uid)


def header(section: Section, inspection: Inspection) -> None:
    """What the header of the database says."""
    numbers = {
        name: int(str(inspection.value(f"PRAGMA {pragma}")))
        for name, pragma in (
            ("page_bytes", "page_size"),
            ("pages", "page_count"),
            ("free_pages", "freelist_count"),
            ("application_id", "application_id"),
        )
    }
    # Read without locks, as it may be where nobody has it open, SQLite does not look for a WAL and says "delete".
    journal = None if inspection.quiet else str(inspection.value("PRAGMA journal_mode"))
    section.facts |= {
        **numbers,
        "tables_version": inspection.version,
        "journal_mode": journal,
        "open_elsewhere": not inspection.quiet,
    }
    section.say(
        f"pages of {numbers['page_bytes']:,} bytes, {numbers['pages']:,} of them, {numbers['free_pages']:,} free; "
        f"journal mode {journal or 'not asked, for nobody has it open'}"
    )
    ours = "ours" if numbers["application_id"] == APPLICATION_ID else "not ours"
    section.say(f"application_id {numbers['application_id']:#x} ({ours}), tables in version {inspection.version} of {VERSION}")
    if journal not in {None, "wal"}:
        section.trouble(
            "journal-mode",
            f"the journal mode is {journal}: another program has changed it under the bus",
            "stop the other program; the bus sets the mode when it is opened the next time",
        )
    if 0 < inspection.version < VERSION:
        section.note(
            "tables-old",
            f"the tables are those of an older eventbus; the next bus that opens it brings them to version {VERSION}; until then "
            "instances and subscriptions are not looked at",
        )


def age(now: float, then: float | None) -> str:
    """How long ago a time was."""
    return "never" if then is None else f"{duration(max(0.0, now - then))} ago"
