"""Kill a program that uses the bus, again and again, and check that nothing acknowledged was lost.

    python -m tests.crash.campaign --kills 200 --seed 1

A campaign is a number of rounds; each has its own database, and so many kills. What the child said (see `child`) is checked
against the database, as it was after each kill (in a copy: the file itself is left as the kill left it) and at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from tests.crash.child import ATTEMPTS, BATCH

TYPES = {
    "chain": ("crash.placed",),
    "link": ("crash.reserved",),
    "flaky": ("crash.placed",),
    "plain": ("crash.placed",),
    "keyed": ("crash.placed",),
    "free": ("crash.placed", "crash.shipped"),
    "audit": ("crash.placed", "crash.reserved", "crash.shipped"),
}
BY_KEY = ("link", "keyed")
STRICT = ("chain", "flaky", "plain", "audit")
SOURCES = ("one", "two", "unkeyed", "batch")
ROOT = Path(__file__).parents[2]


@attrs.frozen
class Begin:
    """A handler has begun: line `B` of the report."""

    event: str
    subscription: str
    position: int
    attempt: int
    key: str | None


@attrs.define
class Round:
    """One database: what was said so far, and what was found wrong."""

    folder: Path
    seed: str
    backend: str
    kills: int = 0
    faults: list[str] = attrs.field(factory=list)
    lines: list[list[str]] = attrs.field(factory=list)
    read: int = 0
    starts: dict[str, int] = attrs.field(factory=lambda: dict.fromkeys(SOURCES, 0))
    unkeyed_seen: int = 0

    @property
    def database(self) -> Path:
        return self.folder / "crash.db"

    @property
    def report(self) -> Path:
        return self.folder / "report"

    # -------------------------------------------------------------- running

    def run(self, kills: int) -> None:
        """Kill so many times, then drain and check everything."""
        chance = random.Random(self.seed)
        before: Snapshot | None = None
        for _ in range(kills):
            self.kill_once(chance)
            fresh = self.fresh_lines()
            self.check_against(before, fresh)
            self.remember_starts(fresh)
            before = self.snapshot()
        with self.child("drain") as child:
            code = child.wait(90)
        fresh = self.fresh_lines()
        if code != 0 or not any(line == ["L", "0"] for line in fresh):
            self.fault(f"the last run ended with {code} and said {[line for line in fresh if line[0] == 'L']}")
        self.check_against(before, fresh)
        self.check_end()

    @contextlib.contextmanager
    def child(self, mode: str) -> Iterator[subprocess.Popen[bytes]]:
        arguments = [self.database, self.seed, self.kills, self.backend, mode, *(self.starts[s] for s in SOURCES)]
        command = [sys.executable, "-m", "tests.crash.child", *map(str, arguments)]
        with self.report.open("ab") as out, (self.folder / "errors").open("ab") as errors:
            child = subprocess.Popen(command, stdout=out, stderr=errors, cwd=ROOT)
        try:
            yield child
        finally:
            child.kill()
            child.wait()

    def kill_once(self, chance: random.Random) -> None:
        """Start the child, wait until it works, and kill it a random moment later; now and then while it is starting."""
        with self.child("work") as child:
            if chance.random() < 0.15:
                time.sleep(chance.random() * 0.5)
            else:
                size = self.report.stat().st_size
                deadline = time.monotonic() + 30
                while self.report.stat().st_size == size and child.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.002)
                time.sleep(chance.random() ** 2 * 0.8)
            if child.poll() is not None:
                self.fault(f"the child ended by itself with {child.returncode}: {self.errors()}")
        self.kills += 1

    def errors(self) -> str:
        return (self.folder / "errors").read_text()[-3000:]

    def fault(self, text: str) -> None:
        self.faults.append(f"seed {self.seed}, {self.backend}, run {self.kills}: {text}")

    def fresh_lines(self) -> list[list[str]]:
        fresh = [line.split(" ") for line in self.report.read_text().splitlines()[self.read :]]
        self.read += len(fresh)
        self.lines += fresh
        return fresh

    def remember_starts(self, fresh: Sequence[Sequence[str]]) -> None:
        """Go on after the last acknowledged one: with its idempotency key, what was under way is published again."""
        for line in fresh:
            if line[0] == "A":
                self.starts[line[2]] = max(self.starts[line[2]], int(line[3]) + 1)
        self.starts["unkeyed"] += 1  # without a key, it would be there twice

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
                (health,) = connection.execute("PRAGMA integrity_check").fetchone()
                if health != "ok":
                    self.fault(f"integrity_check: {health}")
                if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone():
                    return None
                return Snapshot.of(connection)

    # -------------------------------------------------------------- checking one run

    def check_against(self, before: Snapshot | None, fresh: Sequence[Sequence[str]]) -> None:
        """Nothing that was settled in the store before this run is delivered in it; attempts go on where they were."""
        last: dict[tuple[str, int], int] = {}
        served: set[str] = set()
        for line in fresh:
            if line[0] != "B":
                continue
            begin = begin_of(line)
            place = (begin.subscription, begin.position)
            if place in last:
                if begin.attempt != last[place] + 1:
                    self.fault(f"attempt {begin.attempt} after {last[place]} in one run: {begin}")
            elif before is not None:
                self.check_first(before, begin, next_of_lane=begin.subscription not in served)
            last[place] = begin.attempt
            served.add(begin.subscription)

    def check_first(self, before: Snapshot, begin: Begin, *, next_of_lane: bool) -> None:
        made = before.attempts_of(begin, next_of_lane=next_of_lane)
        if made is None:
            self.fault(f"delivered after its settlement was committed: {begin}")
        elif begin.attempt != made + 1:
            self.fault(f"attempt {begin.attempt} where {made} were stored: {begin}")

    # -------------------------------------------------------------- checking the end

    def check_end(self) -> None:
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            events = connection.execute("SELECT position, id, type, key, headers, data FROM events ORDER BY position").fetchall()
            dead = {(s, e) for s, e in connection.execute("SELECT subscription, event_id FROM dead_letters")}
            waiting = connection.execute("SELECT * FROM deliveries").fetchall()
            (instances,) = connection.execute("SELECT count(*) FROM instances").fetchone()
        if waiting:
            self.fault(f"{len(waiting)} deliveries still wait: {waiting[:3]}")
        if instances:
            self.fault(f"{instances} instances that were killed are still listed")
        self.check_log(events)
        self.check_settled(events, dead)
        self.check_order(dead)
        self.check_committed()

    def check_log(self, events: Sequence[tuple[int, str, str, str | None, str | None, str]]) -> None:
        """Everything acknowledged is there, once; batches are whole; every chain has each of its links once."""
        ids = {row[1] for row in events}
        lost = [line for line in self.lines if line[0] == "A" and line[1] not in ids]
        if lost:
            self.fault(f"{len(lost)} acknowledged events are not in the log: {lost[:3]}")
        placed = Counter[tuple[str, int]]()
        batches = Counter[int]()
        for _, _, type, _, _, data in events:
            if type == "crash.placed":
                body = json.loads(data)
                placed[body["source"], body["number"]] += 1
                if body["batch"] >= 0:
                    batches[body["batch"]] += 1
        twice = [name for name, count in placed.items() if count > 1]
        if twice:
            self.fault(f"stored twice: {twice[:5]}")
        torn = [batch for batch, count in batches.items() if count != BATCH]
        if torn:
            self.fault(f"batches that are not whole: {torn[:5]}")
        causes = Counter((type, json.loads(headers)["causation_id"]) for _, _, type, _, headers, _ in events if headers)
        for parent, child in (("crash.placed", "crash.reserved"), ("crash.reserved", "crash.shipped")):
            parents = [row[1] for row in events if row[2] == parent]
            wrong = [(p, causes[child, p]) for p in parents if causes[child, p] != 1]
            if wrong:
                self.fault(f"{len(wrong)} of {len(parents)} {parent} have not exactly one {child}: {wrong[:3]}")
            if sum(1 for row in events if row[2] == child) != len(parents):
                self.fault(f"another number of {child} than of {parent}")

    def check_settled(
        self, events: Sequence[tuple[int, str, str, str | None, str | None, str]], dead: set[tuple[str, str]]
    ) -> None:
        """Every event was handled by every subscription, or is its dead letter, and not both."""
        handled = {(line[2], line[1]) for line in self.lines if line[0] == "E"}
        for subscription, types in TYPES.items():
            wanted = [row[1] for row in events if row[2] in types]
            missed = [e for e in wanted if (subscription, e) not in handled and (subscription, e) not in dead]
            if missed:
                self.fault(f"{subscription} missed {len(missed)} of {len(wanted)}: {missed[:3]}")
            both = [e for e in wanted if (subscription, e) in handled and (subscription, e) in dead]
            if both:
                self.fault(f"{subscription} handled what is its dead letter: {both[:3]}")
        for subscription, event in dead:
            attempts = max(int(line[4]) for line in self.lines if line[0] == "B" and line[1:3] == [event, subscription])
            if attempts != ATTEMPTS:
                self.fault(f"{subscription} dead-lettered {event} after {attempts} attempts")

    def check_order(self, dead: set[tuple[str, str]]) -> None:
        """Within a lane, or a key, an event is begun only after those before it were begun *and* ended."""
        newest: dict[tuple[str, str], int] = {}
        opened: dict[tuple[str, str], set[str]] = defaultdict(set)
        seen: set[tuple[str, str]] = set()
        for line in self.lines:
            if line[0] == "E":
                for (subscription, _), events in opened.items():
                    if subscription == line[2]:
                        events.discard(line[1])
            if line[0] != "B" or line[2] not in (*STRICT, *BY_KEY):
                continue
            begin = begin_of(line)
            lane = (begin.subscription, str(begin.key) if begin.subscription in BY_KEY else "")
            if (begin.subscription, begin.event) in seen:
                continue  # delivered again, after a kill or a failure
            seen.add((begin.subscription, begin.event))
            if begin.position < newest.get(lane, 0):
                self.fault(f"first delivered after {newest[lane]}: {begin}")
            unsettled = {event for event in opened[lane] if (begin.subscription, event) not in dead}
            if unsettled:
                self.fault(f"begun before {unsettled} ended: {begin}")
            newest[lane] = begin.position
            opened[lane].add(begin.event)

    def check_committed(self) -> None:
        """What `handled` has said to be settled was not delivered again, in any later run either."""
        committed: set[str] = set()
        for line in self.lines:
            if line[0] == "C":
                committed.add(line[1])
            elif line[0] == "B" and line[1] in committed:
                self.fault(f"delivered after `handled` had returned: {line}")


@attrs.frozen
class Snapshot:
    """What was settled when the child was killed."""

    lanes: dict[str, list[tuple[str, int, frozenset[int], int]]]
    rows: dict[tuple[str, int], int]
    keys: dict[tuple[str, str], int]
    dead: frozenset[tuple[str, str]]
    slots: dict[str, int]

    @classmethod
    def of(cls, connection: sqlite3.Connection) -> Snapshot:
        lanes = defaultdict(list)
        for name, lane, checkpoint, done, attempt in connection.execute(
            "SELECT subscription, lane, checkpoint, done, attempt FROM lanes"
        ):
            lanes[name].append((lane, checkpoint, frozenset(json.loads(done or "[]")), attempt))
        rows, keys = {}, {}
        for name, position, key, attempt in connection.execute(
            "SELECT subscription, position, key, attempt FROM deliveries ORDER BY position DESC"
        ):
            rows[name, position] = attempt
            if key is not None:
                keys[name, key] = position
        dead = frozenset((s, e) for s, e in connection.execute("SELECT subscription, event_id FROM dead_letters"))
        slots = dict(connection.execute("SELECT DISTINCT key, slot FROM events WHERE key IS NOT NULL"))
        return cls(dict(lanes), rows, keys, dead, slots)

    def attempts_of(self, begin: Begin, *, next_of_lane: bool) -> int | None:
        """Attempts that are stored for a delivery, or None if it is settled. 0 where nothing is known of it."""
        name, position = begin.subscription, begin.position
        if (name, begin.event) in self.dead:
            return None
        if (name, position) in self.rows:
            return self.rows[name, position]
        if begin.key is not None and self.keys.get((name, begin.key), position + 1) <= position:
            return 0  # held behind an earlier event of its key
        lane = self._lane(begin)
        if lane is None:
            return 0
        _, checkpoint, done, attempt = lane
        if position <= checkpoint or position in done:
            return None
        return attempt if next_of_lane else 0

    def _lane(self, begin: Begin) -> tuple[str, int, frozenset[int], int] | None:
        lanes = self.lanes.get(begin.subscription, [])
        if begin.subscription not in BY_KEY:
            return lanes[0] if lanes else None
        slot = self.slots.get(str(begin.key))
        return None if slot is None else next((lane for lane in lanes if int(lane[0]) == slot * len(lanes) // 1024), None)


def begin_of(line: Sequence[str]) -> Begin:
    return Begin(line[1], line[2], int(line[3]), int(line[4]), None if line[5] == "None" else line[5])


def campaign(folder: Path, seed: str, kills: int, backend: str) -> Round:
    """One round; its faults are in what it returns."""
    folder.mkdir(parents=True, exist_ok=True)
    round_ = Round(folder, seed, backend)
    round_.report.touch()
    round_.run(kills)
    return round_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--per-database", type=int, default=12)
    options = parser.parse_args()
    faults, done, number = [], 0, 0
    with tempfile.TemporaryDirectory(prefix="eventbus-crash-") as folder:
        while done < options.kills:
            kills = min(options.per_database, options.kills - done)
            backend = ("asyncio", "trio")[number % 2]
            round_ = campaign(Path(folder) / str(number), f"{options.seed}-{number}", kills, backend)
            counts = Counter(line[0] for line in round_.lines)
            done, number = done + kills, number + 1
            faults += round_.faults
            print(f"{done} kills; {backend}: {counts['A']} acknowledged, {counts['B']} attempts, {counts['C']} waited for; "
                  f"{len(round_.faults)} faults", flush=True)  # fmt: skip
            for fault in round_.faults[:10]:
                print("  ", fault, flush=True)
            if round_.faults:
                kept = Path(tempfile.gettempdir()) / f"eventbus-crash-{options.seed}-{number}"
                shutil.copytree(round_.folder, kept, dirs_exist_ok=True)
    print(f"{done} kills, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
