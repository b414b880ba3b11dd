"""What every worker shares: the event, the measurements, and the line of JSON that it prints.

A worker is a plain script. It runs in an environment with one peer and not much else in it, finds this module beside it, and
measures one thing: `python work_NAME.py --setting S --measure M --seconds N --folder F`. Its last line is JSON. It imports nothing
of this repository.
"""

import argparse
import asyncio
import json
import random
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

BACKLOG = 1_000
"""A publisher waits while so many events are not handled yet. A favour to the queues that slow down as they grow."""

BATCH = 100
"""Events published at once, where there is a way to do so."""

AT_LEAST = 20
"""Measurements of latency, also where they take longer than the given time."""

PATIENCE = 4
"""Times the given seconds after which a measurement gives up on an event that does not arrive, but 20 s at least."""


@dataclass(frozen=True, slots=True)
class OrderPlaced:
    """The event: six fields, as a user would have them."""

    order_id: uuid.UUID
    customer: str
    total: Decimal
    quantity: int
    placed_at: datetime
    note: str | None


NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def fields(number: int) -> dict[str, object]:
    """The fields of an event, for peers that bring their own base class. Made anew for each event, as a user's would be."""
    return {
        "order_id": uuid.uuid4(),
        "customer": f"customer-{number}",
        "total": Decimal(number) / 100,
        "quantity": number % 10,
        "placed_at": NOW,
        "note": None if number % 2 else "leave it at the door",
    }


def event(number: int) -> OrderPlaced:
    """An event as a dataclass."""
    return OrderPlaced(**fields(number))


def to_json(order: OrderPlaced) -> str:
    """For peers that take text: the standard library's JSON, as most people would write it."""
    return json.dumps(
        {
            "order_id": str(order.order_id),
            "customer": order.customer,
            "total": str(order.total),
            "quantity": order.quantity,
            "placed_at": order.placed_at.isoformat(),
            "note": order.note,
        }
    )


def from_json(text: str) -> OrderPlaced:
    """The way back: a handler gets a typed event everywhere."""
    found = json.loads(text)
    return OrderPlaced(
        uuid.UUID(found["order_id"]),
        found["customer"],
        Decimal(found["total"]),
        found["quantity"],
        datetime.fromisoformat(found["placed_at"]),
        found["note"],
    )


class Calls:
    """When the handler was called. `mark` is all that the no-op handler does; it may come from any thread."""

    def __init__(self) -> None:
        self._times: list[int] = []
        self.mark = lambda: self._times.append(time.monotonic_ns())

    def count(self) -> int:
        """Calls until now."""
        return len(self._times)

    def last(self) -> int:
        """When the newest call began, as `time.monotonic_ns` gives it."""
        return self._times[-1]

    def clear(self) -> None:
        """Forget all of them, between two runs."""
        self._times.clear()


class Late(Exception):
    """What was published is not handled within the time limit."""


class Limit:
    """A moment after which waiting ends with `Late`."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + max(20.0, PATIENCE * seconds)

    def check(self, what: Callable[[], str]) -> None:
        """Raise `Late` if it is over."""
        if time.monotonic() > self._end:
            raise Late(what())


def wait_until(ready: Callable[[], bool], limit: Limit, what: Callable[[], str], pause: float = 0.000_5) -> None:
    """Wait in a thread."""
    while not ready():
        limit.check(what)
        time.sleep(pause)


def wait_for_calls(calls: Calls, number: int, limit: Limit) -> None:
    """Wait until the handler was called so often."""
    wait_until(lambda: calls.count() >= number, limit, lambda: f"{calls.count()} of {number} handled")


def hold_back(calls: Calls, published: int, limit: Limit, subscribers: int = 1) -> None:
    """Wait while too much is not handled yet."""
    if published - calls.count() // subscribers >= BACKLOG:
        wait_for_calls(calls, (published - BACKLOG + 1) * subscribers, limit)


def throughput(run: Callable[[int], None], seconds: float, step: int = 1) -> dict[str, float]:
    """Events per second: `run(n)` publishes n events and returns when all are handled and acknowledged.

    The number is raised until a run takes about as long as it should; the last run counts. Those before it are the warm-up, and
    there is one at least.
    """
    run(max(step, 20))
    number = 100
    while True:
        started = time.perf_counter()
        run(number)
        spent = time.perf_counter() - started
        if spent >= seconds * 0.6:
            return {"events": number, "seconds": spent, "events_per_second": number / spent}
        number = min(number * 10, int(number * seconds / spent))
        number = max(step, number - number % step)


class Samples:
    """Latencies, taken one event at a time.

    The publisher pauses between two events for a random time, up to `spread`: as long as the peer's polling interval where it
    polls, so that events come at any moment of it.
    """

    def __init__(self, seconds: float, spread: float) -> None:
        self._random = random.Random(7)
        self._end = time.monotonic() + seconds
        self._spread = spread
        self._taken: list[int] = []
        self.limit = Limit(seconds)

    def wanted(self) -> bool:
        """Whether to take another one."""
        return time.monotonic() < self._end or len(self._taken) < AT_LEAST

    def pause(self) -> float:
        """Seconds until the next event."""
        return self._random.uniform(0.0, self._spread)

    def add(self, nanoseconds: int) -> None:
        """Take one."""
        self._taken.append(nanoseconds)

    def summary(self) -> dict[str, float]:
        """The median and the 99th percentile, in milliseconds. The first two warmed things up."""
        found = sorted(self._taken[2:])
        return {
            "events": len(found),
            "p50_ms": found[len(found) // 2] / 1e6,
            "p99_ms": found[min(len(found) - 1, int(len(found) * 0.99))] / 1e6,
            "max_ms": found[-1] / 1e6,
        }


def latency(
    publish: Callable[[int], None], calls: Calls, seconds: float, spread: float = 0.005, settle: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """From the call of publish to the call of the handler, one event at a time, from a thread."""
    samples = Samples(seconds, spread)
    number = 0
    while samples.wanted():
        started = time.monotonic_ns()
        publish(number)
        number += 1
        wait_for_calls(calls, number, samples.limit)
        samples.add(calls.last() - started)
        settle()
        time.sleep(samples.pause())
    return samples.summary()


async def latency_in_loop(
    publish: Callable[[int], Awaitable[object]], calls: Calls, seconds: float, spread: float = 0.005
) -> dict[str, float]:
    """The same from a task of an asyncio loop."""
    samples = Samples(seconds, spread)
    number = 0
    while samples.wanted():
        started = time.monotonic_ns()
        await publish(number)
        number += 1
        while calls.count() < number:
            samples.limit.check(lambda: "an event was not handled")
            await asyncio.sleep(0.000_2)
        samples.add(calls.last() - started)
        await asyncio.sleep(samples.pause())
    return samples.summary()


def in_threads(number: int, threads: int, work: Callable[[int], None]) -> None:
    """Call `work(i)` for i below `number`, from so many threads."""
    failed: list[BaseException] = []

    def part(first: int) -> None:
        try:
            for i in range(first, number, threads):
                work(i)
        except BaseException as error:
            failed.append(error)

    started = [threading.Thread(target=part, args=(first,)) for first in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if failed:
        raise failed[0]


SYNCHRONOUS = {0: "OFF", 1: "NORMAL", 2: "FULL", 3: "EXTRA"}


def pragmas(execute: Callable[[str], object], how: str) -> dict[str, object]:
    """The settings on which durability rests, asked of a connection that the peer itself made.

    Args:
        execute: runs a statement on it and returns a cursor.
        how: whose connection it is, for the reader of the table.
    """
    values = {name: execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "busy_timeout")}
    version = execute("SELECT sqlite_version()").fetchone()[0]
    return {
        "journal_mode": values["journal_mode"],
        "synchronous": SYNCHRONOUS[values["synchronous"]],
        "busy_timeout_ms": values["busy_timeout"],
        "sqlite": version,
        "how_we_know": how,
    }


@dataclass(frozen=True)
class Task:
    """What the command line asks for.

    Attributes:
        setting: which of the peer's settings.
        measure: "one", "many", "latency" or "three".
        seconds: how long it should take, about.
        folder: an empty one on the disk to be measured.
    """

    setting: str
    measure: str
    seconds: float
    folder: Path

    @property
    def subscribers(self) -> int:
        """How many subscribers an event has."""
        return 3 if self.measure == "three" else 1

    def limit(self) -> Limit:
        """For one run."""
        return Limit(self.seconds)


def main(work: Callable[[Task], dict[str, object]]) -> None:
    """Measure and print. `work` returns {"figures": …, "settings": …, "how": "what was called"}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--setting", required=True)
    parser.add_argument("--measure", required=True, choices=["one", "many", "latency", "three"])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    try:
        found = work(Task(given.setting, given.measure, given.seconds, given.folder))
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(found), flush=True)
    sys.stderr.flush()
