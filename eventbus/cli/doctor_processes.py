"""`python -m eventbus doctor`: *the processes* that have the file open, as the kernel tells of them (Linux).

In comes a path; out come who has it open, who of them is stopped, and who holds which lock. It is read from /proc, without
opening a file or taking a lock of theirs. What this user may not see, or another kernel does not tell, is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import attrs

PROC = Path("/proc")

_WRITER = 120
"""The byte of -shm that a connection locks while it writes (SQLite's WAL format); 123 to 127 are those of readers."""
_READERS = range(123, 128)


@attrs.frozen
class Process:
    """A process that has the database open, or its lock file.

    Attributes:
        state: a letter, see proc(5); "T" is stopped.
    """

    pid: int
    state: str
    command: str

    @property
    def is_stopped(self) -> bool:
        """By a signal, or by a debugger."""
        return self.state in {"T", "t"}

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"


@attrs.frozen
class Held:
    """A lock that a process holds: "turn" (`<db>-lock`), "write" or "read" (SQLite's)."""

    pid: int
    kind: str


def users_of(path: str) -> dict[int, Process]:
    """The other processes that have the database or its lock file open, as far as this user may see."""
    wanted = {_identity(f"{path}{suffix}") for suffix in ("", "-lock")} - {None}
    found = {}
    for entry in _entries(PROC):
        if entry.isdigit() and int(entry) != os.getpid() and any(_identity(name) in wanted for name in _descriptors(entry)):
            process = _process(int(entry))
            if process is not None:
                found[process.pid] = process
    return found


def _descriptors(pid: str) -> Iterator[str]:
    folder = PROC / pid / "fd"
    return (str(folder / name) for name in _entries(folder))


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208  # names, not paths
    except OSError:  # it has ended, or belongs to another user
        return []


def _identity(name: str) -> tuple[int, int] | None:
    try:
        there = os.stat(name)  # noqa: PTH116  # of where the link leads; nothing is opened
    except OSError:
        return None
    return there.st_dev, there.st_ino


def _process(pid: int) -> Process | None:
    try:
        stat = (PROC / str(pid) / "stat").read_text(errors="replace")
        words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    name, _, rest = stat.partition("(")[2].rpartition(")")
    command = " ".join(words).strip() or name
    return Process(pid, rest.split()[0], command if len(command) <= _LONGEST else f"{command[: _LONGEST - 1]}…")


_LONGEST = 60


def locks_of(path: str) -> frozenset[Held]:
    """Who holds the turn to write, SQLite's write lock, or a reader's lock, at this moment. See proc(5), locks."""
    places = {}
    for suffix in ("-lock", "-shm"):
        found = _identity(f"{path}{suffix}")
        if found is not None:
            places[_place(*found)] = suffix
    try:
        lines = (PROC / "locks").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(held for line in lines for held in _held(line.split(), places))


def _place(device: int, inode: int) -> str:
    return f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"


def _held(words: list[str], places: dict[str, str]) -> Iterator[Held]:
    if len(words) != 8 or words[5] not in places:  # noqa: PLR2004  # one that waits has an arrow more
        return
    _, family, _, access, pid, place, first, last = words
    suffix = places[place]
    if suffix == "-lock" and family == "FLOCK":
        yield Held(int(pid), "turn")
    elif suffix == "-shm" and family == "POSIX" and last != "EOF":
        here = range(int(first), int(last) + 1)
        if access == "WRITE" and _WRITER in here:
            yield Held(int(pid), "write")
        if access == "READ" and any(byte in here for byte in _READERS):
            yield Held(int(pid), "read")
