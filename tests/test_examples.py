"""The examples do what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DATA = Path(os.environ.get("EVENTBUS_DATA", ROOT.parent / "shared" / "data")) / "github-webhooks.jsonl"

with_data = pytest.mark.skipif(not DATA.exists(), reason=f"the webhooks are not at {DATA}; EVENTBUS_DATA names their folder")


def run_example(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_quickstart_runs_twice_on_one_file(tmp_path: Path) -> None:
    """The second run finds the events of the first."""
    file = str(tmp_path / "shop.db")
    first = good(run_example("quickstart.py", file))
    assert first.splitlines()[0] == "1: OrderCreated(order_id='o-1', total=Decimal('9.50'))"
    assert f"2 events in {file}" in first
    assert f"4 events in {file}" in good(run_example("quickstart.py", file))


def test_a_worker_is_killed_and_another_goes_on(tmp_path: Path) -> None:
    """What one process publishes, another handles, also when that is killed meanwhile."""
    said = good(run_example("two_processes.py", str(tmp_path / "shop.db"))).splitlines()
    assert said == ["handled by a worker: o-0", "killed, started again, and handled: o-1 to o-100"]


@with_data
def test_the_webhooks_of_github_come_out_as_they_went_in() -> None:
    """All of them are handled, retried and dead-lettered as counted without the bus."""
    said = good(run_example("github_webhooks.py", str(DATA)))
    assert "search  handled       273" in said
    assert "the same as counted without the bus" in said


@with_data
def test_the_webhooks_repeated_still_hold() -> None:
    """Three thousand events hold as well."""
    said = good(run_example("github_webhooks.py", str(DATA), "--repeat-to", "3000", "--seed", "2"))
    assert "index   handled     3,000" in said


def webhook(number: int) -> str:
    """One made here, where the real ones are not there."""
    payload = {"repository": {"full_name": f"me/r{number % 3}"}, "größe": 2**53 + number, "nested": [{"a": None}]}
    return json.dumps({"event": "watch", "action": "started", "payload": payload}, ensure_ascii=False)


def test_webhooks_from_another_file(tmp_path: Path) -> None:
    """The example needs no certain file, and keeps the database it is given, once."""
    file, database = tmp_path / "own.jsonl", tmp_path / "kept.db"
    file.write_text("\n".join(webhook(n) for n in range(300)), encoding="utf-8")
    said = good(run_example("github_webhooks.py", str(file), "--db", str(database)))
    assert "of 3 repositories" in said
    assert database.exists()
    again = run_example("github_webhooks.py", str(file), "--db", str(database))
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_a_difference_is_found(tmp_path: Path) -> None:
    """A handler that swallows one event makes the example fail."""
    file, broken = tmp_path / "own.jsonl", tmp_path / "broken.py"
    file.write_text("\n".join(webhook(n) for n in range(300)), encoding="utf-8")
    source = (EXAMPLES / "github_webhooks.py").read_text(encoding="utf-8")
    line = "        self.done.index[event.repository].add(event.kind, event.delivery)\n"
    assert line in source
    broken.write_text(source.replace(line, f"        if event.delivery == 7:\n            return\n{line}"), encoding="utf-8")
    done = subprocess.run([sys.executable, str(broken), str(file)], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert "DIFFERENT" in done.stdout
