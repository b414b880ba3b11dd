"""Several processes on one file: how much they do together, how soon one sees what another published, and that another has died.

    python -m tests.benchmarks.processes            # prints a table; --json FILE keeps the figures

Each of 1, 2 and 4 processes publishes and handles: 20 tasks publish one event at a time, with one subscription in order of a key
(16 lanes, shared out). Counted is what all of them have had acknowledged, and what was handled by the end. On two cores four
processes have half a core each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import attrs

from eventbus import EventBus, event
from tests.crash.members import Members
from tests.crash.nursery import Nursery

ROOT = Path(__file__).parents[2]
TASKS = 20
LEASE = 10.0


@event("bench.counted", key="key")
@attrs.frozen
class Counted:
    """An event."""

    n: int
    key: str


# ------------------------------------------------------------------ one of the processes


async def _publish_and_handle(path: str, seconds: float) -> dict[str, int]:
    bus, counts = EventBus(path, lease=LEASE), {"published": 0, "handled": 0}

    @bus.subscribe(Counted, name="count", order="key")
    async def count(_counted: Counted) -> None:
        counts["handled"] += 1

    async def publish(task: int, until: float) -> None:
        n = 0
        while time.monotonic() < until:
            await bus.publish(Counted(n, f"{os.getpid()}-{task}-{n % 50}"))
            counts["published"] += 1
            n += 1

    async with bus:
        sys.stdout.write("open\n")
        sys.stdout.flush()
        await anyio.to_thread.run_sync(sys.stdin.readline)  # all begin at once
        async with anyio.create_task_group() as group:
            for task in range(TASKS):
                group.start_soon(publish, task, time.monotonic() + seconds)
        await bus.drain()
    return counts


# ------------------------------------------------------------------ all of them


def throughput(processes: int, seconds: float) -> dict[str, float]:
    """Published events a second of all processes together, and of the one that published least; handled by the time all is."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        command = [sys.executable, "-m", "tests.benchmarks.processes", "--one", f"{folder}/bench.db", str(seconds)]
        own = {**os.environ, "PYTHONPATH": str(ROOT)}
        started = [
            subprocess.Popen(command, cwd=ROOT, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        for each in started:
            assert each.stdout is not None
            assert each.stdout.readline() == "open\n"
        time.sleep(1.0)  # until all have their share
        begun = time.monotonic()
        answers = [json.loads(out) for out in _all_answers(started)]
        whole = time.monotonic() - begun
    published, handled = (sum(answer[what] for answer in answers) for what in ("published", "handled"))
    assert handled >= published
    return {
        "processes": processes,
        "published_per_second": published / seconds,
        "least_per_second": min(answer["published"] for answer in answers) / seconds,
        "handled_per_second": handled / whole,
    }


def _all_answers(started: Sequence[subprocess.Popen[str]]) -> list[str]:
    for each in started:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    return [each.communicate()[0] for each in started]


def idle_latency(count: int) -> dict[str, float]:
    """Milliseconds from a call of publish in one process to the handler in another, when nothing else happens."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder, Nursery() as nursery, Members(Path(folder), nursery) as members:
        members.start("worker")
        web = members.start("web", dispatch=False)
        for n in range(count):
            web.tell("publish", n, 1)
            members.wait_for("begun", n + 1)
            time.sleep(0.05)
        begun = {said.value: said.at for said in members.said("begun")}
        times = sorted((begun[said.value[0]] - said.value[1]) * 1000 for said in members.said("published"))
    return {"median": statistics.median(times), "most": times[-1]}


def death_noticed(count: int) -> dict[str, float]:
    """Milliseconds from SIGKILL of the owner of all lanes to the handler in another process, of an event that waits there."""
    times = []
    for _ in range(count):
        with (
            tempfile.TemporaryDirectory(dir=Path.home()) as folder,
            Nursery() as nursery,
            Members(Path(folder), nursery) as members,
        ):
            owner = members.start("owner", order="log", slow=3600.0)
            other = members.start("other", order="log")
            other.tell("publish", 0, 1)
            members.wait_for("begun", who="owner")
            time.sleep(0.2)
            killed = time.monotonic()
            owner.kill()
            times.append((members.wait_for("begun", who="other")[0].at - killed) * 1000)
    return {"median": statistics.median(times), "most": max(times)}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.processes", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for which each number of processes publishes")
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        sys.stdout.write(json.dumps(anyio.run(_publish_and_handle, options.one[0], float(options.one[1]))) + "\n")
        return
    found: dict[str, Any] = {
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "throughput": [throughput(processes, options.seconds) for processes in (1, 2, 4)],
        "idle_latency_ms": idle_latency(50),
        "death_noticed_ms": death_noticed(10),
    }
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{found['cores']} cores, load before {found['load_before']:.1f}")
    print("| processes | published/s, all | published/s, least | handled/s, all |\n|---|---|---|---|")
    for row in found["throughput"]:
        print("| {processes} | {published_per_second:,.0f} | {least_per_second:,.0f} | {handled_per_second:,.0f} |".format(**row))
    for name in ("idle_latency_ms", "death_noticed_ms"):
        print(f"{name}: median {found[name]['median']:.1f}, most {found[name]['most']:.1f}")


if __name__ == "__main__":
    main()
