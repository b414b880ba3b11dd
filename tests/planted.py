"""The campaign itself, tested: faults are planted in a copy of the code, and the tests must see them.

    python -m tests.planted
    python -m tests.planted --only "no fencing"

Each fault is one that the campaign is there to find. A copy of the package gets it, the tests that should find it run there, and the table
says which did. `tests/test_planted.py` sees that each fault can still be planted.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[1]


@attrs.frozen
class Change:
    """A text of a file that is replaced; it stands there once."""

    file: str
    old: str
    new: str


@attrs.frozen
class Plant:
    """A fault, and what should find it: paths for pytest, which stops at the first test that fails."""

    name: str
    changes: tuple[Change, ...]
    tests: tuple[str, ...]


KILLS = ("tests/crash/test_kill.py",)
SIMULATION = ("tests/simulation",)

PLANTS: Sequence[Plant] = (
    Plant(
        "acknowledge before commit",
        (
            Change(
                "eventbus/_journal.py",
                "        await waiter.wait_decided()\n        if isinstance(ticket.result, Exception):\n            raise ticket.result\n"
                '        return cast("Sequence',
                "        if records and records[0].idempotency_key is None and records[0].due_at is None:\n            return None\n"
                "        await waiter.wait_decided()\n        if isinstance(ticket.result, Exception):\n            raise ticket.result\n"
                '        return cast("Sequence',
            ),
        ),
        KILLS,
    ),
    Plant(
        "settle before the handler",
        (
            Change(
                "eventbus/_workers.py",
                "                outcome = run_async(attempt, context)\n",
                "                from eventbus._outcomes import ACKED\n\n                lane.settle(attempt, ACKED)\n"
                "                lane.flush()\n                outcome = run_async(attempt, context)\n",
            ),
        ),
        KILLS,
    ),
    Plant(
        "synchronous=OFF",
        (Change("eventbus/stores/_sqlite_connection.py", '"synchronous": 2 if full else 1,', '"synchronous": 0,'),),
        ("tests/faults", "tests/store/test_sqlite_file.py"),
    ),
    Plant(
        "synchronous=NORMAL where FULL is promised",
        (Change("eventbus/stores/_sqlite_connection.py", '"synchronous": 2 if full else 1,', '"synchronous": 1,'),),
        ("tests/faults/test_power_loss.py",),
    ),
    Plant(
        "a transaction in two halves",
        (
            Change(
                "eventbus/stores/sqlite.py",
                "    outcomes.write(connection)\n",
                '    connection.execute("COMMIT")\n    connection.execute("BEGIN IMMEDIATE")\n    outcomes.write(connection)\n',
            ),
        ),
        ("tests/faults/test_power_loss.py",),
    ),
    Plant(
        "the store goes on after a reopening that failed",
        (
            Change(
                "eventbus/stores/sqlite.py",
                "        self._frames = 0.0\n        self._data_version = -1\n\n    def close",
                "        self._frames = 0.0\n        self._data_version = -1\n        self._suspect = False\n\n    def close",
            ),
        ),
        ("tests/faults/test_io_errors.py", "tests/faults/test_failing_sync.py"),
    ),
    Plant(
        "outcomes that could not be written are dropped",
        (
            Change(
                "eventbus/_journal.py",
                "            if isinstance(error, _FATAL) or self._closing:\n                self._given_up = True\n                return\n"
                "            self._pending.again",
                "            if error:\n                return\n            self._pending.again",
            ),
        ),
        ("tests/faults/test_held_lock.py",),
    ),
    Plant(
        "no fencing",
        (Change("eventbus/stores/_sqlite_units.py", "if lane is None or lane.epoch != unit.epoch:", "if lane is None:"),),
        ("tests/simulation/test_store_steps.py", "tests/crash/test_stops.py"),
    ),
    Plant(
        "a claimed lane skips what was published while it was claimed",
        (
            Change(
                "eventbus/_membership.py",
                "last = self._known if self._dispatcher.tail.head == self._head else None",
                "last = self._known",
            ),
        ),
        ("tests/bus/test_instances.py",),
    ),
    Plant(
        "instances that serve different sets disagree on shares",
        (
            Change(
                "eventbus/_membership.py",
                "each.name: dict(self._lanes_wanted(each)) for each in self.standing.subscriptions}",
                "each.name: dict(self._lanes_wanted(each)) for each in self.standing.subscriptions\n"
                "                        if each.name in self._dispatcher.servings}",
            ),
        ),
        ("tests/bus/test_instances.py",),
    ),
    Plant(
        "checkpoint past a retry",
        (
            Change(
                "eventbus/_strict.py",
                '        lane.send(\n            "log",\n            position,\n            attempt=attempt.number,',
                '        self._checkpoint = position\n        lane.send(\n            "log",\n            position,\n'
                "            attempt=attempt.number,",
            ),
        ),
        KILLS,
    ),
    Plant(
        "a checkpoint that commits before the events published below it",
        (
            Change(
                "eventbus/stores/_sqlite_units.py",
                "        if unit.published:\n            admitted = self._entering.admit(unit.published)\n",
                "        if unit.published:\n            _LATE.append(unit.published)\n        if _LATE and not unit.published:\n"
                "            for each in _LATE:\n                self._entering.admit(each)\n            _LATE.clear()\n"
                "        if False:\n            admitted = None\n",
            ),
            Change("eventbus/stores/_sqlite_units.py", "_Kind = Literal", "_LATE = []\n_Kind = Literal"),
        ),
        KILLS,
    ),
    Plant(
        "lost update on redrive",
        (
            Change(
                "eventbus/stores/_sqlite_units.py",
                'return unit.source == "redrive" and unit.dead_letter not in self._found.redriven',
                "return False",
            ),
        ),
        ("tests/simulation/test_store_steps.py",),
    ),
    Plant(
        "an event handed twice in the switch from behind to live",
        (
            Change(
                "eventbus/_intake.py",
                "        if records[0].position <= after:\n            records = [record for record in records if record.position > after]\n",
                "",
            ),
        ),
        (*SIMULATION, *KILLS, "tests/bus/test_dispatch.py"),
    ),
    Plant(
        "an event skipped in the switch from behind to live",
        (
            Change(
                "eventbus/_intake.py",
                "        for type, some in (self._meanwhile or ()) if reaches_head else ():\n            self.offer(type, some)\n",
                "",
            ),
        ),
        (*SIMULATION, *KILLS, "tests/bus/test_dispatch.py"),
    ),
    Plant(
        "positions reused after a prune",
        (
            Change(
                "eventbus/stores/_sqlite_schema.py",
                "position INTEGER PRIMARY KEY AUTOINCREMENT,",
                "position INTEGER PRIMARY KEY,",
            ),
            Change(
                "eventbus/stores/_sqlite_commit.py",
                "HEAD = \"coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'events'), 0)\"",
                'HEAD = "coalesce((SELECT max(position) FROM events), 0)"',
            ),
            Change(
                "eventbus/stores/_sqlite_commit.py",
                "at_head = \"AND (SELECT seq FROM sqlite_sequence WHERE name = 'events') IS ?\"",
                'at_head = "AND (SELECT max(position) FROM events) IS ?"',
            ),
        ),
        ("tests/simulation/test_store_steps.py",),
    ),
    Plant(
        "due events removed before they are queued",
        (
            Change(
                "eventbus/stores/_sqlite_commands.py",
                "            insert_events(self._connection, promoted, _head(self._connection) + 1)\n",
                '            self._connection.execute("DELETE FROM scheduled WHERE due_at <= ?", (to_micros(command.now),))\n'
                '            for statement in ("RELEASE command", "COMMIT", "BEGIN IMMEDIATE", "SAVEPOINT command"):\n'
                "                self._connection.execute(statement)\n"
                "            insert_events(self._connection, promoted, _head(self._connection) + 1)\n",
            ),
        ),
        KILLS,
    ),
    Plant(
        "an I/O error taken for 'not stored'",
        (
            Change(
                "eventbus/stores/sqlite.py",
                "stored = decided.trace is None or writer.execute(*decided.trace).fetchone() is not None",
                "stored = False",
            ),
        ),
        (*KILLS, "tests/faults"),
    ),
    *(
        Plant(
            f"the checksum of {what} is not verified",
            (
                Change(
                    "eventbus/stores/_sqlite_rows.py",
                    f'    if _crc(row[:-1]) != crc:\n        raise _damaged(\n            f"{begins}',
                    f'    if False:\n        raise _damaged(\n            f"{begins}',
                ),
            ),
            ("tests/faults/test_flipped_bits.py",),
        )
        for what, begins in (("lanes", "lane"), ("waiting deliveries", "the waiting"), ("subscriptions", "subscription"))
    ),
    Plant(
        "the WAL is not looked through for what a break in it would cut off",
        (Change("eventbus/stores/sqlite.py", "            refuse_cut_off(self._path)  #", "            pass  #"),),
        ("tests/faults/test_flipped_bits.py",),
    ),
    Plant(
        "outcomes are lost with a commit that failed",
        (
            Change(
                "eventbus/_journal.py",
                "self._pending.last = self._pending.units, list(pending.units), {}",
                "self._pending.last = self._pending.units, [], {}",
            ),
        ),
        ("tests/faults/test_held_lock.py",),
    ),
    Plant(
        "outcomes are lost with a commit that an I/O error has ended",
        (
            Change(
                "eventbus/_journal.py",
                "            if isinstance(error, _FATAL) or self._closing:\n                self._given_up = True\n                return\n"
                "            self._pending.again",
                '            if isinstance(error, _FATAL) or self._closing or type(error).__name__ == "StoreUnavailable":\n'
                "                return\n            self._pending.again",
            ),
        ),
        ("tests/faults/test_failing_disk.py", "tests/faults/test_failing_sync.py"),
    ),
    Plant(
        "outcomes are written that come after others were given up",
        (Change("eventbus/_journal.py", "        if self._given_up:\n            pending.units = []\n", ""),),
        ("tests/faults/test_given_up.py",),
    ),
    Plant(
        "outcomes of which nobody can tell are taken for stored",
        (
            Change(
                "eventbus/_journal.py",
                "            if isinstance(error, _FATAL) or self._closing:\n                self._given_up = True\n                return\n"
                "            self._pending.again",
                "            if isinstance(error, (*_FATAL, PublishOutcomeUnknown)) or self._closing:\n                return\n"
                "            self._pending.again",
            ),
        ),
        ("tests/faults/test_failing_disk.py", "tests/faults/test_failing_sync.py"),
    ),
    Plant(
        "a publish of one statement is told refused although it was stored",
        (
            Change(
                "eventbus/stores/sqlite.py",
                "            state.committing = decided is not None  # the",
                "            state.committing = False  # the",
            ),
        ),
        ("tests/faults/test_io_errors.py", "tests/faults/test_failing_disk.py"),
    ),
    Plant(
        "a publish of which nobody can tell is told refused",
        (
            Change(
                "eventbus/stores/sqlite.py",
                "            raise PublishOutcomeUnknown([record.id for record in records]) from failure\n",
                "            raise store_error(error, self._address) from failure\n",
            ),
        ),
        ("tests/faults/test_io_errors.py", "tests/faults/test_failing_disk.py"),
    ),
    Plant(
        "a deleted file is not noticed after a commit",
        (
            Change(
                "eventbus/stores/sqlite.py",
                "            self._identity.check()\n        for position",
                "            pass\n        for position",
            ),
        ),
        ("tests/faults/test_file_trouble.py",),
    ),
    Plant(
        "a deleted file is not noticed by who only waits",
        (Change("eventbus/stores/sqlite.py", "            self._identity.check()  # who only", "            pass  # who only"),),
        ("tests/faults/test_file_trouble.py",),
    ),
    Plant(
        "a full disk is not asked again",
        (
            Change(
                "eventbus/_journal.py",
                "        return self._full and not self._closing and self._clock.monotonic() >= self._retry_at",
                "        return False",
            ),
        ),
        ("tests/faults/test_disk_full.py",),
    ),
    Plant(
        "who has died is not noticed until its lease ends",
        (
            Change(
                "eventbus/stores/sqlite.py",
                "        died = any(self._lives(other) is False for other in self._others)",
                "        died = False",
            ),
        ),
        ("tests/crash/test_processes.py",),
    ),
    Plant(
        "a lease that has ended is taken for a death",
        (
            Change(
                "eventbus/stores/_sqlite_members.py",
                "    return started_in == boot() and lives(id) is not True",
                "    return started_in == boot()",
            ),
        ),
        ("tests/crash/test_stops.py",),
    ),
    Plant(
        "an innocent event is charged with a death",
        (
            Change(
                "eventbus/stores/_sqlite_members.py",
                '"UPDATE marks SET suspect = 1, deaths = deaths + alone,',
                '"UPDATE marks SET suspect = 1, deaths = deaths + 3,',
            ),
        ),
        ("tests/crash/test_probation.py",),
    ),
)


def run(plant: Plant) -> str | None:
    """Plant it in a copy and run the tests there; the first that fails, or None."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder)
        copy.chmod(0o755)  # one test runs as another user
        for name in ("eventbus", "tests", "examples", "docs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
            shutil.copy(ROOT / name, copy / name)
        for change in plant.changes:
            path = copy / change.file
            text = path.read_text()
            assert text.count(change.old) == 1, f"{plant.name}: {change.file} has changed"
            path.write_text(text.replace(change.old, change.new))
        tests = [test for test in plant.tests if (copy / test).exists()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": folder, "TMPDIR": folder}
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        found = re.search(r"^FAILED (\S+)", ended.stdout, re.MULTILINE)
        if found is None and ended.returncode != 0:  # not one test has failed: the copy cannot be tested at all
            raise RuntimeError(f"{plant.name}: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        return found[1] if found else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Plant them one after the other, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=__doc__)
    parser.add_argument("--only", action="append", help="names of faults; without it, all of them")
    options = parser.parse_args(arguments)
    missed = 0
    print("| planted fault | the test that caught it | seconds |\n|---|---|---|")
    for plant in PLANTS:
        if options.only and plant.name not in options.only:
            continue
        begun = time.monotonic()
        found = run(plant)
        missed += found is None
        shown = "**none**" if found is None else f"`{found}`"
        print(f"| {plant.name} | {shown} | {time.monotonic() - begun:.0f} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
