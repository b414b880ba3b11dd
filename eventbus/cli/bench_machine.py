"""`python -m eventbus bench`: *the machine* that is measured, in words; `tests/benchmarks` keeps the same beside its figures."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs

IN_MEMORY = ("tmpfs", "ramfs")
"""File systems that lose everything with the power: their commits cost nothing, and say nothing of a disk."""

_BUSY = 0.5
"""Load average for each core above which figures are doubtful."""


@attrs.frozen
class Machine:
    """What figures depend on.

    Attributes:
        memory_bytes, disk_free_bytes: None where they cannot be found out.
        folder: where the files are made; `filesystem` is what it is on, `device` what that is mounted from.
        load: the load average of the last minute, when this was asked.
    """

    cpu: str
    cores: int
    memory_bytes: int | None
    system: str
    folder: str
    filesystem: str
    device: str
    disk_free_bytes: int
    python: str
    sqlite: str
    eventbus: str
    load: float | None

    @property
    def busy(self) -> bool:
        """Whether other work was going on, so that figures are doubtful."""
        return self.load is not None and self.load > _BUSY * self.cores

    @property
    def in_memory(self) -> bool:
        """Whether the folder is not on a disk at all."""
        return self.filesystem in IN_MEMORY


def machine(folder: Path) -> Machine:
    """This machine, and the disk under a folder."""
    filesystem, device = _mount(folder.resolve())
    return Machine(
        cpu=_cpu(),
        cores=_cores(),
        memory_bytes=_memory(),
        system=f"{platform.system()} {platform.release()}",
        folder=str(folder.resolve()),
        filesystem=filesystem,
        device=device,
        disk_free_bytes=shutil.disk_usage(folder).free,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        sqlite=sqlite3.sqlite_version,
        eventbus=importlib.metadata.version("eventbus"),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def described(it: Machine) -> Iterator[str]:
    """The machine in a few lines, for people."""
    memory = "" if it.memory_bytes is None else f", {it.memory_bytes / 2**30:.1f} GiB of memory"
    yield f"machine   {it.cpu}, {it.cores} cores{memory}, {it.system}"
    yield f"software  {it.python}, SQLite {it.sqlite}, eventbus {it.eventbus}"
    yield f"disk      {it.folder}: {it.filesystem} on {it.device}, {it.disk_free_bytes / 2**30:.0f} GiB free"
    if it.in_memory:
        yield f"          {it.filesystem} lies in memory: its commits are no disk's; choose another folder with --db"
    if it.busy:
        yield f"          the load average is {it.load:.1f}: other programs are at work, so the figures are doubtful"


def _cores() -> int:
    """Those that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _mount(folder: Path) -> tuple[str, str]:
    """The type of the file system that a folder is on, and its device."""
    best, found = 0, ("unknown", "unknown")
    for line in _lines("/proc/mounts"):
        device, point, kind = line.split()[:3]
        point = point.replace("\\040", " ")
        if folder.is_relative_to(point) and len(point) >= best:
            best, found = len(point), (kind, device)
    return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
