"""Pausing: by hand, and where a delivery is exhausted; and going on."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import attrs
import pytest

import eventbus._threads
from eventbus import Delivery, EventBus, HandlingFailed, Reject, RetryPolicy, UnknownSubscription, event
from eventbus.hooks import Moment, SubscriptionPaused
from eventbus.stores.base import Order, Pause, Rewind
from tests.bus.support import Recorder

ORDERS: list[Order] = ["type", "log", "key", "none"]
TWICE = RetryPolicy(attempts=2, first=0.001)


@event("task", key="key")
@attrs.frozen
class Task:
    key: str
    n: int


class Broken:
    """A handler that fails for event 1 until it is mended, and notes its attempts."""

    def __init__(self) -> None:
        self.mended = False
        self.attempts = Recorder()

    async def __call__(self, event: Task, delivery: Delivery) -> None:
        self.attempts.add((event.n, delivery.attempt))
        if event.n == 1 and not self.mended:
            raise ValueError("broken")


class Pauses:
    """A hook that tells when a subscription is paused."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def __call__(self, moment: Moment) -> None:
        if isinstance(moment, SubscriptionPaused):
            self.recorder.add((moment.subscription, moment.reason))


def pausing(db: str, handler: Any, order: Order = "type", **options: Any) -> tuple[EventBus, Pauses]:
    pauses = Pauses()
    bus = EventBus(db, hooks=[pauses])
    bus.subscribe(Task, name="s", order=order, retry=TWICE, on_exhausted="pause", **options)(handler)
    return bus, pauses


@pytest.mark.parametrize("order", ORDERS)
async def test_an_exhausted_delivery_pauses_the_subscription(any_db: str, order: Order) -> None:
    """With `on_exhausted="pause"` nothing is given up: the subscription stops, says why, and resumes at attempt 1."""
    broken = Broken()
    bus, pauses = pausing(any_db, broken, order)
    async with bus:
        first = await bus.publish(Task("a", 1))
        assert await pauses.recorder.wait_for(1) == [("s", "ValueError: broken")]
        second = await bus.publish(Task("b", 2))
        for receipt in (first, second):
            with pytest.raises(HandlingFailed, match="paused"):
                await receipt.handled(timeout=20)
        assert set(await bus.drain(timeout=20)) == {"s"}
        stats = (await bus.stats()).subscriptions["s"]
        assert (stats.state, stats.reason, stats.lag, stats.dead) == ("paused", "ValueError: broken", 2, 0)
        assert broken.attempts.seen == [(1, 1), (1, 2)]
        broken.mended = True
        await bus.resume("s")
        await first.handled(timeout=20)
        await second.handled(timeout=20)
        assert (await bus.stats()).subscriptions["s"].state == "running"
        assert await bus.dead_letters.list() == []
    assert sorted(broken.attempts.seen[2:]) == [(1, 1), (2, 1)]


@pytest.mark.parametrize("order", ORDERS)
async def test_a_pause_lasts_over_a_restart(db: str, order: Order) -> None:
    """Paused is paused after the next start, with its reason; resumed there, it starts at attempt 1 and loses nothing."""
    broken = Broken()
    bus, pauses = pausing(db, broken, order)
    async with bus:
        await bus.publish(Task("a", 1))
        await pauses.recorder.wait_for(1)
        await bus.publish(Task("a", 2))
    broken = Broken()
    bus, _ = pausing(db, broken, order)
    async with bus:
        await bus.publish(Task("a", 3))
        assert set(await bus.drain(timeout=20)) == {"s"}
        (info,) = await bus.subscriptions()
        assert (info.state, info.reason) == ("paused", "ValueError: broken")
        assert broken.attempts.seen == []
        broken.mended = True
        await bus.resume("s")
        assert await bus.drain(timeout=20) == {}
    assert sorted(broken.attempts.seen) == [(1, 1), (2, 1), (3, 1)]
    if order != "none":
        assert broken.attempts.seen == [(1, 1), (2, 1), (3, 1)]


@pytest.mark.parametrize("order", ORDERS)
async def test_resumed_while_not_running(db: str, order: Order) -> None:
    """Resumed by a program without the handler, it goes on at the next start at attempt 1, and may be exhausted again."""
    bus, pauses = pausing(db, Broken(), order)
    async with bus:
        await bus.publish(Task("a", 1))
        await pauses.recorder.wait_for(1)
    async with EventBus(db) as operator:
        await operator.resume("s")
    broken = Broken()
    bus, pauses = pausing(db, broken, order)
    async with bus:
        assert await pauses.recorder.wait_for(1) == [("s", "ValueError: broken")]
        assert await bus.dead_letters.list() == []
    assert broken.attempts.seen == [(1, 1), (1, 2)]


@pytest.mark.parametrize("order", ORDERS)
async def test_a_resume_is_not_undone_by_the_pause_before_it(db: str, order: Order) -> None:
    """A resume that follows at once on the pause holds after a restart, attempts counted anew."""
    broken = Broken()
    bus, pauses = pausing(db, broken, order, concurrency=None)
    async with bus.open(stop_timeout=0):
        await bus.publish(Task("a", 1))
        await pauses.recorder.wait_for(1)
        bus_is_paused = bus.resume("s")
        broken.mended = True
        await bus_is_paused
        (info,) = await bus.subscriptions()
        assert info.state == "running"
        assert await bus.drain(timeout=20) == {}
    async with pausing(db, broken, order)[0] as bus:
        (info,) = await bus.subscriptions()
        assert (info.state, info.reason) == ("running", None)
    assert broken.attempts.seen == [(1, 1), (1, 2), (1, 1)]


async def test_a_pause_by_hand(db: str) -> None:
    """`pause` lets what runs finish, starts nothing more, over a restart too, and holds up no other subscription."""
    started, go_on = Recorder(), anyio.Event()
    other = Recorder()

    def make() -> EventBus:
        bus = EventBus(db)

        @bus.subscribe(Task, name="s")
        async def handle(event: Task) -> None:
            started.add(event.n)
            await go_on.wait()

        @bus.subscribe(Task, name="other")
        async def note(event: Task) -> None:
            other.add(event.n)

        return bus

    async with make() as bus:
        receipts = await bus.publish_many([Task("a", n) for n in range(3)])
        await started.wait_for(1)
        await bus.pause("s")
        go_on.set()
        assert await other.wait_for(3) == [0, 1, 2]
        assert await bus.drain(timeout=20) == {"s": 2}
        assert (await bus.status(receipts[0].id))["s"] == "handled"
        assert (await bus.stats()).subscriptions["s"].state == "paused"
    async with make() as bus:
        await bus.publish(Task("a", 3))
        assert await other.wait_for(4) == [0, 1, 2, 3]
        assert await bus.drain(timeout=20) == {"s": 3}
        assert started.seen == [0]
        await bus.resume("s")
        assert await bus.drain(timeout=20) == {}
    assert started.seen == [0, 1, 2, 3]


async def test_a_pause_stops_a_run_of_plain_handlers(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `pause` has returned, a plain handler starts no further attempt, though many were on their way to its thread."""
    monkeypatch.setattr(eventbus._threads, "QUANTUM", 1_000)
    seen, first, go_on = Recorder(), threading.Event(), threading.Event()
    bus = EventBus(db)

    @bus.subscribe(Task, name="s")
    def handle(event: Task) -> None:
        seen.add(event.n)
        first.set()
        assert go_on.wait(5)

    async with bus:
        await bus.publish_many([Task("a", n) for n in range(50)])
        await seen.wait_for(1)
        await bus.pause("s")
        go_on.set()
        assert await bus.drain(timeout=20) == {"s": 49}
        assert seen.seen == [0]
        await bus.resume("s")
        assert await bus.drain(timeout=20) == {}
    assert seen.seen == list(range(50))


async def test_pause_and_resume_are_known_by_name_and_by_handler(db: str) -> None:
    """Wherever a name is taken, the handler is too; a name that is nobody's is an error."""
    bus = EventBus(db)

    @bus.subscribe(Task)
    async def handle(event: Task) -> None: ...

    async with bus:
        await bus.pause(handle)
        await bus.pause("handle")
        assert (await bus.stats()).subscriptions["handle"].state == "paused"
        await bus.resume(handle)
        await bus.resume("handle")
        assert (await bus.stats()).subscriptions["handle"].state == "running"
        for call in (bus.pause, bus.resume):
            with pytest.raises(UnknownSubscription, match="nobody"):
                await call("nobody")


async def test_exhausted_by_a_rejection_is_a_dead_letter_all_the_same(db: str) -> None:
    """`Reject` says that this delivery is dead; it does not pause the subscription."""

    async def handle(event: Task) -> None:
        raise Reject("not ours")

    bus, pauses = pausing(db, handle)
    async with bus:
        await bus.publish(Task("a", 1))
        assert await bus.drain(timeout=20) == {}
        assert len(await bus.dead_letters.list()) == 1
        assert (await bus.stats()).subscriptions["s"].state == "running"
    assert pauses.recorder.seen == []


async def test_a_pause_that_is_seen_in_the_store_first(any_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause by hand is told of once, also if this instance has seen it in the store before `pause` goes on."""
    bus, pauses = pausing(any_db, Broken())
    async with bus:
        assert bus._running is not None
        (serving,) = bus._running.dispatcher.servings.values()
        command = bus._running.journal.command

        async def see_it(given: Any) -> Any:
            result = await command(given)
            if isinstance(given, Pause):
                serving.follow_pause(given.reason)
            return result

        monkeypatch.setattr(bus._running.journal, "command", see_it)
        await bus.pause("s")
    assert pauses.recorder.seen == [("s", "paused by hand")]


async def test_a_pause_that_a_rewind_has_overtaken(any_db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that would pause its subscription, and does not count since that is being rewound, does not pause it."""
    begun, go_on, seen = anyio.Event(), anyio.Event(), Recorder()

    async def handle(task: Task, delivery: Delivery) -> None:
        seen.add(delivery.attempt)
        if not go_on.is_set():
            if delivery.attempt == 2:
                begun.set()
                await go_on.wait()
            raise ValueError("overtaken")

    bus, pauses = pausing(any_db, handle)
    async with bus:
        await bus.publish(Task("a", 1))
        await begun.wait()
        assert bus._running is not None
        command = bus._running.journal.command

        async def command_and_fail(given: Any) -> Any:
            result = await command(given)
            if isinstance(given, Rewind):
                go_on.set()
                assert await pauses.recorder.wait_for(1) == [("s", "ValueError: overtaken")]
            return result

        monkeypatch.setattr(bus._running.journal, "command", command_and_fail)
        await bus.rewind("s")
        assert await seen.wait_for(3) == [1, 2, 1]
        assert await bus.drain(10) == {}
        assert [info.state for info in await bus.subscriptions()] == ["running"]
