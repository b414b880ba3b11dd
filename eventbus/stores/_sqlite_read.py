"""Questions to the SQLite store and their answers.

publish → journal → *store* → *lanes* → workers → outcome: a lane that is behind reads its pages here; recovery, replay,
history and people ask the rest. In comes a `Query`; out comes its answer, from one statement and so from one snapshot, fetched
as one row: see `_sqlite_rows`.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import msgspec

from eventbus.stores._sqlite_commit import HEAD
from eventbus.stores._sqlite_rows import (
    DEAD_JSON,
    DEAD_ROWS,
    EVENT_ROWS,
    LANE_JSON,
    LANE_ROWS,
    MEMBER_JSON,
    MEMBER_ROWS,
    SUBSCRIPTION_JSON,
    SUBSCRIPTION_ROWS,
    WAITING_JSON,
    WAITING_ROWS,
    EventRow,
    ask,
    collect,
    dead_letter_of,
    decode,
    event_json,
    lane_of,
    member_of,
    micros,
    one,
    record_of,
    records_of,
    single,
    subscribed_of,
    waiting_of,
)
from eventbus.stores.base import (
    SLOTS,
    CountDeadLetters,
    DeadLetterFilter,
    DeadLetterRow,
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
    Member,
    NextDue,
    Page,
    PositionBefore,
    Query,
    Record,
    Retained,
    Stand,
    Standing,
    Subscribed,
    Subscriptions,
    Suspicion,
    Suspicions,
    Types,
    WaitingRow,
    WaitingRows,
)

T = TypeVar("T")
Connection = sqlite3.Connection

LAST = 2**63 - 1
"""The largest position that SQLite has."""

MOST_TYPES = 50
"""With more of them the log is scanned: a range of the index for each would read more than that."""

_EXACT_COUNT = 10_000


def answer(connection: Connection, query: Query[T]) -> T:
    """Answer a query."""
    return cast("T", _ANSWERS[type(query)](connection, query))


# ------------------------------------------------------------------ pages of the log


def _page(connection: Connection, query: Events) -> Page:
    types = None if query.types is None else tuple(dict.fromkeys(query.types))
    ranges = len(types) if types and query.key is None and len(types) <= MOST_TYPES else 0
    timed = query.since is not None or query.until_time is not None
    by_key = query.key is not None
    text = _page_text(ranges, by_key, timed)
    head, scanned, kept, last, raw = single(connection, text, _page_parameters(query, types, ranges), _PAGE, "events")
    rows = decode(raw, EVENT_ROWS, "events")
    rows.sort(key=_position)  # SQLite promises no order to an aggregate; this costs nothing where it is in order
    end = head if query.until is None else min(query.until, head)
    cut = kept < scanned or scanned >= query.limit
    records = records_of(rows)
    if types is not None and not ranges:  # here, so that none is passed by whose type was damaged
        wanted = frozenset(types)
        records = [record for record in records if record.type in wanted or record.fault is not None]
    return Page(records, last if cut and last is not None else end, head)


_PAGE: type[tuple[int, int, int, int | None, bytes]] = tuple[int, int, int, int | None, bytes]


def _position(row: tuple[Any, ...]) -> int:
    return cast("int", row[0])


def _page_parameters(query: Events, types: tuple[str, ...] | None, ranges: int) -> dict[str, object]:
    parameters: dict[str, object] = {
        "after": query.after,
        "until": LAST if query.until is None else query.until,
        "limit": 0 if types == () else query.limit,
        "max_bytes": query.max_bytes,
        "key": query.key,
        "since": -LAST if query.since is None else micros(query.since) / 1e6,
        "until_time": LAST if query.until_time is None else micros(query.until_time) / 1e6,
    }
    return parameters | _type_parameters(types if ranges else None, ranges)


def _type_parameters(types: tuple[str, ...] | None, ranges: int) -> dict[str, object]:
    if ranges:
        return {f"type{i}": name for i, name in enumerate(types or ())}
    return {} if types is None else {"types": msgspec.json.encode(types).decode()}


@functools.lru_cache(maxsize=256)
def _page_text(ranges: int, by_key: bool, timed: bool) -> str:
    """First the positions are picked from an index, then their sizes are added up, then the wide columns of those that fit
    are read: a page costs what is in it."""
    passes = ["true"]
    if timed:
        passes.append("e.time BETWEEN :since AND :until_time")
    return f"""
WITH picked AS MATERIALIZED (
    SELECT c.position AS position, {" AND ".join(passes)} AS passes, e.size AS size
    FROM ({_candidates(ranges, by_key)}) c CROSS JOIN events e ON e.position = c.position
), summed AS MATERIALIZED (
    SELECT position, passes, size, sum(size * passes) OVER (ORDER BY position) AS total FROM picked
), kept AS MATERIALIZED (
    SELECT position, passes FROM summed WHERE total <= :max_bytes OR total = size * passes
)
SELECT {HEAD}, (SELECT count(*) FROM picked), (SELECT count(*) FROM kept), (SELECT max(position) FROM kept), (
    SELECT CAST(json_group_array({event_json()}) AS BLOB)
    FROM kept CROSS JOIN events e ON e.position = kept.position WHERE kept.passes
)"""


def _candidates(ranges: int, by_key: bool) -> str:
    """The next `:limit` positions. The indexes are named: after ANALYZE the planner may prefer to scan the log for a type."""
    between = "position > :after AND position <= :until ORDER BY position LIMIT :limit"
    if by_key:
        return f"SELECT position FROM events INDEXED BY events_key WHERE key = :key AND {between}"
    if not ranges:
        return f"SELECT position FROM events WHERE {between}"
    each = (
        f"SELECT position FROM (SELECT position FROM events INDEXED BY events_type WHERE type = :type{i} AND {between})"
        for i in range(ranges)
    )
    return f"{' UNION ALL '.join(each)} ORDER BY position LIMIT :limit"


def _events_at(connection: Connection, query: EventsAt) -> tuple[Record, ...]:
    wanted = msgspec.json.encode(query.positions).decode()
    source = "FROM events e WHERE e.position IN (SELECT value FROM json_each(?))"
    records = ask(connection, event_json(), source, (wanted,), EVENT_ROWS, record_of)
    return tuple(sorted(records, key=lambda record: record.position))


def _find(connection: Connection, query: Find) -> Record | None:
    parameters = (query.event_id, query.event_id)
    text = (
        f"SELECT CAST(json_array(coalesce((SELECT json_array({event_json()}, NULL, NULL) FROM events e WHERE e.id = ?), "
        f"(SELECT json_array({event_json('0')}, CAST(round(e.due_at * 1e6) AS INTEGER), e.idempotency_key) "
        "FROM scheduled e WHERE e.id = ?))) AS BLOB)"
    )
    (found,) = one(connection, text, parameters, _FOUND, "events")
    if found is None:
        return None
    row, due_at, key = found
    record = record_of(row)
    record.due_at, record.idempotency_key = None if due_at is None else due_at / 1e6, key
    return record


_FOUND = msgspec.json.Decoder(list[tuple[EventRow, int | None, str | None] | None])


# ------------------------------------------------------------------ about the log


def types(connection: Connection) -> Mapping[str, int]:
    # A skip-scan: one look into the index per type, however long the log is.
    text = (
        "WITH RECURSIVE t(type) AS (SELECT min(type) FROM events INDEXED BY events_type "
        "UNION ALL SELECT (SELECT min(type) FROM events INDEXED BY events_type WHERE type > t.type) FROM t "
        "WHERE t.type IS NOT NULL) "
        "SELECT CAST(json_group_array(json_array(type, (SELECT max(position) FROM events INDEXED BY events_type "
        "WHERE events.type = t.type))) AS BLOB) FROM t WHERE type IS NOT NULL"
    )
    return dict(one(connection, text, (), _COUNTS, "events"))


_COUNTS = msgspec.json.Decoder(list[tuple[str, int]])


def position_before(connection: Connection, time: float) -> int:
    """The last position before the first event published at or after a time. Times need not rise with positions."""
    text = (
        f"WITH first(position) AS (SELECT min(position) FROM events INDEXED BY events_time WHERE time >= ?) "
        f"SELECT CASE WHEN first.position IS NULL THEN {HEAD} ELSE max("
        "coalesce((SELECT max(e.position) FROM events e WHERE e.position < first.position), 0), "
        "(SELECT pruned_to FROM log_state WHERE pruned_to < first.position UNION ALL SELECT 0 LIMIT 1)) END FROM first"
    )
    (position,) = single(connection, text, (micros(time) / 1e6,), tuple[int], "events")
    return position


def _log_state(connection: Connection) -> Retained:
    text = (
        f"SELECT {HEAD}, pruned_to, pruned_time, (SELECT count(*) FROM (SELECT 1 FROM events LIMIT {_EXACT_COUNT + 1})) "
        "FROM log_state"
    )
    return Retained(*single(connection, text, (), tuple[int, int, float, int], "log_state"))


def next_due(connection: Connection) -> float | None:
    """When the next scheduled event is due."""
    (due_at,) = single(connection, "SELECT min(due_at) FROM scheduled", (), tuple[float | None], "scheduled")
    return due_at


def _lag(connection: Connection, query: Lag) -> tuple[int, float | None]:
    types = None if query.types is None else tuple(dict.fromkeys(query.types))
    ranges = len(types) if types and len(types) <= MOST_TYPES else 0
    parameters: dict[str, object] = {
        "after": query.after,
        "until": LAST if query.until is None else query.until,
        "limit": query.limit,
        "low": query.slots[0],
        "high": query.slots[1],
    }
    text = _lag_text(ranges, query.slots != (0, SLOTS), types is not None and not ranges)
    return single(connection, text, parameters | _type_parameters(types, ranges), tuple[int, float | None], "events")


def _lag_of_rows(connection: Connection, query: LagOfRows) -> tuple[int, float | None]:
    types = "" if query.types is None else "AND e.type IN (SELECT value FROM json_each(:types))"
    text = (
        "SELECT count(*), min(time) FROM (SELECT time FROM ("
        "SELECT e.time AS time FROM deliveries d CROSS JOIN events e ON e.position = d.position "
        "WHERE d.subscription = :name AND d.key IS NULL "
        "UNION ALL SELECT e.time FROM deliveries d CROSS JOIN lanes l ON l.subscription = d.subscription AND l.lane = d.lane "
        "CROSS JOIN events e INDEXED BY events_key ON e.key = d.key AND e.position BETWEEN "
        "d.position + (d.state IN ('parked', 'freed')) AND l.checkpoint "
        f"WHERE d.subscription = :name AND d.key IS NOT NULL {types}) LIMIT :limit)"
    )
    parameters = {"name": query.subscription, "limit": query.limit} | _type_parameters(query.types, 0)
    return single(connection, text, parameters, tuple[int, float | None], "deliveries")


@functools.lru_cache(maxsize=256)
def _lag_text(ranges: int, by_slot: bool, filtered: bool) -> str:
    between = "position > :after AND position <= :until"
    if by_slot:
        between += " AND slot >= :low AND slot < :high"
    if filtered:
        between += " AND type IN (SELECT value FROM json_each(:types))"
    end = "ORDER BY position LIMIT :limit"
    source = f"SELECT position FROM events WHERE {between} {end}"
    if ranges:
        each = (
            f"SELECT position FROM (SELECT position FROM events INDEXED BY events_type WHERE type = :type{i} AND {between} {end})"
            for i in range(ranges)
        )
        source = f"{' UNION ALL '.join(each)} {end}"
    return (
        f"WITH found AS MATERIALIZED ({source}) SELECT (SELECT count(*) FROM found), "
        "(SELECT time FROM events WHERE position = (SELECT min(position) FROM found))"
    )


# ------------------------------------------------------------------ subscriptions and their lanes


def subscriptions(connection: Connection) -> tuple[Subscribed, ...]:
    """All stored subscriptions, by name."""
    found = ask(connection, SUBSCRIPTION_JSON, "FROM subscriptions", (), SUBSCRIPTION_ROWS, subscribed_of)
    return tuple(sorted(found, key=lambda subscribed: subscribed.name))


def subscription_named(connection: Connection, name: str) -> Subscribed | None:
    """One subscription, if it is stored. All rows are read: it may be its name that was damaged."""
    return next((each for each in subscriptions(connection) if each.name == name), None)


def lanes(connection: Connection, subscription: str | None) -> tuple[LaneState, ...]:
    """All lanes, or those of one subscription."""
    source = "FROM lanes" if subscription is None else "FROM lanes WHERE subscription = :name"
    found = ask(connection, LANE_JSON, source, {"name": subscription}, LANE_ROWS, lane_of)
    return tuple(sorted(found, key=lambda state: (state.subscription, state.lane)))


def waiting_rows(connection: Connection, subscription: str | None, state: str | None = None) -> tuple[WaitingRow, ...]:
    """The waiting deliveries of all subscriptions, or of one, by position. Raises StoreCorrupt if one of them was damaged, or one
    that is no known subscription's: its name may be what is damaged."""
    if subscription is None:
        source = "FROM deliveries"
    elif state is not None:
        source = "FROM deliveries WHERE subscription = :name"
    else:
        source = _ROWS_OF_ONE
    if state is not None:
        source += f" {'WHERE' if subscription is None else 'AND'} state = :state"
    rows = ask(connection, WAITING_JSON, source, {"name": subscription, "state": state}, WAITING_ROWS, waiting_of)
    found = [row for row in rows if subscription is None or row.subscription == subscription]
    return tuple(sorted(found, key=lambda row: (row.waiting.position, row.subscription)))


_ROWS_OF_ONE = (
    "FROM (WITH RECURSIVE n(name) AS (SELECT min(subscription) FROM deliveries UNION ALL "  # a skip-scan, see `types`
    "SELECT (SELECT min(subscription) FROM deliveries WHERE subscription > n.name) FROM n WHERE n.name IS NOT NULL) "
    "SELECT * FROM deliveries WHERE subscription = :name UNION ALL "
    "SELECT d.* FROM n CROSS JOIN deliveries d ON d.subscription = n.name WHERE n.name NOT IN (SELECT name FROM subscriptions)"
    " AND n.name <> :name)"
)


# ------------------------------------------------------------------ instances


OWNER_JSON = "json_object('subscription', subscription, 'lane', lane, 'owner', owner, 'epoch', epoch)"
_OWNERS = msgspec.json.Decoder(list[LaneOwner])


def _standing(connection: Connection) -> Standing:
    parts = (
        (MEMBER_JSON, "instances"),
        (SUBSCRIPTION_JSON, "subscriptions"),
        (OWNER_JSON, "lanes"),
    )
    collected = ", ".join(f"({collect(json, f'FROM {table}')})" for json, table in parts)
    text = f"SELECT changes, {collected} FROM log_state"
    changes, *raw = single(connection, text, (), tuple[int, bytes, bytes, bytes], "log_state")
    members = sorted(map(member_of, decode(raw[0], MEMBER_ROWS, "instances")), key=lambda member: member.instance.id)
    subscribed = sorted(map(subscribed_of, decode(raw[1], SUBSCRIPTION_ROWS, "subscriptions")), key=lambda each: each.name)
    owners = sorted(decode(raw[2], _OWNERS, "lanes"), key=lambda owned: (owned.subscription, owned.lane))
    return Standing(changes, tuple(members), tuple(subscribed), tuple(owners))


def _suspicions(connection: Connection) -> tuple[Suspicion, ...]:
    marks = "json_group_array(json_object('position', m.position, 'deaths', m.deaths))"
    text = (
        "json_object('subscription', l.subscription, 'lane', l.lane, 'deaths', l.deaths, 'marks', json((SELECT "
        f"{marks} FROM marks m WHERE m.subscription = l.subscription AND m.lane = l.lane AND m.suspect)))"
    )
    found = one(connection, collect(text, "FROM lanes l WHERE l.deaths > 0"), (), _SUSPICIONS, "marks")
    return tuple(sorted(found, key=lambda each: (each.subscription, each.lane)))


_SUSPICIONS = msgspec.json.Decoder(list[Suspicion])


def owners(connection: Connection, names: Sequence[str]) -> list[LaneOwner]:
    """Whose the lanes of these subscriptions are."""
    source = "FROM lanes WHERE subscription IN (SELECT value FROM json_each(?))"
    return one(connection, collect(OWNER_JSON, source), (msgspec.json.encode(names).decode(),), _OWNERS, "lanes")


def members(connection: Connection) -> list[Member]:
    """The instances."""
    return ask(connection, MEMBER_JSON, "FROM instances", (), MEMBER_ROWS, member_of)


def changes(connection: Connection) -> int:
    """See `Standing.changes`."""
    return single(connection, "SELECT changes FROM log_state", (), tuple[int], "log_state")[0]


# ------------------------------------------------------------------ dead letters


def dead_letter_condition(wanted: DeadLetterFilter) -> tuple[str, dict[str, object]]:
    """A filter as a condition on `dead_letters e`, and its values."""
    values: dict[str, object] = {
        "ids": None if wanted.ids is None else msgspec.json.encode(wanted.ids).decode(),
        "event_id": wanted.event_id,
        "subscription": wanted.subscription,
        "type": wanted.type,
        "error": wanted.error,
        "since": None if wanted.since is None else micros(wanted.since) / 1e6,
        "until": None if wanted.until is None else micros(wanted.until) / 1e6,
        "redriving": wanted.redriving,
    }
    if wanted.type == "*":
        values["type"] = None
    elif wanted.type is not None and wanted.type.endswith(".*"):
        values |= {"type": None, "prefix": wanted.type[:-1]}
    conditions = [_CONDITIONS[name] for name, value in values.items() if value is not None]
    return " AND ".join(["true", *conditions]), values


_CONDITIONS = {
    "ids": "e.id IN (SELECT value FROM json_each(:ids))",
    "event_id": "e.event_id = :event_id",
    "subscription": "e.subscription = :subscription",
    "type": "e.type = :type",
    "prefix": "substr(e.type, 1, length(:prefix)) = :prefix",
    # The class's name, with its module or without.
    "error": "(e.error_type = :error OR substr(e.error_type, -length(:error) - 1) = '.' || :error)",
    "since": "e.last_failed_at >= :since",
    "until": "e.last_failed_at <= :until",
    "redriving": "e.redriving = :redriving",
}


def _dead_letters(connection: Connection, query: DeadLetters) -> tuple[DeadLetterRow, ...]:
    condition, values = dead_letter_condition(query.filter)
    values |= {"after": query.after, "limit": -1 if query.limit is None else query.limit}
    source = f"FROM (SELECT * FROM dead_letters e WHERE e.id > :after AND {condition} ORDER BY e.id LIMIT :limit) e"
    found = ask(connection, DEAD_JSON, source, values, DEAD_ROWS, dead_letter_of)
    return tuple(sorted(found, key=lambda row: row.id))


def _count_dead_letters(connection: Connection) -> Mapping[str, int]:
    text = (
        "SELECT CAST(json_group_array(json_array(subscription, n)) AS BLOB) "
        "FROM (SELECT subscription, count(*) AS n FROM dead_letters GROUP BY subscription)"
    )
    return dict(one(connection, text, (), _COUNTS, "dead_letters"))


_ANSWERS: Mapping[type, Callable[[Connection, Any], object]] = {
    Events: _page,
    EventsAt: _events_at,
    Find: _find,
    Types: lambda connection, _: types(connection),
    PositionBefore: lambda connection, query: position_before(connection, query.time),
    LogState: lambda connection, _: _log_state(connection),
    NextDue: lambda connection, _: next_due(connection),
    Lag: _lag,
    LagOfRows: _lag_of_rows,
    Subscriptions: lambda connection, _: subscriptions(connection),
    Suspicions: lambda connection, _: _suspicions(connection),
    Stand: lambda connection, _: _standing(connection),
    Lanes: lambda connection, query: lanes(connection, query.subscription),
    WaitingRows: lambda connection, query: waiting_rows(connection, query.subscription, query.state),
    DeadLetters: _dead_letters,
    CountDeadLetters: lambda connection, _: _count_dead_letters(connection),
}
