"""Flipped bits in the database and in its WAL: found, or harmless; never delivered as good, never lost without a word.

A bus makes a database, once for each seed: events of several types, with and without keys, handled, waiting, failing, dead,
scheduled. One image of it was left by a bus that was closed, one by a process that was killed, with all of it in the WAL. Bits of
copies are flipped, each copy is opened by a bus in a subprocess (`python -m tests.faults.flipped_bits`), and everything is delivered. What
was delivered must be what was published, to the last letter. What was not, though it should have been, must have been reported: by an
error, a dead letter, a message.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import attrs

from eventbus import Delivery, Envelope, EventBus, EventBusError, Reject, RetryPolicy, event
from eventbus.stores.sqlite import SQLiteStore
from tests.bus.support import Later
from tests.campaign import MEMORY, Case
from tests.faults.cheaper import cheaper

ROOT = Path(__file__).parents[2]
IMAGES = 100
"""Of one case."""
ROUNDS = 8
LATER = 7_200.0
"""Seconds from the making of a database to the opening of its copies: everything is due by then."""


@event("flip.ordered", key="customer")
@attrs.frozen
class Ordered:
    n: int
    customer: str
    text: str


@event("flip.paid")
@attrs.frozen
class Paid:
    n: int
    text: str


# ------------------------------------------------------------------ in the subprocess


class Seen:
    """What handlers are given."""

    def __init__(self) -> None:
        self.deliveries: list[tuple[str, str, str]] = []

    def note(self, subscription: str, id: str, what: object) -> None:
        self.deliveries.append((subscription, id, repr(what)))


def declare(path: Path, seen: Seen, *, making: bool) -> EventBus:
    """The same subscriptions for making and for opening; while making, some handlers fail."""
    bus = EventBus(SQLiteStore(path), clock=None if making else Later(LATER))
    wait = RetryPolicy(attempts=8, first=3_600.0)

    @bus.subscribe(Ordered, Paid, name="by type", retry=wait)
    async def by_type(it: Ordered | Paid, delivery: Delivery) -> None:
        seen.note("by type", delivery.envelope.id, it)

    @bus.subscribe(Ordered, name="by key", order="key", concurrency=3, retry=wait)
    async def by_key(it: Ordered, delivery: Delivery) -> None:
        if making and it.n % 5 == 0:
            raise RuntimeError("later")
        seen.note("by key", delivery.envelope.id, (it, delivery.envelope.key))

    @bus.subscribe(Ordered, Paid, name="loose", order="none", retry=wait)
    async def loose(it: Ordered | Paid, delivery: Delivery) -> None:
        if making and it.n % 7 == 0:
            raise RuntimeError("later")
        if making and it.n % 11 == 0:
            raise Reject("dead")
        seen.note("loose", delivery.envelope.id, it)

    @bus.subscribe("*", name="audit", order="log")
    async def audit(envelope: Envelope) -> None:
        shown = (envelope.type, envelope.version, envelope.key, dict(envelope.headers), envelope.data.decode(errors="replace"))
        seen.note("audit", envelope.id, shown)

    return bus


async def all_tried(bus: EventBus, published: Sequence[Ordered | Paid]) -> None:
    """Wait until every event was tried, but for those that are held behind one that waits for another attempt."""
    held: set[str] = set()
    by_key = 0
    for it in published:
        if isinstance(it, Ordered) and it.customer not in held:
            by_key += 1
            if it.n % 5 == 0:
                held.add(it.customer)
    while True:
        stats = (await bus.stats()).subscriptions
        if all(each.handled + each.failed == (by_key if name == "by key" else len(published)) for name, each in stats.items()):
            return
        await anyio.sleep(0.005)


async def make(path: Path, seed: int) -> None:
    """Publish and handle, then publish what waits. The last transaction but one publishes, the last does not."""
    chance = random.Random(seed)
    numbers = itertools.count()

    def some() -> Ordered | Paid:
        n, text = next(numbers), "".join(chance.choices("abcdefghijklmnopqrstuvwxyzäöü", k=chance.choice((5, 40, 900))))
        return Ordered(n, f"c{n % 4}", text) if n % 3 else Paid(n, text)

    bus = declare(path, Seen(), making=True)
    async with bus:
        published = [some() for _ in range(4 * ROUNDS)]
        for start in range(0, len(published), 4):
            await bus.publish_many(published[start : start + 4])
        await all_tried(bus, published)
        await bus.publish(some(), due=timedelta(hours=1))
    async with declare(path, Seen(), making=True).open(dispatch=False) as later:
        for _ in range(ROUNDS):
            await later.publish_many([some(), some()])
        await later.pause("audit")  # so that the last transaction is none that publishes
        await later.resume("audit")
        if seed % 2:
            sys.stdout.flush()
            os._exit(0)  # killed: everything since the last start is in the WAL


SUBSCRIPTIONS = ("by type", "by key", "loose", "audit")


class Reports(logging.Handler):
    """What the bus logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.levelname}: {record.getMessage()}")


async def deliver(path: Path, all_again: bool) -> dict[str, Any]:
    """Open, deliver everything; what was delivered, what is dead, what was reported."""
    seen, reports, said = Seen(), Reports(), []
    logging.getLogger("eventbus").addHandler(reports)
    dead: list[tuple[str, str]] = []
    try:
        async with declare(path, seen, making=False) as bus:
            for name in SUBSCRIPTIONS if all_again else ():
                await bus.rewind(name, after=0)
            with anyio.move_on_after(2) as scope:
                while (await bus.stats()).next_due is not None:
                    await bus.drain()
                    await anyio.sleep(0.005)
                await bus.drain()
            if scope.cancelled_caught:
                said.append("not drained")
            stats = await bus.stats()
            said += [f"{name}: {each.reason}" for name, each in stats.subscriptions.items() if each.reason]
            dead = [(each.subscription, each.envelope.id) for each in await bus.dead_letters.list()]
    except EventBusError as error:
        said.append(f"{type(error).__name__}: {error}")
    except BaseExceptionGroup as group:
        said += [f"{type(error).__name__}: {error}" for error in group.exceptions]
    except Exception as error:
        said.append(f"UNCLEAR {type(error).__name__}: {error}")
    finally:
        logging.getLogger("eventbus").removeHandler(reports)
    return {"seen": seen.deliveries, "dead": dead, "said": said + reports.messages}


@cheaper()
def serve() -> None:
    """Open one image after another, as the lines of the standard input say."""
    logging.getLogger("eventbus").propagate = False
    for line in sys.stdin:
        path, all_again = json.loads(line)
        found = anyio.run(deliver, Path(path), all_again)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


# ------------------------------------------------------------------ images and what comes of them

Key = tuple[str, str]


@attrs.frozen
class Opened:
    """What came of opening an image."""

    seen: Sequence[tuple[Key, str]]
    dead: set[Key]
    said: Sequence[str]

    def told(self, subscription: str) -> bool:
        """Whether anything was said that is not about another subscription's attempts."""
        others = [f"WARNING: {name}: attempt" for name in SUBSCRIPTIONS if name != subscription]
        return any(not said.startswith(tuple(others)) for said in self.said)

    @staticmethod
    def of(found: dict[str, Any]) -> Opened:
        seen = [((subscription, id), what) for subscription, id, what in found["seen"]]
        return Opened(seen, {(subscription, id) for subscription, id in found["dead"]}, found["said"])


class Opener:
    """A subprocess that opens images; another one if it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def open(self, path: Path, *, all_again: bool = False) -> Opened | str:
        """What came of it; a text if the process died, or did not come to an end."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([str(path), all_again]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            self._process = None
            return f"the process ended with {process.wait()}"
        return Opened.of(json.loads(line))

    def _start(self) -> subprocess.Popen[str]:
        command = ["timeout", "120", sys.executable, "-m", "tests.faults.flipped_bits", "deliver"]
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.communicate()


@attrs.define
class Original:
    """A database as it was made.

    Attributes:
        files: its bytes, by suffix.
        due: what is delivered when it is opened as it is.
        truth: what each event looks like to each subscription.
        pages: what each page belongs to.
    """

    files: dict[str, bytes]
    due: set[Key]
    truth: dict[Key, str]
    pages: dict[int, str]

    def place(self, suffix: str, offset: int) -> str:
        """What lies at a place."""
        if suffix == "":
            return self.pages.get(offset // PAGE + 1, "?")
        if offset < 32:
            return "header of the WAL"
        start = 32 + (offset - 32) // FRAME * FRAME
        inside = offset - start
        page = int.from_bytes(self.files[suffix][start : start + 4], "big")
        return f"WAL: {'header of a frame of ' if inside < 24 else ''}{self.pages.get(page, '?')}"


PAGE = 4_096
FRAME = PAGE + 24


def original(folder: Path, seed: int, opener: Opener) -> Original:
    """Make a database, and see what is in it."""
    path = folder / "made.db"
    subprocess.run([sys.executable, "-m", "tests.faults.flipped_bits", "make", str(path), str(seed)], cwd=ROOT, check=True)
    files = {suffix: made.read_bytes() for suffix in ("", "-wal") if (made := Path(f"{path}{suffix}")).exists()}
    assert ("-wal" in files) == bool(seed % 2)
    put(folder / "plain.db", files)
    plain = opener.open(folder / "plain.db")
    put(folder / "again.db", files)
    again = opener.open(folder / "again.db", all_again=True)
    assert isinstance(plain, Opened)
    assert isinstance(again, Opened)
    assert not plain.said, plain.said
    put(folder / "pages.db", files)
    with contextlib.closing(sqlite3.connect(folder / "pages.db")) as connection:
        pages = {number: str(name) for name, number in connection.execute("SELECT name, pageno FROM dbstat")}
    return Original(files, {key for key, _ in plain.seen}, dict(again.seen), pages)


def put(path: Path, files: dict[str, bytes]) -> None:
    """Write an image."""
    for suffix, data in files.items():
        Path(f"{path}{suffix}").write_bytes(data)


def used(made: Original, table: str) -> list[int]:
    """The bytes of the database in which a table's rows lie, and what says where."""
    places = []
    for page in (number for number, name in made.pages.items() if name == table):
        start = (page - 1) * PAGE
        cells, content = (int.from_bytes(made.files[""][start + at : start + at + 2], "big") for at in (3, 5))
        places += [*range(start, start + 8 + 2 * cells), *range(start + content, start + PAGE)]
    return places


def damaged(
    files: dict[str, bytes], chance: random.Random, among: Sequence[int] = ()
) -> tuple[dict[str, bytes], list[tuple[str, int]]]:
    """A copy with a bit flipped, or several, or some bytes in a row; and where. With places of the database given, a bit of
    one of them."""
    image = {suffix: bytearray(data) for suffix, data in files.items()}
    if among:
        place = chance.choice(among)
        image[""][place] ^= 1 << chance.randrange(8)
        return {each: bytes(content) for each, content in image.items()}, [("", place)]
    suffixes = sorted(image)
    suffix = chance.choices(suffixes, [len(image[each]) for each in suffixes])[0]
    data = image[suffix]
    kind = chance.random()
    if kind < 0.7:
        places = [chance.randrange(len(data))]
    elif kind < 0.85:
        places = [chance.randrange(len(data)) for _ in range(chance.randrange(2, 9))]
    else:
        start = chance.randrange(len(data))
        places = list(range(start, min(len(data), start + chance.randrange(2, 65))))
    for place in places:
        data[place] ^= 1 << chance.randrange(8) if kind < 0.85 else chance.randrange(1, 256)
    return {each: bytes(content) for each, content in image.items()}, [(suffix, place) for place in places]


def wrong(made: Original, opened: Opened | str, health: str = "ok") -> Iterator[str]:
    """What is wrong with what came of an image.

    Args:
        health: what SQLite's own check says of it. Indexes have no checksums: what is damaged in one may hide an event. That can
            be found, but only by reading all of the file, which a start does not.
    """
    if isinstance(opened, str):
        yield opened
        return
    yield from (said for said in opened.said if said.startswith("UNCLEAR"))
    for key, what in opened.seen:
        if made.truth.get(key) != what:
            yield f"delivered as good: {key} as {what}, where {made.truth.get(key)} was published"
    missing = {key for key in made.due - {key for key, _ in opened.seen} - opened.dead if not opened.told(key[0])}
    if missing and health == "ok":
        yield f"lost without a word: {sorted(missing)[:3]} of {len(missing)}"


def health_of(path: Path, files: dict[str, bytes]) -> str:
    """What SQLite says of an image."""
    put(path, files)
    return health(path)


def health(path: Path) -> str:
    """What SQLite says of a file."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.text_factory = bytes
        try:
            (said,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            return str(error)
    return bytes(said).decode(errors="replace")


SMALL = ("subscriptions", "lanes", "deliveries")
"""Tables of few pages, of which each row decides on many events."""


def case(seed: int, number: int, images: int = IMAGES) -> Case:
    """Damage copies of one database anywhere; of one that was closed, each third where the rows of a small table lie."""
    chance = random.Random(f"{seed}-{number}")
    faults = []
    opener = Opener()
    with tempfile.TemporaryDirectory(prefix="eventbus-bits-", dir=MEMORY) as temporary:
        folder = Path(temporary)
        try:
            made = original(folder, number, opener)
            small = () if number % 2 else tuple(used(made, table) for table in SMALL)
            for image in range(images):
                among = small[image // 3 % len(small)] if small and image % 3 == 0 else ()
                files, places = damaged(made.files, chance, among)
                inner = folder / "image"
                inner.mkdir()
                put(inner / "a.db", files)
                where = sorted({made.place(*place) for place in places})
                found = wrong(made, opener.open(inner / "a.db"), health_of(inner / "check.db", files))
                faults += [f"image {image}, {places[:3]} in {where}: {fault}" for fault in found]
                shutil.rmtree(inner)
        finally:
            opener.close()
    return Case(f"{seed}-{number}", images, faults)


def cases(seed: int) -> Iterator[Case]:
    """See `tests.campaign`."""
    for number in itertools.count():
        yield case(seed, number)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        anyio.run(make, Path(sys.argv[2]), int(sys.argv[3]))
    else:
        serve()
