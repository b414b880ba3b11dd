"""How many events per second, beside F: what a bare sqlite3 loop inserts into the same table, in turn with it.

What counts is all of it: encoding, the commit at synchronous=FULL, decoding where handlers do not share the object, the handlers, their
acks and the commit of the last ack. Opening the bus and a warm-up do not count. Whether each handler was called once for each event is
checked by counting.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import attrs
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from eventbus.cli.bench_floor import measure_floor
from eventbus.cli.bench_order import keyed_orders
from eventbus.cli.bench_work import (
    AT_ONCE,
    Throughput,
    Where,
    bare_sleepers,
    chains,
    key_order,
    plain_handler,
    publish_many,
    sleeping_handlers,
)
from tests.benchmarks.rounds import (
    FLOOR_EVENTS,
    HAS_UVLOOP,
    UVLOOP,
    alternate,
    at_least,
    events_of,
    floor_at,
    note_of,
    rounds_of,
    run_on,
    throughput_data,
    work_on,
)
from tests.benchmarks.table import Row, Table


@attrs.frozen
class Case:
    """A row of the table.

    Attributes:
        events: in each round, about a second's.
        goal: the least that it should be, in F.
        hope: said beside the goal.
        unit: what is counted.
        note: said beside the figure.
    """

    id: str
    what: str
    order: int
    goal: float
    measure: Callable[[Where, int], Awaitable[Throughput]]
    events: int
    hope: str = ""
    unit: str = "events"
    note: str = ""


CASES = [
    Case(
        "publish_many",
        "publish_many of 100, awaited one after another, one async no-op handler, until all is handled",
        order=10,
        goal=0.8,
        hope=" (the hope: 1.0)",
        measure=publish_many,
        events=80_000,
    ),
    Case(
        "publish_many_3",
        "the same with 3 subscriptions",
        order=20,
        goal=0.5,
        measure=partial(publish_many, subscriptions=3),
        events=50_000,
    ),
    Case(
        "publish_many_10",
        "the same with 10 subscriptions",
        order=21,
        goal=0.25,
        measure=partial(publish_many, subscriptions=10),
        events=25_000,
    ),
    Case(
        "plain", "plain (threaded) no-op handler, publish_many of 100", order=50, goal=0.4, measure=plain_handler, events=50_000
    ),
    Case(
        "keys",
        "key order over 1,000 keys, publish_many of 100",
        order=60,
        goal=0.5,
        measure=key_order,
        events=50_000,
        note="F is that of events without keys",
    ),
    Case(
        "chain",
        "a handler that returns one event (a chain of two)",
        order=70,
        goal=0.3,
        measure=chains,
        events=30_000,
        unit="chains",
        note="two events and two acks a chain, F counts one event",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_throughput(case: Case, backend: str, benchmark: BenchmarkFixture, table: Table, tmp_path: Path, quick: bool) -> None:
    """Published and handled, beside what is inserted without a bus."""
    measure_case(case, backend, benchmark, table, tmp_path, quick=quick)


@pytest.mark.skipif(not HAS_UVLOOP, reason="uvloop is not installed: pip install '.[bench]'")
def test_throughput_on_uvloop(benchmark: BenchmarkFixture, table: Table, tmp_path: Path, quick: bool) -> None:
    """The first row, on a loop that users may choose."""
    measure_case(CASES[0], UVLOOP, benchmark, table, tmp_path, quick=quick)


def measure_case(case: Case, loop: str, benchmark: BenchmarkFixture, table: Table, folder: Path, *, quick: bool) -> None:
    """Measure a case and add its row."""
    work = partial(work_on, loop, folder / "bus.db", case.measure, events_of(case.events, quick=quick))
    rounds = alternate(benchmark, rounds_of(quick=quick), partial(floor_at, folder / "floor.db", quick=quick), work)
    data, notes = throughput_data(rounds), [case.note]
    if case.measure is key_order:
        floor = measure_floor(folder / "keyed.db", events=events_of(FLOOR_EVENTS, quick=quick), commits=1, like=keyed_orders(100))
        data["keyed_floor_events_per_second"] = floor.per_second
        notes.append(f"a bare loop that inserts keys as well does {floor.per_second:,.0f}/s")
    benchmark.extra_info.update(data)
    table.add(
        Row(
            case.what,
            f"{at_least(data['ratio'])} F = {data['events_per_second']:,.0f} {case.unit}/s",
            goal=f"≥ {case.goal:g} F{case.hope}",
            met=data["ratio"] >= case.goal,
            backend=loop,
            note=note_of(data, *notes),
            data=data,
            order=case.order,
        )
    )


def test_order_none(backend: str, benchmark: BenchmarkFixture, table: Table, tmp_path: Path, quick: bool) -> None:
    """Sixteen handlers at once that sleep for 1 ms, beside sixteen tasks that do the same without a bus."""
    events = events_of(10_000, quick=quick)
    floor = partial(run_on, backend, bare_sleepers, events)
    work = partial(work_on, backend, tmp_path / "bus.db", sleeping_handlers, events)
    rounds = alternate(benchmark, rounds_of(quick=quick), floor, work)
    data = throughput_data(rounds)
    benchmark.extra_info.update(data)
    table.add(
        Row(
            f'order="none", {AT_ONCE} at once, handlers that sleep 1 ms',
            f"{at_least(data['ratio'])} of {AT_ONCE} bare sleeping tasks = {data['events_per_second']:,.0f} events/s",
            goal=f"≥ 0.7 of what {AT_ONCE} bare sleeping tasks do",
            met=data["ratio"] >= 0.7,
            backend=backend,
            note=f"{data['ratio_min']:.2f} to {data['ratio_max']:.2f}; bare {data['floor_events_per_second']:,.0f}/s",
            data=data,
            order=61,
        )
    )
