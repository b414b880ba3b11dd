"""A disk that is full, and has room again: a tmpfs of a few megabytes, filled and freed while a bus works on it.

Events are published without a pause; the disk is filled until they are refused; then it is freed, and nobody calls the bus. What was
acknowledged must have been handled, once by each subscription; what was refused must not be there; reads go on all the time.
Sometimes whoever has filled the disk takes the room of the ballast as well; sometimes the bus is closed and opened on the full disk.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import subprocess
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import attrs

from eventbus import EventBus, StoreFull
from tests.bus.support import Recorder
from tests.campaign import Case

CYCLES = 5
"""Times that the disk of one case is filled and freed."""
SIZE = 6 * 1_048_576
PATIENCE = 30.0


@attrs.frozen
class Written:
    n: int
    text: str = ""


@attrs.frozen
class Followed:
    n: int


def can_mount() -> bool:
    """Whether this user may mount a tmpfs."""
    return os.geteuid() == 0 and Path("/proc/filesystems").exists() and "tmpfs" in Path("/proc/filesystems").read_text()


@contextlib.contextmanager
def small_disk() -> Iterator[Path]:
    """A file system of `SIZE` bytes of its own."""
    with tempfile.TemporaryDirectory(prefix="eventbus-full-") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


class Filler:
    """Somebody else who writes to the disk until it is full."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "somebody else's"

    def fill(self) -> None:
        """Take all the room that there is."""
        with self._path.open("ab", buffering=0) as file:
            for size in (65_536, 4_096):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def free(self) -> None:
        """Give it back."""
        self._path.unlink()


@attrs.define
class Run:
    """One case: what was published and handled, and what was wrong.

    Attributes:
        reopened: how often the bus was closed while its outcomes could perhaps not be written: they may be handled again.
    """

    folder: Path
    chance: random.Random
    handled: Counter[tuple[str, int]] = attrs.field(factory=Counter)
    acknowledged: set[int] = attrs.field(factory=set)
    refused: set[int] = attrs.field(factory=set)
    faults: list[str] = attrs.field(factory=list)
    reopened: int = 0
    numbers: Iterator[int] = attrs.field(factory=itertools.count)
    settled: Recorder = attrs.field(factory=Recorder)

    def declare(self) -> EventBus:
        bus = EventBus(self.folder / "bus.db", lease=300.0)  # renewals write, too: they are not what it goes on by

        @bus.subscribe(Written, name="first")
        async def first(event: Written) -> Followed:
            self.note("first", event.n)
            return Followed(event.n)

        @bus.subscribe(Written, name="second", order="key", concurrency=4)
        def second(event: Written) -> None:
            self.note("second", event.n)

        @bus.subscribe(Followed, name="third")
        async def third(event: Followed) -> None:
            self.note("third", event.n)

        return bus

    def note(self, subscription: str, n: int) -> None:
        self.handled[subscription, n] += 1
        if self.handled[subscription, n] == 1:
            self.settled.add((subscription, n))

    async def publish(self, bus: EventBus) -> bool:
        """Publish one; whether it was acknowledged."""
        n = next(self.numbers)
        try:
            await bus.publish(Written(n, "x" * self.chance.choice((10, 500, 20_000))), key=str(n % 7))
        except StoreFull:
            self.refused.add(n)
            return False
        self.acknowledged.add(n)
        return True

    async def cycle(self, bus: EventBus) -> None:
        """Fill the disk, publish until refused, look; free it, and wait."""
        filler = Filler(self.folder)
        for _ in range(self.chance.randrange(10)):
            await self.publish(bus)
        filler.fill()
        while await self.publish(bus):
            pass
        greedy = self.chance.random() < 0.3
        for _ in range(self.chance.randrange(20)):
            await self.publish(bus)
            if greedy:
                filler.fill()
        await self.look(bus)
        filler.free()
        await self.wait()
        if not await self.publish(bus):
            self.faults.append("everything is handled, and an event is refused though there is room")
        await self.wait()

    async def look(self, bus: EventBus) -> None:
        """Reads go on."""
        await bus.stats()
        found = {event.n async for event in self.events(bus)}
        if not self.acknowledged <= found:
            self.faults.append(f"acknowledged and not in the log while it is full: {sorted(self.acknowledged - found)[:5]}")

    async def events(self, bus: EventBus) -> AsyncIterator[Written]:
        async for envelope in bus.history(Written):
            event = envelope.event
            assert isinstance(event, Written)
            yield event

    async def wait(self) -> None:
        """Until all that was acknowledged is handled; nobody calls the bus meanwhile."""
        try:
            await self.settled.wait_for(3 * len(self.acknowledged), PATIENCE)
        except TimeoutError as error:
            self.faults.append(f"it does not go on by itself: {error}")
            raise

    async def run(self) -> None:
        for number in range(CYCLES):
            async with self.declare().open() as bus:
                await self.cycle(bus)
            if number % 2:
                await self.open_when_full()
        async with self.declare() as bus:
            left = await bus.drain(timeout=PATIENCE)
            if any(left.values()):
                self.faults.append(f"left in the end: {left}")
            found = Counter([event.n async for event in self.events(bus)])
        self.check(found)

    async def open_when_full(self) -> None:
        """Open a bus on a full disk, with events that wait; it goes on when there is room."""
        filler = Filler(self.folder)
        async with self.declare().open(dispatch=False) as bus:
            await self.publish(bus)
            filler.fill()
        self.reopened += 1
        async with self.declare() as bus:
            await self.look(bus)
            filler.free()
            await self.wait()

    def check(self, found: Counter[int]) -> None:
        """Nothing acknowledged is lost, nothing refused is there, nothing was handled for ever."""
        lost = sorted(self.acknowledged - found.keys())
        there = sorted(self.refused & found.keys())
        twice = [n for n, count in found.items() if count > 1]
        for what, which in (("lost", lost), ("refused and there", there), ("there twice", twice)):
            if which:
                self.faults.append(f"{what}: {which[:5]} of {len(self.acknowledged)}")
        often = [key for key, count in self.handled.items() if count > 1 + self.reopened]
        if often:
            self.faults.append(f"handled again and again: {[(key, self.handled[key]) for key in often[:5]]}")
        if not self.refused:
            self.faults.append("nothing was ever refused: the disk was not full")


def case(seed: int, number: int) -> Case:
    """One disk, filled and freed `CYCLES` times."""
    with small_disk() as folder:
        run = Run(folder, random.Random(f"{seed}-{number}"))
        try:
            anyio.run(run.run, backend=("asyncio", "trio")[number % 2])
        except Exception as error:  # it is a fault, and the next case is to be run
            run.faults.append(f"{type(error).__name__}: {error}")
    return Case(f"{seed}-{number}", CYCLES, run.faults)


def cases(seed: int) -> Iterator[Case]:
    """See `tests.campaign`."""
    for number in itertools.count():
        yield case(seed, number)
