"""Questions to the store, asked from the loop and answered in a thread.

Lanes that are behind read pages of the log here; so do replay, history, dead letters and status. Where the store allows
it, they have a thread of their own; otherwise they are jobs of the journal's thread, between its transactions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from eventbus.errors import BusNotOpen

if TYPE_CHECKING:
    from eventbus._gates import Turn
    from eventbus._loop import Loop
    from eventbus.stores.base import Query, Store

T = TypeVar("T")

_log = logging.getLogger("eventbus")


def report(what: str, error: BaseException) -> None:
    """Log that something could not be read; not of a bus that is closed, which needs it no more."""
    if not isinstance(error, BusNotOpen):
        _log.error("%s could not be read, trying again: %s", what, error)


class Reader:
    """Asks the store; `submit` runs a function in the thread that may read, whose turn is `turn`."""

    def __init__(self, store: Store, loop: Loop, submit: Callable[[Callable[[], object]], object], turn: Turn) -> None:
        self._store = store
        self._loop = loop
        self._submit = submit
        self._closed = False
        self.turn = turn

    def close(self) -> None:
        """Ask nothing any more."""
        self._closed = True

    def ask_then(self, query: Query[T], then: Callable[[T | BaseException], object]) -> None:
        """Ask, and have `then` called on the loop with the answer, or with the error."""
        if self._closed:
            then(BusNotOpen("the bus is closed"))
            return

        def ask() -> None:
            self.turn.take()
            self.turn.come()
            answer: T | BaseException
            try:
                answer = self._store.read(query)
            except BaseException as error:  # noqa: BLE001  # it belongs to who asked
                answer = error
            self.turn.leave()
            try:
                self._loop.post(then, answer)
            except RuntimeError:
                _log.debug("the event loop is gone; nobody waits for this answer")

        self.turn.call()
        self._submit(ask)

    async def ask(self, query: Query[T]) -> T:
        """Ask; returns the answer, or raises the store's error."""
        answers: list[T | BaseException] = []
        waiter = self._loop.waiter()

        def then(answer: T | BaseException) -> None:
            answers.append(answer)
            waiter.set()

        self.ask_then(query, then)
        await waiter.wait()
        if isinstance(answers[0], BaseException):
            raise answers[0]
        return answers[0]
