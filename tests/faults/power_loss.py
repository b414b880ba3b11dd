"""Loss of power, and torn writes: what is on the disk then, opened again.

A program runs on the store in a process of its own, through a VFS that writes down what is asked of the disk (`recorder`). At
every operation the power goes, as it were: images are made of what may be on the disk then (`disk`), and each is opened with the
standard library's SQLite, through the store. It must open, be whole, hold exactly the state after one of the commits that may be
there, and go on with positions above those it holds. Programs that recover from some of these images are recorded in turn.

The SQLite that writes is apsw's, a newer one than the standard library's, which recovers: statements, transactions and WAL
checkpoints are those of the store, and the file format is one; how an older SQLite orders its syncs is not shown by this.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import attrs

from eventbus.errors import EventBusError
from eventbus.stores.base import Events
from eventbus.stores.sqlite import SQLiteStore
from tests.campaign import MEMORY, Case
from tests.faults.cheaper import cheaper
from tests.faults.disk import RULES, Disk, File, Image, Rule
from tests.faults.programs import INSTANCE, Program, digest
from tests.faults.recorder import NAME, Recorder, Request
from tests.faults.recording_vfs import Recording

COMMITS = (7, 12, 24, 40)
"""In a program; three programs of each length take turns."""

RECOVERIES = 2
"""Images of a program from which another is recorded, and of that one from which a third is."""

DEEPEST = 2
"""Recoveries of recoveries of a program."""


class Found(NamedTuple):
    """What an image holds: a digest of it, and the position that an event gets that is appended to it."""

    digest: bytes
    position: int


@attrs.define
class Inspector:
    """Opens images. What was found of one is remembered, since most operations change little."""

    durability: Literal["full", "fast"]
    folder: Path
    known: dict[bytes, Found | str] = attrs.field(factory=dict)
    _program: Program = attrs.field(factory=lambda: Program(random.Random(0), 0xFFFF))

    def look(self, image: Image) -> Found | str:
        """What the image holds, or what is wrong with it."""
        name = hashlib.blake2b(digest_size=16)
        for file, data in sorted(image.items()):
            name.update(f"{file}:{len(data)}:".encode())
            name.update(data)
        found = self.known.get(name.digest())
        if found is None:
            found = self.known[name.digest()] = self._open(image)
        return found

    def _open(self, image: Image) -> Found | str:
        for file in self.folder.iterdir():
            file.unlink()
        put(image, self.folder)
        store = SQLiteStore(self.folder / NAME, durability=self.durability)
        try:
            store.open(INSTANCE)
            try:
                return self._check(store)
            finally:
                store.close()
        except (EventBusError, sqlite3.Error) as error:
            return f"it was refused: {error!r}"

    def _check(self, store: SQLiteStore) -> Found | str:
        writer = store._writer
        assert writer is not None
        found = digest(writer)
        health = writer.execute("PRAGMA integrity_check").fetchall()
        if health != [("ok",)]:
            return f"integrity_check: {health}"
        batch = self._program.append()
        committed = store.commit(batch)
        page = store.read(Events(committed.previous_head, 10, 1_000_000))
        if [record.id for record in page.records] != [batch.appends[0][0].id]:
            return f"after {committed.previous_head} there are {[record.id for record in page.records]}"
        return Found(found, committed.head)


def put(image: Image, folder: Path) -> None:
    """Write the files of an image."""
    for name, data in image.items():
        (folder / name).write_bytes(data)


Timeline = Sequence[bytes]
"""States one after the other, as a program has made them."""


class Cut(NamedTuple):
    """An image that recovery has something to do with, and the states that its program had come to or begun."""

    image: Image
    states: Timeline


@attrs.define
class Loss:
    """All losses of power of one program.

    Attributes:
        cut_off: what the programs before this one had begun, which was cut off when the power went. SQLite leaves the rest of a
            transaction that is not whole in the WAL, and goes on before it. If what comes next is the same to the byte, and is
            cut off where the rest begins, the rest fits again, and the transaction is whole after all, and in its place. It was
            never acknowledged, so it may be there as well as not.
    """

    recorder: Recorder
    inspector: Inspector
    chance: random.Random
    seed: str
    faults: list[str] = attrs.field(factory=list)
    cut_off: list[Timeline] = attrs.field(factory=list)

    def all(self, base: Image, level: int, commits: int) -> None:
        """Record a program that begins with these files, and cut it off everywhere."""
        recording = self._record(base, level, commits)
        before = self.inspector.look(base) if level else None
        if isinstance(before, Found) and before.digest != recording.states[0]:
            self.faults.append(f"level {level}: two SQLites find different things in one image")
        cuts = self._cut(base, recording, level)
        if level == DEEPEST:
            return
        for cut in self.chance.sample(cuts, min(RECOVERIES // (level + 1), len(cuts))):
            self.cut_off.append(cut.states)
            self.all(cut.image, level + 1, 3)
            self.cut_off.pop()

    def _record(self, base: Image, level: int, commits: int) -> Recording:
        folder = Path(tempfile.mkdtemp(prefix="eventbus-power-", dir=MEMORY))
        try:
            put(base, folder)
            return self.recorder.record(Request(str(folder), self.seed, level, commits, self.inspector.durability))
        finally:
            shutil.rmtree(folder)

    def _cut(self, base: Image, recording: Recording, level: int) -> list[Cut]:
        """Cut a recording off at each operation."""
        disk, cuts = Disk(base), []
        for number, op in enumerate(recording.ops):
            disk.apply(op)
            for rule in RULES if disk.unsettled else RULES[:1]:
                image = disk.image(rule, self.chance)
                found = self.inspector.look(image)
                wrong = (
                    found if isinstance(found, str) else self._misplaced(found, recording, self._least(disk, rule), disk.begun)
                )
                if wrong:
                    self.faults.append(f"level {level}, after operation {number}, {rule.__name__}: {wrong}")
                elif rule in {File.some, File.torn} and len(image) > 1:
                    cuts.append(Cut(image, recording.states[: disk.begun + 1]))
        return cuts

    def _least(self, disk: Disk, rule: Rule) -> int:
        """The earliest state that may be found."""
        if self.inspector.durability == "full" or rule is File.everything:  # the latter is what an end of the process leaves
            return disk.acknowledged
        return disk.synced

    def _misplaced(self, found: Found, recording: Recording, least: int, most: int) -> str | None:
        states = recording.states
        if found.digest in states[least : most + 1]:
            given = recording.heads[states.index(found.digest)]
            return None if found.position > given else f"it gives position {found.position}, and {given} was given before"
        for others in self.cut_off:
            if states[least] in others and found.digest in others[others.index(states[least]) :]:
                return None
        what = f"that after commit {states.index(found.digest)}" if found.digest in states else "that after no commit"
        return f"it holds {what}; it must be one from {least} to {most}"


def case(seed: int, number: int, recorder: Recorder) -> Case:
    """One program, and all its losses of power."""
    name = f"{seed}-{number}"
    durability: Literal["full", "fast"] = "fast" if number % 3 == 2 else "full"
    commits = COMMITS[number // 3 % len(COMMITS)]
    with tempfile.TemporaryDirectory(prefix="eventbus-power-", dir=MEMORY) as folder, cheaper():
        inspector = Inspector(durability, Path(folder))
        loss = Loss(recorder, inspector, random.Random(name), name)
        loss.all({}, 0, commits)
    return Case(f"{name}, {durability}", len(inspector.known), loss.faults[:20])


def cases(seed: int) -> Iterator[Case]:
    """See `tests.campaign`. What is counted are different images."""
    with Recorder() as recorder:
        for number in itertools.count():
            yield case(seed, number, recorder)
