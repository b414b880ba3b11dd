"""What the tests of the conformance suite share: a store that is open, records, and short words for the common calls.

publish → journal → *store* → lanes → workers → outcome, with the journal and the reader played by the tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import msgspec
import pytest

from eventbus.stores.base import (
    Batch,
    Beat,
    Claim,
    Command,
    Committed,
    DeadLetterFilter,
    DeadLetterRow,
    DeadLetters,
    Death,
    Events,
    Instance,
    Lanes,
    LaneState,
    LogState,
    Page,
    Record,
    Register,
    Registration,
    Store,
    Stored,
    Subscribed,
    Unit,
    Waiting,
    WaitingRow,
    WaitingRows,
    slot_of,
)

T = TypeVar("T")

NOW = 1_700_000_000.0
"""What the tests' clock says: unix seconds."""

INSTANCE = Instance("01890000-0000-7000-8000-00000000aaaa", "conformance", "localhost", 4711, NOW)

OTHER = Instance("01890000-0000-7000-8000-00000000bbbb", "another", "localhost", 4712, NOW)

_numbers = itertools.count(1)


def record(type: str = "order.created", key: str | None = None, data: bytes = b'{"n":1}', **options: Any) -> Record:
    """A record with a new id, ascending from one to the next."""
    id = f"01890000-0000-7000-8000-{next(_numbers):012x}"
    if "slot" not in options:
        options["slot"] = slot_of(id if key is None else key)
    settings: dict[str, Any] = {"version": 1, "time": NOW, "headers": None, "content_type": "application/json"}
    return Record(id=id, type=type, key=key, data=data, **{**settings, **options})


def records(count: int, type: str = "order.created", **options: Any) -> list[Record]:
    """So many records."""
    return [record(type, **options) for _ in range(count)]


def stored_part(found: Record) -> tuple[object, ...]:
    """What of a record a store has to give back as it was."""
    return (
        *(found.position, found.id, found.type, found.version, found.time, found.key),
        *(found.slot, found.headers, found.content_type, found.data, found.fault),
    )


def death(error: str = "ValueError", **options: Any) -> Death:
    """An end that a delivery comes to."""
    settings = {"error": "no stock", "traceback": "Traceback …", "attempts": 3, "first_failed_at": NOW, "last_failed_at": NOW + 5}
    return Death(error, **{**settings, **options})


def places_of(committed: Committed, *groups: Sequence[Record]) -> list[list[Stored] | Exception]:
    """Where the events of each group came to lie, or why the group was left out."""
    found: list[list[Stored] | Exception] = []
    for group, places in zip(groups, committed.appends, strict=True):
        if isinstance(places, Exception):
            found.append(places)
        else:
            found.append([Stored(event.id, event.position) for event in group] if places is None else list(places))
    return found


class ConformanceBase:
    """The store under test, and words to talk to it."""

    persistent: ClassVar[bool] = True
    """Whether what was committed is there when the store is opened again."""
    tells_deaths: ClassVar[bool] = True
    """Whether the store can tell who has died from whose lease has ended."""

    def make_store(self, directory: Path) -> Store:
        """A store that is not open, which keeps its things in or under `directory`; each call with the same directory gives a
        store on the same things."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        """An open store with nothing in it."""
        store = self.make_store(tmp_path)
        store.open(INSTANCE)
        yield store
        store.close()

    # -------------------------------------------------------------- writing

    def append(self, store: Store, *groups: Sequence[Record], now: float = NOW) -> Committed:
        """Commit groups of events."""
        return store.commit(Batch(now, appends=groups))

    def places(self, store: Store, *events: Record) -> list[Stored]:
        """Commit one group that must not conflict; where its events came to lie."""
        (stored,) = places_of(self.append(store, events), events)
        assert not isinstance(stored, Exception), stored
        return stored

    def run(self, store: Store, command: Command[T], now: float = NOW) -> T:
        """Commit one command; its result, or its error raised."""
        (result,) = store.commit(Batch(now, commands=[cast("Command[object]", command)])).results
        if isinstance(result, Exception):
            raise result
        return cast("T", result)

    def settle(self, store: Store, *units: Unit, now: float = NOW) -> Committed:
        """Commit outcomes."""
        return store.commit(Batch(now, units=units))

    def register(
        self, store: Store, name: str = "mailer", types: tuple[str, ...] = ("order.created",), **options: Any
    ) -> Subscribed:
        """Store a subscription, from the beginning and by type unless told otherwise."""
        registration = Registration(name, types, **{"order": "type", "concurrency": 1, "start": "beginning", **options})
        (subscribed,) = self.run(store, Register((registration,)))
        return subscribed

    def beat(self, store: Store, instance: Instance, **options: Any) -> bool:
        """Show that an instance is alive."""
        return self.run(store, Beat(instance, **options))

    def claim(self, store: Store, subscription: str = "mailer", lane: str = "order.created", start: int = 0) -> LaneState:
        """Become the owner of a lane."""
        (state,) = self.run(store, Claim(INSTANCE.id, ((subscription, lane, start),)))
        assert state is not None
        return state

    def unit(self, state: LaneState, position: int, **options: Any) -> Unit:
        """An outcome in a lane: an ack from the log, unless told otherwise."""
        settings = {"source": "log", "checkpoint": position, **options}
        return Unit(state.subscription, state.lane, state.epoch, position=position, **settings)

    # -------------------------------------------------------------- reading

    def page(self, store: Store, after: int = 0, limit: int = 1_000, max_bytes: int = 1_000_000, **options: Any) -> Page:
        """A page of the log."""
        return store.read(Events(after, limit, max_bytes, **options))

    def log(self, store: Store) -> list[str]:
        """Ids of all events, in order."""
        return [found.id for found in self.page(store).records]

    def head(self, store: Store) -> int:
        """The log's last position."""
        return store.read(LogState()).head

    def lane(self, store: Store, subscription: str = "mailer") -> LaneState:
        """The one lane of a subscription."""
        (state,) = store.read(Lanes(subscription))
        return state

    def waiting(self, store: Store, subscription: str | None = None) -> list[WaitingRow]:
        """Waiting deliveries."""
        return list(store.read(WaitingRows(subscription)))

    def dead(self, store: Store, **conditions: Any) -> list[DeadLetterRow]:
        """Dead letters."""
        return list(store.read(DeadLetters(DeadLetterFilter(**conditions))))

    # -------------------------------------------------------------- situations

    def with_lane(self, store: Store, events: int = 3, **options: Any) -> LaneState:
        """A subscription with a claimed lane, and so many events for it, from position 1."""
        self.register(store, **options)
        self.append(store, records(events))
        lane = "order.created" if options.get("order", "type") == "type" else ""
        return self.claim(store, lane=lane)

    def with_row(self, store: Store, key: str | None = None) -> LaneState:
        """A lane of order "none" whose checkpoint is 3, with a waiting delivery at 2."""
        state = self.with_lane(store, order="none", concurrency=16)
        waiting = Waiting(2, key, 1, NOW + 1, first_failed_at=NOW, error="ValueError: no stock")
        committed = self.settle(store, self.unit(state, 2, checkpoint=3, rows=(waiting,)))
        assert not committed.refused
        return msgspec.structs.replace(state, checkpoint=3)

    def with_dead_letter(self, store: Store) -> tuple[LaneState, DeadLetterRow]:
        """A lane whose first event is a dead letter."""
        state = self.with_lane(store)
        self.settle(store, self.unit(state, 1, death=death()))
        (letter,) = self.dead(store)
        return state, letter

    def reopen(self, store: Store) -> None:
        """Close the store and open it again; skips where nothing would be left."""
        if not self.persistent:
            pytest.skip("this store keeps nothing")
        store.close()
        store.open(INSTANCE)


class Shared(ConformanceBase):
    """Another instance that is alive."""

    _second: Store | None = None

    @pytest.fixture(autouse=True)
    def another(self, store: Store, tmp_path: Path) -> Iterator[None]:
        """Where instances may share a store, it is open a second time, so that the other is not known to be dead."""
        if not store.features.shared:
            yield
            return
        self._second = self.make_store(tmp_path)
        self._second.open(OTHER)
        yield
        self._second.close()
