"""SIGKILL at random moments with four processes on one file: one of them, some, or all; those that live go on meanwhile.

    python -m tests.campaign --only "SIGKILL at random moments, 4 processes"

Each publishes; two handle everything, one handles a part, one nothing (`ROLES`). What they say goes to one file, in the order in
which it happened, whoever says it. Beside what must hold for one process (`checks`): what was settled in the store at one moment
is delivered after it by nobody; those that live go on with what a killed one had; and of those that leave in order, nothing
is left among the instances.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator, Sequence

import attrs

from tests.campaign import Case
from tests.crash.campaign import PATIENCE, Round, new_folder, round_case
from tests.crash.checks import COUNTED, TYPES, Line, Snapshot, begin_of
from tests.crash.nursery import Nursery, Task

KILLS = 10
"""Moments at which some are killed, in one database."""
LEAVING = (0, 3)
"""Those that leave in order, in the end."""
BEING_MADE = ("unable to open", "locked")
"""What SQLite says while the file, or its WAL, is being made."""
ROLES: Sequence[bool | list[str]] = (True, True, ["chain", "link", "keyed"], False)
"""What each of them dispatches."""


@attrs.define
class Company(Round):
    """Several processes on one database.

    Attributes:
        lease: of each, in seconds.
        listed: the processes that the database lists, when it was looked last.
        excused: for each process that was stopped past its lease, what it may still have begun of each subscription.
    """

    lease: float = 10.0
    listed: set[int] = attrs.field(factory=set)
    excused: dict[int, dict[str, int]] = attrs.field(factory=dict)

    def task(self, mode: str, who: int, environment: dict[str, str]) -> Task:
        """With the role of each; the one that drains handles everything."""
        dispatch = ROLES[who] if mode == "work" else True
        return attrs.evolve(super().task(mode, who, environment), dispatch=dispatch, lease=self.lease)

    def start_all(self) -> None:
        """Have all of them at work."""
        for who in range(len(ROLES)):
            if who not in self.working:
                self.working[who] = self.child("work", who)

    def kill_some(self, chance: random.Random) -> None:
        """Let all work, and kill some a random moment later: mostly one, now and then all; now and then while they start."""
        self.start_all()
        if chance.random() < 0.2:
            time.sleep(chance.random() * 0.1)
        else:
            self.wait_for_word()
            time.sleep(chance.random() ** 2 * 0.5)
        self.look_for_ended()
        count = chance.choice((1, 1, 1, 2, 2, 3, len(ROLES)))
        doomed = [who for who in chance.sample(range(len(ROLES)), count) if who in self.working]
        for who in doomed:
            os.kill(self.working[who].pid, signal.SIGKILL)  # all at once; they are waited for below
        for who in doomed:
            self.working.pop(who).kill()
        self.look_at_killed(doomed)

    # -------------------------------------------------------------- what is checked

    def listen(self) -> Sequence[Line]:
        """What was said since the last time, checked against what was stored when it was looked last."""
        fresh = self.fresh_lines()
        if self._before is not None:
            self.found(wrong_since(self._before, fresh, self.excused))
        self._remember_starts(fresh, ())
        return fresh

    def look_at_killed(self, killed: Sequence[int]) -> Sequence[Line]:
        """See `Round`."""
        self.kills += len(killed)
        fresh = self.listen()
        self._remember_starts((), killed)
        self.look()
        return fresh

    def look(self) -> None:
        """See what is stored. What was said meanwhile is checked by nothing: nobody knows whether it was said before."""
        self._before = self.snapshot()
        self.excused.clear()
        self._remember_starts(self.fresh_lines(), ())

    def snapshot(self) -> Snapshot | None:
        """While others write, as one reader sees it; where nobody does, from a copy: who closes a file last changes it."""
        if not self.working or not self.database.exists():
            return super().snapshot()
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN")
                return self.read(connection)
            except sqlite3.OperationalError as error:
                if not any(word in str(error) for word in BEING_MADE):
                    self.fault(f"the database cannot be read: {error}")
                return None

    def read(self, connection: sqlite3.Connection) -> Snapshot | None:
        """See `Round`; and the processes that are listed."""
        snapshot = super().read(connection)
        self.listed = set()
        if snapshot is not None:
            self.listed = {pid for (pid,) in connection.execute("SELECT pid FROM instances")}
        return snapshot

    def wait_until_all_go_on(self) -> None:
        """Each subscription is served, each process that handles has lanes, and the other one publishes."""
        self.start_all()
        self.listen()
        deadline = time.monotonic() + PATIENCE
        unserved, idle = {*TYPES}, {*range(len(ROLES))}
        while (unserved or idle) and len(self.working) == len(ROLES) and time.monotonic() < deadline:
            time.sleep(0.02)
            self.look_for_ended()
            fresh = self.listen()
            unserved -= {line[2] for line in fresh if line[0] == "E"}
            idle -= {who for who, role in enumerate(ROLES) if not role and said_by(who, fresh)}
            idle -= {who for who, child in self.working.items() if child.pid in self.owners()}
        if unserved or idle:
            self.fault(f"after {PATIENCE:g} s not served: {unserved or 'none'}; with nothing to do: {idle or 'none'}")

    def owners(self) -> set[int]:
        """The processes that have lanes."""
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            return {pid for (pid,) in connection.execute("SELECT pid FROM instances JOIN lanes ON owner = id")}

    def end(self) -> None:
        """All go on; two leave in order, the others are killed; then all is drained, and everything is checked."""
        self.wait_until_all_go_on()
        leaving = [self.working.pop(who) for who in LEAVING if who in self.working]
        for child in leaving:
            os.kill(child.pid, signal.SIGTERM)
        for child in leaving:
            if child.wait(PATIENCE) != 0:
                self.fault(f"one that was to leave ended with {child.code}: {self.errors()}")
            child.kill()
        killed = {child.pid for child in self.working.values()}
        for child in self.working.values():
            child.kill()
        self.working.clear()
        self.look()
        if not self.listed <= killed:
            self.fault(f"listed among the instances are {self.listed}, of whom only {killed} were killed")
        super().end()


def said_by(who: int, lines: Sequence[Line]) -> bool:
    """Whether something was acknowledged to a process."""
    return any(line[0] == "A" and line[2].endswith(f".{who}") for line in lines)


def wrong_since(before: Snapshot, fresh: Sequence[Line], excused: dict[int, dict[str, int]]) -> Iterator[str]:
    """What was settled when the snapshot was taken has not been begun after it; and no attempt comes twice that was stored."""
    met: set[tuple[str, int]] = set()
    for line in fresh:
        if line[0] != "B" or line[2] not in COUNTED:
            continue
        begin, who = begin_of(line), int(line[-1])
        if (begin.subscription, begin.position) in met:
            continue
        met.add((begin.subscription, begin.position))
        made = before.attempts_of(begin, next_of_lane=False)
        if made is not None and begin.attempt > made:
            continue
        left = excused.get(who, {})
        if left.get(begin.subscription, 0):
            left[begin.subscription] -= 1
        elif made is None:
            yield f"delivered by process {who} after its settlement was committed: {begin}"
        else:
            yield f"attempt {begin.attempt} by process {who} where {made} were stored: {begin}"


# ------------------------------------------------------------------ cases


def case(seed: int, number: int, nursery: Nursery) -> Case:
    """One database; the same numbers choose the same moments, though not what the machine does until then."""
    chance = random.Random(f"processes {seed}-{number}")

    def kill(company: Company) -> None:
        for _ in range(KILLS):
            company.kill_some(chance)

    what = f"4 processes {seed}-{number}"
    return round_case(what, Company(new_folder(), what, ("asyncio", "trio")[number % 2], nursery), kill)


def cases(seed: int) -> Iterator[Case]:
    """See `tests.campaign`."""
    with Nursery() as nursery:
        for number in itertools.count():
            yield case(seed, number, nursery)
