"""Idempotency keys: the same key again is the same event."""

from __future__ import annotations

from datetime import timedelta

import anyio
import attrs
import pytest

from eventbus import Delivery, Draft, EventBus, IdempotencyConflict
from tests.bus.support import GatedStore, MovableClock, Recorder


@attrs.frozen
class Paid:
    order: str
    cents: int = 0


@attrs.frozen
class Refunded:
    order: str
    cents: int = 0


async def count(bus: EventBus) -> int:
    return len([envelope async for envelope in bus.history()])


async def test_same_key_again(any_db: str) -> None:
    """The same key with the same content gives the first receipt, marked as a duplicate, and stores and delivers nothing."""
    bus, recorder = EventBus(any_db), Recorder()
    bus.subscribe(Paid)(recorder.note)
    async with bus:
        first = await bus.publish(Paid("o-1"), idempotency_key="k")
        again = await bus.publish(Paid("o-1"), idempotency_key="k")
        assert (again.id, again.position, again.duplicate) == (first.id, first.position, True)
        assert not first.duplicate
        await again.handled(timeout=20)
        await bus.drain(timeout=20)
        assert recorder.seen == [Paid("o-1")]
        assert await count(bus) == 1


async def test_across_a_restart(db: str) -> None:
    """A key is known after a restart."""
    async with EventBus(db) as bus:
        first = await bus.publish(Paid("o-1"), idempotency_key="k")
    async with EventBus(db) as bus:
        again = await bus.publish(Paid("o-1"), idempotency_key="k")
        assert (again.id, again.position, again.duplicate) == (first.id, first.position, True)


@pytest.mark.parametrize(
    "other",
    [Draft(Paid("o-1", 1)), Draft(Refunded("o-1")), Draft(Paid("o-1"), key="x")],
    ids=["content", "type", "key"],
)
async def test_other_content(other: Draft) -> None:
    """The same key for another content, type or key is a conflict that names the key and the first event; nothing is stored."""
    async with EventBus(":memory:") as bus:
        first = await bus.publish(Paid("o-1"), idempotency_key="k")
        with pytest.raises(IdempotencyConflict, match="'k'") as caught:
            await bus.publish(other.event, key=other.key, idempotency_key="k")
        assert (caught.value.key, caught.value.event_id) == ("k", first.id)
        assert await count(bus) == 1


async def test_other_headers() -> None:
    """Headers are no content: a retry with another trace is the same event."""
    async with EventBus(":memory:") as bus:
        await bus.publish(Paid("o-1"), idempotency_key="k", headers={"traceparent": "a"})
        again = await bus.publish(Paid("o-1"), idempotency_key="k", headers={"traceparent": "b"})
        assert again.duplicate


async def test_lengths() -> None:
    """Keys of 1 and of 255 characters of any script work."""
    async with EventBus(":memory:") as bus:
        for key in ("k", "🎉" * 255):
            assert not (await bus.publish(Paid("o-1"), idempotency_key=key)).duplicate
            assert (await bus.publish(Paid("o-1"), idempotency_key=key)).duplicate


async def test_many_at_once() -> None:
    """Of many publishers with the same key at the same time one stores the event, and all get its receipt."""
    receipts = []

    async def publish() -> None:
        receipts.append(await bus.publish(Paid("o-1"), idempotency_key="k"))

    async with EventBus(":memory:") as bus:
        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(publish)
        assert len({(receipt.id, receipt.position) for receipt in receipts}) == 1
        assert [receipt.duplicate for receipt in receipts].count(False) == 1
        assert await count(bus) == 1


async def test_in_one_group() -> None:
    """Within one publish_many the second use of a key is a duplicate of the first; between them others keep their order."""
    async with EventBus(":memory:") as bus:
        one, two, three = await bus.publish_many(
            [Draft(Paid("o-1"), idempotency_key="k"), Paid("o-2"), Draft(Paid("o-1"), idempotency_key="k")]
        )
        assert (three.id, three.position, three.duplicate) == (one.id, one.position, True)
        assert not one.duplicate
        assert not two.duplicate
        assert [envelope.event async for envelope in bus.history()] == [Paid("o-1"), Paid("o-2")]


@pytest.mark.parametrize("known", [True, False], ids=["known before", "twice in the group"])
async def test_conflict_in_a_group(known: bool) -> None:
    """One conflict in a group: nothing of the group is stored, and its other keys stay free."""
    async with EventBus(":memory:") as bus:
        if known:
            await bus.publish(Paid("o-1"), idempotency_key="k")
        group = [Draft(Paid("o-0"), idempotency_key="free"), Draft(Paid("o-1"), idempotency_key="k")]
        with pytest.raises(IdempotencyConflict):
            await bus.publish_many([*group, Draft(Paid("o-2"), idempotency_key="k")])
        assert await count(bus) == int(known)
        assert not (await bus.publish(Refunded("o-9"), idempotency_key="free")).duplicate


async def test_conflict_harms_no_other() -> None:
    """A conflict in a transaction that carries events of several callers is raised to its own caller alone."""
    store, outcomes = GatedStore(), Recorder()
    bus = EventBus(store)

    async def publish(event: object, key: str | None) -> None:
        try:
            await bus.publish(event, idempotency_key=key)
            outcomes.add("stored")
        except IdempotencyConflict:
            outcomes.add("conflict")

    async with bus, anyio.create_task_group() as group:
        await bus.publish(Paid("o-1"), idempotency_key="k")
        store.hold()
        group.start_soon(publish, Paid("first"), None)  # held in the store; the others gather behind it
        await store.arrived.wait_for(2)
        for event, key in [(Paid("a"), None), (Paid("o-2"), "k"), (Paid("b"), "new"), (Refunded("o-1"), "k"), (Paid("c"), None)]:
            group.start_soon(publish, event, key)
        await anyio.wait_all_tasks_blocked()
        store.release()
        await outcomes.wait_for(6)
        assert sorted(outcomes.seen) == ["conflict"] * 2 + ["stored"] * 4
        assert store.arrived.seen == [1, 1, 5]
        assert await count(bus) == 5


async def test_scheduled_events_have_keys() -> None:
    """A scheduled event takes its key at once: again, due or not, is a duplicate of it."""
    async with EventBus(":memory:") as bus:
        first = await bus.publish(Paid("o-1"), idempotency_key="k", due=timedelta(hours=1))
        for due in (timedelta(hours=1), timedelta(hours=2), None):
            again = await bus.publish(Paid("o-1"), idempotency_key="k", due=due)
            assert (again.id, again.position, again.duplicate) == (first.id, None, True)
        with pytest.raises(IdempotencyConflict):
            await bus.publish(Paid("o-2"), idempotency_key="k")
        assert await count(bus) == 0


async def test_scheduled_then_due() -> None:
    """When a scheduled event has entered the log, its key gives its position."""
    bus, recorder = EventBus(":memory:"), Recorder()
    bus.subscribe(Paid)(recorder.note)
    async with bus:
        first = await bus.publish(Paid("o-1"), idempotency_key="k", due=timedelta(milliseconds=10))
        await recorder.wait_for(1)
        again = await bus.publish(Paid("o-1"), idempotency_key="k")
        (envelope,) = [envelope async for envelope in bus.history()]
        assert (again.id, again.position, again.duplicate) == (first.id, envelope.position, True)


async def test_cancelled_events_free_their_key() -> None:
    """The key of an event that was cancelled before it was due can be used for another."""
    async with EventBus(":memory:") as bus:
        first = await bus.publish(Paid("o-1"), idempotency_key="k", due=timedelta(hours=1))
        assert await bus.cancel(first.id)
        assert not (await bus.publish(Paid("o-2"), idempotency_key="k")).duplicate


async def test_in_handlers(any_db: str) -> None:
    """A handler that publishes with a key that is known, for the same content, is acknowledged and stores nothing anew."""
    bus, recorder = EventBus(any_db), Recorder()

    @bus.subscribe(Paid)
    async def refund(paid: Paid, delivery: Delivery) -> None:
        delivery.publish(Refunded(paid.order), idempotency_key=f"refund-{paid.order}")

    bus.subscribe(Refunded)(recorder.note)
    async with bus:
        await bus.publish_many([Paid("o-1"), Paid("o-1"), Paid("o-2"), Paid("o-1")])
        assert await bus.drain(timeout=20) == {}
        assert recorder.seen == [Refunded("o-1"), Refunded("o-2")]
        assert await bus.dead_letters.list() == []


async def test_kept_for_dedup_for() -> None:
    """A key is kept for `dedup_for`, also when retention has removed its event, and is free afterwards."""
    clock = MovableClock()
    bus = EventBus(":memory:", clock=clock, retention=timedelta(minutes=1), dedup_for=timedelta(hours=1))
    async with bus:
        assert bus._running is not None
        first = await bus.publish(Paid("o-1"), idempotency_key="k")
        clock.move(timedelta(minutes=30))
        await bus._running.upkeep.prune()
        assert await count(bus) == 0
        assert (await bus.publish(Paid("o-1"), idempotency_key="k")).id == first.id
        clock.move(timedelta(minutes=31))
        await bus._running.upkeep.prune()
        assert not (await bus.publish(Paid("o-1"), idempotency_key="k")).duplicate
