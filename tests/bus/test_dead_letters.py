"""Dead letters: what they keep, how they are found, and how they are sent again."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from eventbus import ConfigurationError, DeadLetter, Delivery, EventBus, Reject, RetryPolicy, UnknownEvent, event
from eventbus.stores.base import Batch, Committed, DeadLetterFilter, Order, Redrive
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import NO_RETRY, Later, MovableClock, Recorder, hold_up_first_crossing

ORDERS: list[Order] = ["type", "log", "key", "none"]


@event("shop.sold", key="key")
@attrs.frozen
class Sold:
    key: str
    n: int = 0


@event("shop.sent")
@attrs.frozen
class Sent:
    n: int


@event("stock.moved")
@attrs.frozen
class Moved:
    n: int


class Switch:
    """A handler that fails until it is told not to, and notes what it was given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.recorder = Recorder()

    async def __call__(self, event: Any, delivery: Delivery) -> None:
        self.recorder.add((event.n, delivery.attempt))
        if self.error is not None:
            raise type(self.error)(*self.error.args)  # one raised again and again would collect frames


def bus_with(
    db: str | SQLiteStore, handler: Callable[..., Awaitable[None]], *types: type, name: str = "s", **options: Any
) -> EventBus:
    bus = EventBus(db)
    options.setdefault("retry", NO_RETRY)
    options.setdefault("breaker", None)  # dead letters by the hundred, and not for a bad world
    bus.subscribe(*(types or (Sold,)), name=name, **options)(handler)
    return bus


# ------------------------------------------------------------------ what they keep


@pytest.mark.parametrize("order", ORDERS)
async def test_a_dead_letter_says_what_happened(any_db: str, order: Order) -> None:
    """It keeps the event with its envelope, the last error with its traceback, the number of attempts, and the times."""
    before = datetime.now(UTC)
    errors = iter([KeyError("first"), ValueError("second")])

    async def handle(_event: Sold) -> None:
        raise next(errors)

    bus = bus_with(any_db, handle, order=order, retry=RetryPolicy(attempts=2, first=0.01, jitter=0.0))
    async with bus:
        receipt = await bus.publish(Sold("k", 5), headers={"trace": "t"})
        assert await bus.drain(timeout=20) == {}
        (letter,) = await bus.dead_letters.list()
        assert await bus.dead_letters.get(letter.id) == letter
        assert await bus.status(receipt.id) == {"s": "dead"}
    envelope = letter.envelope
    assert (letter.subscription, letter.error_type, letter.error, letter.attempts) == ("s", "ValueError", "second", 2)
    assert "Traceback" in letter.traceback
    assert "raise next(errors)" in letter.traceback
    assert before <= letter.first_failed_at <= letter.last_failed_at <= datetime.now(UTC)
    assert letter.last_failed_at - letter.first_failed_at >= timedelta(seconds=0.01)
    assert not letter.redriving
    assert (envelope.id, envelope.position, envelope.type, envelope.version) == (receipt.id, receipt.position, "shop.sold", 1)
    assert (envelope.key, envelope.event) == ("k", Sold("k", 5))
    assert envelope.headers["trace"] == "t"


async def test_a_long_traceback_is_cut(db: str) -> None:
    """Of a long traceback the last 16,000 characters are kept: the error stands at its end."""

    async def handle(_event: Sold) -> None:
        raise ValueError("begin " + "x" * 50_000 + " end")

    async with bus_with(db, handle) as bus:
        await bus.publish(Sold("k"))
        assert await bus.drain(timeout=20) == {}
        (letter,) = await bus.dead_letters.list()
    assert len(letter.traceback) == 16_000
    assert letter.traceback.rstrip().endswith("end")
    assert letter.error.startswith("begin")
    assert len(letter.error) <= 2_000


async def test_each_subscription_has_its_own_dead_letter(db: str) -> None:
    """An event that two subscriptions give up on is a dead letter of each; the third has handled it."""
    bus = bus_with(db, Switch(ValueError("one")), name="one")
    bus.subscribe(Sold, name="two", retry=NO_RETRY)(Switch(KeyError("two")))
    bus.subscribe(Sold, name="three", retry=NO_RETRY)(Switch())
    async with bus:
        receipt = await bus.publish(Sold("k"))
        assert await bus.drain(timeout=20) == {}
        assert {x.subscription for x in await bus.dead_letters.list()} == {"one", "two"}
        assert await bus.status(receipt.id) == {"one": "dead", "two": "dead", "three": "handled"}


async def test_a_dead_letter_outlives_its_event(db: str) -> None:
    """It holds a copy of the event, which retention does not remove, and which can be redriven."""
    switch = Switch(ValueError("no"))
    bus = EventBus(db, retention=timedelta(microseconds=1))
    bus.subscribe(Sold, name="s", retry=NO_RETRY)(switch)
    async with bus:
        await bus.publish(Sold("k", 7))
        assert await bus.drain(timeout=20) == {}
        assert bus._running is not None
        await bus._running.upkeep.prune()  # which otherwise comes once a minute
        assert [e async for e in bus.history()] == []
        (letter,) = await bus.dead_letters.list()
        assert letter.envelope.event == Sold("k", 7)
        switch.error = None
        assert await bus.dead_letters.redrive(letter.id) == 1
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
    assert switch.recorder.seen == [(7, 1), (7, 1)]


# ------------------------------------------------------------------ finding, discarding


async def three_kinds(db: str) -> tuple[EventBus, Switch, Switch]:
    one, two = Switch(ValueError("v")), Switch(Reject("r"))
    bus = bus_with(db, one, Sold, Sent, name="one", order="log")
    bus.subscribe(Sent, Moved, name="two", order="log", retry=NO_RETRY)(two)
    return bus, one, two


Filters = dict[str, Any]
FILTERS: list[tuple[Filters, list[tuple[str, int]]]] = [
    ({"subscription": "one"}, [("one", 1), ("one", 2)]),
    ({"subscription": "two"}, [("two", 2), ("two", 3)]),
    ({"type": Sent}, [("one", 2), ("two", 2)]),
    ({"type": "shop.sent"}, [("one", 2), ("two", 2)]),
    ({"type": "shop.*"}, [("one", 1), ("one", 2), ("two", 2)]),
    ({"type": "*"}, [("one", 1), ("one", 2), ("two", 2), ("two", 3)]),
    ({"error": ValueError}, [("one", 1), ("one", 2)]),
    ({"error": "Reject"}, [("two", 2), ("two", 3)]),
    ({"error": "Reject", "type": "shop.*"}, [("two", 2)]),
    ({"since": datetime(2200, 1, 1, tzinfo=UTC)}, []),
    ({"until": datetime(2000, 1, 1, tzinfo=UTC)}, []),
    ({"since": datetime(2000, 1, 1, tzinfo=UTC), "subscription": "two"}, [("two", 2), ("two", 3)]),
    ({"type": "none.such"}, []),
]


def named(letters: list[DeadLetter]) -> list[tuple[str, int]]:
    return sorted((x.subscription, x.envelope.event.n) for x in letters)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("which", "expected"), FILTERS, ids=str)
async def test_list_redrive_and_discard_take_the_same_filters(db: str, which: Filters, expected: list[tuple[str, int]]) -> None:
    """`list`, `redrive` and `discard` find the same dead letters by subscription, type, error and time."""
    bus, one, two = await three_kinds(db)
    async with bus:
        await bus.publish_many([Sold("k", 1), Sent(2), Moved(3)])
        assert await bus.drain(timeout=20) == {}
        assert named(await bus.dead_letters.list(**which)) == expected
        one.recorder.seen.clear()
        two.recorder.seen.clear()
        assert await bus.dead_letters.redrive(**which) == len(expected)
        assert await bus.drain(timeout=20) == {}
        again = [("one", n) for n, _ in one.recorder.seen] + [("two", n) for n, _ in two.recorder.seen]
        assert sorted(again) == expected
        assert await bus.dead_letters.discard(**which) == len(expected)
        assert len(await bus.dead_letters.list()) == 4 - len(expected)


async def test_a_subscription_may_be_named_by_its_handler(db: str) -> None:
    """Where a filter takes the name of a subscription, it takes the handler too."""
    bus, one, _ = await three_kinds(db)
    async with bus:
        await bus.publish_many([Sold("k", 1), Sent(2), Moved(3)])
        assert await bus.drain(timeout=20) == {}
        assert named(await bus.dead_letters.list(subscription=one)) == [("one", 1), ("one", 2)]


async def test_by_id(db: str) -> None:
    """Single ones are taken by id; an id that is not there is an error of `get`, and nothing to the others."""
    bus, _, _ = await three_kinds(db)
    async with bus:
        await bus.publish_many([Sold("k", 1), Sent(2), Moved(3)])
        assert await bus.drain(timeout=20) == {}
        letters = await bus.dead_letters.list()
        assert [x.id for x in letters] == sorted(x.id for x in letters)
        assert await bus.dead_letters.list(limit=2) == letters[:2]
        assert await bus.dead_letters.discard(letters[0].id, letters[2].id) == 2
        assert await bus.dead_letters.discard(letters[0].id) == 0
        assert await bus.dead_letters.redrive(letters[0].id) == 0
        with pytest.raises(UnknownEvent, match=str(letters[0].id)):
            await bus.dead_letters.get(letters[0].id)
        assert await bus.dead_letters.list() == [letters[1], letters[3]]


async def test_everything_needs_all(db: str) -> None:
    """Redrive and discard of everything want `all=True`; ids together with a filter must satisfy both."""
    bus, _, _ = await three_kinds(db)
    async with bus:
        await bus.publish_many([Sold("k", 1), Sent(2), Moved(3)])
        assert await bus.drain(timeout=20) == {}
        with pytest.raises(ConfigurationError, match="all=True"):
            await bus.dead_letters.redrive()
        with pytest.raises(ConfigurationError, match="all=True"):
            await bus.dead_letters.discard()
        (letter, *_) = await bus.dead_letters.list(subscription="one")
        assert await bus.dead_letters.discard(letter.id, subscription="two") == 0
        assert await bus.dead_letters.redrive(all=True) == 4
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.discard(all=True) == 4
        assert await bus.dead_letters.list() == []


async def test_nonsense_is_refused(db: str) -> None:
    """Naive datetimes and ids that are none are errors that say so."""
    async with bus_with(db, Switch()) as bus:
        with pytest.raises(ConfigurationError, match="aware"):
            await bus.dead_letters.list(since=datetime.now())  # noqa: DTZ005
        with pytest.raises(ConfigurationError):
            await bus.dead_letters.redrive("1")  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError):
            await bus.dead_letters.list(error=5)  # type: ignore[arg-type]


# ------------------------------------------------------------------ redrive


@pytest.mark.parametrize("order", ORDERS)
async def test_a_redrive_that_works_deletes_the_dead_letter(any_db: str, order: Order) -> None:
    """The handler is called again from attempt 1, with live events beside it, and its ack deletes the dead letter."""
    switch = Switch(ValueError("no"))
    async with bus_with(any_db, switch, order=order) as bus:
        receipt = await bus.publish(Sold("k", 1))
        assert await bus.drain(timeout=20) == {}
        switch.error = None
        assert await bus.dead_letters.redrive(subscription="s") == 1
        await bus.publish(Sold("k", 2))
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
        assert await bus.status(receipt.id) == {"s": "handled"}
        await receipt.handled(timeout=1)
    assert sorted(switch.recorder.seen) == [(1, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize("order", ORDERS)
async def test_a_redrive_that_fails_updates_the_dead_letter(db: str, order: Order) -> None:
    """A redrive that fails for good leaves the same dead letter, with the new error and all attempts counted."""
    switch = Switch(ValueError("no"))
    retry = RetryPolicy(attempts=3, first=0.001)
    async with bus_with(db, switch, order=order, retry=retry) as bus:
        await bus.publish(Sold("k", 1))
        assert await bus.drain(timeout=20) == {}
        (before,) = await bus.dead_letters.list()
        switch.error = KeyError("still not")
        await bus.dead_letters.redrive(before.id)
        assert await bus.drain(timeout=20) == {}
        (after,) = await bus.dead_letters.list()
    assert (after.id, after.error_type, after.error) == (before.id, "KeyError", "'still not'")
    assert (before.attempts, after.attempts) == (3, 6)
    assert after.first_failed_at == before.first_failed_at
    assert after.last_failed_at > before.last_failed_at
    assert not after.redriving
    assert switch.recorder.seen == [(1, 1), (1, 2), (1, 3)] * 2


async def test_a_redrive_publishes_with_its_ack(db: str) -> None:
    """What a redriven attempt returns is published with the ack that deletes the dead letter."""
    works = False
    bus, recorder = EventBus(db), Recorder()

    @bus.subscribe(Sold, name="s", retry=NO_RETRY)
    async def handle(event: Sold, delivery: Delivery) -> Sent:
        assert not delivery.replaying
        if not works:
            raise ValueError
        return Sent(event.n)

    bus.subscribe(Sent, name="then")(recorder.note)
    async with bus:
        await bus.publish(Sold("k", 3))
        assert await bus.drain(timeout=20) == {}
        works = True
        await bus.dead_letters.redrive(all=True)
        assert await recorder.wait_for(1) == [Sent(3)]


async def test_a_redrive_is_not_lost_by_a_restart(db: str) -> None:
    """Stopped in the middle, a redrive goes on after the next start with what it has not done, at the attempt it was at."""
    switch = Switch(ValueError("no"))
    async with bus_with(db, switch, order="key") as bus:
        await bus.publish_many([Sold(f"k{n}", n) for n in range(10)])
        assert await bus.drain(timeout=20) == {}

    seen: list[tuple[int, int]] = []
    failed = Recorder()

    async def half(event: Sold, delivery: Delivery) -> None:
        seen.append((event.n, delivery.attempt))
        failed.add(event.n)
        if event.n % 2:
            raise ValueError

    slowly = RetryPolicy(attempts=3, first=3_600, cap=3_600, jitter=0)
    async with bus_with(db, half, order="key", retry=slowly) as bus:
        assert await bus.dead_letters.redrive(all=True) == 10
        await failed.wait_for(10)
        with anyio.fail_after(20):
            while len(await bus.dead_letters.list()) != 5:
                await anyio.lowlevel.checkpoint()
        letters = await bus.dead_letters.list()
        assert all(letter.redriving for letter in letters)
        assert sorted(x.envelope.event.n for x in letters) == [1, 3, 5, 7, 9]  # type: ignore[attr-defined]

    third = Switch()
    bus = EventBus(db, clock=Later(3_700))
    bus.subscribe(Sold, name="s", order="key", retry=slowly)(third)
    async with bus:
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
    assert sorted(seen) == [(n, 1) for n in range(10)]
    assert sorted(third.recorder.seen) == [(n, 2) for n in (1, 3, 5, 7, 9)]


async def test_a_redrive_stopped_while_it_runs_is_not_lost(db: str) -> None:
    """An attempt of a redrive that the stop cancels is made again after the next start, and does not count."""
    async with bus_with(db, Switch(ValueError("no"))) as bus:
        await bus.publish_many([Sold("k", n) for n in range(3)])
        assert await bus.drain(timeout=20) == {}
    recorder = Recorder()

    async def hang(event: Sold) -> None:
        recorder.add(event.n)
        await anyio.sleep_forever()

    bus = bus_with(db, hang)
    async with bus.open(stop_timeout=0):
        assert await bus.dead_letters.redrive(all=True) == 3
        await recorder.wait_for(1)
    switch = Switch()
    async with bus_with(db, switch) as bus:
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
    assert switch.recorder.seen == [(0, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize("order", ["key", "type", "log"])
async def test_redrives_of_a_key_come_in_order(db: str, order: Order) -> None:
    """The dead letters of a key are redriven in the order of their positions, more of them than one page holds."""
    switch = Switch(ValueError("no"))
    async with bus_with(db, switch, order=order) as bus:
        await bus.publish_many([Sold(f"k{n % 3}", n) for n in range(250)])
        assert await bus.drain(timeout=10) == {}
        switch.error = None
        switch.recorder.seen.clear()
        assert await bus.dead_letters.redrive(subscription="s") == 250
        assert await bus.drain(timeout=10) == {}
        assert await bus.dead_letters.list() == []
    for key in range(3):
        mine = [n for n, _ in switch.recorder.seen if n % 3 == key]
        assert mine == sorted(mine)
    assert len(switch.recorder.seen) == 250


async def test_a_failing_redrive_holds_up_neither_others_nor_live_events(db: str) -> None:
    """While one redrive waits for another attempt, the other redrives go on, and so do live events, also in strict order."""
    switch = Switch(ValueError("no"))
    async with bus_with(db, switch) as bus:
        await bus.publish_many([Sold("k", n) for n in range(4)])
        assert await bus.drain(timeout=20) == {}
    recorder = Recorder()

    async def all_but_first(event: Sold) -> None:
        if event.n == 0:
            raise ValueError
        recorder.add(event.n)

    async with bus_with(db, all_but_first, retry=RetryPolicy(first=3_600, cap=3_600)) as bus:
        await bus.dead_letters.redrive(all=True)
        receipt = await bus.publish(Sold("k", 4))
        await receipt.handled(timeout=20)
        assert sorted(await recorder.wait_for(4)) == [1, 2, 3, 4]
        assert await bus.drain(timeout=0.05) == {"s": 1}


async def test_redriving_twice_delivers_once(db: str) -> None:
    """A dead letter that is being redriven is not redriven a second time beside it."""
    switch = Switch(ValueError("no"))
    async with bus_with(db, switch) as bus:
        await bus.publish_many([Sold("k", n) for n in range(20)])
        assert await bus.drain(timeout=20) == {}
        switch.error = None
        switch.recorder.seen.clear()
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(lambda: bus.dead_letters.redrive(all=True))
        assert await bus.drain(timeout=20) == {}
    assert switch.recorder.seen == [(n, 1) for n in range(20)]


async def test_redrive_without_the_handler_waits_for_it(db: str) -> None:
    """A redrive asked for where the subscription is not dispatched is carried out by the next program that does."""
    async with bus_with(db, Switch(ValueError("no"))) as bus:
        await bus.publish(Sold("k", 1))
        assert await bus.drain(timeout=20) == {}
    bus = bus_with(db, Switch())
    async with bus.open(dispatch=False):
        assert await bus.dead_letters.redrive(subscription="s") == 1
        assert (await bus.dead_letters.list())[0].redriving
    switch = Switch()
    async with bus_with(db, switch) as bus:
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
    assert switch.recorder.seen == [(1, 1)]


async def test_a_redrive_called_back_by_a_pause_comes_again(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A redrive that is on its way to its thread when the subscription is paused is delivered when that is resumed."""
    seen, fails = Recorder(), True

    def handle(event: Sold) -> None:
        if fails:
            raise ValueError
        seen.add(event.n)

    bus = EventBus(db)
    bus.subscribe(Sold, name="s", retry=NO_RETRY)(handle)
    async with bus:
        await bus.publish_many([Sold("k", 1), Sold("k", 2)])
        assert await bus.drain(timeout=20) == {}
        fails, gate = False, hold_up_first_crossing(monkeypatch)
        await bus.dead_letters.redrive(all=True)
        while not (await bus.stats()).subscriptions["s"].running:
            await anyio.lowlevel.checkpoint()
        await bus.pause("s")
        gate.set()
        assert await bus.drain(timeout=20) == {"s": 2}
        assert seen.seen == []
        await bus.resume("s")
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
    assert seen.seen == [1, 2]


async def test_a_discarded_redrive_stays_discarded(db: str) -> None:
    """A dead letter discarded while it is redriven is gone, whatever becomes of the attempt that runs."""
    go_on, recorder = anyio.Event(), Recorder()
    fails = True

    async def handle(event: Sold) -> None:
        if fails:
            raise ValueError
        recorder.add(event.n)
        await go_on.wait()
        raise ValueError

    async with bus_with(db, handle) as bus:
        await bus.publish(Sold("k", 1))
        assert await bus.drain(timeout=20) == {}
        fails = False
        await bus.dead_letters.redrive(all=True)
        await recorder.wait_for(1)
        assert await bus.dead_letters.discard(all=True) == 1
        go_on.set()
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []


@pytest.mark.parametrize("order", ["type", "key"])
async def test_a_redrive_that_is_discarded_before_it_runs_does_not_run(db: str, order: Order) -> None:
    """What waits behind another redrive and is discarded meanwhile is not delivered any more; `drain` does not wait for it."""
    runs: list[int] = []
    running, go_on = anyio.Event(), anyio.Event()

    async def handle(sold: Sold, delivery: Delivery) -> None:
        runs.append(sold.n)
        if len(runs) <= 3:
            raise Reject("not yet")
        running.set()
        await go_on.wait()

    bus = bus_with(db, handle, order=order)
    async with bus:
        await bus.publish_many([Sold("k", n) for n in range(3)])
        await bus.drain()
        assert await bus.dead_letters.redrive(all=True) == 3
        await running.wait()
        later = [letter.id for letter in await bus.dead_letters.list()][1:]
        assert await bus.dead_letters.discard(*later) == 2
        go_on.set()
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
    assert runs == [0, 1, 2, 0]


@pytest.mark.parametrize("discard", [False, True])
async def test_a_cancelled_redrive_or_discard_is_made_all_the_same(any_db: str, discard: bool) -> None:
    """Cancelled when it is on its way to the store, it is stored; the dead letter is delivered, and what was parked behind it."""
    switch = Switch(ValueError("first"))
    bus = bus_with(any_db, switch, order="key", on_exhausted="park")
    async with bus:
        await bus.publish_many([Sold("k", n) for n in range(3)])
        assert await bus.drain(timeout=20) == {"s": 2}
        switch.error = None
        with anyio.CancelScope() as scope:
            scope.cancel()
            await (bus.dead_letters.discard(all=True) if discard else bus.dead_letters.redrive(all=True))
        assert scope.cancelled_caught
        await switch.recorder.wait_for(3 if discard else 4, timeout=20)
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
    assert [n for n, _ in switch.recorder.seen] == [0, 1, 2] if discard else [0, 0, 1, 2]


async def test_a_redrive_stored_by_another_is_looked_for_by_the_next(db: str) -> None:
    """A redrive that finds all of them under way already has this bus look for them: who marked them may not have told it."""
    switch = Switch(ValueError("first"))
    async with bus_with(db, switch) as bus:
        await bus.publish(Sold("k"))
        assert await bus.drain(timeout=20) == {}
        switch.error = None
        await bus._running.journal.command(Redrive(DeadLetterFilter()))  # type: ignore[union-attr]
        assert await bus.dead_letters.redrive(all=True) == 0
        await switch.recorder.wait_for(2, timeout=20)


async def test_a_discard_ends_the_wait_for_another_attempt(db: str) -> None:
    """`drain` does not wait for a redrive that is to be tried again in an hour and is discarded meanwhile."""
    switch = Switch(ValueError("first"))
    async with bus_with(db, switch, retry=RetryPolicy(attempts=2, first=3600, jitter=0)) as bus:
        switch.error = Reject("first")
        await bus.publish(Sold("k"))
        assert await bus.drain(timeout=20) == {}
        switch.error = ValueError("again")
        await bus.dead_letters.redrive(all=True)
        assert await bus.drain(timeout=0.2) == {"s": 1}
        assert await bus.dead_letters.discard(all=True) == 1
        assert await bus.drain(timeout=20) == {}


@pytest.mark.parametrize("order", ORDERS)
async def test_what_is_rewound_is_not_redriven_as_well(any_db: str, order: Order) -> None:
    """Dead letters that wait to be redriven when their subscription is rewound go with it: each event comes again once."""
    begun, go_on, good = Recorder(), anyio.Event(), False

    async def handle(sold: Sold) -> None:
        if not good:
            raise Reject("not yet")
        begun.add(sold.n)
        await go_on.wait()

    bus = (
        bus_with(any_db, handle, order=order, concurrency=1)
        if order in {"key", "none"}
        else bus_with(any_db, handle, order=order)
    )
    async with bus:
        await bus.publish_many([Sold("k", n) for n in range(6)])
        assert await bus.drain(timeout=20) == {}
        good = True
        assert await bus.dead_letters.redrive(all=True) == 6
        await begun.wait_for(1)
        await bus.rewind("s", after=0)
        go_on.set()
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
    assert sorted(begun.seen) == [0, 0, 1, 2, 3, 4, 5]  # the first was running


async def test_redrives_of_a_paused_subscription_wait_for_its_resumption(db: str) -> None:
    """What is redriven while a subscription is paused is reported as left, and delivered when it is resumed."""
    switch = Switch(Reject("for now"))
    bus = bus_with(db, switch)
    async with bus:
        await bus.publish_many([Sold("k", n) for n in range(5)])
        assert await bus.drain(20) == {}
        switch.error = None
        await bus.pause("s")
        assert await bus.dead_letters.redrive(all=True) == 5
        assert await bus.drain(20) == {"s": 5}
        assert len(switch.recorder.seen) == 5
        await bus.resume("s")
        assert await bus.drain(20) == {}
        assert await bus.dead_letters.list() == []
    assert switch.recorder.seen[5:] == [(n, 1) for n in range(5)]


async def test_drain_does_not_wait_for_redrives_of_a_blocked_lane(db: str) -> None:
    """With redrives that nobody here decodes, `drain` waits for the others alone, whichever end last, and names what is left."""

    @event("shop.sold", version=2, key="key")
    @attrs.frozen
    class NewerSold:
        key: str
        n: int

    first = bus_with(db, Switch(Reject("for now")), NewerSold, Sent)
    async with first:
        await first.publish_many([NewerSold("k", 1), NewerSold("k", 2), *(Sent(n) for n in range(3))])
        assert await first.drain(20) == {}

    recorder, go_on = Recorder(), anyio.Event()

    async def wait(event: Sent) -> None:
        await go_on.wait()
        recorder.add(event.n)

    second = bus_with(db, wait, Sold, Sent)
    async with second, anyio.create_task_group() as group:
        await second.dead_letters.redrive(all=True)
        drained = Recorder()

        async def drain() -> None:
            drained.add(await second.drain())

        group.start_soon(drain)
        while (await second.stats()).subscriptions["s"].state != "blocked":
            await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        go_on.set()
        assert await drained.wait_for(1) == [{"s": 2}]
        assert sorted(recorder.seen) == [0, 1, 2]


class Stepped(SQLiteStore):
    """A SQLite store whose commits of outcomes, once `stepping`, wait for a step each."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.stepping = False
        self.begun = 0
        self.steps = threading.Semaphore(0)

    def commit(self, batch: Batch) -> Committed:
        """Commit, when it is its turn."""
        if self.stepping and batch.units:
            self.begun += 1
            assert self.steps.acquire(timeout=10)
        return super().commit(batch)


async def test_drain_waits_for_the_outcomes_of_redrives_beside_a_paused_one(db: str) -> None:
    """Redrives that are handled and not written yet are not left, also where all others wait in a lane that gives nothing out."""
    switch, store, drained = Switch(Reject("for now")), Stepped(db), Recorder()

    async def handle(event: Any, delivery: Delivery) -> None:
        while store.stepping and event.n and not store.begun:
            await anyio.lowlevel.checkpoint()  # the first outcome is written by itself
        await switch(event, delivery)

    bus = bus_with(store, handle, Sold, Sent)
    async with bus, anyio.create_task_group() as group:
        await bus.publish_many([Sold("k", 1), Sold("k", 2), *(Sent(n) for n in range(3))])
        assert await bus.drain(20) == {}
        for lane in bus._open().dispatcher.lanes():
            lane.blocked = "as if it could not be decoded" if lane.name == "shop.sold" else None
        switch.error, store.stepping = None, True

        async def drain() -> None:
            drained.add(await bus.drain())

        await bus.dead_letters.redrive(all=True)
        group.start_soon(drain)
        await switch.recorder.wait_for(5 + 3)
        await anyio.wait_all_tasks_blocked()
        store.steps.release()
        with anyio.fail_after(10):
            while bus._open().dispatcher.servings["s"].redriver.known == 5:
                await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        store.steps.release(100)
        assert await drained.wait_for(1) == [{"s": 2}]


@pytest.mark.parametrize("order", ORDERS)
async def test_a_clock_that_is_set_back_does_not_put_a_redrive_off(db: str, order: Order) -> None:
    """What waits in a redrive for another attempt waits no longer because the time of day jumps back meanwhile."""
    clock, seen = MovableClock(), Recorder()
    bus = EventBus(db, clock=clock)

    @bus.subscribe(Sold, name="s", order=order, retry=RetryPolicy(attempts=2, first=0.2, jitter=0.0))
    async def handler(_sold: Sold) -> None:
        seen.add(len(seen.seen) + 1)
        if len(seen.seen) <= 3:
            raise ValueError("no")

    async with bus:
        await bus.publish(Sold("a"))
        assert await bus.drain(20) == {}
        await bus.dead_letters.redrive(subscription="s")
        assert bus._running is not None
        while not bus._running.dispatcher.servings["s"].redriver._later:
            await anyio.lowlevel.checkpoint()
        clock.move(timedelta(hours=-1))
        assert await seen.wait_for(4) == [1, 2, 3, 4]
        assert await bus.drain(20) == {}
        assert await bus.dead_letters.list() == []
