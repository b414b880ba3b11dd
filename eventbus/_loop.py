"""asyncio and trio: the only place that tells them apart, and where tasks and threads come from.

The journal's and the reader's threads hand their results to the loop with `Loop.post`; tasks wait for them with a `Waiter`,
which costs a fraction of anyio's `Event`. Everything else that is asynchronous uses anyio.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from typing import TYPE_CHECKING, Any, Protocol

import anyio
from anyio.lowlevel import checkpoint_if_cancelled, current_token

from eventbus._gates import Gate, Turn, Worker
from eventbus.errors import WrongLoop

if TYPE_CHECKING:
    from types import TracebackType

    import trio


class Waiter(Protocol):
    """Something that one task waits for and that happens once."""

    done: bool

    def set(self) -> None:
        """It has happened. On the loop's thread; again does nothing."""

    async def wait(self) -> None:
        """Wait for it; cancellation ends the wait."""

    async def wait_decided(self) -> None:
        """Wait for it; a cancellation is raised only when it has happened."""


class Tasks(Protocol):
    """The tasks of ours, around a body. Where one raises, the body is cancelled, and a group with the error comes out at the end.

    They are shielded, and Ctrl-C does not end them in the middle. asyncio programs that shut down cancel all tasks that there
    are, ours as well, and still need them to leave the bus: so what is started begins, and no task of ours ends cancelled.
    """

    async def __aenter__(self) -> object:
        """The body begins."""

    def start(self, function: Callable[[], Coroutine[Any, Any, None]], /) -> None:
        """Run a function in a task of its own."""

    def cancel(self) -> None:
        """Cancel the body."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        """Wait until all tasks have ended; takes in the cancellation of the body that is its own."""


class Loop(Protocol):
    """The event loop that a bus was opened on, and where its threads come from: a simulation has others.

    Attributes:
        checkpoint_if_cancelled: raises the cancellation of the scopes around this task, if there is one. As anyio's function
            of this name, without its search for the loop, which takes longer than to encode an event.
    """

    checkpoint_if_cancelled: Callable[[], Awaitable[None]]

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Have the loop call a function soon; from any thread. RuntimeError if the loop is gone."""

    def soon(self, function: Callable[[], object]) -> None:
        """Have the loop call a function soon; on its own thread."""

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

    async def forget_cancellation(self, scope: anyio.CancelScope | None = None, /) -> None:
        """Go on as if it had not been; but not if this scope, the innermost one, is cancelled. In a task of ours."""

    def tasks(self) -> Tasks:
        """New tasks of ours."""

    async def within(self, scope: anyio.CancelScope, function: Callable[[], Awaitable[None]], /) -> None:
        """Run a function within a scope, in a task of ours: the scope takes in its own cancellation, also if the task was
        cancelled otherwise meanwhile."""

    async def insist(self, function: Callable[[], Awaitable[None]], scope: anyio.CancelScope, /) -> None:
        """Call a function again if its task, one of ours, is cancelled otherwise than by this scope, the innermost one."""


def current_loop() -> Loop:
    """The running loop."""
    token = current_token()
    native, checkpoint = token.native_token, token.backend_class.checkpoint_if_cancelled
    if isinstance(native, asyncio.AbstractEventLoop):
        return _Asyncio(native, checkpoint)
    return _Trio(native, checkpoint)  # type: ignore[arg-type]  # anyio has these two


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

    def soon(self, function: Callable[[], object]) -> None:
        self._loop.call_soon(function)

    def waiter(self) -> _AsyncioWaiter:
        return _AsyncioWaiter(self._loop)

    def check(self) -> None:
        # Only one loop runs in a thread. Until Python 3.12 to ask for it is a system call.
        if threading.get_ident() != self._thread or not self._loop.is_running():
            raise _wrong_loop()

    def self_cancelled(self) -> Callable[[], int]:
        task = asyncio.current_task()
        return _never if task is None else task.cancelling

    async def forget_cancellation(self, scope: anyio.CancelScope | None = None, /) -> None:
        task = asyncio.current_task()
        while task is not None and task.cancelling() and not (scope is not None and scope.cancel_called):
            while task.uncancel():
                pass
            with contextlib.suppress(asyncio.CancelledError):  # it may not have been raised yet, or be another
                await asyncio.sleep(0)

    def tasks(self) -> Tasks:
        return _AsyncioTasks(self)

    async def within(self, scope: anyio.CancelScope, function: Callable[[], Awaitable[None]], /) -> None:
        with scope:
            try:
                await function()
            except asyncio.CancelledError:  # which anyio lets out when there was another
                if not scope.cancel_called:
                    raise
        await self.forget_cancellation()

    async def insist(self, function: Callable[[], Awaitable[None]], scope: anyio.CancelScope, /) -> None:
        while True:
            try:
                return await function()
            except asyncio.CancelledError:
                if scope.cancel_called:
                    raise
                await self.forget_cancellation(scope)


class _AsyncioTasks:
    """Not a group of anyio's, which has itself and its body cancelled when one of its tasks is."""

    def __init__(self, loop: _Asyncio) -> None:
        self._loop = loop
        self._body = anyio.CancelScope()
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        self._ended = loop.waiter()

    async def __aenter__(self) -> object:
        return self._body.__enter__()

    def start(self, function: Callable[[], Coroutine[Any, Any, None]], /) -> None:
        self._loop.check()  # it may be closed under those who would leave
        begun = False

        async def run() -> None:
            nonlocal begun
            begun = True
            with contextlib.suppress(asyncio.CancelledError):
                await function()

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not begun:  # it was cancelled before its first step
                self.start(function)
            elif not task.cancelled() and (error := task.exception()) is not None:
                self._errors.append(error)
                self._body.cancel()
            if not self._tasks:
                self._ended.set()

        task = asyncio.get_running_loop().create_task(run(), name=f"{function.__module__}.{function.__qualname__}")
        self._tasks.add(task)
        task.add_done_callback(ended)

    def cancel(self) -> None:
        self._body.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        try:
            await self._wait_until_ended()
        except BaseException as own:
            if self._body.__exit__(type(own), own, own.__traceback__):
                return True
            raise
        return self._body.__exit__(kind, error, trace)

    async def _wait_until_ended(self) -> None:
        self._loop.check()
        self._ended = self._loop.waiter()
        if self._tasks:
            await self._ended.wait_decided()
        if self._errors:
            raise BaseExceptionGroup("tasks of the bus have failed", self._errors)


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

    def soon(self, function: Callable[[], object]) -> None:
        self._token.run_sync_soon(function)

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

    async def forget_cancellation(self, _scope: anyio.CancelScope | None = None, /) -> None:
        pass

    def tasks(self) -> Tasks:
        return _TrioTasks()

    async def within(self, scope: anyio.CancelScope, function: Callable[[], Awaitable[None]], /) -> None:
        with scope:
            await function()

    async def insist(self, function: Callable[[], Awaitable[None]], _scope: anyio.CancelScope, /) -> None:
        await function()


class _TrioTasks:
    def __init__(self) -> None:
        self._group = anyio.create_task_group()

    async def __aenter__(self) -> object:
        return await self._group.__aenter__()

    def start(self, function: Callable[[], Coroutine[Any, Any, None]], /) -> None:
        import trio  # noqa: PLC0415

        async def run() -> None:
            with anyio.CancelScope(shield=True):
                await function()

        # trio raises KeyboardInterrupt wherever code of the main task's descent happens to run; so it goes to the main task.
        self._group.start_soon(trio.lowlevel.enable_ki_protection(run), name=function)

    def cancel(self) -> None:
        self._group.cancel_scope.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        return await self._group.__aexit__(kind, error, trace)


# ------------------------------------------------------------------ processes


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
