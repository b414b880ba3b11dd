"""Another process holds the write lock of the database, as somebody's own tool may: for a while, for long, stopped, killed.

The bus and the tool are two processes; what is waited for is that the bus's thread has come to the store, or was refused there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from eventbus import StoreBusy
from eventbus.stores import _sqlite_connection, sqlite
from tests.faults import held_lock
from tests.faults.held_lock import Placed, Shop
from tests.faults.locker import Locker


@pytest.fixture
def impatient() -> Iterator[None]:
    """The store waits for 0.2 s, not 5, for a lock."""
    with held_lock.waiting_for(200):
        yield


@pytest.fixture
def tool(db: str) -> Iterator[Locker]:
    """The tool; the database must be there before it is asked for anything."""
    with Locker(db) as tool:
        yield tool


async def test_a_lock_that_is_held_shortly_is_waited_for(db: str, tool: Locker) -> None:
    """A publish waits for it, and goes on."""
    shop = Shop(db)
    async with shop.bus, anyio.create_task_group() as tasks:
        tool.ask("write")
        tasks.start_soon(shop.bus.publish, Placed(0))
        await shop.store.wait_until_under_way()
        tool.ask("end")
        await shop.seen.wait_for(1)
        await shop.in_order(1)
        assert shop.store.refused.seen == []


@pytest.mark.usefixtures("impatient")
async def test_a_lock_that_is_held_for_long_is_told_of(db: str, tool: Locker) -> None:
    """A publish raises StoreBusy, which says what it is; nothing is stored of it, and as soon as the lock is free it works."""
    shop = Shop(db)
    async with shop.bus:
        await shop.bus.publish(Placed(0))
        await shop.seen.wait_for(1)
        await shop.bus.drain(10)
        tool.ask("write")
        with pytest.raises(StoreBusy, match="held the write lock for too long; look for an open transaction") as caught:
            await shop.bus.publish(Placed(99))
        assert db in str(caught.value)
        tool.ask("end")
        await shop.bus.publish(Placed(1))
        await shop.in_order(2)


@pytest.mark.usefixtures("impatient")
async def test_an_outcome_that_cannot_be_written_is_not_a_failure_of_the_handler(db: str, tool: Locker) -> None:
    """It is kept, and written when the lock is free; no attempt is started meanwhile, and then dispatch goes on by itself.

    "database is locked" taken for the handler's error: dbos-py #761.
    """
    shop = Shop(db)
    shop.gate = anyio.Event()
    async with shop.bus:
        for n in range(3):
            await shop.bus.publish(Placed(n))
        await shop.seen.wait_for(1)
        tool.ask("write")
        shop.gate.set()
        await shop.store.refused.wait_for(3)
        started = len(shop.seen.seen)
        await shop.store.refused.wait_for(5)
        assert len(shop.seen.seen) == started
        tool.ask("end")
        await shop.seen.wait_for(3)
        await shop.in_order(3)


@pytest.mark.usefixtures("impatient")
async def test_a_lock_that_outlasts_the_lease(db: str, tool: Locker) -> None:
    """A bus that could not renew its lease takes its lanes up again when it can."""
    shop = Shop(db, lease=1.0)
    async with shop.bus:
        await shop.bus.publish(Placed(0))
        await shop.seen.wait_for(1)
        await shop.bus.drain(10)
        tool.ask("write")
        for _ in range(8):  # each of them takes 0.2 s
            with pytest.raises(StoreBusy):
                await shop.bus.publish(Placed(99))
        tool.ask("end")
        await shop.bus.publish(Placed(1))
        await shop.seen.wait_for(2)
        await shop.in_order(2)


@pytest.mark.usefixtures("impatient")
async def test_a_tool_that_is_stopped_while_it_holds_the_lock(db: str, tool: Locker) -> None:
    """It is as if it held it for long: told of, and over when it goes on."""
    shop = Shop(db)
    async with shop.bus:
        tool.ask("write")
        tool.stop()
        with pytest.raises(StoreBusy):
            await shop.bus.publish(Placed(99))
        tool.go_on()
        tool.ask("end")
        await shop.bus.publish(Placed(0))
        await shop.in_order(1)


async def test_a_tool_that_is_killed_while_it_holds_the_lock(db: str, tool: Locker) -> None:
    """What waits for it goes on; what it had begun is undone."""
    shop = Shop(db)
    async with shop.bus, anyio.create_task_group() as tasks:
        tool.ask("write")
        tasks.start_soon(shop.bus.publish, Placed(0))
        await shop.store.wait_until_under_way()
        tool.kill()
        await shop.seen.wait_for(1)
        await shop.in_order(1)
        assert shop.store.refused.seen == []


@pytest.mark.usefixtures("impatient")
async def test_a_start_while_the_lock_is_held(db: str, tool: Locker) -> None:
    """A bus that cannot enter itself says why; once the lock is free, the same bus opens, and nothing was lost."""
    async with Shop(db).bus as bus:
        await bus.publish(Placed(0))
        await bus.drain(10)
    shop = Shop(db)
    tool.ask("write")
    with pytest.raises(StoreBusy, match="held the write lock"):
        async with shop.bus:
            pytest.fail("it opened")  # pragma: no cover
    tool.ask("end")
    async with shop.bus:
        await shop.bus.publish(Placed(1))
        await shop.seen.wait_for(1)
        assert await shop.bus.drain(10) == {}
    assert shop.seen.seen == [(1, 1)]


@pytest.mark.usefixtures("impatient")
async def test_leaving_while_the_lock_is_held(db: str, tool: Locker) -> None:
    """A bus that cannot write its last outcomes leaves all the same; what they settled is delivered again."""
    shop = Shop(db)
    async with shop.bus:
        await shop.bus.publish(Placed(0))
        await shop.bus.drain(10)
        shop.gate = anyio.Event()
        await shop.bus.publish(Placed(1))
        await shop.seen.wait_for(2)
        tool.ask("write")
        shop.gate.set()
    tool.ask("end")
    again = Shop(db)
    async with again.bus:
        await again.seen.wait_for(1)
        assert await again.bus.drain(10) == {}
        assert again.seen.seen == [(1, 1)]
        assert await again.bus.dead_letters.list() == []


async def test_a_reader_that_stays_open(db: str, tool: Locker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The WAL grows for as long as it is there, and nothing else happens; afterwards the file is as small as it was to be."""
    limit = 256 * 1024
    monkeypatch.setattr(_sqlite_connection, "JOURNAL_SIZE_LIMIT", limit)
    monkeypatch.setattr(sqlite, "WAL_PAGES", 20)
    wal = Path(f"{db}-wal")
    shop = Shop(db)
    count = 0
    async with shop.bus:
        await shop.bus.publish(Placed(count))
        await shop.bus.drain(10)
        tool.ask("read")
        while wal.stat().st_size < 4 * limit:
            count += 1
            await shop.bus.publish(Placed(count, "x" * 10_000))
        tool.ask("end")
        for _ in range(200):
            if wal.stat().st_size <= limit:
                break
            count += 1
            await shop.bus.publish(Placed(count, "x" * 1_000))
        assert wal.stat().st_size <= limit
        await shop.in_order(count + 1)


@pytest.mark.parametrize("number", range(4))
def test_any_course_of_it(number: int) -> None:
    """Held, stopped and killed in any order, between and during publishes: what was acknowledged is handled, once, and nothing else."""
    case = held_lock.case(1, number)
    assert not case.faults, case.told()
    assert case.checked
