"""`python -m eventbus bench`: it runs to its end, measures what it says, and sees what is lost. What it measures is not judged here."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import anyio
import pytest

from eventbus import EventBus
from eventbus.__main__ import main
from eventbus.cli.bench import WORK
from eventbus.cli.bench_floor import BATCH, BenchFailed, Source, measure_floor, remove
from eventbus.cli.bench_machine import described, machine
from eventbus.cli.bench_order import keyed_orders, orders
from eventbus.cli.bench_steady import steady
from eventbus.cli.bench_work import (
    Singles,
    Throughput,
    Where,
    bare_sleepers,
    chains,
    check,
    key_order,
    many_tasks,
    one_task,
    plain_handler,
    publish_many,
    sleeping_handlers,
)
from tests.benchmarks.acks import Acks
from tests.benchmarks.report import Run, lines_of, load, markdown_of, now, save, summary_of
from tests.benchmarks.table import Row


def run_bench(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eventbus", "bench", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=50, check=False)


# ------------------------------------------------------------------ the command


def test_the_command_measures_the_disk_and_the_bus_and_leaves_no_file(tmp_path: Path) -> None:
    """It prints the machine, the disk, and a line for each work."""
    done = run_bench("--seconds", "0.1", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        str(tmp_path),
        sqlite3.sqlite_version,
        "one durable commit takes",
        "inserted bare",
        *(work.what for work in WORK),
    ):
        assert words in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_file_can_be_made_elsewhere_and_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--db` chooses the disk, `--loop` the event loop."""
    assert main(["bench", "--seconds", "0.1", "--db", str(tmp_path / "new.db"), "--loop", "trio"]) == 0
    assert "on trio" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["", "-wal", "-lock"])
def test_a_file_that_is_there_is_refused_and_left_alone(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The benchmark removes its file afterwards, so it must be its own."""
    mine = tmp_path / f"mine.db{suffix}"
    mine.write_text("mine")
    assert main(["bench", "--db", str(tmp_path / "mine.db")]) == 2
    assert f"{mine} exists" in capsys.readouterr().out
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--db", "no such folder/new.db"], "there is no folder"),
        (["--seconds", "0"], "above 0"),
        (["--seconds", "nan"], "above 0"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is measured."""
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().out


def test_the_machine_is_described(tmp_path: Path) -> None:
    """What figures depend on, and that a file system in memory is no disk."""
    here = machine(tmp_path)
    assert here.cores >= 1
    assert here.disk_free_bytes > 0
    assert str(tmp_path) in "\n".join(described(here))


# ------------------------------------------------------------------ the floors


@pytest.mark.parametrize("like", [orders(BATCH), keyed_orders(BATCH)], ids=["orders", "keyed"])
def test_the_floor_inserts_what_a_bus_inserts(like: list[object], tmp_path: Path) -> None:
    """Copies differ from the rows of a bus in what must be unique, and there they grow."""
    path = tmp_path / "bus.db"

    async def publish() -> None:
        bus = EventBus(path)
        async with bus:
            await bus.publish_many(like)

    anyio.run(publish)
    connection = sqlite3.connect(path)
    try:
        source = Source.of(connection)
    finally:
        connection.close()
    rows = [tuple(row) for row in source.rows]
    copies = [row for batch in source.copies(3) for row in batch]
    assert source.growing
    for index in range(len(rows[0])):
        if index in source.growing:
            values = [row[index] for row in rows + copies]
            assert values == sorted(set(values))  # type: ignore[type-var]
        else:
            assert [row[index] for row in copies] == [row[index] for row in rows] * 3


def test_the_floor_counts_what_it_was_told(tmp_path: Path) -> None:
    """And leaves no file."""
    floor = measure_floor(tmp_path / "floor.db", events=300, commits=30)
    assert (floor.events, len(floor.commits)) == (300, 30)
    assert 0 < floor.commit <= floor.commit_p99 <= floor.commit_max
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ the work

WORKS: list[Callable[[Where, int], Awaitable[Throughput | Singles]]] = [
    publish_many,
    partial(publish_many, subscriptions=3),
    plain_handler,
    key_order,
    sleeping_handlers,
    chains,
    partial(many_tasks, tasks=7),
    one_task,
]


def _name(work: Callable[..., object]) -> str:
    return (work.func if isinstance(work, partial) else work).__name__


@pytest.mark.parametrize("work", WORKS, ids=_name)
async def test_all_that_is_published_is_handled(
    work: Callable[[Where, int], Awaitable[Throughput | Singles]], tmp_path: Path
) -> None:
    """Each work checks itself, and does at least what it was told."""
    done = await work(tmp_path / "bus.db", 210)
    assert done.events >= 210
    assert done.seconds > 0


async def test_bare_tasks_sleep_as_often_as_they_were_told() -> None:
    """The floor of the sleeping handlers."""
    assert (await bare_sleepers(32)).events == 32


async def test_each_single_event_is_timed(tmp_path: Path) -> None:
    """When it was published, when the handler was called, and when the ack was committed: one after another."""
    acks = Acks(tmp_path / "bus.db")
    done = await many_tasks(acks, 60, tasks=6)
    handled = acks.handled(done)
    assert len(done.began) == len(done.returned) == len(set(done.positions)) == len(done.called) == len(handled) == 60
    assert 0 < done.calling(1) <= done.calling(99)
    assert 0 < done.publishing(1) <= done.publishing(99)
    assert handled[0] > done.calling(1)
    assert handled[-1] > done.calling(99)


@pytest.mark.parametrize("singly", [False, True])
async def test_a_steady_load_is_handled_by_each_subscription(singly: bool, tmp_path: Path) -> None:
    """Every event is late by something, for every subscription."""
    done = await steady(tmp_path / "bus.db", rate=1_000, seconds=0.3, singly=singly)
    assert (done.events, len(done.late)) == (300, 900)
    assert done.late[0] > 0
    assert done.seconds >= 0.29
    assert done.cores > 0


@pytest.mark.parametrize(("counts", "left"), [({"a": 10, "b": 9}, {}), ({"a": 11}, {}), ({"a": 10}, {"a": 1})])
def test_what_is_lost_or_made_twice_is_no_result(counts: dict[str, int], left: dict[str, int]) -> None:
    """A figure that leaves out events is worth nothing."""
    with pytest.raises(BenchFailed):
        check(counts, 10, left)


def test_removing_a_file_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    """It is done after every work, whatever has happened."""
    remove(tmp_path / "none.db")


# ------------------------------------------------------------------ the table


def test_a_run_is_kept_with_its_machine(tmp_path: Path) -> None:
    """What comes out of the JSON is what went in, and is shown."""
    rows = [
        Row("a | b", "0.9 F", goal="≥ 0.8 F", met=True, note="all of it", data={"ratio": 0.9}, order=10),
        Row("c", "0.2 F", goal="≥ 0.3 F", met=False, order=20),
        Row("c", "0.3 F", backend="trio", order=20),
    ]
    run = Run(now(), "abc", 60, machine(tmp_path), rows, ["test_x"])
    save(run, tmp_path / "run.json")
    assert load(tmp_path / "run.json") == run
    assert "| c | asyncio | ≥ 0.3 F | 0.2 F | **no** |  |" in list(markdown_of(rows))
    assert any(line.startswith("a | b") and line.endswith("yes") for line in lines_of(rows))
    assert "1 of 2 goals are met." in "\n".join(summary_of(run))
