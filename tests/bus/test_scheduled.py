"""Events with `due`: stored now, delivered then."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import anyio
import attrs
import pytest

from eventbus import Delivery, Draft, Envelope, EventBus, UnknownEvent, WaitTimeout
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import GatedStore, Later, MovableClock, Recorder, until


@attrs.frozen
class Remind:
    text: str


@attrs.frozen
class Start:
    pass


@attrs.frozen
class Filler:
    pass


SOON = timedelta(milliseconds=50)
LATER = timedelta(hours=1)


async def history(bus: EventBus) -> list[Envelope]:
    return [envelope async for envelope in bus.history()]


@pytest.mark.parametrize("zone", [None, UTC, timezone(timedelta(hours=-7))], ids=str)
async def test_not_before_it_is_due(any_db: str, zone: timezone | None) -> None:
    """A scheduled event is delivered when it is due and not before, with that time as its own; `due` may be a span or a time."""
    bus, recorder = EventBus(any_db), Recorder()

    @bus.subscribe(Remind)
    async def take(remind: Remind, delivery: Delivery) -> None:
        recorder.add((datetime.now(UTC), delivery.envelope.time))

    async with bus:
        due = datetime.now(UTC) + SOON
        receipt = await bus.publish(Remind("a"), due=SOON if zone is None else due.astimezone(zone))
        assert receipt.position is None
        assert await history(bus) == []
        ((taken, time),) = await recorder.wait_for(1)
        assert due - timedelta(milliseconds=1) <= time <= taken
        (envelope,) = await history(bus)
        assert (envelope.id, envelope.event) == (receipt.id, Remind("a"))


async def test_order_of_due_times() -> None:
    """Scheduled events enter the log in the order of their due times, whatever the order of publishing."""
    bus, recorder = EventBus(":memory:"), Recorder()
    bus.subscribe(Remind)(recorder.note)
    async with bus:
        now = datetime.now(UTC)
        drafts = [Draft(Remind(str(n)), due=now + SOON + n * timedelta(milliseconds=15)) for n in (3, 1, 4, 0, 2)]
        await bus.publish_many(drafts)
        assert [remind.text for remind in await recorder.wait_for(5)] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("due", [timedelta(0), timedelta(days=-1), datetime(2020, 1, 1, tzinfo=UTC)], ids=str)
async def test_due_already(due: timedelta | datetime) -> None:
    """An event that is due already is delivered at once."""
    bus, recorder = EventBus(":memory:"), Recorder()
    bus.subscribe(Remind)(recorder.note)
    async with bus:
        await bus.publish(Remind("a"), due=due)
        await recorder.wait_for(1, timeout=20)


async def test_due_while_nobody_runs(db: str) -> None:
    """An event that became due while the bus was closed is delivered after the next start, once."""
    clock, recorder = MovableClock(), Recorder()
    bus = EventBus(db, clock=clock)
    bus.subscribe(Remind, name="take")(recorder.note)
    async with bus:
        await bus.publish_many([Draft(Remind("a"), due=LATER), Draft(Remind("b"), due=2 * LATER)])
    clock.move(LATER * 1.5)
    for _ in range(2):
        async with bus:
            await recorder.wait_for(1)
            await bus.drain(timeout=20)
            assert recorder.seen == [Remind("a")]
    clock.move(LATER)
    async with bus:
        assert await recorder.wait_for(2) == [Remind("a"), Remind("b")]


async def test_many_due_at_once() -> None:
    """Thousands of events due at one time are all delivered, in the order of publishing."""
    bus, recorder = EventBus(":memory:"), Recorder()
    bus.subscribe(Remind)(recorder.note)
    async with bus:
        due = datetime.now(UTC) + SOON
        await bus.publish_many([Draft(Remind(str(n)), due=due) for n in range(1200)])
        assert [remind.text for remind in await recorder.wait_for(1200)] == [str(n) for n in range(1200)]


async def test_cancel() -> None:
    """A cancelled event is never delivered; cancel says whether it was in time."""
    bus, recorder = EventBus(":memory:"), Recorder()
    bus.subscribe(Remind)(recorder.note)
    async with bus:
        kept = await bus.publish(Remind("kept"), due=timedelta(milliseconds=500))
        cancelled = await bus.publish(Remind("cancelled"), due=timedelta(milliseconds=500))
        assert await bus.cancel(cancelled.id) is True
        assert await bus.cancel(cancelled.id) is False
        await kept.handled(timeout=20)
        await bus.drain(timeout=20)
        assert recorder.seen == [Remind("kept")]
        assert await bus.cancel(kept.id) is False
        assert await bus.cancel("no such id") is False
        with pytest.raises(UnknownEvent):
            await bus.status(cancelled.id)


async def test_handled_waits_until_due() -> None:
    """`handled` of a scheduled event waits for it to be due and handled, or until it is cancelled."""
    bus, recorder, outcomes = EventBus(":memory:"), Recorder(), Recorder()
    bus.subscribe(Remind)(recorder.note)
    async with bus:
        receipt = await bus.publish(Remind("a"), due=SOON)
        await receipt.handled(timeout=20)
        assert recorder.seen == [Remind("a")]
        never = await bus.publish(Remind("b"), due=LATER)
        with pytest.raises(WaitTimeout):
            await never.handled(timeout=0.02)

        async def wait() -> None:
            try:
                await never.handled(timeout=20)
            except UnknownEvent:
                outcomes.add("unknown")
            except WaitTimeout:
                outcomes.add("timeout")

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            await bus.cancel(never.id)
        assert outcomes.seen == ["unknown"]


async def test_from_a_handler(any_db: str) -> None:
    """What a handler publishes with `due`, it too is delivered in time: by Delivery.publish, and as a returned Draft."""
    bus, recorder = EventBus(any_db), Recorder()

    @bus.subscribe(Start)
    async def begin(start: Start, delivery: Delivery) -> Draft:
        delivery.publish(Remind("published"), due=SOON)
        return Draft(Remind("returned"), due=2 * SOON)

    bus.subscribe(Remind)(recorder.note)
    async with bus:
        await bus.publish(Start())
        assert await recorder.wait_for(2, timeout=20) == [Remind("published"), Remind("returned")]


async def test_from_a_handler_as_another_comes_due(db: str) -> None:
    """What a handler schedules is delivered in time, also if it is stored together with the move of another into the log."""
    store, recorder, go_on = GatedStore(db), Recorder(), anyio.Event()
    bus = EventBus(store)

    @bus.subscribe(Start)
    async def begin(_start: Start, delivery: Delivery) -> None:
        await go_on.wait()
        delivery.publish(Remind("second"), due=SOON)

    bus.subscribe(Remind)(recorder.note)
    async with bus, anyio.create_task_group() as group:
        journal, upkeep = bus._running.journal, bus._running.upkeep  # type: ignore[union-attr]
        await (await bus.publish(Remind("before"), due=SOON)).handled(timeout=20)
        await bus.publish(Start())
        await bus.publish(Remind("first"), due=timedelta(milliseconds=300))
        await until(lambda: upkeep._due < math.inf)
        store.hold()
        group.start_soon(bus.publish, Filler())
        await store.arrived.wait_for(4)
        await until(lambda: journal._pending.commands)
        go_on.set()
        await until(lambda: journal._pending.units)
        store.release()
        assert await recorder.wait_for(3, timeout=20) == [Remind("before"), Remind("first"), Remind("second")]


async def test_cancelled_after_it_is_queued(any_db: str) -> None:
    """A scheduled event whose publisher was cancelled while it was being written is delivered in time, like any other."""
    store, recorder, scope = GatedStore(any_db), Recorder(), anyio.CancelScope()
    bus = EventBus(store)
    bus.subscribe(Remind)(recorder.note)

    async def publish(*events: Draft) -> None:
        with scope:
            await bus.publish_many(events)

    async with bus, anyio.create_task_group() as group:
        await (await bus.publish(Remind("before"), due=SOON)).handled(timeout=20)
        store.hold()
        group.start_soon(publish, Draft(Remind("a"), due=SOON), Draft(Remind("b"), due=2 * SOON))
        await store.arrived.wait_for(2)
        scope.cancel()
        store.release()
        assert await recorder.wait_for(3, timeout=20) == [Remind("before"), Remind("a"), Remind("b")]


async def test_a_cancelled_cancel() -> None:
    """Who waits for an event is told that it was cancelled, also if who did that was cancelled itself meanwhile."""
    bus, outcomes = EventBus(":memory:"), Recorder()
    async with bus, anyio.create_task_group() as group:
        receipt = await bus.publish(Remind("a"), due=LATER)

        async def wait() -> None:
            with pytest.raises(UnknownEvent):
                await receipt.handled()
            outcomes.add("unknown")

        group.start_soon(wait)
        await until(lambda: bus._running.dispatcher.promotions)  # type: ignore[union-attr]
        await bus.stats()  # read after what that waits for has been looked for
        with anyio.CancelScope() as scope:
            scope.cancel()
            await bus.cancel(receipt.id)
        assert scope.cancelled_caught
        assert await outcomes.wait_for(1, timeout=20) == ["unknown"]


async def test_the_next_one_changes() -> None:
    """An event that is due sooner than all before is not held up by them."""
    bus, recorder = EventBus(":memory:"), Recorder()
    bus.subscribe(Remind)(recorder.note)
    async with bus:
        far = datetime.now(UTC) + LATER
        await bus.publish(Remind("far"), due=far)
        next_due = (await bus.stats()).next_due
        assert next_due is not None
        assert abs(next_due - far) < timedelta(milliseconds=1)
        await bus.publish(Remind("near"), due=SOON)
        assert await recorder.wait_for(1, timeout=20) == [Remind("near")]


async def test_not_drained() -> None:
    """drain does not wait for events that are due later."""
    bus = EventBus(":memory:")
    bus.subscribe(Remind)(Recorder().note)
    async with bus:
        await bus.publish(Remind("a"), due=LATER)
        assert await bus.drain(timeout=20) == {}


async def test_subscribed_before_it_is_due(db: str) -> None:
    """An event is for the subscriptions that exist when it is due, since its position is given then."""
    clock, recorder = MovableClock(), Recorder()
    async with EventBus(db, clock=clock) as bus:
        await bus.publish(Remind("a"), due=LATER)
    late = EventBus(db, clock=clock)
    late.subscribe(Remind, name="late")(recorder.note)
    async with late:
        pass
    clock.move(2 * LATER)
    async with late:
        await recorder.wait_for(1)


async def test_damaged_while_it_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A scheduled event of which the disk has made one of another type is told of when its time comes, since those who subscribe
    to the type that it had cannot come upon it; who subscribes to all has it as a dead letter."""
    path = tmp_path / "a.db"
    async with EventBus(path) as bus:
        receipt = await bus.publish(Remind("a"), due=timedelta(hours=1))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE scheduled SET type = type || 'x'")
    bus = EventBus(SQLiteStore(path), clock=Later(7_200))
    got: list[object] = []
    bus.subscribe(Remind, name="one")(got.append)
    bus.subscribe("*", name="all")(got.append)
    async with bus:
        with anyio.fail_after(10):
            while not (dead := await bus.dead_letters.list()):
                await anyio.sleep(0.005)
    assert got == []
    assert [(letter.subscription, letter.envelope.id) for letter in dead] == [("all", receipt.id)]
    assert f"scheduled event {receipt.id} has come into the log damaged" in caplog.text
