"""SIGKILL at random moments, and what the programs that are killed share with those that kill themselves at fail points.

A case is a `Round`: a database of its own, and a number of kills, one after the other. What the children said (see `child`) is
checked against the database, as it was after each kill (in a copy: the file itself is left as the kill left it), and in the
end, when everything was drained (see `checks`).
"""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import sqlite3
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import attrs

from tests.campaign import Case
from tests.crash.checks import Late, Line, Snapshot, wrong_in_run, wrong_in_the_end
from tests.crash.nursery import Child, Nursery, Task

KILLS = 13
"""In one database."""

PATIENCE = 60.0
"""Seconds in which a child must have done what is waited for, on whatever machine."""


@attrs.define
class Round:
    """One database: the program that works on it, what was said so far, and what was found wrong."""

    folder: Path
    seed: str
    backend: str
    nursery: Nursery
    kills: int = 0
    faults: list[str] = attrs.field(factory=list)
    lines: list[list[str]] = attrs.field(factory=list)
    starts: dict[str, int] = attrs.field(factory=lambda: defaultdict(int))
    working: dict[int, Child] = attrs.field(factory=dict)
    late: dict[Late, int] = attrs.field(factory=Counter)
    _runs: Iterator[int] = attrs.field(factory=itertools.count)
    _before: Snapshot | None = None

    @property
    def database(self) -> Path:
        return self.folder / "crash.db"

    @property
    def report(self) -> Path:
        return self.folder / "report"

    # -------------------------------------------------------------- running

    def child(self, mode: str, who: int = 0, environment: dict[str, str] | None = None) -> Child:
        """Start a program."""
        return self.nursery.start(self.task(mode, who, environment or {}))

    def task(self, mode: str, who: int, environment: dict[str, str]) -> Task:
        """What it is to do."""
        own = {source: number for source, number in self.starts.items() if source.endswith(f".{who}")}
        output, errors = str(self.report), str(self.folder / "errors")
        return Task(str(self.database), self.seed, next(self._runs), self.backend, mode, output, errors, who, own, environment)

    def kill_at_random(self, chance: random.Random) -> None:
        """Start it, let it work, and kill it a random moment later; now and then while it is starting."""
        child = self.working[0] = self.child("work")
        if chance.random() < 0.2:
            time.sleep(chance.random() * 0.1)
        else:
            self.wait_for_word()
            time.sleep(chance.random() ** 2 * 0.4)
        self.look_for_ended()
        child.kill()
        self.look_at_killed([0])

    def wait_for_word(self) -> None:
        """Wait until something is said."""
        size, deadline = self.report.stat().st_size, time.monotonic() + PATIENCE
        while self.report.stat().st_size == size and not self._has_ended() and time.monotonic() < deadline:
            time.sleep(0.002)

    def look_for_ended(self) -> None:
        """None may end by itself."""
        for who in self._has_ended():
            child = self.working.pop(who)
            self.fault(f"child {who} ended by itself with {child.code}: {self.errors()}")

    def _has_ended(self) -> list[int]:
        return [who for who, child in self.working.items() if child.wait(0) is not None]

    def look_at_killed(self, killed: Sequence[int]) -> Sequence[Line]:
        """Check what they said in this run, and how they left the database; returns what they said."""
        self.kills += 1
        fresh = self.fresh_lines()
        self.found(wrong_in_run(self._before, fresh))
        self._before = self.snapshot()
        self._remember_starts(fresh, killed)
        return fresh

    def end(self) -> None:
        """Kill what still works, drain, and check everything."""
        for who in list(self.working):
            self.working.pop(who).kill()
        child = self.child("drain")
        code = child.wait(PATIENCE * 2)
        child.kill()
        fresh = self.fresh_lines()
        if code != 0 or not any(line == ["L", "0"] for line in fresh):
            said = [line for line in fresh if line[0] == "L"]
            self.fault(f"the last run ended with {code} and said {said}: {self.errors()}")
        self.found(wrong_in_run(self._before, fresh))
        if code == 0:
            self.found(wrong_in_the_end(self.database, self.lines, self.late))

    def errors(self) -> str:
        return (self.folder / "errors").read_text()[-3000:]

    def fault(self, text: str) -> None:
        self.faults.append(f"seed {self.seed}, {self.backend}, kill {self.kills}: {text}")

    def found(self, faults: Iterator[str]) -> None:
        for text in faults:
            self.fault(text)

    def fresh_lines(self) -> list[list[str]]:
        """What was said since the last time."""
        said = [line for line in self.report.read_text().split("\n") if line.endswith(" .")]
        fresh = [line.split(" ")[:-1] for line in said[len(self.lines) :]]
        self.lines += fresh
        return fresh

    def _remember_starts(self, fresh: Sequence[Line], killed: Sequence[int]) -> None:
        """Go on after the last acknowledged one: with its idempotency key, what was under way is published again."""
        for line in fresh:
            if line[0] == "A":
                self.starts[line[2]] = max(self.starts[line[2]], int(line[3]) + 1)
        for who in killed:
            self.starts[f"unkeyed.{who}"] += 1  # without a key, it would be there twice

    def snapshot(self) -> Snapshot | None:
        """What the database held when the child was killed, from a copy."""
        if not self.database.exists():
            return None
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            for suffix in ("", "-wal"):
                source = Path(f"{self.database}{suffix}")
                if source.exists():
                    shutil.copy(source, folder)
            with contextlib.closing(sqlite3.connect(Path(folder) / self.database.name)) as connection:
                return self.read(connection)

    def read(self, connection: sqlite3.Connection) -> Snapshot | None:
        """What a database holds."""
        (health,) = connection.execute("PRAGMA integrity_check").fetchone()
        if health != "ok":
            self.fault(f"integrity_check: {health}")
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone():
            return None
        return Snapshot.of(connection)


# ------------------------------------------------------------------ cases


R = TypeVar("R", bound=Round)


def round_case(what: str, round_: R, kill: Callable[[R], None]) -> Case:
    """One round; the files of one that found something are kept, and named."""
    round_.report.touch()
    try:
        kill(round_)
        round_.end()
    finally:
        for child in round_.working.values():
            child.kill()
        if not round_.faults:
            shutil.rmtree(round_.folder)
    faults = [f"{fault} (see {round_.folder})" for fault in round_.faults]
    return Case(f"{what}, {round_.backend}", round_.kills, faults)


def new_folder() -> Path:
    """For one round."""
    return Path(tempfile.mkdtemp(prefix="eventbus-crash-"))


def case(seed: int, number: int, nursery: Nursery) -> Case:
    """Kill at random moments; the same numbers choose the same moments, though not what the machine does until then."""
    chance = random.Random(f"{seed}-{number}")

    def kill(round_: Round) -> None:
        for _ in range(KILLS):
            round_.kill_at_random(chance)

    what = f"{seed}-{number}"
    return round_case(what, Round(new_folder(), what, ("asyncio", "trio")[number % 2], nursery), kill)


def cases(seed: int) -> Iterator[Case]:
    """See `tests.campaign`."""
    with Nursery() as nursery:
        for number in itertools.count():
            yield case(seed, number, nursery)
