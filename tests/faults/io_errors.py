"""Every read, write, sync, truncation, lock, opening and deletion of a program fails: once, a few times, for a while, and
from then on for ever.

A program runs on the store, on apsw and a disk that fails when it is told to (`failing_vfs`), beside the same program on a store
in memory. What was acknowledged must be there in the end; what was refused must not be; of what nobody could tell the store says
so, and only if the disk went on failing. When the disk is in order again, the store must recover by itself, with what it is asked
next; until then, it must not go on beside what it could not decide.

Run as a module it is the process in which that takes place; see `apsw_sqlite` for why it is one of its own.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import attrs
import msgspec

from eventbus.errors import EventBusError, PublishOutcomeUnknown, StoreFull, StoreUnavailable
from eventbus.stores import sqlite
from eventbus.stores.base import Batch, Committed, Events, Lanes, Query
from eventbus.stores.sqlite import SQLiteStore
from tests.campaign import MEMORY, Case
from tests.faults.cheaper import cheaper
from tests.faults.failing_vfs import Disk, FailingVFS, Mode
from tests.faults.programs import INSTANCE, NOW, Program, contents

ROOT = Path(__file__).parents[2]

STEPS = 10
"""In a program."""

WHILE = 3
"""Steps in which the disk fails, for a while."""

PATIENCE = 600.0
"""Seconds in which all runs of a program must have ended; they take some 50."""


_REFUSALS = (StoreUnavailable, StoreFull)
"""What a disk that fails may be answered with. StoreCorrupt and StoreLost are not: such a bus would not go on."""


class Wrong(Exception):
    """What was found wrong."""


# ------------------------------------------------------------------ one run


@attrs.define
class Run:
    """One run of a program.

    Attributes:
        reference: the store in memory. unknown: it was said of this batch that nobody could tell.
        broken: steps since the disk has failed.
    """

    folder: Path
    disk: Disk
    chance: random.Random
    mode: Mode
    reference: SQLiteStore = attrs.field(factory=lambda: SQLiteStore(":memory:"))
    store: SQLiteStore = attrs.field(init=False)
    unknown: Batch | None = None
    broken: int = 0

    def __attrs_post_init__(self) -> None:
        self.store = self._fresh()

    def _fresh(self) -> SQLiteStore:
        return SQLiteStore(self.folder / "io.db")

    def all(self, prepare: int) -> int:
        """Run it; the disk is in order for so many commits first. Returns how often the disk was asked after that."""
        program = Program(self.chance)
        self.reference.open(INSTANCE)
        try:
            if prepare:
                asked, self.disk.asked = self.disk.asked, -(10**9)
                self.open()
                for number in range(prepare):
                    self.commit(program.batch(self.reference) if number else program.first())
                self.disk.asked = asked
            else:
                self.open()
                self.commit(program.first())
            for _ in range(STEPS):
                self.step(program)
                self.broken += bool(self.disk.failed)
                if self.mode == "for a while" and self.broken == WHILE:
                    self.repair()
            self.close()
            asked = self.disk.asked
            self.disk.repair()
            self.compare()
            return asked
        finally:
            self.disk.repair()
            self.store.close()
            self.reference.close()

    def repair(self) -> None:
        """The disk is in order again: from here on everything works, and what was undecided is found out."""
        self.disk.repair()
        if not self.store._opened:
            self.open()
        self.find_out()

    def find_out(self) -> None:
        """Have the store open its file anew, and see what became of what nobody could tell."""
        self.attempt(lambda: self.store.commit(Batch(NOW)))
        self.settle_unknown()

    def settle_unknown(self) -> None:
        unknown, self.unknown = self.unknown, None
        if unknown is not None and _held(self.store) != _held(self.reference):
            self.reference.commit(unknown)

    def step(self, program: Program) -> None:
        if self.chance.random() < 0.1 and self.unknown is None:  # one that is opened anew may be in doubt anew
            self.close()
            self.open()
        if self.chance.random() < 0.3:
            self.read(self.chance.choice([Events(0, 1_000, 10_000_000), Lanes()]))
        self.commit(program.batch(self.reference))

    # -------------------------------------------------------------- what is done, and what may come of it

    def attempt(self, what: Callable[[], Any]) -> Any:
        """Do something, again if it is refused as it may be; None if the disk goes on failing."""
        while True:
            in_order = not self.disk.left
            try:
                return what()
            except PublishOutcomeUnknown as error:
                if self.mode == "once":
                    raise Wrong(f"nobody could tell, though the disk failed only once: {error!r}") from error
                raise
            except _REFUSALS as error:
                if in_order or not self.disk.failed:
                    raise Wrong(f"refused by a disk that is in order: {error!r}") from error
            except EventBusError as error:
                raise Wrong(f"answered with {error!r}") from error
            if self.disk.left == math.inf:
                return None

    def open(self) -> None:
        def opened() -> bool:
            self.store.open(INSTANCE)
            return True

        self.attempt(opened)

    def close(self) -> None:
        self.store.close()

    def commit(self, batch: Batch) -> None:
        if not self.store._opened:
            return  # a disk that fails for ever did not let it open
        try:
            committed: Committed | None = self.attempt(lambda: self.store.commit(copy.deepcopy(batch)))
        except PublishOutcomeUnknown:
            if self.unknown is not None:
                raise Wrong("nobody could tell of a second batch, where the first left the store shut") from None
            self.unknown = batch
            if self.disk.left < math.inf:
                self.find_out()
            return
        if committed is not None:
            expected = self.reference.commit(copy.deepcopy(batch))
            if _said(committed) != _said(expected):
                raise Wrong(f"a commit returned {_said(committed)[:500]}; it should have been {_said(expected)[:500]}")

    def read(self, query: Query[Any]) -> None:
        if not self.store._opened:
            return
        found = self.attempt(lambda: self.store.read(query))
        if found is not None and self.unknown is None:
            expected = self.reference.read(query)
            if _plain(found) != _plain(expected):
                raise Wrong(f"{query} was answered with {_plain(found)[:500]}; it should have been {_plain(expected)[:500]}")

    def compare(self) -> None:
        """What is there when it is opened on a disk that is in order."""
        self.store = self._fresh()
        self.store.open(INSTANCE)
        self.settle_unknown()
        found, expected = _held(self.store), _held(self.reference)
        if found != expected:
            tables = [table for table, rows in expected.items() if rows != found[table]]
            shown = "; ".join(f"{t}: {str(found[t])[:300]} where there should be {str(expected[t])[:300]}" for t in tables)
            raise Wrong(f"other things are there than were acknowledged: {shown}")
        if self.store._writer is not None and self.store._writer.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
            raise Wrong("integrity_check finds something")


def _said(committed: Committed) -> str:
    c = committed
    return _plain([c.previous_head, c.head, c.appends, c.refused, c.conflicts, c.results, c.events])


def _plain(value: Any) -> str:
    """For comparing and showing: records are equal only to themselves."""
    return msgspec.json.encode(value, enc_hook=repr).decode()


def _held(store: SQLiteStore) -> dict[str, Any]:
    held: dict[str, Any] = contents(store._writer)
    held["log_state"] = [row[:3] + row[4:] for row in held["log_state"]]  # without the random name of the last write
    return held


# ------------------------------------------------------------------ all runs of a program


class Report(msgspec.Struct):
    runs: int
    faults: list[str]


@cheaper()
def run_all(seed: str, part: int, of: int) -> Report:
    """Let each operation of a program fail, or of its operations a part."""
    from tests.faults import apsw_sqlite

    disk = Disk()
    _vfs = FailingVFS("failing", disk)  # as long as it is there, SQLite knows it
    apsw_sqlite.install("failing")
    sqlite.WAL_PAGES = 12
    prepare = random.Random(seed).choice([0, 3, 3])
    asked = _run(seed, prepare, disk, "once")
    report = Report(0, [])
    if isinstance(asked, str):
        return Report(1, [f"on a disk that is in order: {asked}"])
    for at in range(1 + part, asked + 1, of):
        for mode in get_args(Mode):
            disk.break_at(at, mode)
            wrong = _run(seed, prepare, disk, mode)
            report.runs += 1
            if isinstance(wrong, str):
                report.faults.append(f"at {at} of {asked}, {mode}: {wrong}")
    return report


def _run(seed: str, prepare: int, disk: Disk, mode: Mode) -> int | str:
    with tempfile.TemporaryDirectory(prefix="eventbus-io-", dir=MEMORY) as folder:
        run = Run(Path(folder), disk, random.Random(seed), mode)
        try:
            return run.all(prepare)
        except Exception as error:
            shown = str(error) if isinstance(error, Wrong) else "".join(traceback.format_exception(error)[-6:])
            return f"{disk.failed}: {shown}"


# ------------------------------------------------------------------ cases


def case(seed: int, number: int, part: int = 0, of: int = 1) -> Case:
    """All runs of one program, or a part of them."""
    name = f"{seed}-{number}"
    command = [sys.executable, "-m", "tests.faults.io_errors", name, str(part), str(of)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return Case(name, 0, [f"it hung: not done within {PATIENCE} s"])
    report = Report(0, [f"it ended with {done.returncode}: {done.stderr.decode()[-2000:]}"])
    with contextlib.suppress(msgspec.DecodeError):
        report = msgspec.json.decode(done.stdout, type=Report)
    return Case(f"{name}, part {part} of {of}", report.runs, report.faults)


def cases(seed: int) -> Iterator[Case]:
    """See `tests.campaign`. What is counted are runs, each with another failure."""
    for number in itertools.count():
        yield case(seed, number)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(run_all(sys.argv[1], *map(int, sys.argv[2:]))))
