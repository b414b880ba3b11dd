"""Events that end the process: each is found and dead-lettered, and nothing else is taken for it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)  # each wait has a patience of its own, and says what did not come

ROOT = Path(__file__).parents[2]

PROGRAM = """
import os, signal, sys
import anyio, attrs
from eventbus import Draft, EventBus, event

DB, REPORT, ORDER, HOW, KILLERS = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], set(map(int, sys.argv[5].split(",")))
out = os.open(REPORT, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@event("shop.placed", key="owner")
@attrs.frozen
class Placed:
    n: int
    owner: str

bus = EventBus(DB)

def work(placed):
    os.write(out, f"{placed.n}\\n".encode())
    if placed.n in KILLERS:
        os.kill(os.getpid(), signal.SIGKILL)

async def asynchronous(placed: Placed) -> None:
    work(placed)

def plain(placed: Placed) -> None:
    work(placed)

async def slow(placed: Placed) -> None:
    await anyio.sleep(0)
    work(placed)

bus.subscribe(Placed, name="stock", order=ORDER)({"async": asynchronous, "plain": plain, "slow": slow}[HOW])

@bus.subscribe(Placed, name="other")
async def other(placed: Placed) -> None:
    await anyio.sleep(0)

async def main() -> None:
    if not os.path.exists(DB + ".published"):
        async with bus.open(dispatch=False):
            await bus.publish_many([Draft(Placed(n, str(n % 5))) for n in range(30)])
        open(DB + ".published", "w").close()
    async with bus:
        print(await bus.drain(30), flush=True)

anyio.run(main)
"""


def run(folder: Path, order: str, how: str, killers: str) -> int:
    command = [sys.executable, "-c", PROGRAM, folder / "a.db", folder / "report", order, how, killers]
    return subprocess.run(list(map(str, command)), cwd=ROOT, timeout=60, capture_output=True, check=False).returncode


def dead(folder: Path) -> list[tuple[str, int, str]]:
    with contextlib.closing(sqlite3.connect(folder / "a.db")) as connection:
        rows = connection.execute("SELECT subscription, data, error_type FROM dead_letters ORDER BY position").fetchall()
        (left,) = connection.execute("SELECT count(*) FROM marks").fetchone()
        assert connection.execute("SELECT sum(deaths) FROM lanes").fetchone() == (0,)
    assert left == 0
    return [(name, json.loads(data)["n"], error) for name, data, error in rows]


@pytest.mark.parametrize(
    ("order", "how"), [("type", "async"), ("log", "plain"), ("key", "slow"), ("key", "plain"), ("none", "slow")]
)
def test_an_event_that_kills_the_process(tmp_path: Path, order: str, how: str) -> None:
    """It is dead-lettered after five deaths: one that raises suspicion, one that marks it, three while it was alone. All others are
    handled, and none of them is dead-lettered."""
    deaths = 0
    while run(tmp_path, order, how, "17") != 0:
        deaths += 1
        assert deaths < 10
    assert dead(tmp_path) == [("stock", 17, "ProcessDied")]
    assert deaths == 5
    handled = Counter(map(int, (tmp_path / "report").read_text().split()))
    assert set(handled) == set(range(30))


def test_two_events_that_kill_the_process(tmp_path: Path) -> None:
    """Each of them is found."""
    deaths = 0
    while run(tmp_path, "none", "slow", "3,20") != 0:
        deaths += 1
        assert deaths < 20
    assert dead(tmp_path) == [("stock", 3, "ProcessDied"), ("stock", 20, "ProcessDied")]
