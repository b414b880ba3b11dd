"""`python -m eventbus doctor`: each thing that it finds, on files made by a bus, running, stopped and killed; and that it changes
nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from eventbus.__main__ import main
from eventbus.cli import doctor_file, doctor_processes, doctor_report, doctor_subscriptions
from eventbus.cli.doctor_report import WIDTH, Report, Section, duration, few, lines_of, size
from eventbus.stores import _sqlite_file
from eventbus.stores.sqlite_inspect import Inspection, loses_commits
from tests.doctor_support import change, change_subscriptions, child, diagnose, found, made, run_doctor, sums, text_of, until
from tests.pages import first_cells, page


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "shop.db"


# ------------------------------------------------------------------ what is well


def test_a_file_that_nobody_has_open(db: Path) -> None:
    """All is well, every section says so, and no file is changed, made or removed."""
    before = sums(made(db, "publishes"))
    ran = run_doctor(db, "--watch", "0", "--full")
    assert ran.returncode == 0, ran.stdout
    for name in ("sqlite", "file", "health", "instances"):
        assert re.search(rf"^{name} +ok$", ran.stdout, re.MULTILINE)
    assert sqlite3.sqlite_version in ran.stdout
    assert "integrity_check: ok" in ran.stdout
    assert "3 events" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("fine (0). First: nothing has to be done")
    assert sums(db) == before


def test_a_running_bus(db: Path) -> None:
    """It is there, alive, with its lanes; nothing is wrong."""
    with child(db, "waits") as process:
        before = sums(db)
        said = diagnose(db)
        assert (said["exit_code"], said["verdict"], found(said)) == (0, "ok", {})
        (one,) = said["sections"]["instances"]["facts"]["instances"]
        assert (one["pid"], one["name"], one["state"], one["lanes"], one["serves"]) == (
            process.pid,
            "shop",
            "alive",
            1,
            ["stock"],
        )
        assert 0 < one["lease_left_seconds"] <= 10
        assert said["sections"]["file"]["facts"]["journal_mode"] == "wal"
        assert {**sums(db), "shop.db-wal": "", "shop.db-shm": ""} == {**before, "shop.db-wal": "", "shop.db-shm": ""}


def test_the_text_fits_its_columns_whatever_is_stored(db: Path) -> None:
    """Also long errors; what would move the cursor is shown as what it is."""
    ran = run_doctor(made(db, "fails"), "--watch", "0")
    assert max(map(len, ran.stdout.splitlines())) <= WIDTH
    section = Section("health")
    section.trouble("corrupt", "x" * 500 + "\x1b[2J", "wörd " * 100)
    assert all(len(line) <= WIDTH for line in lines_of(Report("/p", 0.0, [section])))
    assert "\x1b" not in "".join(lines_of(Report("/p", 0.0, [section])))


def test_the_trouble_that_is_told_first_is_the_first_that_was_found() -> None:
    """Troubles go before notes; the last line says what to do."""
    one, two = Section("file"), Section("health")
    one.note("wal-large", "large", "wait")
    two.trouble("corrupt", "broken", "restore it")
    report = Report("/p", 0.0, [one, two])
    assert (report.exit_code, report.first()) == (1, "restore it")
    assert list(lines_of(report))[-1] == "trouble (1). First: restore it"


# ------------------------------------------------------------------ processes


def test_a_process_that_was_killed(db: Path) -> None:
    """The row it left is a note, its WAL is read, and no file is changed, not even -shm."""
    with child(db, "waits") as process:
        process.kill()
        process.wait()
        before = sums(db)
        said = diagnose(db)
    assert said["exit_code"] == 0
    assert found(said) == {"instance-dead": "note"}
    assert said["sections"]["health"]["facts"]["checked"]["events"] == 20
    assert sums(db) == before


def test_a_process_that_is_stopped(db: Path) -> None:
    """While its lease lasts it holds its lanes: trouble, with its number and what to do."""
    with child(db, "waits", lease=600) as process:
        process.send_signal(signal.SIGSTOP)
        said = until(db, "instance-stopped")
        assert said["exit_code"] == 1
        assert f"kill -CONT {process.pid}" in said["first"]
        assert run_doctor(db, "--watch", "0").stdout.splitlines()[-1].startswith("trouble (1). First: kill -CONT")


def test_a_process_that_is_stopped_and_forgotten(db: Path) -> None:
    """Its row is gone, since its lease had ended and others have removed it; it may hold locks all the same."""
    with child(db, "waits") as process:
        process.send_signal(signal.SIGSTOP)
        change(db, "DELETE FROM instances")
        assert f"process {process.pid}" in text_of(until(db, "process-stopped"), "process-stopped")


def test_a_process_whose_event_loop_hangs(db: Path) -> None:
    """It lives, and its lease has ended."""
    with child(db, "hangs", lease=0.5) as process:
        said = until(db, "lease-ended")
        assert said["exit_code"] == 1
        assert f"process {process.pid}" in text_of(said, "lease-ended")
        assert said["sections"]["instances"]["facts"]["instances"][0]["state"] == "late"


def test_a_lock_file_that_was_deleted(db: Path) -> None:
    """Those who have the bus open refuse to write: trouble."""
    with child(db, "waits"):
        Path(f"{db}-lock").unlink()
        assert found(diagnose(db))["lock-missing"] == "trouble"


def test_another_program_that_holds_the_write_lock(db: Path) -> None:
    """It is named, as one that has the file open, and as the one that keeps all others from writing."""
    made(db, "publishes")
    with child(db, "holds") as process:
        said = diagnose(db)
        assert found(said) == {"not-running": "note", "other-programs": "note", "write-lock-held": "trouble"}
        assert f"process {process.pid}" in text_of(said, "write-lock-held")
        assert {"kind": "write", "pid": process.pid} in said["sections"]["instances"]["facts"]["locks_held_all_the_time"]


def test_a_bus_that_writes_all_the_time_does_not_hold_the_lock(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is found taken each time is no trouble as long as something is committed."""
    with child(made(db, "publishes"), "holds") as process:
        held = frozenset({doctor_processes.Held(process.pid, "write")})

        def write_and_look(_path: str) -> frozenset[doctor_processes.Held]:
            process.kill()
            process.wait()
            change(db, "UPDATE log_state SET changes = changes + 1")
            return held

        monkeypatch.setattr("eventbus.cli.doctor_watch.locks_of", write_and_look)
        assert main(["doctor", str(db), "--watch", "0"]) == 0


def test_another_program_that_only_reads(db: Path) -> None:
    """A note."""
    with child(made(db, "publishes"), "reads") as process:
        said = diagnose(db)
        assert found(said)["other-programs"] == "note"
        (other,) = said["sections"]["instances"]["facts"]["other_processes"]
        assert (other["pid"], said["exit_code"]) == (process.pid, 0)


# ------------------------------------------------------------------ subscriptions


def test_events_that_wait_for_a_bus_to_be_started(db: Path) -> None:
    """A note, with how many."""
    said = diagnose(made(db, "publishes"))
    assert (found(said), said["exit_code"]) == ({"not-running": "note"}, 0)
    facts = said["sections"]["subscriptions"]["facts"]["subscriptions"]["stock"]
    assert (facts["lag"], facts["order"], facts["served_by"], facts["paused"]) == (3, "type", [], None)
    assert [lane["lag"] for lane in facts["lanes"]] == [3]


def test_a_subscription_that_no_running_bus_has(db: Path) -> None:
    """Trouble if events wait."""
    with child(made(db, "publishes"), "idles"):
        assert found(diagnose(db)) == {"not-served": "trouble"}


def test_a_subscription_that_no_running_bus_has_and_nothing_waits(db: Path) -> None:
    """A note."""
    with child(made(db, "pauses"), "idles"):
        change_subscriptions(db, paused=None, paused_at=None)
        assert found(diagnose(db)) == {"not-served": "note"}


def test_lanes_that_nobody_has_taken(db: Path) -> None:
    """A bus that serves them is there, and they are nobody's: trouble."""
    with child(db, "hangs", lease=600):
        made(db, "publishes")
        change(db, "UPDATE lanes SET owner = NULL")
        said = diagnose(db)
        assert found(said) == {"orphans": "trouble"}
        assert said["sections"]["subscriptions"]["facts"]["subscriptions"]["stock"]["orphans"] == ["doctor.placed"]


def test_a_lane_that_does_not_move(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note where one has looked for a moment, trouble where one has looked for a minute."""
    with child(db, "is_slow"):
        assert found(diagnose(db)) == {"not-moving": "note"}
        monkeypatch.setattr(doctor_subscriptions, "PATIENCE", 0.0)
        assert main(["doctor", str(db), "--watch", "0"]) == 1


def test_a_handler_that_has_outlived_its_timeout(db: Path) -> None:
    """What only its own process can know is told with its lease."""
    with child(db, "is_stuck", lease=0.5) as process:
        said = until(db, "stuck-handlers")
        assert said["exit_code"] == 1
        assert f"--pid {process.pid}" in text_of(said, "stuck-handlers")


def test_an_event_that_nobody_can_decode(db: Path) -> None:
    """Its lane waits for a program that knows the version: trouble."""
    with child(made(db, "publishes_later"), "is_old", lease=0.5):
        said = until(db, "cannot-decode")
        assert found(said) == {"cannot-decode": "trouble"}


def test_a_bus_of_another_deployment(db: Path) -> None:
    """One that declares another order than is stored waits: a note."""
    with child(db, "waits"):
        change_subscriptions(db, concurrency=7)
        assert found(diagnose(db)) == {"other-deployment": "note"}


def test_a_paused_subscription(db: Path) -> None:
    """A note, and trouble once events wait."""
    said = diagnose(made(db, "pauses"))
    assert found(said) == {"paused": "note"}
    said = diagnose(made(db, "publishes"))
    assert found(said) == {"paused": "trouble", "not-running": "note"}
    assert "bus.resume('stock')" in said["first"]


def test_failures(db: Path) -> None:
    """Dead letters and retries are notes, with their errors."""
    said = diagnose(made(db, "fails"))
    assert (found(said), said["exit_code"]) == ({"dead-letters": "note", "retrying": "note", "not-running": "note"}, 0)
    assert "no address 2" in text_of(said, "dead-letters")
    assert "the shelf is gone" in text_of(said, "retrying")
    (newest, _) = said["sections"]["subscriptions"]["facts"]["dead_letters"]["mailer"]["newest"]
    assert (newest["type"], newest["position"], newest["redriving"]) == ("doctor.placed", 2, False)


# ------------------------------------------------------------------ the place


def test_a_network_file_system(db: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trouble, wherever the file came from."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 1 0:1 / {tmp_path} rw - nfs4 server:/x rw\n")
    monkeypatch.setattr(_sqlite_file, "MOUNTINFO", str(mounts))
    assert verdicts_of(doctor_file.file_section(str(made_without_check(db, monkeypatch)))) == {"network-file-system": "trouble"}


def made_without_check(db: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_sqlite_file, "refuse_network", lambda _path: None)
    return made(db, "publishes")


def verdicts_of(section: Section) -> dict[str, str]:
    return {finding.code: finding.verdict for finding in section.findings}


@pytest.mark.parametrize(
    ("free", "expected"), [(2**40, {}), (2**28, {"disk-nearly-full": "note"}), (2**20, {"disk-full": "trouble"})]
)
def test_room_on_the_disk(free: int, expected: dict[str, str], db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is a note, none is trouble."""
    made(db, "publishes")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(2**41, 0, free))
    assert verdicts_of(doctor_file.file_section(str(db))) == expected


def test_a_file_that_others_may_read(db: Path) -> None:
    """A note."""
    made(db, "publishes").chmod(0o644)
    said = diagnose(db)
    assert found(said) == {"others-may-read": "note", "not-running": "note"}
    assert "chmod 600" in text_of(said, "others-may-read")


def test_a_wal_that_has_grown(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note, and who keeps it so."""
    monkeypatch.setattr("eventbus.cli.doctor_file.LARGE_WAL", 1000)
    with child(db, "waits"):
        assert verdicts_of(doctor_file.file_section(str(db))) == {"wal-large": "note"}


def test_another_journal_mode(db: Path) -> None:
    """Somebody has changed it: with a rollback journal a bus's reader blocks its writer."""
    with child(made(db, "publishes"), "reads"):
        pass  # leaves -wal and -shm
    change(db, "PRAGMA journal_mode = DELETE")
    with Inspection(str(db), quiet=False) as inspection:
        section = Section("file")
        doctor_file.header(section, inspection)
    assert verdicts_of(section) == {"journal-mode": "trouble"}


# ------------------------------------------------------------------ how it looks


def test_a_quiet_look_is_taken_again_if_somebody_comes_in_between(db: Path) -> None:
    """What is read without locks holds only if nobody has written."""
    made(db, "publishes")
    with Inspection(str(db)) as inspection:
        assert inspection.quiet
    assert inspection.undisturbed()
    with Inspection(str(db)) as inspection, child(db, "idles"):
        pass
    assert not inspection.undisturbed()
    with child(db, "idles"), Inspection(str(db)) as inspection:
        assert not inspection.quiet


def test_nothing_can_be_written_through_an_inspection(db: Path) -> None:
    """Whichever way the file is opened."""
    made(db, "publishes")
    for quiet in (True, False):
        with Inspection(str(db), quiet=quiet) as inspection, pytest.raises(Exception, match="readonly"):
            inspection.column("DELETE FROM events RETURNING position")


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((4, 0, 0), False),
    ],
)
def test_which_sqlite_can_lose_commits(version: tuple[int, ...], affected: bool) -> None:
    """3.7.0 to 3.51.2, but for 3.44.6 and 3.50.7."""
    assert loses_commits(version) is affected


def test_a_reader_that_has_read_enough(db: Path) -> None:
    """`python -m eventbus doctor … | head -1` ends without a traceback."""
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-m", "eventbus", "doctor", str(db)], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_numbers_in_words() -> None:
    """Units that fit."""
    assert [size(n) for n in (0, 1023, 1536, 2**20, 5 * 2**30)] == ["0 bytes", "1,023 bytes", "1.5 KiB", "1.0 MiB", "5.0 GiB"]
    assert [duration(n) for n in (0, 1.5, 59, 120, 7200, 10**6)] == ["0 s", "1.5 s", "59 s", "2 min", "2 h", "12 d"]
    assert few([str(n) for n in range(7)]) == "0, 1, 2, 3, 4 and 2 more"


# ------------------------------------------------------------------ the page


_DAMAGED = ("events", "scheduled", "subscriptions", "lanes", "deliveries", "dead-letters")


def test_the_page_lists_every_finding() -> None:
    """Codes are stable, and documented; the page lists them and no others."""
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(doctor_report.__file__).parent.glob("doctor*.py"))
    codes = set(re.findall(r'(?:\.note|\.trouble|Finding)\(\s*"([a-z-]+)"', sources))
    codes |= {f"damaged-{table}" for table in _DAMAGED} | {"rows-…"}
    sections = {section.title: first_cells(section.text) for section in page("docs/reference/doctor.md").sections()}
    assert {code for cells in (sections["Findings"], sections["It cannot be looked at"]) for code in cells} == codes


def test_the_page_lists_every_key(db: Path) -> None:
    """Of the whole, of each section, and of an instance, a subscription and a lane."""
    with child(made(db, "fails"), "idles"):
        said = diagnose(db)
    sections = {section.title: first_cells(section.text) for section in page("docs/reference/doctor.md").sections()}
    assert sections["The whole"] == list(said)
    for name, section in said["sections"].items():
        assert sections[f"`{name}`"] == list(section["facts"]), name
    instance = said["sections"]["instances"]["facts"]["instances"][0]
    subscription = next(iter(said["sections"]["subscriptions"]["facts"]["subscriptions"].values()))
    assert sections["An instance"] == list(instance)
    assert sections["A subscription"] == list(subscription)
    assert sections["A lane"] == list(subscription["lanes"][0])
