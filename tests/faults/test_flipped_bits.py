"""Flipped bits in the database and its WAL are found, or do no harm."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from eventbus import StoreCorrupt
from eventbus._clock import shown
from eventbus.stores._sqlite_read import answer
from eventbus.stores.base import Lanes, Subscriptions, WaitingRows
from tests.faults import flipped_bits
from tests.faults.flipped_bits import IMAGES, SMALL, Key, Opened, Opener, Original, health, original, put, used, wrong

pytestmark = pytest.mark.timeout(300)

CASES = 5
EVENT = b"flip.ordered"
DATA = b'{"n":'


@pytest.mark.parametrize("number", range(CASES))
def test_found_or_harmless(number: int) -> None:
    """What is delivered from a damaged file is what was published; what is not delivered was reported, or SQLite's own
    check would tell of it."""
    case = flipped_bits.case(1, number)
    assert not case.faults, case.told()
    assert case.checked == IMAGES


@pytest.fixture(scope="module")
def opener() -> Iterator[Opener]:
    """Opens images in another process."""
    opener = Opener()
    yield opener
    opener.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, opener: Opener) -> Original:
    """A database that was closed."""
    return original(tmp_path_factory.mktemp("bits"), 0, opener)


def waiting(made: Original, subscription: str) -> list[str]:
    """Events that wait for a subscription, in order."""
    return sorted(id for name, id in made.due if name == subscription)


def row_of(made: Original, id: str) -> range:
    """Where the values of an event's row lie in the database: from its id to the end of its data."""
    file = made.files[""]
    begin = file.index(id.encode() + EVENT)
    assert file.find(id.encode() + EVENT, begin + 1) == -1
    return range(begin, file.index(b"}", file.index(DATA, begin)) + 1)


@pytest.mark.parametrize("subscription", ["by type", "by key", "loose", "audit"])
def test_every_byte_of_an_event(made: Original, opener: Opener, subscription: str, tmp_path: Path) -> None:
    """An event whose row was damaged, in whatever byte, is delivered as it was published, or is a dead letter; also for a
    subscription that has it waiting for another attempt, or behind one."""
    chance = random.Random(3)
    ids = [id for id in waiting(made, subscription) if id.encode() + EVENT in made.files[""]]
    for id in (ids[0], ids[-1]):
        key: Key = (subscription, id)
        row = row_of(made, id)
        type_to_slot = row[36:62]
        rest = row[62 :: max(9, len(row) // 25)]
        for place in (*row[:36:9], *type_to_slot[:: 1 if subscription == "by key" else 3], *rest):
            data = bytearray(made.files[""])
            data[place] ^= 1 << chance.randrange(8)
            put(tmp_path / f"{place}.db", {"": bytes(data)})
            opened = opener.open(tmp_path / f"{place}.db")
            assert isinstance(opened, Opened)
            assert not list(wrong(made, opened)), (place - row.start, bytes(data[row.start : row.start + 80]), opened.said)
            assert key in {key for key, _ in opened.seen} | opened.dead or opened.told(subscription), place


@pytest.mark.parametrize("table", SMALL)
def test_every_byte_of_the_rows_that_decide(made: Original, table: str, tmp_path: Path) -> None:
    """Whatever byte of a subscription, a lane or a waiting delivery is damaged: it says what it said, or the store refuses to say
    it, or SQLite's own check tells."""
    chance = random.Random(4)
    path = tmp_path / "a.db"
    put(path, made.files)
    right = asked(path)
    told = 0
    with path.open("r+b", buffering=0) as file:
        for place in used(made, table):
            byte = made.files[""][place]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << chance.randrange(8)]), place)
            found = asked(path)
            if found is None:
                told += 1
            elif found != right:
                assert health(path) != "ok", (place, found)
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert told > 50


def asked(path: Path) -> list[object] | None:
    """What the store says of subscriptions, lanes and waiting deliveries; None if it says that something is damaged."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as connection:
            names = ("by type", "by key", "loose", "audit")
            return [answer(connection, query) for query in (Subscriptions(), Lanes(), *map(WaitingRows, names))]
    except (StoreCorrupt, sqlite3.Error, UnicodeDecodeError):
        return None


def test_a_time_that_no_calendar_has() -> None:
    """A damaged time is shown as the nearest that there is, so that the other dead letters of a list can be seen."""
    assert shown(1e300).year == 9999
    assert shown(-1e300).year == 1
    assert shown(1e12).year == 9999
