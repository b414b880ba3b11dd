"""How long the event loop is kept from its turn: each callback and each step of a task is timed, on the clock and on the CPU.

asyncio runs everything through `Handle._run`, which is replaced while it is measured. Two times of each: on the clock, and of the CPU by
the loop's thread (`time.thread_time`). The CPU's, without the garbage collector's, is the work that the bus does in one go. The
collector goes through all that the program has, when it is its turn, and its settings are the user's. The clock's time also has the
waiting for the GIL, which another thread has, and for a core, which another program has.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs

_LONG = 0.002
"""Seconds from which on it is remembered what it was."""


@attrs.define
class Blocks:
    """Seconds that each callback and each step took, in order of time.

    Attributes:
        cpu: without the garbage collector.
        collecting: seconds that the garbage collector took of the loop's thread, each time.
        late: seconds by which a task that sleeps for a millisecond was woken too late.
        longest: what took longest of the CPU, by name.
    """

    wall: array[float] = attrs.field(factory=lambda: array("d"))
    cpu: array[float] = attrs.field(factory=lambda: array("d"))
    collecting: array[float] = attrs.field(factory=lambda: array("d"))
    late: array[float] = attrs.field(factory=lambda: array("d"))
    longest: dict[str, float] = attrs.field(factory=dict)

    def ran(self, handle: asyncio.Handle, wall: float, cpu: float) -> None:
        """A callback, or a step, has come to its end."""
        self.wall.append(wall)
        self.cpu.append(cpu)
        if cpu > _LONG:
            name = _name(getattr(handle, "_callback", None))
            self.longest[name] = max(cpu, self.longest.get(name, 0.0))


def _name(callback: Any) -> str:
    """Of a callback, or of the coroutine whose step it is."""
    owner = getattr(callback, "__self__", None)
    called = owner.get_coro() if isinstance(owner, asyncio.Task) else callback
    return str(getattr(called, "__qualname__", called))


@contextmanager
def timed() -> Iterator[Blocks]:
    """Time what the running loop does meanwhile."""
    blocks = Blocks()
    original = asyncio.Handle._run
    wall, cpu, thread = time.perf_counter, time.thread_time, threading.get_ident()

    collecting = began = 0.0  # by the collector since the handle began; when the collector began

    def run(handle: asyncio.Handle) -> None:
        nonlocal collecting
        collecting = 0.0
        wall_before, cpu_before = wall(), cpu()
        original(handle)
        cpu_taken, wall_taken = cpu() - cpu_before, wall() - wall_before
        blocks.ran(handle, wall_taken, cpu_taken - collecting)

    def collected(phase: str, _info: dict[str, int]) -> None:
        nonlocal collecting, began
        if threading.get_ident() != thread:
            return
        if phase == "start":
            began = cpu()
        else:
            blocks.collecting.append(cpu() - began)
            collecting += blocks.collecting[-1]

    asyncio.Handle._run = run  # type: ignore[method-assign,assignment]
    gc.callbacks.append(collected)
    heart = asyncio.get_running_loop().create_task(_beat(blocks))
    try:
        yield blocks
    finally:
        heart.cancel()
        gc.callbacks.remove(collected)
        asyncio.Handle._run = original  # type: ignore[method-assign]


async def _beat(blocks: Blocks) -> None:
    """A task of the user's, which wants its turn each millisecond."""
    while True:
        due = time.perf_counter() + 0.001
        await asyncio.sleep(0.001)
        blocks.late.append(time.perf_counter() - due)
