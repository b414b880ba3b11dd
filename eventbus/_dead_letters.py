"""`bus.dead_letters`: deliveries given up on, to look at, to send again, to throw away."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from eventbus._model import DeadLetter
from eventbus.errors import ConfigurationError, UnknownEvent
from eventbus.stores.base import LARGEST, DeadLetterFilter, DeadLetterRow, Discard, Redrive, storable
from eventbus.stores.base import DeadLetters as Query

if TYPE_CHECKING:
    from eventbus._declared import Declared
    from eventbus._running import Running


class DeadLetters:
    """The dead letters of a bus.

    A filter's conditions must all hold: `subscription` (a name, or the handler), `type` (a name, a pattern, or the class),
    `error` (the name of the error's class, or the class), `since` and `until` (aware datetimes, inclusive, of the last failure).
    """

    def __init__(self, running: Callable[[], Running], declared: Declared) -> None:
        self._running = running
        self._declared = declared

    async def list(
        self,
        *,
        subscription: str | Callable[..., Any] | None = None,
        type: str | type | None = None,
        error: str | type[BaseException] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int | None = None,
    ) -> list[DeadLetter]:
        """Dead letters, oldest first; at most `limit`, None for all of them."""
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or not 0 < limit <= LARGEST):
            raise ConfigurationError(f"limit={limit!r}; expected an int from 1, or None for all of them")
        which = self._filter((), subscription, type, error, since, until)
        running = self._running()
        rows = await running.reader.ask(Query(which, limit=limit))
        return [running.decoder.dead_letter(row) for row in rows]

    async def get(self, id: int) -> DeadLetter:
        """One dead letter.

        Raises:
            UnknownEvent: there is none with this id.
        """
        running = self._running()
        rows: tuple[DeadLetterRow, ...] = await running.reader.ask(Query(DeadLetterFilter(ids=(_id(id),))))
        if not rows:
            raise UnknownEvent(f"there is no dead letter {id}; it was redriven, discarded, or never there")
        return running.decoder.dead_letter(rows[0])

    async def redrive(
        self,
        *ids: int,
        subscription: str | Callable[..., Any] | None = None,
        type: str | type | None = None,
        error: str | type[BaseException] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        all: bool = False,
    ) -> int:
        """Deliver dead letters again, each to its subscription, from attempt 1; returns how many.

        Returns as soon as that is stored; `drain` waits for them. A dead letter is deleted only with the ack; if it fails for
        good again, it stays, brought up to date. It takes turns with live events, and does not hold them up. With its ack, a
        key that was parked behind it is free: the later events follow, in order.

        Raises:
            ConfigurationError: neither ids, nor a condition, nor `all=True`.
        """
        which = self._filter(ids, subscription, type, error, since, until, needs_all=not all)
        running = self._running()
        try:
            return len(await running.journal.command(Redrive(which)))
        finally:  # who is cancelled meanwhile does not come back here, and it is stored; none may be new, and some not known yet
            for serving in running.dispatcher.servings.values():
                serving.redriver.kick()

    async def discard(
        self,
        *ids: int,
        subscription: str | Callable[..., Any] | None = None,
        type: str | type | None = None,
        error: str | type[BaseException] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        all: bool = False,
    ) -> int:
        """Delete dead letters; returns how many. A key that was parked behind one goes on with what came after it.

        Raises:
            ConfigurationError: neither ids, nor a condition, nor `all=True`.
        """
        which = self._filter(ids, subscription, type, error, since, until, needs_all=not all)
        running = self._running()
        try:
            return await running.journal.command(Discard(which))
        finally:  # see `redrive`
            for serving in running.dispatcher.servings.values():
                serving.redriver.begin_anew()

    def _filter(
        self,
        ids: tuple[int, ...],
        subscription: object,
        type: type | str | None,
        error: object,
        since: datetime | None,
        until: datetime | None,
        *,
        needs_all: bool = False,
    ) -> DeadLetterFilter:
        if needs_all and not ids and not any((subscription, type, error, since, until)):
            raise ConfigurationError("this would take every dead letter; give ids, a condition, or all=True")
        return DeadLetterFilter(
            tuple(_id(each) for each in ids) if ids else None,
            None,
            None if subscription is None else self._declared.name_of(subscription),
            None if type is None else self._declared.type_of(type),
            _error(error),
            None if since is None else _time("since", since),
            None if until is None else _time("until", until),
        )


def _error(error: object) -> str | None:
    if error is None or (isinstance(error, str) and storable(error)):
        return error
    if inspect.isclass(error):
        return error.__name__
    raise ConfigurationError(f"error={error!r}; expected the name of the error's class, or the class")


def _id(id: object) -> int:
    if isinstance(id, DeadLetter):
        return id.id
    if isinstance(id, int) and not isinstance(id, bool) and 0 <= id <= LARGEST:
        return id
    raise ConfigurationError(f"{id!r} is no id of a dead letter: an int, DeadLetter.id; of a list, unpack them: redrive(*ids)")


def _time(name: str, point: datetime) -> float:
    if not isinstance(point, datetime) or point.utcoffset() is None:
        raise ConfigurationError(f"{name}={point!r}; expected an aware datetime, such as datetime.now(UTC)")
    return point.timestamp()
