"""What a busy type loses of its throughput on a bus with a thousand other subscriptions, or with ten thousand other lanes.

In turn: a bus with one subscription to the busy type and nothing else, and one that has the others as well, which are idle. Each is
opened and warmed up before the clock starts, which stops when the last ack is committed. The lanes are those of a subscription
to a pattern, in order per type, on a log that has ten thousand types.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import attrs
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from eventbus import Envelope, EventBus, event
from eventbus.cli.bench_floor import remove
from eventbus.cli.bench_work import Throughput
from eventbus.stores.base import Batch, Record, slot_of
from eventbus.stores.sqlite import SQLiteStore
from tests.benchmarks.big_log import INSTANCE
from tests.benchmarks.busy import Busy
from tests.benchmarks.rounds import alternate, at_least, events_of, rounds_of, run_on
from tests.benchmarks.table import Row, Table

SUBSCRIPTIONS = 1_000
LANES = 10_000
EVENTS = 50_000

_WARM_UP = 1_000


@attrs.frozen
class Opened:
    """Throughput of the busy type, and the seconds that it took to open the bus."""

    throughput: Throughput
    opening: float

    @property
    def per_second(self) -> float:
        """Events per second."""
        return self.throughput.per_second


async def _work(path: Path, others: Callable[[EventBus], None], events: int) -> Opened:
    bus = EventBus(path)
    busy = Busy(bus)
    others(bus)
    began = time.perf_counter()
    async with bus:
        opening = time.perf_counter() - began
        await busy.handled(min(_WARM_UP, events))
        return Opened(await busy.handled(events), opening)


def _measured(loop: str, path: Path, others: Callable[[EventBus], None], events: int, source: Path | None = None) -> Opened:
    if source is not None:
        shutil.copy(source, path)
    try:
        return run_on(loop, _work, path, others, events)
    finally:
        remove(path)


async def _idle(_event: object) -> None:
    pass


async def _idle_envelope(_envelope: Envelope) -> None:
    pass


# ------------------------------------------------------------------ the others


def nothing(_bus: EventBus) -> None:
    """No others."""


def subscriptions(classes: list[type], bus: EventBus) -> None:
    """One to each of these types."""
    for number, cls in enumerate(classes):
        bus.subscribe(cls, name=f"other-{number}")(_idle)


def lanes(bus: EventBus) -> None:
    """One subscription with a lane for each type of the log."""
    bus.subscribe("other.*", name="others", start="beginning")(_idle_envelope)


def other_classes(count: int) -> list[type]:
    """Event classes that nobody publishes."""
    return [
        event(f"other.t{n}")(attrs.make_class(f"Other{n}", {"number": attrs.field(type=int)}, frozen=True)) for n in range(count)
    ]


def fill(path: Path, types: int) -> None:
    """A log with one event of each of so many types, written by the store itself."""
    store = SQLiteStore(path, durability="fast")
    store.open(INSTANCE)
    try:
        for first in range(0, types, 500):
            records = [_record(number) for number in range(first, min(first + 500, types))]
            store.commit(Batch(time.time(), appends=[records]))
    finally:
        store.close()


def _record(number: int) -> Record:
    id = f"01900000-0000-7000-8000-{number:012x}"
    return Record(id, f"other.t{number}", 1, time.time(), None, slot_of(id), None, "application/json", b'{"number":1}')


async def handle_all(path: Path) -> None:
    """Let the lanes come to be, and handle their events."""
    bus = EventBus(path)
    lanes(bus)
    async with bus:
        assert await bus.drain(120) == {}


# ------------------------------------------------------------------ the rows


@pytest.mark.parametrize(("which", "order"), [("subscriptions", 140), ("lanes", 141)])
def test_busy_type(
    which: str, order: int, backend: str, benchmark: BenchmarkFixture, table: Table, tmp_path: Path, quick: bool
) -> None:
    """A busy type is as fast, whatever else there is on the bus."""
    events, source = events_of(EVENTS, quick=quick), None
    others: Callable[[EventBus], None] = lanes
    if which == "subscriptions":
        others = partial(subscriptions, other_classes(SUBSCRIPTIONS))
        what = f"{SUBSCRIPTIONS:,} subscriptions to other types"
    else:
        source = tmp_path / "types.db"
        fill(source, LANES)
        run_on("asyncio", handle_all, source)
        what = f"{LANES:,} other lanes"
    rounds = alternate(
        benchmark,
        rounds_of(quick=quick),
        partial(_measured, backend, tmp_path / "alone.db", nothing, events),
        partial(_measured, backend, tmp_path / "beside.db", others, events, source),
    )
    ratios = rounds.each(lambda alone, beside: beside.per_second / alone.per_second)
    data = {
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "alone_events_per_second": rounds.median(lambda alone, _: alone.per_second),
        "beside_events_per_second": rounds.median(lambda _, beside: beside.per_second),
        "open_ms": rounds.median(lambda _, beside: beside.opening) * 1e3,
    }
    benchmark.extra_info.update(data)
    table.add(
        Row(
            f"{what}: one busy type",
            f"{at_least(data['ratio'])} of its throughput alone = {data['beside_events_per_second']:,.0f} events/s",
            goal="≥ 0.8",
            met=data["ratio"] >= 0.8,
            backend=backend,
            note=f"{data['ratio_min']:.2f} to {data['ratio_max']:.2f}; opening such a bus takes {data['open_ms']:.0f} ms",
            data=data,
            order=order,
        )
    )
