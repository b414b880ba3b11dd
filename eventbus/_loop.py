"""asyncio and trio: the only place that tells them apart, and the only one that makes threads.

The journal's and the reader's threads hand their results to the loop with `Loop.post`; tasks wait for them with a `Waiter`,
which costs a fraction of anyio's `Event`. Everything else that is asynchronous uses anyio.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import queue
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

import anyio
from anyio.lowlevel import checkpoint_if_cancelled, current_token

from eventbus.errors import WrongLoop

if TYPE_CHECKING:
    import trio

P = ParamSpec("P")
T = TypeVar("T")


GIVE_WAY = 0.001
"""Seconds for which the loop gives way to a thread, at most."""


class Waiter(Protocol):
    """Something that one task waits for and that happens once."""

    done: bool

    def set(self) -> None:
        """It has happened. On the loop's thread; again does nothing."""

    async def wait(self) -> None:
        """Wait for it; cancellation ends the wait."""

    async def wait_decided(self) -> None:
        """Wait for it; a cancellation is raised only when it has happened."""


class Loop(Protocol):
    """The event loop that a bus was opened on, and where its threads come from: a simulation has others.

    Attributes:
        checkpoint_if_cancelled: raises the cancellation of the scopes around this task, if there is one. As anyio's function
            of this name, without its search for the loop, which takes longer than to encode an event.
    """

    checkpoint_if_cancelled: Callable[[], Awaitable[None]]

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Have the loop call a function soon; from any thread. RuntimeError if the loop is gone."""

    def waiter(self) -> Waiter:
        """A new waiter."""

    def worker(self, name: str) -> Worker:
        """A new thread."""

    def gate(self) -> Gate:
        """A new gate."""

    def turn(self) -> Turn:
        """A new turn."""

    def check(self) -> None:
        """Raise `WrongLoop` unless called from a task of this loop."""

    def self_cancelled(self) -> Callable[[], int]:
        """A function that says whether this task was cancelled other than by a cancel scope, which none of ours outlives: by what
        it ran."""

    async def forget_cancellation(self) -> None:
        """Go on as if it had not been. Within a shielded scope."""

    async def insist(self, function: Callable[[], Awaitable[None]], scope: anyio.CancelScope, /) -> None:
        """Call a function again if its task is cancelled otherwise than by this shielded scope: asyncio programs that shut down
        cancel all tasks that there are, ours as well, and still need them to leave the bus."""


def current_loop() -> Loop:
    """The running loop."""
    token = current_token()
    native, checkpoint = token.native_token, token.backend_class.checkpoint_if_cancelled
    if isinstance(native, asyncio.AbstractEventLoop):
        return _Asyncio(native, checkpoint)
    return _Trio(native, checkpoint)  # type: ignore[arg-type]  # anyio has these two


def undisturbed(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A coroutine function for a task of ours, which Ctrl-C must not end in the middle.

    trio raises KeyboardInterrupt wherever code of the main task's descent happens to run; with this it goes to the main task.
    """
    if isinstance(current_loop(), _Trio):
        import trio  # noqa: PLC0415  # only where trio runs

        return trio.lowlevel.enable_ki_protection(function)
    return function


class _Threads:
    """What a loop has for threads."""

    def worker(self, name: str) -> Worker:
        return Worker(name)

    def gate(self) -> Gate:
        return Gate()

    def turn(self) -> Turn:
        return Turn()


def _never() -> int:
    return 0


def _wrong_loop() -> WrongLoop:
    return WrongLoop("the bus belongs to the event loop and thread it was opened on; call it from a task of that loop")


# ------------------------------------------------------------------ asyncio


class _AsyncioWaiter:
    __slots__ = ("_future", "_loop", "done")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] | None = None
        self.done = False

    def set(self) -> None:
        self.done = True
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def wait(self) -> None:
        if not self.done:
            # A cancelled wait cancels the future, so each wait has its own.
            self._future = self._loop.create_future()
            await self._future

    async def wait_decided(self) -> None:
        if self.done:
            return
        self._future = self._loop.create_future()
        try:
            await self._future
        except asyncio.CancelledError:
            await self._wait_shielded()
            raise

    async def _wait_shielded(self) -> None:
        with anyio.CancelScope(shield=True):
            while not self.done:
                try:
                    await self.wait()
                except asyncio.CancelledError:
                    continue  # a second Task.cancel(); the first is raised when it is decided


class _Asyncio(_Threads):
    def __init__(self, loop: asyncio.AbstractEventLoop, checkpoint_if_cancelled: Callable[[], Awaitable[None]]) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self.checkpoint_if_cancelled = checkpoint_if_cancelled

    def post(self, function: Callable[..., object], *args: object) -> None:
        self._loop.call_soon_threadsafe(function, *args)

    def waiter(self) -> _AsyncioWaiter:
        return _AsyncioWaiter(self._loop)

    def check(self) -> None:
        # Only one loop runs in a thread. Until Python 3.12 to ask for it is a system call.
        if threading.get_ident() != self._thread or not self._loop.is_running():
            raise _wrong_loop()

    def self_cancelled(self) -> Callable[[], int]:
        task = asyncio.current_task()
        return _never if task is None else task.cancelling

    async def forget_cancellation(self) -> None:
        task = asyncio.current_task()
        while task is not None and task.uncancel():
            pass
        with contextlib.suppress(asyncio.CancelledError):  # it may not have been raised yet
            await asyncio.sleep(0)

    async def insist(self, function: Callable[[], Awaitable[None]], scope: anyio.CancelScope, /) -> None:
        while True:
            try:
                return await function()
            except asyncio.CancelledError:
                if scope.cancel_called:
                    raise
                await self.forget_cancellation()


# ------------------------------------------------------------------ trio


class _TrioWaiter:
    __slots__ = ("_task", "done")

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None
        self.done = False

    def set(self) -> None:
        import trio  # noqa: PLC0415  # only where trio runs

        self.done = True
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    async def wait(self) -> None:
        await self._wait(decided=False)

    async def wait_decided(self) -> None:
        await self._wait(decided=True)

    async def _wait(self, *, decided: bool) -> None:
        import trio  # noqa: PLC0415

        if self.done:
            return
        cancelled = False

        def abort(_: object) -> trio.lowlevel.Abort:
            nonlocal cancelled
            cancelled = True
            if decided:
                return trio.lowlevel.Abort.FAILED
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)
        if cancelled:
            await checkpoint_if_cancelled()


class _Trio(_Threads):
    def __init__(self, token: trio.lowlevel.TrioToken, checkpoint_if_cancelled: Callable[[], Awaitable[None]]) -> None:
        self._token = token
        self.checkpoint_if_cancelled = checkpoint_if_cancelled

    def post(self, function: Callable[..., object], *args: object) -> None:
        self._token.run_sync_soon(function, *args)

    def waiter(self) -> _TrioWaiter:
        return _TrioWaiter()

    def check(self) -> None:
        import trio  # noqa: PLC0415

        try:
            token = trio.lowlevel.current_trio_token()
        except RuntimeError:
            token = None
        if token is not self._token:
            raise _wrong_loop()

    def self_cancelled(self) -> Callable[[], int]:
        return _never  # only scopes cancel

    async def forget_cancellation(self) -> None:
        pass

    async def insist(self, function: Callable[[], Awaitable[None]], _scope: anyio.CancelScope, /) -> None:
        await function()


# ------------------------------------------------------------------ processes and threads


class _Process:
    """This process; a forked child is another."""


_here = _Process()


def this_process() -> object:
    """Another object in a forked child, which has none of our threads. To ask for the pid would be a system call."""
    return _here


def _forked() -> None:
    global _here  # noqa: PLW0603  # there is one process
    _here = _Process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def context_for_threads(context: Context) -> Context:
    """A copy of a context that does not claim to be inside an event loop: a plain handler may start one of its own."""
    copy = context.copy()
    sniffio = sys.modules.get("sniffio")  # with it, anyio notes in the context which loop it is in
    if sniffio is not None:
        copy.run(sniffio.current_async_library_cvar.set, None)
    return copy


class Gate:
    """Something that one thread waits at and another opens, once for each time. A `Condition` makes a lock for each wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let the one that waits, or comes next, pass; then it is closed again."""
        self._lock.release()

    def wait(self, seconds: float = math.inf) -> bool:
        """Pass when it is open; False if it was not for so long."""
        return self._lock.acquire(timeout=min(seconds, threading.TIMEOUT_MAX) if seconds < math.inf else -1)


class Turn:
    """How the loop gives way to a thread before it does much itself.

    A thread that is called could not begin before the loop has nothing to do, or before CPython's switch interval is over (5 ms),
    since the loop holds the GIL. When the loop waits until the thread has come, that holds the GIL for a moment, and then not
    while SQLite works; so both work at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._door = Gate()
        self._called = self._busy = self._waited_for = False

    def call(self) -> None:
        """There is something for the thread to do; before it can come for it."""
        self._called = True

    def come(self) -> None:
        """In the thread: it begins with all that it was called for."""
        with self._lock:
            self._called, self._busy = False, True
            if self._waited_for:
                self._waited_for = False
                self._door.open()

    def leave(self) -> None:
        """In the thread: it is done with it."""
        self._busy = False

    def give_way(self) -> None:
        """On the loop: wait until the thread has come, if it was called and is not busy; at most `GIVE_WAY` seconds."""
        if not self._called or self._busy:
            return
        with self._lock:
            if not self._called or self._busy:
                return
            self._waited_for = True
        passed = False
        try:
            passed = self._door.wait(GIVE_WAY)
        finally:  # a signal's handler may raise
            if not passed:
                with self._lock:
                    if self._waited_for:
                        self._waited_for = False
                    else:
                        self._door.wait(0)  # it has come in between


class Worker:
    """A daemon thread of ours that runs one job after another."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], object]) -> None:
        """Run a job after those before it. A job must not raise."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Let the thread end when the jobs before are done; does not wait."""
        self._jobs.put(None)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end; False if it still runs after `timeout` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
