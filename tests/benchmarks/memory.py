"""Buses with subscriptions that stand still, each run in a process of its own: what they hold in memory, and what others notice.

Two buses are open: on one, a busy type is alone; on the other, there is a stalled subscription as well. They take turns. Memory is
that of the process (RSS), above what it had when both were warm, before anything was stalled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

import attrs

from eventbus import Draft, Envelope, EventBus, event
from eventbus.cli.bench_order import Order
from tests.benchmarks.busy import Busy

Numbers = dict[str, float]

CHUNK = 5_000
"""Events of the busy type between two looks."""

BODY = "x" * 8_000

_PATIENCE = 300.0
"""Seconds after which what is not handled counts as lost."""


# ------------------------------------------------------------------ memory


def _kilobytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)


def resident() -> float:
    """What the process holds now, in MB."""
    return _kilobytes("VmRSS") * 1_024 / 1e6


def peak() -> float:
    """The most that it has held since `forget_peak`, in MB."""
    return _kilobytes("VmHWM") * 1_024 / 1e6


def forget_peak() -> None:
    """Begin again."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


# ------------------------------------------------------------------ the stalled subscription


class Stalled:
    """Its handlers wait until they are let go."""

    def __init__(self) -> None:
        self.called = 0
        self._go = asyncio.Event()

    async def handle(self, _event: object) -> None:
        await self._go.wait()
        self.called += 1

    async def handle_envelope(self, envelope: Envelope) -> None:
        await self.handle(envelope)

    def let_go(self) -> None:
        self._go.set()


@attrs.define
class Pair:
    """The two buses, and how fast the busy type was on each in turn."""

    alone: Busy
    beside: Busy
    buses: tuple[EventBus, EventBus]
    alone_rates: list[float] = attrs.field(factory=list)
    beside_rates: list[float] = attrs.field(factory=list)

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path, beside: EventBus) -> AsyncIterator[Pair]:
        """Both, warm. `beside` has its stalled subscription, to which nothing has been published."""
        alone = EventBus(folder / "alone.db")
        pair = cls(Busy(alone), Busy(beside), (alone, beside))
        async with alone, beside.open(stop_timeout=0.1):
            yield pair

    async def warm_up(self) -> None:
        for _ in range(4):
            await self.take_turns()
        self.alone_rates.clear()
        self.beside_rates.clear()

    async def publish(self, batches: Sequence[Sequence[Draft]], buses: Sequence[EventBus]) -> None:
        """Other events, one batch after another."""
        for batch in batches:
            for bus in buses:
                await bus.publish_many(batch)

    async def take_turns(self) -> None:
        """One chunk on each."""
        self.alone_rates.append((await self.alone.called(CHUNK)).per_second)
        await self.run_beside()

    async def run_beside(self) -> None:
        self.beside_rates.append((await self.beside.called(CHUNK)).per_second)

    def numbers(self, before: float) -> Numbers:
        """What there is to say, given the memory before."""
        alone, beside = median(self.alone_rates), median(self.beside_rates)
        return {
            "grown_mb": resident() - before,
            "peak_mb": peak() - before,
            "before_mb": before,
            "alone_events_per_second": alone,
            "beside_events_per_second": beside,
            "speed_ratio": beside / alone,
        }


def stalled_behind(folder: str, events: int) -> Numbers:
    """A subscription to the busy type itself that falls behind by so many events, then catches up."""

    async def run() -> Numbers:
        bus, stalled = EventBus(Path(folder) / "beside.db"), Stalled()
        bus.subscribe(Order, name="stalled", timeout=None)(stalled.handle)
        async with Pair.open(Path(folder), bus) as pair:
            await pair.warm_up()
            behind, before = 4 * CHUNK, resident()
            forget_peak()
            while behind < events:
                await pair.take_turns()
                await pair.run_beside()
                behind += 2 * CHUNK
            found = pair.numbers(before)
            return found | await _caught_up(bus, stalled, behind, before)

    return asyncio.run(run())


async def _caught_up(bus: EventBus, stalled: Stalled, behind: int, before: float) -> Numbers:
    """Let it go: nothing was lost, and catching up takes no memory either."""
    forget_peak()
    began = time.perf_counter()
    stalled.let_go()
    left = await bus.drain(_PATIENCE)
    seconds = time.perf_counter() - began
    assert (stalled.called, left) == (behind, {}), f"{behind:,} were to be handled, {stalled.called:,} were; left {left}"
    return {"behind": float(behind), "catching_up_peak_mb": peak() - before, "catching_up_per_second": behind / seconds}


# ------------------------------------------------------------------ many stalled lanes


def stalled_lanes(folder: str, order: str, lanes: int, rounds: int) -> Numbers:
    """A subscription with so many lanes (order "type" or "key"), each of which gets an event of 8 KB in each round."""

    async def run() -> Numbers:
        bus, stalled = EventBus(Path(folder) / "beside.db"), Stalled()
        if order == "key":
            bus.subscribe("big.*", name="stalled", timeout=None, order="key", concurrency=lanes)(stalled.handle_envelope)
        else:
            bus.subscribe("big.*", name="stalled", timeout=None)(stalled.handle_envelope)
        batches = _big_events(order, lanes)
        async with Pair.open(Path(folder), bus) as pair:
            await pair.publish(batches, pair.buses[:1])  # the types' own cost; nobody wants them there
            await pair.warm_up()
            before = resident()
            forget_peak()
            for number in range(rounds):
                await pair.publish(batches, pair.buses)  # both have them to write
                await pair.take_turns()
                if number == 0:  # its lanes are made and begin; that passes
                    pair.alone_rates.clear()
                    pair.beside_rates.clear()
            found = pair.numbers(before)
            return found | await _caught_up(bus, stalled, lanes * rounds, before)

    return asyncio.run(run())


def _big_events(order: str, lanes: int) -> Sequence[Sequence[Draft]]:
    """One event for each lane, a hundred in a batch."""
    if order == "key":
        big = _big_class(0)(BODY)
        drafts = [Draft(big, key=f"key-{number}") for number in range(lanes)]
    else:
        drafts = [Draft(_big_class(number)(BODY)) for number in range(lanes)]
    return [drafts[at : at + 100] for at in range(0, lanes, 100)]


def _big_class(number: int) -> type:
    made: type = attrs.make_class(f"Big{number}", {"body": attrs.field(type=str)}, frozen=True)
    registered = event(f"big.t{number}")(made)
    assert isinstance(registered, type)
    return registered
