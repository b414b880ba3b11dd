"""A file whose tables do not hold together is refused, in words, before an event is lost by it."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from datetime import timedelta
from pathlib import Path

import anyio
import attrs
import pytest

from eventbus import EventBus, StoreCorrupt

pytestmark = pytest.mark.anyio


@attrs.frozen
class Noted:
    n: int


def bus_on(path: Path, handled: list[int]) -> EventBus:
    """A bus with one subscription, that removes old events at once when it is told to."""
    bus = EventBus(path)

    @bus.subscribe(Noted)
    async def note(it: Noted) -> None:
        handled.append(it.n)

    return bus


async def made(path: Path) -> list[int]:
    """A file with four events that were handled."""
    handled: list[int] = []
    async with bus_on(path, handled) as bus:
        await bus.publish_many([Noted(n) for n in range(4)])
        await bus.drain()
    return handled


async def opened(path: Path) -> None:
    """Open it, and close it."""
    async with bus_on(path, []):
        pass


def change(path: Path, script: str) -> None:
    """As a disk, or a hand, would."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(script)


PRUNED = "DELETE FROM events; UPDATE log_state SET pruned_to = 4;"
"""As retention leaves a file."""

LOWERED = "UPDATE sqlite_sequence SET seq = 2 WHERE name = 'events';"


@pytest.mark.parametrize("before", ["", PRUNED])
@pytest.mark.parametrize("damage", [LOWERED, "DELETE FROM sqlite_sequence;", "UPDATE sqlite_sequence SET seq = x'00';"])
async def test_positions_are_never_given_twice(tmp_path: Path, before: str, damage: str) -> None:
    """A log that would go on from a position it has given already is refused; as the error says, it can be mended, and then what
    is published is handled."""
    handled = await made(path := tmp_path / "a.db")
    change(path, before + damage)
    with pytest.raises(StoreCorrupt, match=r"sqlite_sequence|log_state") as caught:
        await opened(path)
    if "x'00'" in damage:  # no number any more: SQLite's own check tells of nothing, and the advice is a copy
        return
    change(path, re.search(r"execute: (.*)", str(caught.value))[1])  # type: ignore[index]
    async with bus_on(path, handled) as bus:
        receipt = await bus.publish(Noted(9))
        await bus.drain()
        assert receipt.position == 5
    assert handled == [0, 1, 2, 3, 9]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("DELETE FROM log_state", "rows of log_state"),
        ("UPDATE log_state SET changes = 0", "log_state.changes is 0"),
        ("DROP TABLE marks", "the table marks is gone"),
        ("DROP TABLE dead_letters", "the table dead_letters is gone"),
    ],
)
async def test_what_else_holds_the_tables_together(tmp_path: Path, damage: str, words: str) -> None:
    """Whatever is missing is named."""
    await made(path := tmp_path / "a.db")
    change(path, damage)
    with pytest.raises(StoreCorrupt, match=words):
        await opened(path)


def damage(path: Path, table: str, script: str) -> None:
    """Give a column a value of another type, as a flipped bit in a row's header does, and a STRICT table does not allow."""
    change(path, f"PRAGMA writable_schema = 1; UPDATE sqlite_schema SET sql = replace(sql, ' STRICT', '') WHERE name = '{table}'")
    change(path, script)
    change(path, f"PRAGMA writable_schema = 1; UPDATE sqlite_schema SET sql = sql || ' STRICT' WHERE name = '{table}'")


async def test_a_time_that_is_a_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A number of which a damaged file has made a text is told of, or an error of the bus, and no TypeError."""
    handled = await made(path := tmp_path / "a.db")
    async with bus_on(path, handled).open(dispatch=False) as bus:
        await bus.publish(Noted(5), due=timedelta(hours=1))
    damage(path, "scheduled", "UPDATE scheduled SET due_at = 'soon'")
    async with bus_on(path, handled):
        with anyio.fail_after(10):
            while "the rows of scheduled are not what they should be" not in caplog.text:
                await anyio.sleep(0.005)
    damage(path, "log_state", "UPDATE log_state SET pruned_to = 1, pruned_time = 'soon'")
    with pytest.raises(StoreCorrupt, match="log_state"):
        await opened(path)
