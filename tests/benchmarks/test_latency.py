"""How long an event takes, beside C and C99: how long bare one-row commits take on the same disk, in turn with it.

Times are wall clock and include everything in between: encoding, waiting for the writer, the commit at synchronous=FULL, the way back to
the event loop. A handler's time is taken by the handler. "Handled" is when the commit of the ack has returned (`acks.py`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import attrs
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from eventbus.cli.bench_floor import Floor, measure_floor, remove
from eventbus.cli.bench_steady import Steady, steady
from eventbus.cli.bench_work import Singles, many_tasks, one_task
from eventbus.cli.demo_show import percentile
from tests.benchmarks.acks import Acks
from tests.benchmarks.rounds import (
    Rounds,
    alternate,
    at_least,
    at_most,
    events_of,
    floor_at,
    note_of,
    rounds_of,
    run_on,
    stall_data,
    stalls_of,
    throughput_data,
    work_on,
)
from tests.benchmarks.table import Row, Table

# ------------------------------------------------------------------ many tasks


@attrs.frozen
class Handled:
    """What many tasks did, with the seconds from each call of `publish` until the event was handled, ascending."""

    singles: Singles
    handled: list[float]

    @property
    def per_second(self) -> float:
        """Events per second."""
        return self.singles.per_second


def _handled(loop: str, path: Path, tasks: int, events: int) -> Handled:
    acks = Acks(path)
    try:
        singles = run_on(loop, partial(many_tasks, tasks=tasks), acks, events)
    finally:
        remove(path)
    return Handled(singles, acks.handled(singles))


@pytest.mark.parametrize(("tasks", "order"), [(100, 30), (1_000, 31)])
def test_tasks(
    tasks: int, order: int, backend: str, benchmark: BenchmarkFixture, table: Table, tmp_path: Path, quick: bool
) -> None:
    """Tasks that publish one at a time: together they are fast, and none of them waits long."""
    floor = partial(floor_at, tmp_path / "floor.db", quick=quick)
    work = partial(_handled, backend, tmp_path / "bus.db", tasks, events_of(40_000, quick=quick))
    rounds = alternate(benchmark, rounds_of(quick=quick), floor, work)
    data = throughput_data(rounds) | stall_data(rounds.floors) | _handled_data(rounds)
    benchmark.extra_info.update(data)
    within = tasks < 1_000 or data["handled_p99_over_commit_p99_ms"] < 150
    table.add(
        Row(
            f"{tasks:,} tasks publishing one at a time",
            f"{at_least(data['ratio'])} F = {data['events_per_second']:,.0f} events/s; p99 to handled {data['handled_p99_ms']:.0f} ms "
            f"= C99 + {data['handled_p99_over_commit_p99_ms']:.0f} ms",
            goal="≥ 0.3 F" if tasks < 1_000 else "≥ 0.3 F, p99 to handled < C99 + 150 ms",
            met=data["ratio"] >= 0.3 and within,
            backend=backend,
            note=note_of(data, f"p50 to handled {data['handled_p50_ms']:.1f} ms", stalls_of(data)),
            data=data,
            order=order,
        )
    )


def _handled_data(rounds: Rounds[Floor, Handled]) -> dict[str, float]:
    return {
        "handled_p50_ms": 1e3 * rounds.median(lambda _, done: percentile(done.handled, 50)),
        "handled_p99_ms": 1e3 * rounds.median(lambda _, done: percentile(done.handled, 99)),
        "handled_p99_over_commit_p99_ms": 1e3
        * rounds.median(lambda floor, done: percentile(done.handled, 99) - floor.commit_p99),
        "publish_p50_ms": 1e3 * rounds.median(lambda _, done: done.singles.publishing(50)),
        "publish_p99_ms": 1e3 * rounds.median(lambda _, done: done.singles.publishing(99)),
        "called_p99_ms": 1e3 * rounds.median(lambda _, done: done.singles.calling(99)),
    }


# ------------------------------------------------------------------ one task


def test_one_task(backend: str, benchmark: BenchmarkFixture, table: Table, tmp_path: Path, quick: bool) -> None:
    """One task that publishes one event at a time: it costs a commit and little more, and the handler is called soon."""
    floor = partial(floor_at, tmp_path / "floor.db", quick=quick)
    work = partial(work_on, backend, tmp_path / "bus.db", one_task, events_of(2_000, quick=quick))
    rounds = alternate(benchmark, rounds_of(quick=quick), floor, work)
    data = stall_data(rounds.floors) | _one_data(rounds)
    benchmark.extra_info.update(data)
    for order, name, what, most in (
        (40, "publish", "one task, one at a time: publish p50", 0.25),
        (41, "called", "one task, one at a time: publish → handler called p50", 0.4),
    ):
        over = data[f"{name}_p50_over_commit_p50_ms"]
        table.add(
            Row(
                what,
                f"C + {at_most(over)} ms = {data[f'{name}_p50_ms']:.2f} ms",
                goal=f"≤ C + {most:g} ms",
                met=over <= most,
                backend=backend,
                note=f"C = {data['commit_p50_ms']:.2f} ms; p99 {data[f'{name}_p99_ms']:.1f} ms; {stalls_of(data)}",
                data=data,
                order=order,
            )
        )


def _one_data(rounds: Rounds[Floor, Singles]) -> dict[str, float]:
    return {
        "publish_p50_ms": 1e3 * rounds.median(lambda _, done: done.publishing(50)),
        "publish_p50_over_commit_p50_ms": 1e3 * rounds.median(lambda floor, done: done.publishing(50) - floor.commit),
        "publish_p99_ms": 1e3 * rounds.median(lambda _, done: done.publishing(99)),
        "called_p50_ms": 1e3 * rounds.median(lambda _, done: done.calling(50)),
        "called_p50_over_commit_p50_ms": 1e3 * rounds.median(lambda floor, done: done.calling(50) - floor.commit),
        "called_p99_ms": 1e3 * rounds.median(lambda _, done: done.calling(99)),
    }


# ------------------------------------------------------------------ a steady load

RATE = 10_000


def test_steady(backend: str, benchmark: BenchmarkFixture, table: Table, tmp_path: Path, quick: bool) -> None:
    """Ten thousand events a second that nobody holds back, for a minute: each is handled, soon, with CPU to spare."""
    seconds = 2 if quick else 60 if backend == "asyncio" else 20
    data = _steady_data(backend, benchmark, tmp_path, seconds, singly=False, quick=quick)
    over = data["called_p99_over_commit_p99_ms"]
    table.add(
        Row(
            f"steady {RATE:,} events/s, open loop, 3 subscriptions, {seconds} s",
            _steady_figure(data),
            goal="p99 to handler < C99 + 20 ms, nothing lost, < 1 core",
            met=over < 20 and data["cores"] < 1,
            backend=backend,
            note=f"what comes due in a millisecond is one publish_many; {_steady_note(data)}",
            data=data,
            order=80,
        )
    )


def test_steady_singly(backend: str, benchmark: BenchmarkFixture, table: Table, tmp_path: Path, quick: bool) -> None:
    """The same load as a server would bring it: each event in a task of its own. Reported beside the row above."""
    seconds = 2 if quick else 20
    data = _steady_data(backend, benchmark, tmp_path, seconds, singly=True, quick=quick)
    table.add(
        Row(
            f"the same, each event published in a task of its own, {seconds} s",
            _steady_figure(data),
            backend=backend,
            note=f"the tasks' own cost is included; {_steady_note(data)}",
            data=data,
            order=81,
        )
    )


def _steady_data(
    loop: str, benchmark: BenchmarkFixture, folder: Path, seconds: float, *, singly: bool, quick: bool
) -> dict[str, float]:
    """Bare commits before and after, since a minute is long."""
    floor = partial(measure_floor, folder / "floor.db", events=100, commits=events_of(4_000, quick=quick))
    work = partial(_steady, loop, folder / "bus.db", seconds, singly=singly)
    before = floor()
    done: Steady = benchmark.pedantic(work, rounds=1)  # type: ignore[no-untyped-call]
    stalls = stall_data([before, floor()])
    data = stalls | {
        "events": float(done.events),
        "seconds": done.seconds,
        "called_p50_ms": done.lateness(50) * 1e3,
        "called_p99_ms": done.lateness(99) * 1e3,
        "called_max_ms": done.late[-1] * 1e3,
        "called_p99_over_commit_p99_ms": done.lateness(99) * 1e3 - stalls["commit_p99_ms"],
        "cores": done.cores,
    }
    benchmark.extra_info.update(data)
    return data


def _steady(loop: str, path: Path, seconds: float, *, singly: bool) -> Steady:
    try:
        return run_on(loop, partial(steady, rate=RATE, seconds=seconds, singly=singly), path)
    finally:
        remove(path)


def _steady_figure(data: dict[str, float]) -> str:
    over = data["called_p99_over_commit_p99_ms"]
    return f"p99 {data['called_p99_ms']:.1f} ms = C99 + {over:.1f} ms; nothing lost; {data['cores']:.2f} cores"


def _steady_note(data: dict[str, float]) -> str:
    times = f"p50 {data['called_p50_ms']:.1f} ms, longest {data['called_max_ms']:.0f} ms"
    return f"from when an event was due until each handler was called: {times}; {stalls_of(data)}"
