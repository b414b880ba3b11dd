"""How benchmarks measure: a floor and a figure in turn, round after round, and medians of what lies between them."""

from __future__ import annotations

import gc
import importlib.util
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Generic, Protocol, TypeVar

import anyio
import attrs
from pytest_benchmark.fixture import BenchmarkFixture

from eventbus.cli.bench_floor import Floor, measure_floor, remove
from eventbus.cli.bench_work import Where
from eventbus.cli.demo_show import percentile

FLOOR_EVENTS = 50_000
"""That the bare loop inserts in each round, `BATCH` a commit."""

FLOOR_COMMITS = 500
"""Bare one-row commits in each round."""

UVLOOP = "asyncio + uvloop"
HAS_UVLOOP = importlib.util.find_spec("uvloop") is not None

T = TypeVar("T")


class Rate(Protocol):
    """Whatever has a rate: a `Floor`, a `Throughput`."""

    @property
    def per_second(self) -> float: ...


F = TypeVar("F")
R = TypeVar("R", bound=Rate)
FR = TypeVar("FR", bound=Rate)


def events_of(events: int, *, quick: bool) -> int:
    """How many; a twentieth where it is only to be seen that it works."""
    return events // 20 if quick else events


def rounds_of(*, quick: bool) -> int:
    """How many times the floor and the work take turns."""
    return 2 if quick else 5


# ------------------------------------------------------------------ one measurement


def run_on(loop: str, function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Run on "asyncio", "trio" or "asyncio + uvloop"."""
    if loop == UVLOOP:
        return anyio.run(function, *args, backend="asyncio", backend_options={"use_uvloop": True})
    return anyio.run(function, *args, backend=loop)


def floor_at(path: Path, *, quick: bool) -> Floor:
    """F and C, on a file of their own."""
    return measure_floor(path, events=events_of(FLOOR_EVENTS, quick=quick), commits=events_of(FLOOR_COMMITS, quick=quick))


def work_on(loop: str, path: Path, measure: Callable[[Where, int], Awaitable[T]], events: int) -> T:
    """Work for a bus, on a file of its own."""
    try:
        return run_on(loop, measure, path, events)
    finally:
        remove(path)


# ------------------------------------------------------------------ rounds


@attrs.frozen
class Rounds(Generic[F, T]):
    """What was measured: in each round the floor, and then the work."""

    floors: Sequence[F]
    done: Sequence[T]

    def each(self, figure: Callable[[F, T], float]) -> list[float]:
        """A figure of each round."""
        return [figure(floor, done) for floor, done in zip(self.floors, self.done, strict=True)]

    def median(self, figure: Callable[[F, T], float]) -> float:
        """The median of a figure over the rounds."""
        return median(self.each(figure))


def alternate(benchmark: BenchmarkFixture, rounds: int, floor: Callable[[], F], work: Callable[[], T]) -> Rounds[F, T]:
    """Measure the floor and the work in turn. Both warm themselves up; what pytest-benchmark itself times includes that."""
    floors: list[F] = []
    done: list[T] = []

    def set_up() -> None:
        gc.collect()
        floors.append(floor())
        gc.collect()

    benchmark.pedantic(lambda: done.append(work()), setup=set_up, rounds=rounds)  # type: ignore[no-untyped-call]
    return Rounds(floors, done)


# ------------------------------------------------------------------ for rows


def throughput_data(rounds: Rounds[FR, R]) -> dict[str, float]:
    """The raw numbers of a row whose figure is a ratio of rates."""
    ratios = rounds.each(lambda floor, done: done.per_second / floor.per_second)
    return {
        "events_per_second": rounds.median(lambda _, done: done.per_second),
        "floor_events_per_second": rounds.median(lambda floor, _: floor.per_second),
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def stall_data(floors: Sequence[Floor]) -> dict[str, float]:
    """The raw numbers of what the disk does by itself: over the commits of all rounds."""
    commits = sorted(second for floor in floors for second in floor.commits)
    return {
        "commit_p50_ms": percentile(commits, 50) * 1e3,
        "commit_p99_ms": percentile(commits, 99) * 1e3,
        "commit_max_ms": commits[-1] * 1e3,
    }


def at_least(ratio: float) -> str:
    """With two decimals, rounded down: what is not reached does not look as if it were."""
    return f"{math.floor(ratio * 100) / 100:.2f}"


def at_most(milliseconds: float) -> str:
    """With two decimals, rounded up."""
    return f"{math.ceil(milliseconds * 100) / 100:.2f}"


def note_of(data: Mapping[str, float], *others: str) -> str:
    """How far the rounds lie apart, what F was, and what else there is to say."""
    spread = f"{data['ratio_min']:.2f} to {data['ratio_max']:.2f}; F = {data['floor_events_per_second']:,.0f}/s"
    return "; ".join([spread, *filter(None, others)])


def stalls_of(data: Mapping[str, float]) -> str:
    """What the disk does by itself, for notes."""
    return f"C99 {data['commit_p99_ms']:.1f} ms, longest bare commit {data['commit_max_ms']:.1f} ms"
