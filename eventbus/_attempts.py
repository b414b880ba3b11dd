"""One run of a handler: a context of its own, the call, and what came of it.

publish → journal → store → lanes → *workers* → *outcome*. In comes an `Attempt`; out comes an `Outcome`, as data. Nothing here
touches the store or the lane. A coroutine is driven by hand inside a fresh context, which costs a tenth of a task.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context
from typing import Any

import msgspec

from eventbus._outcomes import ACKED, Acked, Attempt, Failed, Outcome, Undeliverable, current_attempt
from eventbus.errors import HandlerTimeout, UndecodableEvent, UnknownEventType


class Torn(BaseException):
    """The event loop was closed under a running attempt: there is nobody left to tell."""


def _begin(attempt: Attempt) -> object:
    """Call the handler; in the attempt's context."""
    current_attempt.set(attempt)
    return attempt.lane.holder.call(attempt)


def _end(attempt: Attempt, result: object) -> Outcome:
    """What the handler published and returned; in the attempt's context."""
    if result is None and attempt.outbox is None:
        return ACKED
    published = attempt.lane.holder.published(attempt, result)
    return ACKED if attempt.replaying or not published else Acked(published)


def failed(attempt: Attempt, error: BaseException) -> Outcome:
    """The outcome of an attempt that raised."""
    record = attempt.record
    # A handler may meet events other than its own that it cannot decode, in `history` for instance; they are its own affair.
    if isinstance(error, UndecodableEvent) and (error.type, error.version) == (record.type, record.version):
        return Undeliverable(str(error)) if isinstance(error, UnknownEventType) else Failed(error, final=True)
    return Failed(error)


def timed_out(attempt: Attempt) -> HandlerTimeout:
    """The error of an attempt that took too long."""
    options = attempt.lane.holder.options
    return HandlerTimeout(f"the handler of {options.name!r} took longer than its timeout of {options.timeout:g} s")


def run_plain(attempt: Attempt, base: Context) -> Outcome:
    """Run a plain handler, in the calling thread."""
    context = base.copy()
    try:
        result = context.run(_begin, attempt)
        if inspect.isawaitable(result):
            if isinstance(result, Coroutine):
                result.close()
            raise TypeError("the handler is a plain function that returned an awaitable; make it `async def`")  # noqa: TRY301
        return context.run(_end, attempt, result)
    except BaseException as error:  # noqa: BLE001  # an outcome, whatever it is
        return failed(attempt, error)


class Suspended(msgspec.Struct, frozen=True, eq=False):
    """An attempt of an async handler that waits for something; it is run to its end by awaiting `finish`."""

    _attempt: Attempt
    _context: Context
    _coroutine: Coroutine[Any, Any, object]
    _yielded: object

    async def finish(self) -> Outcome:
        """Run it to its end.

        Whatever it raises comes out: the worker alone knows whether a cancellation was its own.
        """
        result = await _go_on(self._context, self._coroutine, self._yielded)
        try:
            return self._context.run(_end, self._attempt, result)
        except Exception as error:  # noqa: BLE001  # a bad event among those returned
            return failed(self._attempt, error)


def run_async(attempt: Attempt, base: Context) -> Outcome | Suspended:
    """Run an async handler until it first waits for something, or to its end. Most never wait."""
    context = base.copy()
    return context.run(_run_to_first_wait, attempt, context)


def _run_to_first_wait(attempt: Attempt, context: Context) -> Outcome | Suspended:
    try:
        coroutine = _begin(attempt)
        if type(coroutine) is not _Coroutine:
            coroutine = _coroutine_of(coroutine)
        try:
            yielded = coroutine.send(None)
        except StopIteration as stop:
            result = stop.value
        else:
            return Suspended(attempt, context, coroutine, yielded)
        return ACKED if result is None and attempt.outbox is None else _end(attempt, result)
    except BaseException as error:  # noqa: BLE001  # an outcome, whatever it is
        return failed(attempt, error)


_Coroutine = types.CoroutineType


def _coroutine_of(awaitable: object) -> Coroutine[Any, Any, object]:
    if not isinstance(awaitable, Awaitable):
        raise TypeError(f"the handler returned {type(awaitable).__name__} where an awaitable was expected")

    async def wait() -> object:
        return await awaitable

    return wait()


@types.coroutine
def _go_on(context: Context, coroutine: Coroutine[Any, Any, object], yielded: object) -> Generator[object, Any, object]:
    """Hand what the coroutine yields to the event loop, and what comes back to the coroutine, each step in its context."""
    step: Callable[[Any], object]
    while True:
        try:
            value = yield yielded
            step = coroutine.send
        except GeneratorExit:
            coroutine.close()
            raise Torn from None
        except BaseException as error:  # noqa: BLE001  # thrown in by the event loop, for the coroutine
            value, step = error, coroutine.throw
        try:
            yielded = context.run(step, value)
        except StopIteration as stop:
            return stop.value
