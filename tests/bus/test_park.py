"""`on_exhausted="park"`: a key's later events wait behind its dead letter, in order, until that is redriven or discarded."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from eventbus import Delivery, DeliveryStatus, EventBus, HandlingFailed, Reject, RetryPolicy, event
from eventbus.stores.base import Batch, Committed, Discard, Redrive
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import NO_RETRY, QUICK, Hurrying, Recorder


@event("till.booked", key="key")
@attrs.frozen
class Booked:
    key: str | None
    n: int


@event("till.closed", key="key")
@attrs.frozen
class Closed:
    key: str
    n: int


class Till:
    """A handler that fails for chosen numbers, and notes what it has handled and what it was asked to."""

    def __init__(self, *bad: int) -> None:
        self.bad = set(bad)
        self.error: type[Exception] = ValueError
        self.handled = Recorder()
        self.tried = Recorder()

    async def __call__(self, event: Any, delivery: Delivery) -> None:
        self.tried.add(event.n)
        if event.n in self.bad:
            raise self.error(f"no {event.n}")
        if not delivery.replaying:
            self.handled.add(event.n)

    @property
    def seen(self) -> list[int]:
        return list(self.handled.seen)


def bus_with(db: Any, till: Till, **options: Any) -> EventBus:
    bus = EventBus(db)
    settings = {"order": "key", "on_exhausted": "park", "retry": NO_RETRY, "concurrency": 2, **options}
    bus.subscribe(Booked, Closed, name="till", **settings)(till)
    return bus


def of(key: str, *numbers: int) -> list[Booked]:
    return [Booked(key, n) for n in numbers]


async def dead(bus: EventBus) -> list[int]:
    """Numbers of the dead letters, oldest first."""
    return [letter.envelope.event.n for letter in await bus.dead_letters.list()]  # type: ignore[attr-defined]


@pytest.fixture
def db(tmp_path: Path) -> str:
    return str(tmp_path / "till.db")


async def test_later_events_wait() -> None:
    """The later events of a key wait behind its dead letter; other keys flow."""
    till = Till(2)
    bus = bus_with(":memory:", till, concurrency=1)
    async with bus:
        await bus.publish_many([*of("a", 1, 2, 3), *of("b", 11, 12), *of("a", 4)])
        left = await bus.drain()
        await bus.publish_many([*of("b", 13), *of("a", 5)])
        assert await bus.drain() == {"till": 3}
        stats = (await bus.stats()).subscriptions["till"]
        assert await dead(bus) == [2]
    assert left == {"till": 2}
    assert till.seen == [1, 11, 12, 13]
    assert (stats.parked, stats.retrying, stats.dead, stats.lag) == (1, 0, 1, 3)


@pytest.mark.parametrize("retry", [NO_RETRY, QUICK])
async def test_redrive_frees(retry: RetryPolicy) -> None:
    """A redrive delivers the dead letter first, then all of the key's later events in order, and later ones flow again."""
    till = Till(1)
    bus = bus_with(":memory:", till, retry=retry)
    async with bus:
        await bus.publish_many([*of("a", 1, 2, 3), Closed("a", 4), *of("a", *range(5, 300))])
        await bus.drain()
        assert till.seen == []
        till.bad.clear()
        assert await bus.dead_letters.redrive(subscription="till") == 1
        assert await bus.drain() == {}
        assert till.seen == list(range(1, 300))
        await bus.publish_many(of("a", 300, 301))
        assert await bus.drain() == {}
        stats = (await bus.stats()).subscriptions["till"]
    assert till.seen == list(range(1, 302))
    assert (stats.parked, stats.dead, stats.lag) == (0, 0, 0)


async def test_redrive_fails() -> None:
    """If the redrive fails for good again, the key stays parked behind it."""
    till = Till(1)
    bus = bus_with(":memory:", till, retry=QUICK)
    async with bus:
        await bus.publish_many(of("a", 1, 2, 3))
        await bus.drain()
        for _ in range(2):
            await bus.dead_letters.redrive(all=True)
            assert await bus.drain() == {"till": 2}
        assert (till.seen, await dead(bus)) == ([], [1])
        till.bad.clear()
        await bus.dead_letters.redrive(all=True)
        await bus.drain()
    assert till.seen == [1, 2, 3]


async def test_discard_frees() -> None:
    """Discarding the dead letter frees the key: its later events are delivered, in order."""
    till = Till(1)
    bus = bus_with(":memory:", till)
    async with bus:
        first = (await bus.publish_many(of("a", 1, 2, 3)))[0]
        await bus.drain()
        assert await bus.dead_letters.discard(subscription="till") == 1
        assert await bus.drain() == {}
        assert await bus.status(first.id) == {"till": DeliveryStatus.HANDLED}
        assert (await bus.stats()).subscriptions["till"].lag == 0
    assert till.seen == [2, 3]
    assert till.tried.seen == [1, 2, 3]


async def test_nothing_behind() -> None:
    """A key with nothing behind its dead letter is freed too: what comes later is delivered at once."""
    till = Till(1)
    bus = bus_with(":memory:", till)
    async with bus:
        await bus.publish_many(of("a", 1))
        await bus.drain()
        await bus.dead_letters.discard(all=True)
        await bus.drain()
        assert (await bus.stats()).subscriptions["till"].retrying == 0
        await (await bus.publish(Booked("a", 2))).handled(timeout=20)
    assert till.seen == [2]


async def test_parks_again() -> None:
    """A later event of a freed key that fails for good parks it again, as often as it takes."""
    till = Till(1, 3, 4)
    bus = bus_with(":memory:", till)
    async with bus:
        await bus.publish_many(of("a", 1, 2, 3, 4, 5))
        await bus.drain()
        steps = []
        for number in (1, 3, 4):
            steps.append((await dead(bus), till.seen))
            till.bad.discard(number)
            await bus.dead_letters.redrive(all=True)
            await bus.drain()
    assert steps == [([1], []), ([3], [1, 2]), ([4], [1, 2, 3])]
    assert till.seen == [1, 2, 3, 4, 5]


async def test_a_reject_parks() -> None:
    """A rejected event parks its key as well: whatever made the dead letter, nothing overtakes it."""
    till = Till(1)
    till.error = Reject
    bus = bus_with(":memory:", till, retry=RetryPolicy())
    async with bus:
        await bus.publish_many(of("a", 1, 2))
        await bus.drain()
        assert (await dead(bus), till.seen) == ([1], [])


async def test_without_a_key() -> None:
    """An event without a key becomes a dead letter and holds nothing up."""
    till = Till(1)
    bus = bus_with(":memory:", till)
    async with bus:
        await bus.publish_many([Booked(None, 1), Booked(None, 2)])
        assert await bus.drain() == {}
        assert (await bus.stats()).subscriptions["till"].parked == 0
    assert till.seen == [2]


async def test_damaged(db: str) -> None:
    """A damaged event parks nothing, for its key may be what is damaged: it is a dead letter, and gone when that is discarded."""
    till = Till()
    bus = bus_with(db, till)
    async with bus.open(dispatch=False):
        await bus.publish_many([*of("a", 1), *of("a", 2)])
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("UPDATE events SET data = replace(CAST(data AS TEXT), '1', '7') WHERE position = 1")
    async with bus:
        assert await bus.drain(20) == {}
        assert (await bus.stats()).subscriptions["till"].parked == 0
        assert await bus.dead_letters.discard(all=True) == 1
        assert await bus.drain(20) == {}
        assert await bus.dead_letters.list() == []
    assert till.tried.seen == [2]


async def test_plain_handler() -> None:
    """A plain handler, which is given many events at once, is given none of a key after its dead letter."""
    seen = Recorder()
    bus = EventBus(":memory:")

    @bus.subscribe(Booked, name="till", order="key", on_exhausted="park", retry=NO_RETRY, concurrency=1)
    def book(event: Booked) -> None:
        seen.add((event.key, event.n))
        if event.n == 3:
            raise ValueError

    async with bus:
        await bus.publish_many([Booked(key, n) for n in range(1, 200) for key in ("a", "b")])
        await bus.drain()
    assert seen.seen == [(key, n) for n in range(1, 4) for key in ("a", "b")]


# ------------------------------------------------------------------ what those who ask are told


async def test_status() -> None:
    """The dead letter's event is dead, the later ones are parked, others are not."""
    till = Till(1)
    bus = bus_with(":memory:", till)
    async with bus:
        receipts = await bus.publish_many([*of("a", 1, 2, 3), *of("b", 4)])
        await bus.drain()
        statuses = [(await bus.status(receipt.id))["till"] for receipt in receipts]
    assert statuses == [DeliveryStatus.DEAD, DeliveryStatus.PARKED, DeliveryStatus.PARKED, DeliveryStatus.HANDLED]


async def test_handled() -> None:
    """`handled` of a parked event fails at once, with the reason; also if it was waited for before it was parked."""
    gate = anyio.Event()
    bus = EventBus(":memory:")

    @bus.subscribe(Booked, name="till", order="key", on_exhausted="park", retry=NO_RETRY)
    async def book(event: Booked) -> None:
        await gate.wait()
        raise ValueError

    failures: list[HandlingFailed] = []
    async with bus:
        receipts = await bus.publish_many(of("a", 1, 2))

        async def wait() -> None:
            with pytest.raises(HandlingFailed) as caught:
                await receipts[1].handled(timeout=10)
            failures.append(caught.value)

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            gate.set()
        await wait()
        with pytest.raises(HandlingFailed) as caught:
            await receipts[0].handled(timeout=10)
    assert [(list(f.dead_letters), f.blocked) for f in failures] == [
        ([], {"till": "parked: its key 'a' waits behind a dead letter"}) for _ in range(2)
    ]
    assert len(caught.value.dead_letters) == 1


async def test_memory() -> None:
    """A parked key costs one row, however many of its events wait, and the checkpoint goes on."""
    till = Till(0)
    bus = bus_with(":memory:", till)
    async with bus:
        for start in range(0, 5_000, 500):
            await bus.publish_many(of("a", *range(start, start + 500)))
        await bus.drain()
        running = bus._open()
        assert sum(lane.log.waiting for lane in running.dispatcher.lanes()) == 1
        assert sum(len(lane.log.intake) for lane in running.dispatcher.lanes()) == 0
        assert max(lane.stored for lane in running.dispatcher.lanes()) == 5_000
        till.bad.clear()
        await bus.dead_letters.redrive(all=True)
        await bus.drain()
    assert till.seen == list(range(5_000))


async def test_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """When too many keys of a lane are parked it gives out nothing more, says so, and goes on when some are freed."""
    monkeypatch.setattr("eventbus._loose.PARKED", 3)
    till = Till(1, 2, 3)
    bus = bus_with(":memory:", till, concurrency=1)
    async with bus:
        await bus.publish_many([Booked(f"k{n}", n) for n in range(1, 4)])
        await bus.drain()
        receipt = await bus.publish(Booked("other", 4))
        with pytest.raises(HandlingFailed) as caught:
            await receipt.handled(timeout=20)
        assert await bus.drain() == {"till": 1}
        await bus.dead_letters.discard(all=True)
        assert await bus.drain() == {}
    assert "3 keys are parked" in caught.value.blocked["till"]
    assert till.seen == [4]


# ------------------------------------------------------------------ beside everything else


async def test_pause_and_resume() -> None:
    """Resuming a subscription does not free its parked keys, and a redrive made while it is paused waits."""
    till = Till(1)
    bus = bus_with(":memory:", till)
    async with bus:
        await bus.publish_many(of("a", 1, 2))
        await bus.drain()
        await bus.pause("till")
        await bus.resume("till")
        await bus.drain()
        assert till.seen == []
        till.bad.clear()
        await bus.pause("till")
        await bus.dead_letters.redrive(all=True)
        await bus.drain()
        assert till.seen == []
        await bus.resume("till")
        await bus.drain()
    assert till.seen == [1, 2]


async def test_replay() -> None:
    """A replay delivers parked events as any others, and neither frees the key nor settles them."""
    till = Till(1)
    bus = bus_with(":memory:", till)
    async with bus:
        await bus.publish_many(of("a", 1, 2, 3))
        await bus.drain()
        till.bad.clear()
        await bus.replay(to="till")
        await bus.drain()
        assert (till.seen, till.tried.seen) == ([], [1, 1, 2, 3])
        assert (await bus.stats()).subscriptions["till"].parked == 1
        await bus.dead_letters.redrive(all=True)
        await bus.drain()
    assert till.seen == [1, 2, 3]


async def test_rewind_before() -> None:
    """A rewind to before the dead letter takes it away, frees the key, and delivers everything as if it were new."""
    till = Till(2)
    bus = bus_with(":memory:", till)
    async with bus:
        await bus.publish_many(of("a", 1, 2, 3))
        await bus.drain()
        till.bad.clear()
        await bus.rewind("till", after=0)
        assert await bus.drain() == {}
        assert await dead(bus) == []
    assert till.seen == [1, 1, 2, 3]


async def test_rewind_after() -> None:
    """A rewind to behind the dead letter leaves the key parked."""
    till = Till(1)
    bus = bus_with(":memory:", till)
    async with bus:
        await bus.publish_many([*of("a", 1, 2), *of("b", 3), *of("a", 4)])
        await bus.drain()
        await bus.rewind("till", after=2)
        assert await bus.drain() == {"till": 2}
        assert till.seen == [3, 3]
        till.bad.clear()
        await bus.dead_letters.redrive(all=True)
        assert await bus.drain() == {}
    assert till.seen == [3, 3, 1, 2, 4]


async def test_unsubscribe(db: str) -> None:
    """Removing a subscription takes its parked keys along; one of the same name begins anew, and the dead letters stay."""
    till = Till(1)
    async with bus_with(db, till) as bus:
        await bus.publish_many(of("a", 1, 2))
        await bus.drain()
        await bus.unsubscribe("till")
    till = Till()
    async with bus_with(db, till) as bus:
        await bus.publish(Booked("a", 3))
        assert await bus.drain() == {}
        assert await dead(bus) == [1]
        await bus.dead_letters.redrive(all=True)
        await bus.drain()
    assert till.seen == [3, 1]


async def test_retention(db: str) -> None:
    """The later events of a parked key are never pruned; the dead letter has its own copy of its event."""
    till = Till(1)
    bus = EventBus(db, retention=timedelta(days=1), clock=Hurrying(1_000_000))
    bus.subscribe(Booked, name="till", order="key", on_exhausted="park", retry=NO_RETRY, timeout=None)(till)
    async with bus:
        await bus.publish_many([*of("a", 1, 2), *of("b", 3), *of("a", 4)])
        await bus.drain()
        with anyio.fail_after(20):
            while (await bus.stats()).events != 2:
                await anyio.lowlevel.checkpoint()
        till.bad.clear()
        await bus.dead_letters.redrive(all=True)
        await bus.drain()
    assert till.seen == [3, 1, 2, 4]


# ------------------------------------------------------------------ restarts


async def test_restart(db: str) -> None:
    """After a restart a parked key is parked, also for what is published then, and a redrive frees it."""
    till = Till(1)
    async with bus_with(db, till) as bus:
        await bus.publish_many(of("a", 1, 2))
        await bus.drain()
    async with bus_with(db, till) as bus:
        await bus.publish_many(of("a", 3))
        assert await bus.drain() == {"till": 2}
        till.bad.clear()
        await bus.dead_letters.redrive(all=True)
        await bus.drain()
    assert till.seen == [1, 2, 3]


@pytest.mark.parametrize("command", [Redrive, Discard])
async def test_told_by_the_store_alone(db: str, command: Any) -> None:
    """What another program has redriven or discarded is found in the store at the start."""
    from eventbus.stores.base import DeadLetterFilter

    till = Till(1)
    async with bus_with(db, till) as bus:
        await bus.publish_many(of("a", 1, 2, 3))
        await bus.drain()
    till.bad.clear()
    other = EventBus(db)
    async with other:
        await other._open().journal.command(command(DeadLetterFilter()))
    async with bus_with(db, till) as bus:
        await bus.drain()
    assert till.seen == ([1, 2, 3] if command is Redrive else [2, 3])


async def test_other_policy(db: str) -> None:
    """A key that was parked stays so when the policy is another now, until its dead letter goes."""
    till = Till(1)
    async with bus_with(db, till) as bus:
        await bus.publish_many(of("a", 1, 2))
        await bus.drain()
    async with bus_with(db, till, on_exhausted="dead_letter") as bus:
        await bus.publish(Booked("a", 3))
        await bus.drain()
        assert till.seen == []
        await bus.dead_letters.discard(all=True)
        await bus.drain()
    assert till.seen == [2, 3]


class CutStore(SQLiteStore):
    """A store whose commits after the first `left` that write something fail, as if the process had been killed there."""

    def __init__(self, path: str, left: int) -> None:
        super().__init__(path, durability="fast")
        self.left = left
        self.cut = False

    def commit(self, batch: Batch) -> Committed:
        if self.left <= 0:
            self.cut = True
            raise OSError("cut off by the test")
        committed = super().commit(batch)
        self.left -= 1
        return committed


async def cut_after(db: str, till: Till, left: int, discard: bool) -> bool:
    """Redrive or discard, and be cut off after so many commits; whether that came before the end."""
    store = CutStore(db, left)
    try:
        async with bus_with(store, till) as bus:
            if discard:
                await bus.dead_letters.discard(all=True)
            else:
                await bus.dead_letters.redrive(all=True)
            await bus.drain(timeout=10)
    except* Exception:  # however it ends
        assert store.cut
    return store.cut


def unique(numbers: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(numbers))


@pytest.mark.parametrize("discard", [False, True])
async def test_cut_off_at_every_commit(tmp_path: Path, discard: bool) -> None:
    """Cut off between any two commits of a redrive or a discard, what is left goes on in order: nothing lost, nothing overtaken."""
    cut, left = True, 1
    while cut:
        db = str(tmp_path / f"{left}.db")
        till = Till(1)
        async with bus_with(db, till) as bus:
            await bus.publish_many([*of("a", *range(1, 8)), *of("b", 20)])
            await bus.drain()
        till.bad.clear()
        cut = await cut_after(db, till, left, discard)
        async with bus_with(db, till) as bus:
            await bus.drain()
            if cut:  # the cut may have come before the command
                await (bus.dead_letters.discard if discard else bus.dead_letters.redrive)(all=True)
            assert await bus.drain() == {}
            assert await dead(bus) == []
        first = [] if discard and 1 not in till.seen else [1]
        assert unique(n for n in till.seen if n < 20) == [*first, *range(2, 8)]
        left += 1
    assert left > 3
