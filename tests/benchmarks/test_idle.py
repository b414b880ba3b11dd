"""What an idle bus takes of the CPU: a hundred subscriptions that have handled what there was, and nothing comes.

In a process of its own: the CPU time of all its threads, and how often one of them was woken (voluntary context switches), over
ten seconds. An event loop without a bus would take none of either.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

import anyio

from eventbus import EventBus
from eventbus.cli.bench_floor import BATCH
from eventbus.cli.bench_order import Order, orders
from eventbus.cli.bench_work import Tally, check
from tests.benchmarks.apart import Numbers, apart
from tests.benchmarks.table import Row, Table

SUBSCRIPTIONS = 100


def idle(path: str, backend: str, seconds: float) -> Numbers:
    """CPU time and wake-ups of this process, per second."""
    found: Numbers = anyio.run(_idle, path, seconds, backend=backend)
    return found


async def _idle(path: str, seconds: float) -> Numbers:
    bus = EventBus(path)
    tallies = [Tally(f"s{number}") for number in range(SUBSCRIPTIONS)]
    for tally in tallies:
        bus.subscribe(Order, name=tally.name)(tally.handle)
    async with bus:
        await bus.publish_many(orders(BATCH))
        left = await bus.drain(60)
        check({tally.name: tally.count for tally in tallies}, BATCH, left)
        await anyio.sleep(1.0)
        woken, cpu, began = _woken(), time.process_time(), time.perf_counter()
        await anyio.sleep(seconds)
        cpu, taken = time.process_time() - cpu, time.perf_counter() - began
        return {"core_percent": 100 * cpu / taken, "wake_ups_per_second": (_woken() - woken) / taken, "seconds": taken}


def _woken() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


def test_idle(backend: str, table: Table, tmp_path: Path, quick: bool) -> None:
    """A bus that has nothing to do takes next to nothing."""
    data = apart(idle, path=str(tmp_path / "idle.db"), backend=backend, seconds=1.0 if quick else 10.0)
    table.add(
        Row(
            f"idle, {SUBSCRIPTIONS} subscriptions",
            f"{data['core_percent']:.3f} % of a core",
            goal="< 0.5 % of a core",
            met=data["core_percent"] < 0.5,
            backend=backend,
            note=f"{data['wake_ups_per_second']:.1f} wake-ups of a thread per second, over {data['seconds']:.0f} s",
            data=data,
            order=150,
        )
    )
