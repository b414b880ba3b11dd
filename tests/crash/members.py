"""Processes that do what they are told, for tests with several on one file; and how a test tells them.

    with Members(folder) as members:
        one = members.start("one", order="key")
        one.tell("publish", 0, 10)
        members.wait_for("handled", count=10)

A member has one bus with one subscription, "stock". It reads what it is to do from a pipe, line by line, and says what has
happened, with the time (CLOCK_MONOTONIC, which all processes share), in a file that all append to:

    publish FIRST COUNT    → published n, of each
    lanes                  → lanes …, the names of those that it has now
    drain                  → drained n, what is left
    fork                   → forked pid, raised …, what the bus says in the child, which lives on
    freeze handler|turn    the next handler, or transaction, stops the process (SIGSTOP)
    leave                  leave in order → left

and of itself `open`, `begun n`, `handled n`, `refused`, of a publish that got `StoreBusy`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
import attrs

from eventbus import EventBus, Reject, StoreBusy, event
from eventbus.stores import sqlite
from eventbus.stores.base import Batch, Committed
from eventbus.stores.sqlite import SQLiteStore
from tests.crash.nursery import Child, Nursery, Task

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds in which must have happened what a test waits for, on whatever machine."""


@event("member.placed")
@attrs.frozen
class Placed:
    """What members publish."""

    n: int


@event("member.paid")
@attrs.frozen
class Paid:
    """What the handler of a Placed publishes."""

    n: int
    by: str


# ------------------------------------------------------------------ the test's side


@attrs.frozen
class Said:
    """Something that a member has said."""

    who: str
    what: str
    value: Any
    at: float


@attrs.define(eq=False)
class Member:
    """One process, as the test sees it."""

    name: str
    child: Child
    _pipe: int

    @property
    def pid(self) -> int:
        return self.child.pid

    def tell(self, *words: object) -> None:
        """Have it do something."""
        os.write(self._pipe, json.dumps(words).encode() + b"\n")

    def is_stopped(self) -> bool:
        """Whether it is stopped (SIGSTOP)."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def kill(self) -> float:
        """SIGKILL; returns when."""
        at = time.monotonic()
        self.child.kill()
        return at

    def leave(self) -> None:
        """Have it leave in order, and wait until it has."""
        self.tell("leave")
        code = self.child.wait(PATIENCE)
        assert code == 0, f"{self.name} ended with {code}"


class Members:
    """Processes on one file."""

    def __init__(self, folder: Path, nursery: Nursery, backend: str = "asyncio") -> None:
        self.database = folder / "members.db"
        self._folder = folder
        self._nursery = nursery
        self._backend = backend
        self._report = folder / "report"
        self._report.touch()
        self._all: list[Member] = []
        self._pipes: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for member in self._all:
            member.child.kill()
        for pipe in self._pipes:
            os.close(pipe)

    def start(self, name: str, *, dispatch: bool = True, lease: float = 10.0, wait: bool = True, **options: object) -> Member:
        """Start one.

        Args:
            options: those of its subscription (order, concurrency), and: slow, seconds that a handler takes; slow_disk, seconds
                that each transaction takes; busy, seconds after which a turn to write is given up; buses, how many it has;
                at, when it is to open;
                fails, whether a handler fails that was stopped.
        """
        path = self._folder / f"to-{name}"
        os.mkfifo(path)
        self._pipes.append(pipe := os.open(path, os.O_RDWR))
        task = Task(
            *(str(self.database), "", 0, self._backend, name, str(self._report), str(self._folder / "errors")),
            dispatch=dispatch,
            lease=lease,
            program="tests.crash.members",
            options={"pipe": str(path), **options},
        )
        member = Member(name, self._nursery.start(task), pipe)
        self._all.append(member)
        if wait:
            self.wait_for("open", who=name)
        return member

    def dead(self) -> int:
        """How many dead letters there are; nobody may have the file open."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            return int(connection.execute("SELECT count(*) FROM dead_letters").fetchone()[0])

    def suspicions(self) -> list[tuple[str, int]]:
        """Lanes on probation, with the deaths that they are suspected of."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            return connection.execute("SELECT lane, deaths FROM lanes WHERE deaths > 0").fetchall()

    def paid(self) -> list[tuple[int, str]]:
        """What the handlers' attempts have published, by whom, as it is in the file; nobody may have that open."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            rows = connection.execute("SELECT data FROM events WHERE type = 'member.paid' ORDER BY position").fetchall()
        return [(body["n"], body["by"]) for body in (json.loads(data) for (data,) in rows)]

    def said(self, what: str, who: str | None = None) -> list[Said]:
        """What was said of one kind, in its order."""
        lines = [json.loads(line) for line in self._report.read_text().split("\n")[:-1]]  # the last one may be half there
        return [Said(*line) for line in lines if line[1] == what and who in (None, line[0])]

    def wait_for(self, what: str, count: int = 1, who: str | None = None) -> list[Said]:
        """Wait until it was said so often."""
        return self.until(lambda: said if len(said := self.said(what, who)) >= count else None, f"{count} times {what!r}")

    def wait_for_lanes(self, sizes: dict[Member, int]) -> dict[str, list[str]]:
        """Wait until each has so many lanes; returns which."""

        def ask() -> dict[str, list[str]] | None:
            before = {member: len(self.said("lanes", member.name)) for member in sizes}
            for member in sizes:
                member.tell("lanes")
            lanes = {m.name: self.wait_for("lanes", before[m] + 1, m.name)[-1].value for m in sizes}
            return lanes if all(len(lanes[member.name]) == size for member, size in sizes.items()) else None

        return self.until(ask, f"shares of {list(sizes.values())}")

    def until(self, look: Callable[[], T | None], what: str) -> T:
        """Look until there is something."""
        deadline = time.monotonic() + PATIENCE
        while (found := look()) is None:
            errors = (self._folder / "errors").read_text() if (self._folder / "errors").exists() else ""
            assert time.monotonic() < deadline, f"waited {PATIENCE:g} s for {what}; {errors[-2000:]}"
            time.sleep(0.002)
        return found


# ------------------------------------------------------------------ the member's side


class _Store(SQLiteStore):
    """A store on a slow disk, or one whose process is stopped in the midst of a transaction."""

    slow_disk = 0.0
    freeze = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.at_work = threading.Lock()

    def commit(self, batch: Batch) -> Committed:
        with self.at_work:
            return super().commit(batch)

    def _commit(self, batch: Batch) -> Committed:
        time.sleep(self.slow_disk)
        if self.freeze:
            self.freeze = False
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread first: it must not go on a bit
        return super()._commit(batch)


@attrs.define
class _Program:
    task: Task
    freeze: bool = False
    buses: list[tuple[EventBus, _Store]] = attrs.field(factory=list)

    def say(self, what: str, value: object = None) -> None:
        line = json.dumps((self.task.mode, what, value, time.monotonic())) + "\n"
        os.write(1, line.encode())

    async def run(self) -> None:
        options = self.task.options
        await anyio.sleep(max(0.0, options.get("at", 0.0) - time.monotonic()))
        sqlite.BUSY_TIMEOUT = int(1000 * options.get("busy", 5.0))  # type: ignore[attr-defined]
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(options.get("buses", 1)):
                bus, store = self.bus(), _Store(self.task.database)
                store.slow_disk = options.get("slow_disk", 0.0)
                self.buses.append((bus, store))
                await stack.enter_async_context(bus.open(store, dispatch=self.task.dispatch))
            self.say("open")
            async for words in self.commands():
                await self.do(*words)
        self.say("left")

    def bus(self) -> EventBus:
        options = {name: self.task.options[name] for name in ("order", "concurrency") if name in self.task.options}
        bus = EventBus(self.task.database, lease=self.task.lease)

        @bus.subscribe(Placed, name="stock", **options)
        async def stock(placed: Placed) -> Paid:
            self.say("begun", placed.n)
            if self.freeze:
                self.freeze = False
                with contextlib.ExitStack() as stack:
                    for _, store in self.buses:
                        stack.enter_context(store.at_work)  # or it may be stopped while it has the turn to write
                    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
                if self.task.options.get("fails"):
                    raise Reject("it was stopped")
            await anyio.sleep(self.task.options.get("slow", 0.0))
            self.say("handled", placed.n)
            return Paid(placed.n, self.task.mode)

        return bus

    async def commands(self) -> AsyncIterator[list[Any]]:
        """What the test tells, until "leave"."""
        pipe = os.open(self.task.options["pipe"], os.O_RDWR | os.O_NONBLOCK)
        left = b""
        while True:
            await anyio.wait_readable(pipe)
            *lines, left = (left + os.read(pipe, 65536)).split(b"\n")
            for line in lines:
                if (words := json.loads(line)) == ["leave"]:
                    return
                yield words

    async def do(self, what: str, *values: Any) -> None:
        bus, store = self.buses[0]
        match what, *values:
            case "publish", first, count:
                for n in range(first, first + count):
                    await self.publish(self.buses[n % len(self.buses)][0], n)
            case ("lanes",):
                servings = [bus._running.dispatcher.servings["stock"] for bus, _ in self.buses if bus._running is not None]
                self.say("lanes", [lane for serving in servings for lane in serving.lanes])
            case ("drain",):
                self.say("drained", sum((await bus.drain(PATIENCE)).values()))
            case "freeze", "turn":
                store.freeze = True
            case "freeze", "handler":
                self.freeze = True
            case ("fork",):
                self.fork(bus)

    async def publish(self, bus: EventBus, n: int) -> None:
        """Publish, again and again if another has the turn to write."""
        while True:
            begun = time.monotonic()
            try:
                await bus.publish(Placed(n), key=n % 16)
            except StoreBusy as error:
                self.say("refused", str(error))
            else:
                self.say("published", [n, begun])
                return

    def fork(self, bus: EventBus) -> None:
        """Have a child that uses the bus of its parent, and lives on."""
        if pid := os.fork():
            self.say("forked", pid)
            return

        async def use() -> None:
            try:
                await bus.publish(Placed(-1))
            except BaseException as error:
                self.say("raised", f"{type(error).__name__}: {error}")

        # In a thread of its own: this one is inside the parent's loop.
        threading.Thread(target=lambda: anyio.run(use, backend=self.task.backend)).start()
        signal.pause()


def work(task: Task) -> None:
    """Run a member, in a process of its own; its mode is its name."""
    anyio.run(_Program(task).run, backend=task.backend)
