"""Failed attempts: when they are made again, how often, and whom they hold up."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import anyio
import attrs
import pytest

from eventbus import Delivery, EventBus, Reject, RetryAfter, RetryPolicy, event
from eventbus.hooks import AttemptFailed, Moment
from eventbus.stores.base import Order
from tests.bus.support import NO_RETRY, QUICK, Hurrying, Later, Recorder

ORDERS: list[Order] = ["type", "log", "key", "none"]
LATER = RetryPolicy(first=3_600, cap=3_600)
"""After the first failure nothing more within any test."""


@event("job", key="key")
@attrs.frozen
class Job:
    key: str
    n: int = 0


@attrs.frozen
class Other:
    n: int = 0


class Failures:
    """A hook that keeps what failed, and tells who waits for it."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def __call__(self, moment: Moment) -> None:
        if isinstance(moment, AttemptFailed):
            self.recorder.add(moment)

    async def wait_for(self, count: int) -> list[AttemptFailed]:
        return await self.recorder.wait_for(count)


def failing_bus(
    db: str, retry: RetryPolicy, fail: Callable[[Delivery], object], **options: Any
) -> tuple[EventBus, Recorder, Failures]:
    """A bus with one subscription `s`, whose handler notes its attempts, then does as `fail` does."""
    attempts, failures = Recorder(), Failures()
    clock = options.pop("clock", None)
    bus = EventBus(db, hooks=[failures], clock=clock)

    @bus.subscribe(Job, name="s", retry=retry, **options)
    async def handle(event: Job, delivery: Delivery) -> None:
        attempts.add((event.n, delivery.attempt))
        fail(delivery)

    return bus, attempts, failures


def raising(error: Exception) -> Callable[[Delivery], object]:
    def fail(_delivery: Delivery) -> None:
        raise error

    return fail


# ------------------------------------------------------------------ policies


@pytest.mark.parametrize("order", ORDERS)
async def test_an_event_is_tried_as_often_as_the_policy_says(any_db: str, order: Order) -> None:
    """A delivery that keeps failing is attempted `attempts` times, counted from 1, and then is a dead letter."""
    bus, attempts, _ = failing_bus(any_db, QUICK, raising(ValueError("no")), order=order)
    async with bus:
        await bus.publish(Job("a"))
        assert await bus.drain(timeout=20) == {}
        (letter,) = await bus.dead_letters.list()
        assert letter.attempts == 4
        stats = (await bus.stats()).subscriptions["s"]
    assert attempts.seen == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert (stats.failed, stats.handled, stats.dead, stats.lag, stats.retrying) == (4, 0, 1, 0, 0)


@pytest.mark.parametrize("order", ORDERS)
async def test_the_delays_are_those_of_the_policy(db: str, order: Order) -> None:
    """The delay grows by `factor` from `first` up to `cap`, and no attempt is made before it is over."""
    retry = RetryPolicy(attempts=5, first=60.0, factor=10.0, cap=3_600.0, jitter=0.0)
    clock = Hurrying(pace=20_000)
    times: list[float] = []

    def fail(_: object) -> None:
        times.append(clock.time())
        raise ZeroDivisionError

    bus, _, failures = failing_bus(db, retry, fail, order=order, clock=clock)
    async with bus:
        await bus.publish(Job("a"))
        assert await bus.drain(timeout=20) == {}
    assert [failure.retry_in for failure in failures.recorder.seen] == [60.0, 600.0, 3_600.0, 3_600.0, None]
    waited = [after - before for before, after in itertools.pairwise(times)]
    assert all(seconds >= least for seconds, least in zip(waited, [60.0, 600.0, 3_600.0, 3_600.0], strict=True)), waited


@pytest.mark.parametrize("order", ORDERS)
async def test_retry_after_has_its_own_delay_and_counts(db: str, order: Order) -> None:
    """`RetryAfter` brings the delivery back after its own delay, and counts as an attempt."""
    retry = RetryPolicy(attempts=3, first=0.001)
    bus, attempts, failures = failing_bus(db, retry, raising(RetryAfter(7_200)), order=order, clock=Hurrying(pace=100_000))
    async with bus:
        await bus.publish(Job("a"))
        assert await bus.drain(timeout=20) == {}
        (letter,) = await bus.dead_letters.list(error=RetryAfter)
    assert attempts.seen == [(0, 1), (0, 2), (0, 3)]
    assert [failure.retry_in for failure in failures.recorder.seen] == [7_200.0, 7_200.0, None]
    assert letter.attempts == 3


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, -1, 1e300, "soon", None])
async def test_retry_after_nonsense_harms_nothing(db: str, seconds: Any) -> None:
    """A handler that asks for a delay that is none has failed like any other, and the bus goes on."""
    retry = RetryPolicy(attempts=2, first=0.0)
    bus, attempts, failures = failing_bus(db, retry, raising(RetryAfter(seconds)), order="key")
    async with bus:
        await bus.publish(Job("a"))
        assert (await failures.wait_for(1))[0].retry_in is not None
        stats = await bus.stats()
        assert stats.subscriptions["s"].state == "running"
    assert attempts.seen[0] == (0, 1)


@pytest.mark.parametrize("order", ORDERS)
async def test_reject_is_a_dead_letter_at_once(db: str, order: Order) -> None:
    """`Reject` is a dead letter after the first attempt, with its reason, and the next event goes on."""
    bus, attempts, _ = failing_bus(db, QUICK, raising(Reject("not ours")), order=order)
    async with bus:
        await bus.publish_many([Job("a", 1), Job("a", 2)])
        assert await bus.drain(timeout=20) == {}
        letters = await bus.dead_letters.list()
    assert attempts.seen == [(1, 1), (2, 1)]
    assert [(x.error_type, x.error, x.attempts) for x in letters] == [("Reject", "not ours", 1)] * 2


@pytest.mark.parametrize("order", ORDERS)
async def test_give_up_on_is_a_dead_letter_at_once(db: str, order: Order) -> None:
    """An error that `give_up_on` names, or a subclass of it, is not tried again; others are."""
    retry = RetryPolicy(attempts=3, first=0.001, give_up_on=(LookupError,))
    errors: dict[int, Exception] = {1: KeyError("gone"), 2: ValueError("later")}

    def fail(delivery: Delivery) -> None:
        raise errors[delivery.envelope.event.n]  # type: ignore[attr-defined]

    bus, attempts, _ = failing_bus(db, retry, fail, order=order)
    async with bus:
        await bus.publish_many([Job("a", 1), Job("a", 2)])
        assert await bus.drain(timeout=20) == {}
    assert attempts.seen == [(1, 1), (2, 1), (2, 2), (2, 3)]


async def test_attempts_none_never_gives_up(db: str) -> None:
    """`attempts=None` tries until it works."""

    def fail(delivery: Delivery) -> None:
        if delivery.attempt < 40:
            raise ValueError

    bus, attempts, _ = failing_bus(db, RetryPolicy(attempts=None, first=0.0, jitter=0.0), fail)
    async with bus:
        await bus.publish(Job("a"))
        assert await bus.drain(timeout=20) == {}
        assert await bus.dead_letters.list() == []
    assert [attempt for _, attempt in attempts.seen] == list(range(1, 41))


async def test_an_error_that_cannot_be_printed_is_a_failure_like_any_other(db: str) -> None:
    """Errors with lone surrogates, NULs, or a `__str__` that raises are stored as well as they can be."""

    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    errors: list[Exception] = [ValueError("\ud800 \0 x"), Odd(), ValueError("x" * 100_000)]
    bus, _, _ = failing_bus(db, NO_RETRY, lambda delivery: _raise(errors[delivery.envelope.event.n]))  # type: ignore[attr-defined]
    async with bus:
        await bus.publish_many([Job("a", n) for n in range(3)])
        assert await bus.drain(timeout=20) == {}
        letters = await bus.dead_letters.list()
    assert [letter.error_type for letter in letters] == ["ValueError", "Odd", "ValueError"]


def _raise(error: Exception) -> None:
    raise error


# ------------------------------------------------------------------ over restarts


@pytest.mark.parametrize("order", ORDERS)
async def test_attempts_are_not_reset_by_a_restart(db: str, order: Order) -> None:
    """Attempts made before a stop are counted after it: never more than the policy allows, never fewer."""
    seen: list[tuple[int, int]] = []
    for _ in range(3):
        bus, attempts, failures = failing_bus(
            db, RetryPolicy(attempts=5, first=0.0, jitter=0.0, cap=0.0), raising(ValueError("no")), order=order
        )
        async with bus.open(stop_timeout=0):
            if not seen:
                await bus.publish(Job("a"))
            await failures.wait_for(2 if len(seen) < 4 else 1)
        seen += attempts.seen
        if len(seen) >= 5:
            break
    async with failing_bus(db, QUICK, raising(ValueError("no")), order=order)[0] as bus:
        assert await bus.drain(timeout=20) == {}
        (letter,) = await bus.dead_letters.list()
    assert [attempt for _, attempt in seen] == [1, 2, 3, 4, 5]
    assert letter.attempts == 5


@pytest.mark.parametrize("order", ORDERS)
async def test_due_times_are_not_skipped_by_a_restart(db: str, order: Order) -> None:
    """What is due in an hour is not tried before by a restart, and is tried after one that comes an hour later."""
    retry = RetryPolicy(attempts=3, first=3_600.0, cap=3_600.0, jitter=0.0)
    bus, first, failures = failing_bus(db, retry, raising(ValueError("no")), order=order)
    async with bus:
        receipt = await bus.publish(Job("a", 1))
        await failures.wait_for(1)
    bus, soon, _ = failing_bus(db, retry, raising(ValueError("no")), order=order, clock=Later(3_000))
    async with bus:
        assert await bus.drain(timeout=0.1) == {"s": 1}
        assert (await bus.status(receipt.id)) == {"s": "retrying"}
        assert (await bus.stats()).subscriptions["s"].retrying == 1
    bus, later, _ = failing_bus(db, retry, lambda _: None, order=order, clock=Later(3_700))
    async with bus:
        assert await bus.drain(timeout=20) == {}
        assert (await bus.status(receipt.id)) == {"s": "handled"}
    assert (first.seen, soon.seen, later.seen) == ([(1, 1)], [], [(1, 2)])


@pytest.mark.parametrize("order", ORDERS)
async def test_a_clock_that_was_set_back_does_not_put_retries_off(db: str, order: Order) -> None:
    """After a restart with the clock ten years back, what waits for another attempt waits no longer than it was to."""
    retry = RetryPolicy(attempts=3, first=0.5, cap=0.5, jitter=0.0)
    bus, first, failures = failing_bus(db, retry, raising(ValueError("no")), order=order)
    async with bus:
        await bus.publish(Job("a", 1))
        await failures.wait_for(1)
    bus, later, _ = failing_bus(db, retry, lambda _: None, order=order, clock=Later(-10 * 365 * 86_400))
    async with bus:
        assert await bus.drain(timeout=20) == {}
    assert (first.seen, later.seen) == ([(1, 1)], [(1, 2)])


@pytest.mark.parametrize("order", ORDERS)
async def test_the_first_failure_is_remembered_over_a_restart(db: str, order: Order) -> None:
    """A dead letter says when its delivery failed first, also if that was in another process's life."""
    retry = RetryPolicy(attempts=2, first=3_600.0, cap=3_600.0, jitter=0.0)
    bus, _, failures = failing_bus(db, retry, raising(ValueError("no")), order=order)
    async with bus:
        await bus.publish(Job("a", 1))
        await failures.wait_for(1)
    async with failing_bus(db, retry, raising(KeyError("no")), order=order, clock=Later(4_000))[0] as bus:
        assert await bus.drain(timeout=20) == {}
        (letter,) = await bus.dead_letters.list()
    assert (letter.attempts, letter.error_type) == (2, "KeyError")
    assert 3_999 < (letter.last_failed_at - letter.first_failed_at).total_seconds() < 4_010


async def test_a_key_is_held_over_a_restart(db: str) -> None:
    """Behind a failed event the later ones of its key wait, also those published after a restart; other keys go on."""
    retry = RetryPolicy(attempts=3, first=3_600.0, cap=3_600.0, jitter=0.0)

    def fail(delivery: Delivery) -> None:
        if delivery.envelope.event.n == 1 and delivery.attempt == 1:  # type: ignore[attr-defined]
            raise ValueError

    seen = []
    bus, attempts, failures = failing_bus(db, retry, fail, order="key", concurrency=1)
    async with bus:
        await bus.publish_many([Job("a", 1), Job("b", 2), Job("a", 3), Job("b", 4)])
        await failures.wait_for(1)
        await attempts.wait_for(3)
    seen.append(attempts.seen)
    bus, attempts, _ = failing_bus(db, retry, fail, order="key", concurrency=1)
    async with bus:
        await bus.publish_many([Job("a", 5), Job("b", 6)])
        await attempts.wait_for(1)
        assert (await bus.stats()).subscriptions["s"].retrying == 1
    seen.append(attempts.seen)
    bus, attempts, _ = failing_bus(db, retry, fail, order="key", concurrency=1, clock=Later(3_700))
    async with bus:
        await bus.publish_many([Job("a", 7)])
        assert await bus.drain(timeout=20) == {}
    seen.append(attempts.seen)
    assert seen == [[(1, 1), (2, 1), (4, 1)], [(6, 1)], [(1, 2), (3, 1), (5, 1), (7, 1)]]


# ------------------------------------------------------------------ whom they hold up


async def test_a_failing_key_holds_up_no_other_key(db: str) -> None:
    """While a key waits for another attempt, other keys of its lane are handled, and their receipts know it."""
    bus = EventBus(db)

    @bus.subscribe(Job, name="s", order="key", concurrency=1, retry=LATER)
    async def handle(event: Job) -> None:
        if event.key == "bad":
            raise ValueError

    async with bus:
        receipts = await bus.publish_many([Job(key, n) for n, key in enumerate(["bad", "a", "bad", "b", "a", "bad"])])
        for number in (1, 3, 4):
            await receipts[number].handled(timeout=20)
        statuses = [(await bus.status(receipt.id))["s"] for receipt in receipts]
        assert statuses == ["retrying", "handled", "pending", "handled", "handled", "pending"]
        assert set(await bus.drain(timeout=0.05)) == {"s"}


async def test_a_failing_event_holds_up_nothing_in_order_none(db: str) -> None:
    """In order "none" only the failed event waits."""
    bus = EventBus(db)

    @bus.subscribe(Job, name="s", order="none", concurrency=1, retry=LATER)
    async def handle(event: Job) -> None:
        if event.n == 0:
            raise ValueError

    async with bus:
        receipts = await bus.publish_many([Job("a", n) for n in range(10)])
        for receipt in receipts[1:]:
            await receipt.handled(timeout=20)
        assert (await bus.status(receipts[0].id)) == {"s": "retrying"}


async def test_a_failing_lane_holds_up_no_other_lane(db: str) -> None:
    """While one type's lane waits for another attempt, other types of the subscription go on, and so do other subscriptions."""
    bus, seen = EventBus(db), defaultdict(list)

    @bus.subscribe(Job, Other, name="by type", retry=LATER)
    async def by_type(event: Job | Other) -> None:
        seen[type(event).__name__].append(event.n)
        if isinstance(event, Job):
            raise ValueError

    @bus.subscribe(Job, Other, name="log", order="log")
    async def in_log(event: Job | Other) -> None:
        seen["log"].append(event.n)

    async with bus:
        await bus.publish_many([Job("a", 0), Other(1), Job("b", 2), Other(3)])
        assert await bus.drain(timeout=0.2) == {"by type": 2}
    assert seen == {"Job": [0], "Other": [1, 3], "log": [0, 1, 2, 3]}


async def test_in_strict_order_the_lane_waits(db: str) -> None:
    """In order "type" and "log" nothing overtakes an event that waits for another attempt."""

    def fail(delivery: Delivery) -> None:
        if delivery.envelope.event.n == 1 and delivery.attempt < 3:  # type: ignore[attr-defined]
            raise ValueError

    bus, attempts, _ = failing_bus(db, QUICK, fail)
    async with bus:
        await bus.publish_many([Job("a", n) for n in range(4)])
        assert await bus.drain(timeout=20) == {}
    assert attempts.seen == [(0, 1), (1, 1), (1, 2), (1, 3), (2, 1), (3, 1)]


async def test_many_keys_may_fail_at_once(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More keys may fail than a lane holds rows for: it gives out no more until some are settled, and loses none."""
    import eventbus._loose

    monkeypatch.setattr(eventbus._loose, "HELD", 5)
    attempts: dict[str, int] = defaultdict(int)
    bus = EventBus(db)

    @bus.subscribe(Job, name="s", order="key", concurrency=1, retry=RetryPolicy(first=0.005, factor=1))
    async def handle(event: Job) -> None:
        attempts[event.key] += 1
        if attempts[event.key] < 3:
            raise ValueError

    async with bus:
        await bus.publish_many([Job(f"k{n}", n) for n in range(40)])
        with anyio.fail_after(20):
            assert await bus.drain() == {}
    assert set(attempts.values()) == {3}
    assert len(attempts) == 40
