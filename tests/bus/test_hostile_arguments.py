"""Arguments that no store can hold harm nobody: they are refused where they are given."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest

from eventbus import ConfigurationError, EventBus, EventBusError, InvalidEventType, InvalidSubscription, event
from tests.bus.support import Recorder

BAD = "\ud800"
HUGE = 10**30

CALLS: list[Callable[[EventBus], Awaitable[object]]] = [
    lambda bus: bus.cancel(BAD),
    lambda bus: bus.status(BAD),
    lambda bus: bus.pause(BAD),
    lambda bus: bus.resume(BAD),
    lambda bus: bus.unsubscribe(BAD),
    lambda bus: bus.rewind(BAD),
    lambda bus: bus.rewind("s", after=HUGE),
    lambda bus: bus.replay(BAD),
    lambda bus: bus.replay(since=HUGE),
    lambda bus: bus.dead_letters.list(type=BAD),
    lambda bus: bus.dead_letters.list(limit=HUGE),
    lambda bus: bus.dead_letters.get(HUGE),
    lambda bus: bus.dead_letters.discard(error=BAD),
    lambda bus: bus.dead_letters.redrive(subscription=BAD),
    lambda bus: bus.publish_many(Placed(1)),  # type: ignore[arg-type]
]


@attrs.frozen
class Placed:
    n: int


@pytest.mark.parametrize("number", range(len(CALLS)))
async def test_a_bad_argument_harms_nobody(any_db: str, number: int) -> None:
    """It is refused with an error of ours, or finds nothing; the bus goes on for everybody else."""
    bus, recorder = EventBus(any_db), Recorder()
    bus.subscribe(Placed, name="s")(recorder.note)
    async with bus:
        with contextlib.suppress(EventBusError):
            assert await CALLS[number](bus) is False
        await (await bus.publish(Placed(2))).handled(timeout=20)
    assert recorder.seen == [Placed(2)]


def test_a_start_beyond_all_positions_is_refused() -> None:
    """A start that could not be stored is refused when it is declared, before it is registered."""
    with pytest.raises(InvalidSubscription, match="start="):
        EventBus(":memory:").subscribe(Placed, start=HUGE)(Recorder().note)


def test_a_version_beyond_all_bounds_is_refused() -> None:
    """So is the version of an event type."""
    with pytest.raises(InvalidEventType, match="version"):
        event("placed", version=2**70)


async def test_a_limit_is_a_number_from_one(any_db: str) -> None:
    """A limit of dead letters that makes no sense is refused."""
    limit: Any
    async with EventBus(any_db) as bus:
        for limit in (0, -1, "5", True):
            with pytest.raises(ConfigurationError, match="limit="):
                await bus.dead_letters.list(limit=limit)
