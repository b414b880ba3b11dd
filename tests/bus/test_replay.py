"""History again: `replay` delivers it beside live events, `rewind` has it handled as if it were new, `history` only reads it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from eventbus import (
    BusNotOpen,
    ConfigurationError,
    Delivery,
    Envelope,
    EventBus,
    RangeNotRetained,
    ReplaySummary,
    RetryPolicy,
    UnknownSubscription,
)
from tests.bus.support import NO_RETRY, QUICK, MovableClock, Recorder


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


@asynccontextmanager
async def a_bus_with(count: int, order: str = "type", **options: Any) -> AsyncIterator[tuple[EventBus, Recorder, list[int]]]:
    """An open bus whose one subscription "h" has handled so many events; what it sees from now on; the events' positions."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="h", **ORDERS[order], **options)
    async def handler(placed: Placed, delivery: Delivery) -> None:
        seen.add((placed.n, delivery.replaying, delivery.attempt))

    async with bus:
        receipts = await bus.publish_many([Placed(n) for n in range(count)])
        assert await bus.drain(20) == {}
        assert sorted(n for n, *_ in seen.seen) == list(range(count))
        seen.seen.clear()
        yield bus, seen, [receipt.position or 0 for receipt in receipts]


def numbers(seen: Recorder) -> list[int]:
    return [n for n, *_ in seen.seen]


# ------------------------------------------------------------------ replay: what


@each_order
async def test_everything_again(order: str) -> None:
    """A replay delivers every event once more, marked as replaying; the summary counts; checkpoints do not move."""
    async with a_bus_with(1200, order) as (bus, seen, positions):
        summary = await bus.replay()
        assert sorted(numbers(seen)) == list(range(1200))
        assert {(replaying, attempt) for _, replaying, attempt in seen.seen} == {(True, 1)}
        assert summary == ReplaySummary(positions[-1], 1200, 1200, 0)
        await bus.publish(Placed(-1))
        await bus.drain(20)
        assert seen.seen[1200:] == [(-1, False, 1)]


@each_order
async def test_in_order(order: str) -> None:
    """A replay keeps the order that the subscription has."""
    async with a_bus_with(300, order) as (bus, seen, _):
        await bus.replay()
        if order != "none" and order != "key":
            assert numbers(seen) == list(range(300))


async def test_in_order_of_each_key() -> None:
    """With order="key" a replay keeps the order of each key."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="h", order="key", concurrency=4)
    async def handler(placed: Placed, delivery: Delivery) -> None:
        await anyio.sleep(0.0001 * (placed.n % 3))
        seen.add((delivery.envelope.key, placed.n))

    async with bus:
        for n in range(60):
            await bus.publish(Placed(n), key=n % 5)
        await bus.drain(20)
        seen.seen.clear()
        await bus.replay()
    for key in range(5):
        assert [n for k, n in seen.seen if k == str(key)] == list(range(key, 60, 5))


async def test_ranges_of_positions() -> None:
    """`since` and `until` are inclusive, `after` is exclusive."""
    async with a_bus_with(10) as (bus, seen, positions):
        for options, expected in (
            ({"since": positions[3]}, range(3, 10)),
            ({"after": positions[3]}, range(4, 10)),
            ({"until": positions[3]}, range(4)),
            ({"since": positions[3], "until": positions[5]}, range(3, 6)),
            ({"after": positions[3], "until": positions[5]}, range(4, 6)),
            ({"since": 0}, range(10)),
            ({"after": 0}, range(10)),
            ({"since": positions[5], "until": positions[3]}, range(0)),
            ({"until": positions[9] + 1000}, range(10)),
            ({"after": positions[9] + 1000}, range(0)),
        ):
            seen.seen.clear()
            summary = await bus.replay(**options)  # type: ignore[arg-type]
            assert numbers(seen) == list(expected), options
            assert summary.events == summary.handled == len(expected)


async def test_ranges_of_time() -> None:
    """Datetimes are aware, and inclusive at both ends to the microsecond."""
    clock, seen = MovableClock(), Recorder()
    bus = EventBus(":memory:", clock=clock)
    bus.subscribe(Placed, name="h")(seen.note)
    async with bus:
        for n in range(5):
            await bus.publish(Placed(n))
            clock.move(timedelta(hours=1))
        await bus.drain(20)
        times = [envelope.time async for envelope in bus.history()]
        tick = timedelta(microseconds=1)
        for options, expected in (
            ({"since": times[1]}, range(1, 5)),
            ({"since": times[1] + tick}, range(2, 5)),
            ({"until": times[3]}, range(4)),
            ({"until": times[3] - tick}, range(3)),
            ({"since": times[1], "until": times[3]}, range(1, 4)),
            ({"since": times[4] + tick}, range(0)),
            ({"until": times[0] - tick}, range(0)),
            ({"since": times[2].astimezone()}, range(2, 5)),
        ):
            seen.seen.clear()
            await bus.replay(**options)  # type: ignore[arg-type]
            assert seen.seen == [Placed(n) for n in expected], options
            assert [e.event async for e in bus.history(**options)] == [Placed(n) for n in expected]  # type: ignore[arg-type]


async def test_what_cannot_be_a_range() -> None:
    """Naive datetimes, two starts, and other nonsense are errors that say so; nothing is delivered."""
    async with a_bus_with(3) as (bus, seen, _):
        naive = datetime(2024, 1, 1)  # noqa: DTZ001  # the fault
        wrong: list[dict[str, Any]] = [
            {"since": naive},
            {"until": naive},
            {"since": 1, "after": 1},
            {"after": datetime.now(UTC)},
            {"since": -1},
            {"since": "yesterday"},
            {"until": True},
            {"rate": 0},
            {"rate": -1},
            {"rate": True},
            {"exclusive": "yes"},
        ]
        for options in wrong:
            with pytest.raises(ConfigurationError, match=next(iter(options))):
                await bus.replay(**options)
        assert not seen.seen


async def test_types() -> None:
    """Types may be classes, names and patterns; without any, all are meant."""
    bus, seen = EventBus(":memory:"), Recorder()
    bus.subscribe(Placed, Shipped, name="both", order="log")(seen.note)
    async with bus:
        for n in range(3):
            await bus.publish_many([Placed(n), Shipped(n)])
        await bus.drain(20)
        for types, expected in (
            ((Placed,), [Placed(0), Placed(1), Placed(2)]),
            (("Shipped",), [Shipped(0), Shipped(1), Shipped(2)]),
            ((Placed, "Shipped"), [e for n in range(3) for e in (Placed(n), Shipped(n))]),
            (("*",), [e for n in range(3) for e in (Placed(n), Shipped(n))]),
            (("Placed.*",), []),
            (("nobody",), []),
        ):
            seen.seen.clear()
            summary = await bus.replay(*types)
            assert seen.seen == expected
            assert summary.events == len(expected)


async def test_to_whom() -> None:
    """`to` is a name, a handler, or several, each once; by default all that allow it. Those that do not are an error when named."""
    bus, one, two, never = EventBus(":memory:"), Recorder(), Recorder(), Recorder()
    bus.subscribe(Placed, name="one")(one.note)
    bus.subscribe(Placed, name="two", order="none")(two.note)
    bus.subscribe(Placed, name="never", replay=False)(never.note)
    async with bus:
        await bus.publish(Placed(1))
        await bus.drain(20)
        for to, expected in (
            ("one", (2, 1)),
            (two.note, (2, 2)),
            (["one", two.note], (3, 3)),
            (None, (4, 4)),
            ([], (4, 4)),
            (["one", one.note, "one"], (5, 4)),
        ):
            summary = await bus.replay(to=to)  # type: ignore[arg-type]  # mypy joins the cases to object
            assert (len(one.seen), len(two.seen)) == expected
            assert summary.handled <= 2
        with pytest.raises(ConfigurationError, match="never"):
            await bus.replay(to=["one", "never"])
        with pytest.raises(UnknownSubscription, match="known: 'one', 'two', 'never'"):
            await bus.replay(to="nobody")
    assert len(never.seen) == 1
    assert (len(one.seen), len(two.seen)) == (5, 4)


async def test_not_dispatched_here(db: str) -> None:
    """A subscription that is not dispatched cannot be replayed to."""
    bus = EventBus(db)
    bus.subscribe(Placed, name="one")(Recorder().note)
    async with bus.open(dispatch=False):
        with pytest.raises(UnknownSubscription, match="not dispatched here"):
            await bus.replay(to="one")


async def test_a_late_subscriber_is_replayed_to_from_before_its_start(db: str) -> None:
    """A subscription with start="now" gets by replay what was published before it existed."""
    early, seen = EventBus(db), Recorder()
    async with early:
        await early.publish_many([Placed(n) for n in range(3)])
    late = EventBus(db)
    late.subscribe(Placed, name="late")(seen.note)
    async with late:
        assert await late.drain(20) == {}
        assert seen.seen == []
        await late.replay(to="late")
        assert seen.seen == [Placed(0), Placed(1), Placed(2)]


# ------------------------------------------------------------------ replay: how


async def test_dry_run() -> None:
    """A dry run counts the events that would be delivered, and delivers none."""
    async with a_bus_with(700) as (bus, seen, positions):
        summary = await bus.replay(after=positions[99], dry_run=True)
        assert summary == ReplaySummary(positions[-1], 600, 0, 0, dry_run=True)
        assert not seen.seen


async def test_progress() -> None:
    """Progress is told after each page, with growing counts; a plain or an async function may listen."""
    async with a_bus_with(1300) as (bus, _, positions):
        told: list[ReplaySummary] = []

        async def listen(summary: ReplaySummary) -> None:
            await anyio.lowlevel.checkpoint()
            told.append(summary)

        for progress in (told.append, listen):
            told.clear()
            summary = await bus.replay(progress=progress)
            assert len(told) >= 3
            assert [each.position for each in told] == sorted({each.position for each in told})
            assert told[-1] == summary
            assert told[-1].position == positions[-1]
            assert all(each.handled >= positions.index(each.position) + 1 for each in told)


async def test_progress_that_raises_ends_the_replay() -> None:
    """An error of the progress function comes out of `replay`, which delivers nothing more; the bus goes on."""
    async with a_bus_with(3000) as (bus, seen, _):

        def progress(_summary: ReplaySummary) -> None:
            raise LookupError("enough")

        with pytest.raises(LookupError):
            await bus.replay(progress=progress)
        await bus.publish(Placed(-1))
        await bus.drain(20)
        assert (-1, False, 1) in seen.seen
        assert len(seen.seen) < 3000


async def test_rate() -> None:
    """`rate` bounds the events per second."""
    async with a_bus_with(10) as (bus, seen, _):
        began = anyio.current_time()
        await bus.replay(rate=50)
        assert anyio.current_time() - began >= 0.2
        assert numbers(seen) == list(range(10))


async def test_resume_by_position() -> None:
    """A replay that was cancelled goes on with `after=` the position that progress was told last; nothing is left out."""
    async with a_bus_with(3000) as (bus, seen, positions):
        told: list[ReplaySummary] = []
        with anyio.CancelScope() as scope:

            def progress(summary: ReplaySummary) -> None:
                told.append(summary)
                if len(told) == 2:
                    scope.cancel()

            await bus.replay(progress=progress)
        assert scope.cancelled_caught
        summary = await bus.replay(after=told[-1].position)
        assert summary.position == positions[-1]
        assert set(numbers(seen)) == set(range(3000))


async def test_a_cancelled_replay_delivers_nothing_more() -> None:
    """After the cancellation of a replay, what it had handed to the lanes is not delivered."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="h")
    async def handler(placed: Placed, delivery: Delivery) -> None:
        if delivery.replaying:
            seen.add(placed.n)
            await anyio.sleep(0.001)

    async with bus:
        await bus.publish_many([Placed(n) for n in range(400)])
        await bus.drain(20)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(bus.replay)
                await seen.wait_for(3)
                scope.cancel()
        after = len(seen.seen)
        receipt = await bus.publish(Placed(-1))
        await receipt.handled(20)
        assert len(seen.seen) <= after + 1


async def test_what_a_replayed_attempt_publishes_is_dropped() -> None:
    """Neither returned events nor those of `delivery.publish` are stored in a replay; `bus.publish` is independent of it."""
    bus = EventBus(":memory:")

    @bus.subscribe(Placed, name="h")
    async def handler(placed: Placed, delivery: Delivery) -> Shipped:
        delivery.publish(Shipped(100 + placed.n))
        if delivery.replaying:
            await bus.publish(Shipped(200 + placed.n))
        return Shipped(placed.n)

    async with bus:
        await bus.publish(Placed(1))
        await bus.drain(20)
        await bus.replay()
        stored = [envelope.event async for envelope in bus.history(Shipped)]
    assert sorted(stored, key=lambda e: e.n) == [Shipped(1), Shipped(101), Shipped(201)]  # type: ignore[attr-defined]


@each_order
async def test_a_failure_is_tried_again_out_of_line(order: str) -> None:
    """A replayed event that fails is tried again by the policy, while those after it go on; `replay` waits for it."""
    bus, seen = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="h", retry=QUICK, **ORDERS[order])
    async def handler(placed: Placed, delivery: Delivery) -> None:
        seen.add((placed.n, delivery.attempt))
        if delivery.replaying and placed.n == 1 and delivery.attempt < 3:
            raise ValueError("again")

    async with bus:
        await bus.publish_many([Placed(n) for n in range(4)])
        await bus.drain(20)
        seen.seen.clear()
        summary = await bus.replay()
        assert (summary.events, summary.handled, summary.dead) == (4, 4, 0)
        assert sorted(seen.seen) == [(0, 1), (1, 1), (1, 2), (1, 3), (2, 1), (3, 1)]
        assert seen.seen.index((3, 1)) < seen.seen.index((1, 2))
        assert await bus.dead_letters.list() == []


@each_order
async def test_a_failure_for_good_is_a_dead_letter(db: str, order: str) -> None:
    """A replayed event that fails for good is a dead letter by the time `replay` returns, and can be redriven."""
    bus, broken = EventBus(db), False

    @bus.subscribe(Placed, name="h", retry=QUICK, **ORDERS[order])
    async def handler(placed: Placed, delivery: Delivery) -> None:
        if broken and placed.n == 1:
            raise ValueError("broken")

    async with bus:
        receipts = await bus.publish_many([Placed(n) for n in range(4)])
        await bus.drain(20)
        broken = True
        summary = await bus.replay()
        (letter,) = await bus.dead_letters.list()
        assert (summary.events, summary.handled, summary.dead) == (4, 3, 1)
        assert letter.envelope.event == Placed(1)
        assert letter.attempts == 4
        assert (await bus.status(receipts[1].id)) == {"h": "dead"}
        await bus.replay()
        (letter,) = await bus.dead_letters.list()
        broken = False
        await bus.dead_letters.redrive(letter.id)
        assert await bus.drain(20) == {}
        assert await bus.dead_letters.list() == []
        assert (await bus.status(receipts[1].id)) == {"h": "handled"}


@pytest.mark.parametrize("order", ["type", "log", "key"])
async def test_live_events_take_turns_with_a_replay(order: str) -> None:
    """A long replay does not hold up live events, nor they it: they take turns, each in its own order, one at a time."""
    bus, seen, running, published = EventBus(":memory:"), Recorder(), 0, anyio.Event()

    @bus.subscribe(Placed, name="h", order=order, **({"concurrency": 1} if order == "key" else {}))  # type: ignore[arg-type]
    async def handler(placed: Placed, delivery: Delivery) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await anyio.sleep(0.001)
        if delivery.replaying and placed.n == 5:
            await published.wait()
        running -= 1
        seen.add((delivery.replaying, placed.n))

    async with bus:
        await bus.publish_many([Placed(n) for n in range(60)])
        await bus.drain(20)
        seen.seen.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(bus.replay)
            await seen.wait_for(5)
            await bus.publish_many([Placed(n) for n in range(60, 80)])
            published.set()
        await bus.drain(20)
    live = [n for replaying, n in seen.seen if not replaying]
    assert live == list(range(60, 80))
    assert [n for replaying, n in seen.seen if replaying] == list(range(60))
    last_live = seen.seen.index((False, 79))
    assert seen.seen.index((False, 60)) < 15
    assert last_live < seen.seen.index((True, 59))


async def test_a_paused_target_is_waited_for() -> None:
    """A replay to a paused subscription goes on when it is resumed."""
    async with a_bus_with(5) as (bus, seen, _):
        await bus.pause("h")
        async with anyio.create_task_group() as group:
            group.start_soon(bus.replay)
            await anyio.sleep(0.03)  # nothing tells that it waits
            assert not seen.seen
            await bus.resume("h")
        assert numbers(seen) == list(range(5))


async def test_a_target_that_is_removed_ends_its_part() -> None:
    """If a subscription is removed while it is replayed to, the replay says so instead of waiting for ever."""
    async with a_bus_with(5) as (bus, _, _):
        await bus.pause("h")
        outcome: list[object] = []

        async def replay() -> None:
            try:
                outcome.append(await bus.replay())
            except Exception as error:
                outcome.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(replay)
            await anyio.sleep(0.02)  # nothing tells that it waits
            await bus.unsubscribe("h")
            with anyio.move_on_after(2) as scope:
                while not outcome:
                    await anyio.sleep(0.001)
            group.cancel_scope.cancel()
        assert not scope.cancelled_caught
        assert isinstance(outcome[0], UnknownSubscription)


async def test_a_bus_that_closes_ends_a_replay() -> None:
    """A replay in another task is told that the bus was closed, and where to go on."""
    bus, begun = EventBus(":memory:"), anyio.Event()
    caught: list[BusNotOpen] = []

    @bus.subscribe(Placed, name="h")
    async def handler(_placed: Placed, delivery: Delivery) -> None:
        if delivery.replaying:
            begun.set()
            await anyio.sleep(0.01)

    async def replay() -> None:
        try:
            await bus.replay()
        except BusNotOpen as error:
            caught.append(error)

    async with anyio.create_task_group() as group:
        async with bus:
            await bus.publish_many([Placed(n) for n in range(100)])
            await bus.drain(20)
            group.start_soon(replay)
            await begun.wait()
    assert len(caught) == 1
    assert "replay(after=0)" in str(caught[0])


async def test_events_published_during_a_replay_are_not_part_of_it() -> None:
    """A replay without an end reaches to the head at the call: one that handlers feed ends all the same."""
    bus, replayed = EventBus(":memory:"), Recorder()

    @bus.subscribe(Placed, name="h")
    async def handler(placed: Placed, delivery: Delivery) -> None:
        if delivery.replaying:
            replayed.add(placed.n)
            await bus.publish(Placed(placed.n + 1))

    async with bus:
        await bus.publish(Placed(0))
        await bus.drain(20)
        summary = await bus.replay()
        await bus.drain(20)
    assert replayed.seen == [0]
    assert summary.events == 1


async def test_two_replays_at_once() -> None:
    """Two replays to one subscription do not disturb each other: each delivers its whole range."""
    async with a_bus_with(200) as (bus, seen, positions):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: bus.replay(until=positions[99]))
            group.start_soon(lambda: bus.replay(since=positions[50]))
        assert sorted(numbers(seen)) == sorted([*range(100), *range(50, 200)])


async def test_an_empty_log() -> None:
    """A replay of nothing, and of a range behind the head, ends at once."""
    bus = EventBus(":memory:")
    bus.subscribe(Placed, name="h")(Recorder().note)
    async with bus:
        assert await bus.replay() == ReplaySummary(0, 0, 0, 0)
        assert [e async for e in bus.history()] == []
        await bus.rewind("h")
        assert await bus.drain(20) == {}


# ------------------------------------------------------------------ rewind


@each_order
async def test_rewind_handles_again_as_if_new(order: str) -> None:
    """After a rewind every event is handled again: from attempt 1, not as a replay, and before what is new."""
    async with a_bus_with(50, order) as (bus, seen, _):
        await bus.rewind("h")
        await bus.publish(Placed(50))
        assert await bus.drain(20) == {}
        assert sorted(numbers(seen)) == list(range(51))
        assert {(replaying, attempt) for _, replaying, attempt in seen.seen} == {(False, 1)}
        if order in ("type", "log"):
            assert numbers(seen) == list(range(51))


@each_order
async def test_rewind_to_a_position(order: str) -> None:
    """`since` is inclusive and `after` exclusive; rewinding to behind the checkpoint does nothing."""
    async with a_bus_with(20, order) as (bus, seen, positions):
        for options, expected in (
            ({"since": positions[15]}, range(15, 20)),
            ({"after": positions[15]}, range(16, 20)),
            ({"after": positions[19]}, range(0)),
            ({"since": datetime.now(UTC) - timedelta(hours=1)}, range(20)),
        ):
            seen.seen.clear()
            await bus.rewind("h", **options)
            assert await bus.drain(20) == {}
            assert sorted(numbers(seen)) == list(expected), options


async def test_rewind_by_the_handler_survives_a_restart(db: str) -> None:
    """Where a name is taken the handler is too; a rewind is stored before anything is delivered again."""
    bus, seen = EventBus(db), Recorder()
    bus.subscribe(Placed, name="h")(seen.note)
    async with bus:
        await bus.publish_many([Placed(n) for n in range(3)])
        await bus.drain(20)
        await bus.pause("h")
        await bus.rewind(seen.note)
    seen.seen.clear()
    async with bus:
        assert not seen.seen
        await bus.resume("h")
        assert await bus.drain(20) == {}
    assert seen.seen == [Placed(0), Placed(1), Placed(2)]


async def test_rewind_of_a_subscription_that_is_not_dispatched(db: str) -> None:
    """A subscription may be rewound where it is not dispatched; one that does not exist may not."""
    bus, seen = EventBus(db), Recorder()
    bus.subscribe(Placed, name="h")(seen.note)
    async with bus:
        await bus.publish(Placed(1))
        await bus.drain(20)
    async with bus.open(dispatch=False):
        await bus.rewind("h")
        with pytest.raises(UnknownSubscription):
            await bus.rewind("nobody")
    async with bus:
        await bus.drain(20)
    assert seen.seen == [Placed(1), Placed(1)]


@each_order
async def test_rewind_with_an_attempt_in_flight(order: str) -> None:
    """An attempt that runs when its subscription is rewound does not count: neither its ack nor what it publishes."""
    bus, seen, gate, running = EventBus(":memory:"), Recorder(), anyio.Event(), anyio.Event()

    @bus.subscribe(Placed, name="h", **ORDERS[order])
    async def handler(placed: Placed, delivery: Delivery) -> Shipped:
        seen.add((placed.n, delivery.attempt))
        if len(seen.seen) == 3:
            running.set()
            await gate.wait()
        return Shipped(placed.n)

    async with bus:
        for n in range(3):
            await (await bus.publish(Placed(n))).handled(20) if n < 2 else await bus.publish(Placed(n))
        await running.wait()
        await bus.rewind("h")
        gate.set()
        assert await bus.drain(20) == {}
        assert sorted(seen.seen) == [(0, 1), (0, 1), (1, 1), (1, 1), (2, 1), (2, 1)]
        stored = [envelope.event async for envelope in bus.history(Shipped)]
        assert sorted(shipped.n for shipped in stored if isinstance(shipped, Shipped)) == [0, 0, 1, 1, 2]


@each_order
async def test_rewind_forgets_retries_and_dead_letters_behind_it(order: str) -> None:
    """What waits for a retry, and dead letters, above the position are forgotten: those events come again at attempt 1."""
    bus, seen, broken = EventBus(":memory:"), Recorder(), True

    @bus.subscribe(Placed, name="h", retry=RetryPolicy(attempts=3, first=3600), **ORDERS[order])
    async def handler(placed: Placed, delivery: Delivery) -> None:
        if broken and placed.n == 1:
            raise ValueError("waits for an hour")
        seen.add((placed.n, delivery.attempt))

    async with bus:
        await bus.publish_many([Placed(n) for n in range(3)])
        assert (await bus.drain(0.1))["h"] >= 1
        broken = False
        await bus.rewind("h")
        assert await bus.drain(20) == {}
        assert (2, 1) in seen.seen
        assert (1, 1) in seen.seen
        assert (await bus.stats()).subscriptions["h"].retrying == 0


@pytest.mark.parametrize("order", ["key", "none"])
async def test_rewind_keeps_the_retries_before_it(order: str) -> None:
    """A rewind to a position forgets nothing that lies before it: what waits there for a retry is still made."""
    bus, seen, broken = EventBus(":memory:"), Recorder(), True

    @bus.subscribe(Placed, name="h", retry=RetryPolicy(attempts=3, first=0.3, jitter=0), **ORDERS[order])
    async def handler(placed: Placed, delivery: Delivery) -> None:
        if broken and placed.n == 1:
            raise ValueError("once")
        seen.add((placed.n, delivery.attempt))

    async with bus:
        receipts = [await bus.publish(Placed(n), key=n) for n in range(4)]
        await seen.wait_for(3)
        assert (await bus.stats()).subscriptions["h"].retrying == 1
        broken = False
        await bus.rewind("h", since=receipts[3].position)
        assert await bus.drain(20) == {}
        assert sorted(seen.seen) == [(0, 1), (1, 2), (2, 1), (3, 1), (3, 1)]


async def test_rewind_removes_dead_letters_behind_it() -> None:
    """A dead letter above the position is gone with the rewind; one below it stays."""
    bus, broken = EventBus(":memory:"), True

    @bus.subscribe(Placed, name="h", retry=NO_RETRY)
    async def handler(placed: Placed) -> None:
        if broken:
            raise ValueError("dead")

    async with bus:
        receipts = await bus.publish_many([Placed(n) for n in range(4)])
        await bus.drain(20)
        assert len(await bus.dead_letters.list()) == 4
        broken = False
        await bus.rewind("h", since=receipts[2].position)
        assert await bus.drain(20) == {}
        assert [letter.envelope.event for letter in await bus.dead_letters.list()] == [Placed(0), Placed(1)]


async def test_rewind_leaves_other_subscriptions_alone() -> None:
    """Only the named subscription handles anything again."""
    bus, one, two = EventBus(":memory:"), Recorder(), Recorder()
    bus.subscribe(Placed, name="one")(one.note)
    bus.subscribe(Placed, name="two")(two.note)
    async with bus:
        await bus.publish(Placed(1))
        await bus.drain(20)
        await bus.rewind("one")
        await bus.drain(20)
    assert (len(one.seen), len(two.seen)) == (2, 1)


async def test_rewind_while_publishing() -> None:
    """Rewinds beside publishers lose nothing and keep the order after the last of them."""
    bus, seen = EventBus(":memory:"), Recorder()
    bus.subscribe(Placed, name="h")(seen.note)

    async def publish() -> None:
        for n in range(300):
            await bus.publish(Placed(n))

    async with bus:
        async with anyio.create_task_group() as group:
            group.start_soon(publish)
            for target in (20, 40, 60, 80):
                await seen.wait_for(target)
                await bus.rewind("h")
        assert await bus.drain(20) == {}
    last = len(seen.seen) - 1 - seen.seen[::-1].index(Placed(0))
    assert seen.seen[last:] == [Placed(n) for n in range(300)]


# ------------------------------------------------------------------ history


async def test_history_reads_and_delivers_nothing() -> None:
    """`history` yields envelopes in order of position, beyond one page, with everything that is stored of them."""
    async with a_bus_with(1100) as (bus, seen, positions):
        envelopes = [envelope async for envelope in bus.history()]
        assert [envelope.position for envelope in envelopes] == positions
        assert [envelope.event for envelope in envelopes] == [Placed(n) for n in range(1100)]
        assert isinstance(envelopes[0], Envelope)
        assert envelopes[0].time.tzinfo is UTC
        assert not seen.seen


async def test_history_by_type_and_key() -> None:
    """Types, patterns and a key select; a key is compared as text; ranges apply as well."""
    bus = EventBus(":memory:")
    async with bus:
        receipts = []
        for n in range(6):
            receipts.append(await bus.publish(Placed(n), key=n % 2))
            await bus.publish(Shipped(n), key=str(n % 2))
        await bus.publish(Placed(99))

        async def events(*types: Any, **options: Any) -> list[object]:
            return [envelope.event async for envelope in bus.history(*types, **options)]

        assert await events(Placed, key=1) == [Placed(1), Placed(3), Placed(5)]
        assert await events("Shipped", key="0") == [Shipped(0), Shipped(2), Shipped(4)]
        assert await events(key=1, since=receipts[3].position) == [Placed(3), Shipped(3), Placed(5), Shipped(5)]
        assert await events("Pl.*") == []
        assert len(await events("*")) == 13
        assert await events(Placed, after=receipts[4].position) == [Placed(5), Placed(99)]
        assert await events(key="nobody's") == []
        with pytest.raises(ConfigurationError):
            await events(since=1, after=1)


async def test_history_may_be_left_in_the_middle() -> None:
    """An iteration that is left early leaves nothing behind; the bus closes as ever."""
    async with a_bus_with(1100) as (bus, _, _):
        async for envelope in bus.history():
            assert envelope.event == Placed(0)
            break
        await bus.publish(Placed(1))


async def test_history_to_the_head_at_the_call() -> None:
    """Events that are published while history is read are not part of it: reading and publishing in one loop ends."""
    async with a_bus_with(3) as (bus, _, _):
        async for envelope in bus.history(Placed):
            await bus.publish(envelope.event)
        assert len([e async for e in bus.history()]) == 6


# ------------------------------------------------------------------ what is not retained


async def test_a_range_that_is_not_retained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay, rewind or history that begins before what retention has left is an error, not a gap."""
    monkeypatch.setattr("eventbus._options.PRUNE_EVERY", 0.01)
    clock, seen = MovableClock(), Recorder()
    bus = EventBus(":memory:", retention=timedelta(hours=1), clock=clock)
    bus.subscribe(Placed, name="h")(seen.note)
    async with bus:
        old = await bus.publish_many([Placed(n) for n in range(3)])
        await bus.drain(20)
        before = datetime.fromtimestamp(clock.time(), UTC)
        clock.move(timedelta(hours=2))
        young = await bus.publish(Placed(3))
        await bus.drain(20)
        with anyio.fail_after(20):
            while (await bus.stats()).events > 1:
                await anyio.sleep(0.005)
        seen.seen.clear()
        for options in ({"since": old[0].position}, {"after": 0}, {"since": before - timedelta(minutes=1)}):
            with pytest.raises(RangeNotRetained):
                await bus.replay(**options)
            with pytest.raises(RangeNotRetained):
                await bus.rewind("h", **options)
            with pytest.raises(RangeNotRetained):
                async for _ in bus.history(**options):
                    pass
        with pytest.raises(RangeNotRetained, match="since= or after="):
            await bus.rewind("h")
        assert await bus.drain(20) == {}
        assert not seen.seen
        assert (await bus.replay()).events == 1
        assert (await bus.replay(after=old[2].position)).events == 1
        assert (await bus.replay(since=before + timedelta(minutes=1))).events == 1
        await bus.rewind("h", since=young.position)
        assert await bus.drain(20) == {}
        assert seen.seen == [Placed(3)] * 4
