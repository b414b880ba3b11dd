"""The oracle's answers: each as the docstring of its query in `eventbus.stores.queries` has it.

publish → journal → *store* → *lanes* → workers → outcome. Whatever is asked, everything is looked through.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import msgspec

from eventbus.stores.base import (
    CountDeadLetters,
    DeadLetters,
    Events,
    EventsAt,
    Find,
    Lag,
    LagOfRows,
    LaneOwner,
    Lanes,
    LaneState,
    LogState,
    NextDue,
    Page,
    PositionBefore,
    Query,
    Record,
    Retained,
    Stand,
    Standing,
    Subscriptions,
    Suspect,
    Suspicion,
    Suspicions,
    Types,
    WaitingRows,
)
from tests.simulation.disk import Disk

T = TypeVar("T")


def answer(disk: Disk, query: Query[T]) -> T:
    """Answer a query."""
    return cast("T", _ANSWERS[type(query)](disk, query))


def _copy(record: Record) -> Record:
    """Records may be changed by who is given them; the disk's own are not."""
    return msgspec.structs.replace(record)


def _page(disk: Disk, query: Events) -> Page:
    """`limit` bounds what is looked at: events of the key and the types; those of other times are then left out."""
    end = disk.head if query.until is None else min(query.until, disk.head)
    seen = [
        event
        for position, event in disk.log.items()
        if query.after < position <= end
        and (query.types is None or event.type in query.types)
        and (query.key is None or event.key == query.key)
    ]
    records: list[Record] = []
    room = query.max_bytes
    for count, event in enumerate(seen[: query.limit]):
        if (query.since is None or event.time >= query.since) and (query.until_time is None or event.time <= query.until_time):
            room -= len(event.data)
            if records and room < 0:
                return Page(records, seen[count - 1].position, disk.head)
            records.append(_copy(event))
    return Page(records, end if len(seen) < query.limit else seen[query.limit - 1].position, disk.head)


def position_before(disk: Disk, time: float) -> int:
    """The last position before the first event of a time."""
    first = next((position for position, event in disk.log.items() if event.time >= time), None)
    if first is None:
        return disk.head
    return max(position for position in (0, *disk.log, disk.pruned_to) if position < first)


def _find(disk: Disk, query: Find) -> Record | None:
    everywhere = (*disk.log.values(), *disk.scheduled.values())
    return next((_copy(event) for event in everywhere if event.id == query.event_id), None)


def _lag(disk: Disk, query: Lag) -> tuple[int, float | None]:
    low, high = query.slots
    until = disk.head if query.until is None else query.until
    times = (
        event.time
        for position, event in disk.log.items()
        if query.after < position <= until and low <= event.slot < high and (query.types is None or event.type in query.types)
    )
    found = list(itertools.islice(times, query.limit))
    return len(found), next(iter(found), None)


def _lag_of_rows(disk: Disk, query: LagOfRows) -> tuple[int, float | None]:
    times: list[float] = []
    for row in disk.rows_of(query.subscription):
        at, key = row.waiting.begins, row.waiting.key
        lane = disk.lanes.get((row.subscription, row.lane))
        if key is None:
            times += [disk.log[at].time] if at in disk.log else []
        elif lane is not None:
            times += [
                event.time
                for position, event in disk.log.items()
                if at <= position <= lane.state.checkpoint
                and event.key == key
                and (query.types is None or event.type in query.types)
            ]
    return min(len(times), query.limit), min(times, default=None)


def _stand(disk: Disk, _: Stand) -> Standing:
    return Standing(
        disk.changes,
        tuple(each.member for _, each in sorted(disk.present.items())),
        tuple(subscribed for _, subscribed in sorted(disk.subscriptions.items())),
        tuple(LaneOwner(*key, lane.owner, lane.state.epoch) for key, lane in sorted(disk.lanes.items())),
    )


def _suspicions(disk: Disk, _: Suspicions) -> tuple[Suspicion, ...]:
    found = []
    for (name, lane), state in sorted(disk.lanes.items()):
        marks = [
            Suspect(position, marked.deaths)
            for (subscription, position), marked in sorted(disk.marks.items())
            if (subscription, marked.lane) == (name, lane) and marked.suspect
        ]
        if state.deaths:
            found.append(Suspicion(name, lane, state.deaths, tuple(marks)))
    return tuple(found)


def _lanes(disk: Disk, query: Lanes) -> tuple[LaneState, ...]:
    return tuple(lane.state for key, lane in sorted(disk.lanes.items()) if query.subscription in {None, key[0]})


def _dead_letters(disk: Disk, query: DeadLetters) -> Iterable[object]:
    found = [letter for letter in disk.letters_like(query.filter) if letter.id > query.after]
    return tuple(msgspec.structs.replace(letter, record=_copy(letter.record)) for letter in found[: query.limit])


_ANSWERS: Mapping[type, Callable[[Disk, Any], object]] = {
    Events: _page,
    EventsAt: lambda disk, query: tuple(_copy(disk.log[at]) for at in sorted(set(query.positions)) if at in disk.log),
    Find: _find,
    Types: lambda disk, _: disk.types(),
    PositionBefore: lambda disk, query: position_before(disk, query.time),
    LogState: lambda disk, _: Retained(disk.head, disk.pruned_to, disk.pruned_time, min(len(disk.log), 10_001)),
    NextDue: lambda disk, _: min((event.due_at or 0.0 for event in disk.scheduled.values()), default=None),
    Lag: _lag,
    LagOfRows: _lag_of_rows,
    Subscriptions: lambda disk, _: tuple(subscribed for _, subscribed in sorted(disk.subscriptions.items())),
    Stand: _stand,
    Suspicions: _suspicions,
    Lanes: _lanes,
    WaitingRows: lambda disk, query: tuple(
        row for row in disk.rows_of(query.subscription) if query.state in {None, row.waiting.state}
    ),
    DeadLetters: _dead_letters,
    CountDeadLetters: lambda disk, _: dict(collections.Counter(letter.subscription for letter in disk.letters.values())),
}
