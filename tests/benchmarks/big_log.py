"""A long log, made quickly: what a bus would have written in a month, by the store itself, without syncing the disk.

Twenty types, a few of them frequent; half of the events have one of 100,000 keys, a tenth have headers. Positions, checksums and
indexes are those of any log, since `SQLiteStore.commit` writes them.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from eventbus import JSONCodec
from eventbus.cli.bench_order import KEYS, Order, orders
from eventbus.stores.base import Batch, Instance, Record, slot_of
from eventbus.stores.sqlite import SQLiteStore

TYPES = ("bench.order", *(f"bench.other_{number}" for number in range(1, 20)))
"""In falling order of frequency; the first is the type of `Order`."""

_BATCH = 512
_MONTH = 30 * 86_400.0
_KEYS = 100_000
_HEADERS = '{"correlation_id":"0198c0de-0000-7000-8000-000000000000"}'
_EXAMPLES = 997
"""Different data; a prime, as is the number of drawn types, so that all go with all."""
_DRAWS = 5_003

INSTANCE = Instance("01900000-0000-7000-8000-000000000000", "builder", "host", 1, 0.0)


def build(path: Path, events: int) -> None:
    """Write a closed file with so many events, the newest of them a minute old."""
    store = SQLiteStore(path)
    store.open(INSTANCE)
    try:
        assert store._writer is not None
        store._writer.execute("PRAGMA synchronous=OFF")  # for the building only: it is no measurement
        store._writer.execute("PRAGMA cache_size=-500000")  # keys come in no order
        for batch in _batches(events, time.time() - 60):
            store.commit(Batch(time.time(), appends=[batch]))
    finally:
        store.close()
    write_back(path)


def analyze(path: Path) -> None:
    """Have SQLite gather its statistics, with which its planner may choose other indexes."""
    store = SQLiteStore(path)
    store.open(INSTANCE)
    try:
        assert store._writer is not None
        store._writer.execute("ANALYZE")
    finally:
        store.close()


def write_back(path: Path, *, forget: bool = False) -> None:
    """Have the system write what it has not of a closed file, or it does so during the measurement, which waits for it.

    `forget`: and hold nothing of it in memory, as after the machine was started.
    """
    for file in path.parent.glob(f"{path.name}*"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            if forget and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _batches(events: int, end: float) -> Iterator[Sequence[Record]]:
    chance = random.Random(7)
    types = chance.choices(TYPES, weights=[1 / (rank + 1) for rank in range(len(TYPES))], k=_DRAWS)
    codec = JSONCodec()
    codec.prepare(Order)
    data = [codec.encode(order) for order in orders(_EXAMPLES)]
    # Some of them are the customers of `KeyedOrder`s, the others lie between those.
    keys = [f"customer-{number % KEYS:03}" + f"-{number // KEYS}" * (number >= KEYS) for number in range(_KEYS)]
    slots = [slot_of(key) for key in keys]
    for first in range(0, events, _BATCH):
        batch = []
        for number in range(first, min(first + _BATCH, events)):
            moment = end - _MONTH * (events - number) / events
            drawn = number * 7_919 % (2 * _KEYS)
            key, slot = (keys[drawn], slots[drawn]) if drawn < _KEYS else (None, number % 1_024)
            headers = None if number % 10 else _HEADERS
            head = (_id(moment, number), types[number % _DRAWS], 1, moment)
            batch.append(Record(*head, key, slot, headers, codec.content_type, data[number % _EXAMPLES]))
        yield batch


def _id(moment: float, number: int) -> str:
    """A UUIDv7 that grows with the number."""
    milliseconds = int(moment * 1_000)
    return f"{milliseconds >> 16:08x}-{milliseconds & 0xFFFF:04x}-7000-8000-{number:012x}"
