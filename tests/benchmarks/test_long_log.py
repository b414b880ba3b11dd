"""What the length of the log costs: an event, a page and a start, with 10,000 and with 5,000,000 events in the file.

An event's cost is the time of `publish_many` of 100 until all are handled and acked, for each event; short and long file take turns.
A page is one read of 500 events by the store. Then both again after ANALYZE, which may lead SQLite's planner to other indexes.
A start is timed in a process of its own, from just before `bus.open` until the first handler is called with an event that was
waiting; after a clean end, and after a SIGKILL of a process that was publishing and handling. See `big_log.py` for the file.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import attrs
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from eventbus.cli.bench_floor import BATCH, remove
from eventbus.cli.bench_work import Throughput, key_order, publish_many
from eventbus.stores.base import Events
from eventbus.stores.sqlite import SQLiteStore
from tests.benchmarks import big_log, start
from tests.benchmarks.apart import apart, killed
from tests.benchmarks.bare import insert_more
from tests.benchmarks.big_log import TYPES
from tests.benchmarks.rounds import Rounds, alternate, at_most, events_of, rounds_of, run_on
from tests.benchmarks.table import Row, Table

SHORT = 10_000
LONG = 5_000_000

PAGE = 500
_PAGE_BYTES = 1_048_576
_PAGES = 40


@attrs.frozen
class Logs:
    """The files, closed; the short one is copied for each use, so that it stays short."""

    short: Path
    long: Path
    events: int

    def fresh(self) -> Path:
        """A copy of the short file."""
        path = self.short.with_name("copy.db")
        remove(path)
        shutil.copy(self.short, path)
        return path


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory, quick: bool) -> Iterator[Logs]:
    """Two logs that are alike but for their length; removed in the end."""
    folder = tmp_path_factory.mktemp("logs")
    try:
        made = Logs(folder / "short.db", folder / "long.db", events_of(LONG, quick=quick))
        big_log.build(made.short, SHORT)
        big_log.build(made.long, made.events)
        yield made
    finally:
        shutil.rmtree(folder)


# ------------------------------------------------------------------ the cost of an event

WITHOUT_KEYS = "without keys"
WORK = {WITHOUT_KEYS: publish_many, "with keys, in order per key": key_order}
"""The goal is for the event of the measure, which has no key."""


@pytest.mark.parametrize("which", WORK)
def test_event(which: str, logs: Logs, benchmark: BenchmarkFixture, table: Table, quick: bool) -> None:
    """An event costs the same in a long log."""
    _event(which, logs, benchmark, table, quick=quick, order=110)


@pytest.mark.parametrize("types", [None, TYPES[:1], TYPES[1:3]], ids=["all", "one_type", "two_types"])
def test_page(types: tuple[str, ...] | None, logs: Logs, benchmark: BenchmarkFixture, table: Table, quick: bool) -> None:
    """A page costs the same in a long log."""
    _page(types, logs, benchmark, table, quick=quick, order=112)


@pytest.fixture(scope="module")
def analyzed(logs: Logs) -> Logs:
    """The same after ANALYZE. What is measured without must come before."""
    big_log.analyze(logs.short)
    big_log.analyze(logs.long)
    return logs


@pytest.mark.parametrize("which", WORK)
def test_event_after_analyze(which: str, analyzed: Logs, benchmark: BenchmarkFixture, table: Table, quick: bool) -> None:
    """… also with statistics for SQLite's planner."""
    _event(which, analyzed, benchmark, table, quick=quick, order=114, after=", after ANALYZE")


@pytest.mark.parametrize("types", [None, TYPES[:1], TYPES[1:3]], ids=["all", "one_type", "two_types"])
def test_page_after_analyze(
    types: tuple[str, ...] | None, analyzed: Logs, benchmark: BenchmarkFixture, table: Table, quick: bool
) -> None:
    """… also with statistics for SQLite's planner."""
    _page(types, analyzed, benchmark, table, quick=quick, order=116, after=", after ANALYZE")


# ------------------------------------------------------------------ the start


@pytest.mark.parametrize("ending", ["clean", "killed"])
def test_start(ending: str, logs: Logs, table: Table, quick: bool) -> None:
    """The first event that waited is delivered soon after the start, however long the log is.

    It comes last, since it leaves subscriptions in the file for which events wait.
    """
    apart(start.leave_events_waiting, path=str(logs.long))
    apart(start.first_delivery, path=str(logs.long))  # registers nothing new from here on
    found = [_start(ending, logs.long) for _ in range(rounds_of(quick=quick))]
    cold = _start(ending, logs.long, partial(big_log.write_back, forget=True))
    first = median(each["first_delivery_seconds"] for each in found)
    data = {
        "first_delivery_ms": first * 1e3,
        "first_delivery_max_ms": max(each["first_delivery_seconds"] for each in found) * 1e3,
        "open_ms": median(each["open_seconds"] for each in found) * 1e3,
        "cold_first_delivery_ms": cold["first_delivery_seconds"] * 1e3,
        "wal_bytes": median(each["wal_bytes"] for each in found),
    }
    wal = f"; the WAL left behind has {data['wal_bytes'] / 1e6:.1f} MB" if ending == "killed" else ""
    table.add(
        Row(
            f"start with {logs.events:,} events in the log, {start.SUBSCRIPTIONS} subscriptions, "
            + ("after a clean end" if ending == "clean" else "after a kill"),
            f"{first:.3f} s to the first delivery",
            goal="< 0.3 s",
            met=first < 0.3,
            note=f"longest {data['first_delivery_max_ms']:.0f} ms; {data['cold_first_delivery_ms']:.0f} ms where the system holds "
            f"nothing of the file in memory{wal}; imports are not included",
            data=data,
            order=120 if ending == "clean" else 121,
        )
    )


# ------------------------------------------------------------------ how


def _event(
    which: str, logs: Logs, benchmark: BenchmarkFixture, table: Table, *, quick: bool, order: int, after: str = ""
) -> None:
    count = events_of(20_000, quick=quick)
    bare: list[Throughput] = []

    def on(path: Path) -> Throughput:
        done = run_on("asyncio", WORK[which], path, count)
        bare.append(insert_more(path, count // BATCH))
        return done

    rounds = alternate(benchmark, rounds_of(quick=quick), lambda: on(logs.fresh()), lambda: on(logs.long))
    short, long = (median(1e6 / each.per_second for each in bare[file::2]) for file in (0, 1))
    note = f"a bare loop that inserts such events into the same files: {long / short:.2f} times ({short:.1f} and {long:.1f} µs)"
    goal = which == WITHOUT_KEYS
    if not goal:
        note += "; each event goes to a page of its own of the index by key, which does not end at one place"
    _add(f"cost of an event {which}", rounds, logs, benchmark, table, order, after, note, goal=goal)


def _page(
    types: tuple[str, ...] | None,
    logs: Logs,
    benchmark: BenchmarkFixture,
    table: Table,
    *,
    quick: bool,
    order: int,
    after: str = "",
) -> None:
    name = "all types" if types is None else "one type" if len(types) == 1 else "two types"
    rounds = alternate(benchmark, rounds_of(quick=quick), partial(_pages, logs.short, types), partial(_pages, logs.long, types))
    _add(f"cost of an event in a page of {PAGE}, {name}", rounds, logs, benchmark, table, order, after)


def _pages(path: Path, types: tuple[str, ...] | None) -> Throughput:
    """Full pages from all over the log, read by a store of our own."""
    store = SQLiteStore(path)
    store.open(big_log.INSTANCE)
    try:
        head = store.read(Events(0, 1, _PAGE_BYTES)).head
        last = head * 3 // 4  # so that the rest of even the short log fills a page of one type
        events, seconds = 0, 0.0
        for number in range(_PAGES):
            after = last * number // _PAGES
            began = time.perf_counter()
            page = store.read(Events(after, PAGE, _PAGE_BYTES, types=types))
            seconds += time.perf_counter() - began
            events += len(page.records)
            assert len(page.records) == PAGE
            assert not any(record.fault for record in page.records)
    finally:
        store.close()
    return Throughput(events, seconds)


def _add(
    what: str,
    rounds: Rounds[Throughput, Throughput],
    logs: Logs,
    benchmark: BenchmarkFixture,
    table: Table,
    order: int,
    after: str,
    note: str = "",
    *,
    goal: bool = True,
) -> None:
    ratios = rounds.each(lambda short, long: short.per_second / long.per_second)
    ratio = median(ratios)
    data = {
        "short_us": 1e6 * rounds.median(lambda short, _: 1 / short.per_second),
        "long_us": 1e6 * rounds.median(lambda _, long: 1 / long.per_second),
        "ratio": ratio,
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    benchmark.extra_info.update(data)
    table.add(
        Row(
            f"{what}, with {SHORT:,} and with {logs.events:,} events in the log{after}",
            f"{at_most(ratio)} times as much in the long log: {data['short_us']:.1f} and {data['long_us']:.1f} µs",
            goal="within 15 %" if goal else "",
            met=ratio <= 1.15 if goal else None,
            note="; ".join(filter(None, [f"{min(ratios):.2f} to {max(ratios):.2f}", note])),
            data=data,
            order=order,
        )
    )


def _start(ending: str, path: Path, before: Callable[[Path], None] = lambda _path: None) -> dict[str, float]:
    if ending == "clean":
        apart(start.leave_events_waiting, path=str(path))
    else:
        killed(start.die_with_events_waiting, path=str(path))
    wal = path.with_name(path.name + "-wal")
    size = wal.stat().st_size if wal.exists() else 0
    before(path)
    return {**apart(start.first_delivery, path=str(path)), "wal_bytes": float(size)}
