"""How things stand: `status` of one event, `stats` of everything, and the stored subscriptions."""

from __future__ import annotations

import contextlib
import sqlite3
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import attrs
import pytest

from eventbus import Delivery, DeliveryStatus, Draft, EventBus, RetryPolicy, UnknownEvent
from tests.bus.support import NO_RETRY, MovableClock, Recorder


@attrs.frozen
class Placed:
    n: int


@attrs.frozen
class Shipped:
    n: int


ORDERS: dict[str, dict[str, Any]] = {
    "type": {"order": "type"},
    "key": {"order": "key", "concurrency": 4},
    "log": {"order": "log"},
    "none": {"order": "none", "concurrency": 4},
}
each_order = pytest.mark.parametrize("order", list(ORDERS))


# ------------------------------------------------------------------ status


@each_order
async def test_the_life_of_an_event(db: str, order: str) -> None:
    """Pending until an attempt was made, retrying while it waits for another, then handled."""
    bus, gate, attempts = EventBus(db), anyio.Event(), Recorder()

    @bus.subscribe(Placed, name="h", retry=RetryPolicy(first=1.0, jitter=0), **ORDERS[order])
    async def handler(_placed: Placed, delivery: Delivery) -> None:
        attempts.add(delivery.attempt)
        if delivery.attempt == 1:
            await gate.wait()
            raise ValueError("once")

    async with bus:
        receipt = await bus.publish(Placed(1), key="a")
        await attempts.wait_for(1)
        assert await bus.status(receipt.id) == {"h": DeliveryStatus.PENDING}
        gate.set()
        with anyio.fail_after(20):
            while (status := await bus.status(receipt.id)) == {"h": DeliveryStatus.PENDING}:  # no event tells
                await anyio.sleep(0.002)
        assert status == {"h": "retrying"}
        await receipt.handled(20)
        assert await bus.status(receipt.id) == {"h": "handled"}


@each_order
async def test_what_waits_behind_a_retry_is_pending(db: str, order: str) -> None:
    """Behind an event that is retried, the later ones of its lane or key are pending; others go on."""
    bus, seen = EventBus(db), Recorder()

    @bus.subscribe(Placed, name="h", retry=RetryPolicy(first=3600), **ORDERS[order])
    async def handler(placed: Placed) -> None:
        seen.add(placed.n)
        if placed.n == 1:
            raise ValueError("in an hour")

    async with bus:
        receipts = await bus.publish_many([Draft(Placed(n), key=n % 2) for n in range(5)])
        await bus.drain(0.1)
        statuses = [(await bus.status(receipt.id))["h"].value for receipt in receipts]
    expected = {
        "type": ["handled", "retrying", "pending", "pending", "pending"],
        "log": ["handled", "retrying", "pending", "pending", "pending"],
        "key": ["handled", "retrying", "handled", "pending", "handled"],
        "none": ["handled", "retrying", "handled", "handled", "handled"],
    }
    assert statuses == expected[order]


@each_order
async def test_dead_and_redriven(order: str) -> None:
    """A dead letter is dead; while it is redriven it counts as retrying; then it is handled."""
    bus, broken, gate, running = EventBus(":memory:"), True, anyio.Event(), anyio.Event()

    @bus.subscribe(Placed, name="h", retry=NO_RETRY, **ORDERS[order])
    async def handler(_placed: Placed) -> None:
        if broken:
            raise ValueError("dead")
        running.set()
        await gate.wait()

    async with bus:
        receipt = await bus.publish(Placed(1))
        await bus.drain(20)
        assert await bus.status(receipt.id) == {"h": "dead"}
        broken = False
        await bus.dead_letters.redrive(all=True)
        await running.wait()
        assert await bus.status(receipt.id) == {"h": "retrying"}
        gate.set()
        await bus.drain(20)
        assert await bus.status(receipt.id) == {"h": "handled"}


async def test_status_names_the_subscriptions_that_an_event_is_for(db: str) -> None:
    """Neither those of other types nor those that began after the event; those without a handler as well."""
    first = EventBus(db)
    first.subscribe(Placed, name="placed")(Recorder().note)
    first.subscribe(Shipped, name="shipped")(Recorder().note)
    first.subscribe("*", name="all")(Recorder().note)
    async with first:
        receipt = await first.publish(Placed(1))
        await first.drain(20)
        assert await first.status(receipt.id) == {"all": "handled", "placed": "handled"}
    second = EventBus(db)
    second.subscribe(Placed, name="late")(Recorder().note)
    async with second:
        other = await second.publish(Placed(2))
        await second.drain(20)
        assert await second.status(receipt.id) == {"all": "handled", "placed": "handled"}
        assert await second.status(other.id) == {"all": "pending", "late": "handled", "placed": "pending"}


async def test_status_of_scheduled_and_unknown_events() -> None:
    """A scheduled event is pending; one that is not there is an error that names it."""
    bus = EventBus(":memory:")
    bus.subscribe(Placed, name="h")(Recorder().note)
    async with bus:
        receipt = await bus.publish(Placed(1), due=timedelta(hours=1))
        assert await bus.status(receipt.id) == {"h": "pending"}
        await bus.cancel(receipt.id)
        for unknown in (receipt.id, "nonsense", ""):
            with pytest.raises(UnknownEvent, match=repr(unknown)):
                await bus.status(unknown)


# ------------------------------------------------------------------ stats


async def test_stats_of_the_log() -> None:
    """Head, events and next due time, and what was published since the bus was opened, by callers and by handlers."""
    bus = EventBus(":memory:")

    @bus.subscribe(Placed, name="h")
    async def handler(placed: Placed) -> Shipped:
        return Shipped(placed.n)

    async with bus:
        stats = await bus.stats()
        assert (stats.head, stats.events, stats.published, stats.pending, stats.next_due) == (0, 0, 0, 0, None)
        await bus.publish_many([Placed(n) for n in range(10)])
        due = datetime.now(UTC) + timedelta(hours=1)
        await bus.publish(Placed(99), due=due)
        await bus.drain(20)
        stats = await bus.stats()
        assert (stats.head, stats.events, stats.published, stats.pending) == (20, 20, 20, 0)
        assert stats.next_due == due


@each_order
async def test_stats_of_a_subscription(order: str) -> None:
    """Lag and its age, retrying, dead, running, handled and failed."""
    clock, bus_gate, seen = MovableClock(), anyio.Event(), Recorder()
    bus = EventBus(":memory:", clock=clock)
    retry = RetryPolicy(attempts=2, first=0.001, jitter=0)

    @bus.subscribe(Placed, name="h", retry=retry, **ORDERS[order])
    async def handler(placed: Placed, delivery: Delivery) -> None:
        if placed.n == 0:
            raise ValueError("dead")
        if placed.n == 2:
            seen.add(placed.n)
            await bus_gate.wait()

    async with bus:
        await bus.publish_many([Draft(Placed(n), key="a") for n in range(2)])
        assert await bus.drain(20) == {}
        idle = (await bus.stats()).subscriptions["h"]
        assert (idle.state, idle.reason) == ("running", None)
        assert (idle.lag, idle.lag_seconds, idle.retrying, idle.running, idle.stuck) == (0, 0.0, 0, 0, 0)
        assert (idle.dead, idle.handled, idle.failed) == (1, 1, 2)
        await bus.publish_many([Draft(Placed(n), key="a") for n in (2, 3, 4)])
        await seen.wait_for(1)
        clock.move(timedelta(minutes=5))
        with anyio.fail_after(20):
            while (busy := (await bus.stats()).subscriptions["h"]).lag != (1 if order == "none" else 3):
                await anyio.sleep(0.002)
        assert busy.running == 1
        assert 299 < busy.lag_seconds < 310
        bus_gate.set()
        assert await bus.drain(20) == {}


@each_order
async def test_lag_counts_what_waits_behind_a_retry(db: str, order: str) -> None:
    """Lag is every event that is not settled, whether it waits for a retry, behind one, or was not looked at yet."""
    clock = MovableClock()
    bus = EventBus(db, clock=clock)

    @bus.subscribe(Placed, name="h", retry=RetryPolicy(first=3600), **ORDERS[order])
    async def handler(placed: Placed) -> None:
        if placed.n == 0:
            raise ValueError("in an hour")

    async with bus:
        await bus.publish_many([Draft(Placed(n), key=n % 2) for n in range(10)])
        await bus.drain(0.1)
        clock.move(timedelta(minutes=5))
        stats = (await bus.stats()).subscriptions["h"]
        assert stats.lag == {"type": 10, "log": 10, "key": 5, "none": 1}[order]
        assert stats.retrying == 1
        assert 299 < stats.lag_seconds < 310


async def test_lag_is_counted_up_to_ten_thousand() -> None:
    """Counting stops at 10,000, so that `stats` stays quick however far behind a subscription is."""
    bus = EventBus(":memory:")
    bus.subscribe(Placed, name="h", order="key")(Recorder().note)
    async with bus.open(dispatch=False):
        for _ in range(3):
            await bus.publish_many([Draft(Placed(n), key=n) for n in range(4000)])
        stats = await bus.stats()
        assert stats.subscriptions["h"].lag == 10_000
        assert stats.events == 10_001
        assert stats.head == 12_000


async def test_a_stuck_thread_is_counted() -> None:
    """The thread of a plain handler that has outlived its timeout is reported as stuck until it returns."""
    import threading

    bus, let_go = EventBus(":memory:"), threading.Event()

    @bus.subscribe(Placed, name="h", timeout=0.02, retry=NO_RETRY)
    def handler(placed: Placed) -> None:
        if placed.n == 0:
            let_go.wait(5)

    async with bus:
        await bus.publish_many([Placed(0), Placed(1)])
        with anyio.fail_after(20):
            while (await bus.stats()).subscriptions["h"].stuck != 1:  # no event tells
                await anyio.sleep(0.005)
        let_go.set()
        assert await bus.drain(20) == {}
        stats = (await bus.stats()).subscriptions["h"]
        assert (stats.stuck, stats.dead, stats.handled) == (0, 1, 1)


async def test_subscriptions() -> None:
    """Names, types, options and states of all that are stored, by name."""
    bus = EventBus(":memory:")
    before = datetime.now(UTC)
    bus.subscribe(Placed, Shipped, name="b", order="key", concurrency=3)(Recorder().note)
    bus.subscribe("x.*", name="a", order="log")(Recorder().note)
    async with bus:
        a, b = await bus.subscriptions()
        assert (a.name, a.types, a.order, a.concurrency, a.state, a.reason) == ("a", ("x.*",), "log", 1, "running", None)
        assert (b.name, b.types, b.order, b.concurrency) == ("b", ("Placed", "Shipped"), "key", 3)
        assert before - timedelta(seconds=1) <= b.created_at <= datetime.now(UTC)
        await bus.pause("a")
        a, _ = await bus.subscriptions()
        assert (a.state, a.reason) == ("paused", "paused by hand")
        assert (await bus.stats()).subscriptions["a"].state == "paused"


async def test_what_is_cancelled_while_it_is_stored_takes_effect_here_too(db: str) -> None:
    """A cancelled `pause`, `resume`, `rewind` or `unsubscribe` is done whole or not at all: store and bus agree."""
    bus, seen = EventBus(db), Recorder()
    bus.subscribe(Placed, name="h")(seen.note)
    calls = [lambda: bus.pause("h"), lambda: bus.resume("h"), lambda: bus.rewind("h")]
    async with bus:
        await (await bus.publish(Placed(0))).handled(20)
        for n in range(1, 22):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(calls[n % 3])
                    for _ in range(n % 5):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
            (info,) = await bus.subscriptions()
            receipt = await bus.publish(Placed(n))
            if info.state == "running":
                await receipt.handled(20)
        await bus.resume("h")
        assert await bus.drain(20) == {}
        (info,) = await bus.subscriptions()
        assert info.state == "running"
    assert {placed.n for placed in seen.seen} == set(range(22))


async def test_the_tables_can_be_read_with_any_tool(db: str) -> None:
    """While the bus is closed, plain SQL shows what is stored, under the names of the glossary."""
    bus = EventBus(db)

    @bus.subscribe(Placed, name="h", retry=NO_RETRY)
    async def handler(placed: Placed) -> None:
        if placed.n == 1:
            raise ValueError("dead")

    async with bus:
        await bus.publish(Placed(0), idempotency_key="zero", key="a")
        await bus.publish(Placed(1))
        await bus.publish(Placed(2), due=timedelta(hours=1))
        await bus.drain(20)
    with contextlib.closing(sqlite3.connect(db)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert {
            "events",
            "subscriptions",
            "instances",
            "lanes",
            "deliveries",
            "dead_letters",
            "scheduled",
            "idempotency",
        } <= tables
        assert connection.execute("SELECT type, key, data FROM events ORDER BY position").fetchall() == [
            ("Placed", "a", '{"n":0}'),
            ("Placed", None, '{"n":1}'),
        ]
        assert connection.execute("SELECT subscription, lane, checkpoint FROM lanes").fetchall() == [("h", "Placed", 2)]
        assert connection.execute("SELECT subscription, error_type, error, data FROM dead_letters").fetchall() == [
            ("h", "ValueError", "dead", '{"n":1}')
        ]
        assert connection.execute("SELECT data FROM scheduled").fetchall() == [('{"n":2}',)]
        assert connection.execute("SELECT key FROM idempotency").fetchall() == [("zero",)]
        assert connection.execute("SELECT count(*) FROM instances").fetchone() == (0,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
