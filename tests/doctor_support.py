"""For the tests of `python -m eventbus doctor`: files made by a bus, programs beside it, and what the doctor says."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import msgspec

from eventbus import EventBus
from eventbus.__main__ import main
from eventbus.stores._sqlite_read import subscriptions
from eventbus.stores._sqlite_units import write_subscription
from tests import doctor_child
from tests.pages import ROOT


def run_doctor(path: object, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eventbus", "doctor", str(path), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)


def diagnose(path: object, *arguments: str) -> Mapping[str, Any]:
    """What it says, with its exit code checked. No bus is open in this process, so it may look from here."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["doctor", str(path), "--json", "--watch", "0.1", *arguments])
    said: Mapping[str, Any] = json.loads(out.getvalue())
    assert said["exit_code"] == code
    return said


def found(said: Mapping[str, Any]) -> dict[str, str]:
    """Codes and verdicts of all findings."""
    return {each["code"]: each["verdict"] for section in said["sections"].values() for each in section["findings"]}


def text_of(said: Mapping[str, Any], code: str) -> str:
    return next(f"{e['text']} → {e['do']}" for s in said["sections"].values() for e in s["findings"] if e["code"] == code)


def made(path: Path, *modes: str) -> Path:
    """A file that buses have made and closed."""
    for mode in modes:
        anyio.run(getattr(doctor_child, mode), EventBus(path, name="shop"))
    return path


@contextlib.contextmanager
def child(path: Path, mode: str, lease: float = 10.0) -> Iterator[subprocess.Popen[str]]:
    """A program in another process, ready; killed at the end."""
    command = [sys.executable, "-m", "tests.doctor_child", str(path), mode, str(lease)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def until(path: Path, code: str, seconds: float = 20) -> Mapping[str, Any]:
    """Ask again and again, until the finding is there."""
    end = time.monotonic() + seconds
    while True:
        said = diagnose(path)
        if code in found(said) or time.monotonic() > end:
            assert code in found(said), said
            return said


def change_subscriptions(path: Path, **changes: Any) -> None:
    """As a bus would, with their checksums."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for subscribed in subscriptions(connection):
            write_subscription(connection, msgspec.structs.replace(subscribed, **changes))


def change(path: Path, *statements: str) -> None:
    """As an accident, or a hand, would."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        for statement in statements:
            connection.execute(statement)
    finally:
        connection.close()


def sums(path: Path) -> dict[str, str]:
    return {
        each.name: hashlib.sha256(each.read_bytes()).hexdigest()
        for each in path.parent.iterdir()
        if each.name.startswith(path.name)
    }
