"""`python -m eventbus doctor` on files that are damaged, old, or none of a bus."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from eventbus.__main__ import main
from eventbus.stores.sqlite_inspect import VERSION
from tests.doctor_support import change, child, diagnose, found, made, run_doctor, text_of
from tests.first_version import to_first_version
from tests.pages import ROOT


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "shop.db"


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    ("statement", "code", "where"),
    [
        ("UPDATE events SET data = '{\"n\":9}' WHERE position = 2", "damaged-events", "position 2"),
        ("UPDATE events SET headers = CAST(x'ff' AS TEXT) WHERE position = 2", "damaged-events", "position 2"),
        ("UPDATE lanes SET checkpoint = 1 WHERE subscription = 'mailer'", "damaged-lanes", "'mailer'"),
        ("UPDATE dead_letters SET key = 'x' WHERE id = 2", "damaged-dead-letters", "id 2"),
        ("UPDATE scheduled SET type = 'y'", "damaged-scheduled", "id "),
        ("UPDATE subscriptions SET concurrency = 9 WHERE name = 'mailer'", "damaged-subscriptions", "'mailer'"),
        ("UPDATE subscriptions SET since = '{' WHERE name = 'mailer'", "damaged-subscriptions", "'mailer'"),
        (
            "INSERT INTO deliveries VALUES ('stock', 1, 'doctor.placed', NULL, 'retrying', 1, 0, NULL, NULL, 5)",
            "damaged-deliveries",
            "position 1",
        ),
    ],
)
def test_a_row_that_is_not_what_was_written(statement: str, code: str, where: str, db: Path) -> None:
    """Its checksum tells, and the row is named."""
    change(made(db, "fails", "schedules"), statement)
    said = diagnose(db)
    assert found(said)[code] == "trouble"
    assert where in text_of(said, code)
    (damaged,) = said["sections"]["health"]["facts"]["damaged"]
    assert where in damaged["where"]


def test_only_the_newest_events_are_looked_at_unless_all_are_asked_for(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--full` takes all."""
    change(made(db, "publishes"), "UPDATE events SET key = 'x' WHERE position = 1")
    monkeypatch.setattr("eventbus.cli.doctor_health.NEWEST", 2)
    assert main(["doctor", str(db), "--watch", "0"]) == 0
    assert main(["doctor", str(db), "--watch", "0", "--full"]) == 1


def test_a_file_with_a_broken_page(db: Path) -> None:
    """The structure is checked; what can be read is told all the same, and nothing is raised."""
    made(db, "fails", "publishes")
    connection = sqlite3.connect(db)
    (page_bytes,), (root,) = (
        connection.execute(text).fetchone()
        for text in ("PRAGMA page_size", "SELECT rootpage FROM sqlite_master WHERE name = 'events'")
    )
    connection.close()
    broken = bytearray(db.read_bytes())
    broken[(root - 1) * page_bytes : root * page_bytes] = b"\x5a" * page_bytes
    db.write_bytes(broken)
    ran = run_doctor(db, "--watch", "0")
    assert (ran.returncode, ran.stderr) == (1, "")
    assert "TROUBLE: the file is damaged" in ran.stdout or "TROUBLE: quick_check cannot be read" in ran.stdout
    assert "3.0 KiB" not in ran.stdout.splitlines()[-1]


def test_every_page_of_a_file_may_be_broken(db: Path) -> None:
    """Whichever it is, doctor says something, and raises nothing."""
    original = made(db, "fails", "schedules").read_bytes()
    page_bytes = int.from_bytes(original[16:18])
    codes = set()
    for number in range(len(original) // page_bytes):
        broken = bytearray(original)
        broken[number * page_bytes : (number + 1) * page_bytes] = os.urandom(page_bytes)
        db.write_bytes(broken)
        code = main(["doctor", str(db), "--watch", "0", "--json"])
        codes.add(code)
    assert codes <= {0, 1, 2}  # 0: the page of an index that is empty, or free
    assert codes >= {1, 2}


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE sqlite_sequence SET seq = 1 WHERE name = 'events'", "last position is 1"),
        ("DELETE FROM sqlite_sequence", "last position is 0"),
        ("DROP TABLE marks", "the table marks is gone"),
        ("UPDATE log_state SET changes = 0", "log_state.changes is 0"),
    ],
)
def test_tables_that_do_not_hold_together(statement: str, words: str, db: Path) -> None:
    """No bus opens such a file; it is told why."""
    change(made(db, "fails", "publishes"), statement)
    for full in ((), ("--full",)):
        said = diagnose(db, *full)
        assert found(said)["unsound"] == "trouble"
        assert words in text_of(said, "unsound")


def test_a_row_that_is_gone(db: Path) -> None:
    """Where there is one, and it is not there, what cannot be asked is told."""
    change(made(db, "fails"), "DELETE FROM log_state")
    ran = run_doctor(db, "--watch", "0")
    assert (ran.returncode, ran.stderr) == (1, "")
    assert "the rows of log_state are not what they should be" in " ".join(ran.stdout.split())


@pytest.mark.parametrize("mode", ["publishes", "never"])
@pytest.mark.parametrize("with_shm", [False, True])
def test_a_wal_that_no_bus_will_open(mode: str, with_shm: bool, db: Path) -> None:
    """Trouble, and what to do: also where SQLite would find nothing in the file, since all of it stands beyond the break."""
    with child(db, "waits") as process:
        process.kill()
        process.wait()
    wal = Path(f"{db}-wal")
    data = bytearray(wal.read_bytes())
    data[32 + 24 + 100 if mode == "never" else len(data) // 2] ^= 1
    wal.write_bytes(data)
    if not with_shm:
        Path(f"{db}-shm").unlink()
    said = diagnose(db)
    assert (said["exit_code"], found(said)["damaged-wal"]) == (1, "trouble")
    assert "wal_checkpoint(TRUNCATE)" in text_of(said, "damaged-wal")
    assert said["first"] == "copy the file and its -wal; then as said here"


# ------------------------------------------------------------------ what cannot be looked at


def _another_program(db: Path) -> None:
    change(db, "CREATE TABLE events (name)", "PRAGMA user_version = 3")


def _newer(db: Path) -> None:
    change(made(db, "publishes"), f"PRAGMA user_version = {VERSION + 1}")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _db: None, "there is no such file"),
        (lambda db: db.mkdir(), "is a directory"),
        (os.mkfifo, "is no file"),
        (lambda db: db.write_text("a letter, not a database" * 100), "not an SQLite database"),
        (lambda db: db.write_bytes(b""), "has no tables of a bus"),
        (_another_program, "database of another program"),
        (_newer, "written by a newer eventbus"),
    ],
)
def test_what_cannot_be_looked_at(make: Callable[[Path], object], words: str, db: Path) -> None:
    """Exit code 2, and words for it; nothing is made."""
    make(db)
    before = sorted(db.parent.iterdir())
    ran = run_doctor(db)
    assert (ran.returncode, ran.stderr) == (2, "")
    assert words in " ".join(ran.stdout.split())
    assert "could not look (2). First: " in ran.stdout.splitlines()[-1] + ran.stdout.splitlines()[-2]
    said = diagnose(db)
    assert (said["verdict"], words in said["unreadable"]["text"]) == ("unreadable", True)
    assert sorted(db.parent.iterdir()) == before


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """It says which."""
    ran = run_doctor(tmp_path / "none" / "shop.db")
    assert ran.returncode == 2
    assert "there is no directory" in " ".join(ran.stdout.split())


def test_a_file_that_may_not_be_read() -> None:
    """Another user is told to be the one that the bus runs as."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # which everybody may enter
    try:
        folder.chmod(0o755)
        path = made(folder / "shop.db", "publishes")
        path.chmod(0o000)
        program = (
            "import os, sys; from eventbus.__main__ import main; os.getuid() or os.setuid(65534); sys.exit(main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", program, "doctor", str(path)]  # an interpreter that only root may run is loaded as root
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
        assert ran.returncode == 2, ran.stderr
        assert "may not be read by this user" in " ".join(ran.stdout.split())
    finally:
        shutil.rmtree(folder)


def test_tables_of_an_older_version(db: Path) -> None:
    """A note; its health is looked at, its instances are not."""
    to_first_version(made(db, "fails", "schedules"))
    said = diagnose(db)
    assert found(said) == {"tables-old": "note"}
    assert said["sections"].keys() == {"sqlite", "file", "health"}
    change(db, "UPDATE lanes SET checkpoint = 1 WHERE subscription = 'mailer'")
    assert found(diagnose(db)) == {"tables-old": "note", "damaged-lanes": "trouble"}


@pytest.mark.parametrize("watch", ["-1", "nan"])
def test_a_time_that_cannot_be_watched(watch: str, db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is looked at."""
    assert main(["doctor", str(db), f"--watch={watch}"]) == 2
    assert "expected a number of seconds" in capsys.readouterr().out
