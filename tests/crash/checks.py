"""What must hold after kills: of what the killed programs have said, and of what their database held.

In come the lines of `child` and snapshots of the database; out comes, in words, what is wrong with them.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from tests.crash.child import ATTEMPTS, BATCH

TYPES = {
    "chain": ("crash.placed",),
    "link": ("crash.reserved",),
    "flaky": ("crash.placed",),
    "plain": ("crash.placed",),
    "keyed": ("crash.placed",),
    "free": ("crash.placed", "crash.shipped"),
    "doomed": ("crash.doomed",),
    "audit": ("crash.placed", "crash.reserved", "crash.shipped", "crash.doomed", "crash.hopeless"),
}
BY_KEY = ("link", "keyed")
KEY_LANES = 4
"""Of each of these; the store knows those that were claimed."""
STRICT = ("chain", "flaky", "plain", "audit")
COUNTED = tuple(set(TYPES) - {"doomed"})
"""Subscriptions whose attempts go on being counted: none of their deliveries is redriven, replayed or rewound."""

Line = Sequence[str]
Late = tuple[int, str]
"""A process and a subscription."""
Event = tuple[int, str, str, str | None, str | None, str]
"""Position, id, type, key, headers, data."""


@attrs.frozen
class Begin:
    """A handler has begun: line `B` of the report."""

    event: str
    subscription: str
    position: int
    attempt: int
    key: str | None


def begin_of(line: Line) -> Begin:
    """A line `B`."""
    return Begin(line[1], line[2], int(line[3]), int(line[4]), None if line[5] == "None" else line[5])


# ------------------------------------------------------------------ one run


def wrong_in_run(before: Snapshot | None, fresh: Sequence[Line]) -> Iterator[str]:
    """Nothing that was settled in the store before this run is delivered in it; attempts go on where they were."""
    last: dict[tuple[str, int], int] = {}
    served: set[str] = set()
    for line in fresh:
        if line[0] != "B" or line[2] not in COUNTED:
            continue
        begin = begin_of(line)
        place = (begin.subscription, begin.position)
        if place in last:
            if begin.attempt != last[place] + 1:
                yield f"attempt {begin.attempt} after {last[place]} in one run: {begin}"
        elif before is not None:
            yield from _wrong_first(before, begin, next_of_lane=begin.subscription not in served)
        last[place] = begin.attempt
        served.add(begin.subscription)


def _wrong_first(before: Snapshot, begin: Begin, *, next_of_lane: bool) -> Iterator[str]:
    made = before.attempts_of(begin, next_of_lane=next_of_lane)
    if made is None:
        yield f"delivered after its settlement was committed: {begin}"
    elif begin.attempt != made + 1:
        yield f"attempt {begin.attempt} where {made} were stored: {begin}"


# ------------------------------------------------------------------ the end


def wrong_in_the_end(database: Path, lines: Sequence[Line], late: Mapping[Late, int]) -> Iterator[str]:
    """After everything was drained: nothing is lost, nothing waits, all was settled, once and in order.

    Args:
        late: how many events a process may have begun for a subscription although they were settled: it was stopped as it was about
            to.
    """
    with contextlib.closing(sqlite3.connect(database)) as connection:
        events = connection.execute("SELECT position, id, type, key, headers, data FROM events ORDER BY position").fetchall()
        dead = {(s, e) for s, e in connection.execute("SELECT subscription, event_id FROM dead_letters")}
        waiting = connection.execute("SELECT * FROM deliveries").fetchall()
        (instances,) = connection.execute("SELECT count(*) FROM instances").fetchone()
    if waiting:
        yield f"{len(waiting)} deliveries still wait: {waiting[:3]}"
    if instances:
        yield f"{instances} instances that were killed are still listed"
    yield from _wrong_in_log(events, lines)
    yield from _wrong_chains(events)
    yield from _wrong_settled(events, dead, lines)
    yield from _wrong_order(dead, lines)
    yield from _wrong_committed(lines, late)


def _wrong_in_log(events: Sequence[Event], lines: Sequence[Line]) -> Iterator[str]:
    """Everything acknowledged is there, once; batches are whole; what was cancelled is not there."""
    ids = {row[1] for row in events}
    lost = [line for line in lines if line[0] == "A" and line[1] not in ids]
    if lost:
        yield f"{len(lost)} acknowledged events are not in the log: {lost[:3]}"
    placed = Counter[tuple[str, int]]()
    batches = Counter[tuple[str, int]]()
    for _, _, type, _, _, data in events:
        if type == "crash.placed":
            body = json.loads(data)
            placed[body["source"], body["number"]] += 1
            if body["batch"] >= 0:
                batches[body["source"], body["batch"]] += 1
        elif type == "crash.never":
            yield "an event that is due in an hour is in the log"
    twice = [name for name, count in placed.items() if count > 1]
    if twice:
        yield f"stored twice: {twice[:5]}"
    torn = [batch for batch, count in batches.items() if count != BATCH]
    if torn:
        yield f"batches that are not whole: {torn[:5]}"


def _wrong_chains(events: Sequence[Event]) -> Iterator[str]:
    """Every chain has each of its links once."""
    causes = Counter((type, json.loads(headers)["causation_id"]) for _, _, type, _, headers, _ in events if headers)
    for parent, child in (("crash.placed", "crash.reserved"), ("crash.reserved", "crash.shipped")):
        parents = [row[1] for row in events if row[2] == parent]
        wrong = [(p, causes[child, p]) for p in parents if causes[child, p] != 1]
        if wrong:
            yield f"{len(wrong)} of {len(parents)} {parent} have not exactly one {child}: {wrong[:3]}"
        if sum(1 for row in events if row[2] == child) != len(parents):
            yield f"another number of {child} than of {parent}"


def _wrong_settled(events: Sequence[Event], dead: set[tuple[str, str]], lines: Sequence[Line]) -> Iterator[str]:
    """Every event was handled by every subscription, or is its dead letter, and not both."""
    handled = {(line[2], line[1]) for line in lines if line[0] == "E"}
    for subscription, types in TYPES.items():
        wanted = [row[1] for row in events if row[2] in types]
        missed = [e for e in wanted if (subscription, e) not in handled and (subscription, e) not in dead]
        if missed:
            yield f"{subscription} missed {len(missed)} of {len(wanted)}: {missed[:3]}"
        both = [e for e in wanted if (subscription, e) in handled and (subscription, e) in dead]
        if both:
            yield f"{subscription} handled what is its dead letter: {both[:3]}"
    made: dict[tuple[str, str], int] = {}
    for line in lines:
        if line[0] == "B":
            made[line[2], line[1]] = max(int(line[4]), made.get((line[2], line[1]), 0))
    for subscription, event in dead:
        if subscription in COUNTED and made.get((subscription, event)) != ATTEMPTS:
            yield f"{subscription} dead-lettered {event} after {made.get((subscription, event))} attempts"


def _wrong_order(dead: set[tuple[str, str]], lines: Sequence[Line]) -> Iterator[str]:
    """Within a lane, or a key, an event is begun only after those before it were begun *and* ended."""
    newest: dict[tuple[str, str], int] = {}
    opened: dict[tuple[str, str], set[str]] = defaultdict(set)
    seen: set[tuple[str, str]] = set()
    for line in lines:
        if line[0] == "E":
            for (subscription, _), events in opened.items():
                if subscription == line[2]:
                    events.discard(line[1])
        if line[0] != "B" or line[2] not in (*STRICT, *BY_KEY):
            continue
        begin = begin_of(line)
        lane = (begin.subscription, str(begin.key) if begin.subscription in BY_KEY else "")
        if (begin.subscription, begin.event) in seen:
            continue  # delivered again, after a kill or a failure
        seen.add((begin.subscription, begin.event))
        if begin.position < newest.get(lane, 0):
            yield f"first delivered after {newest[lane]}: {begin}"
        unsettled = {event for event in opened[lane] if (begin.subscription, event) not in dead}
        if unsettled:
            yield f"begun before {sorted(unsettled)[:3]} ended: {begin}"
            opened[lane].clear()  # each is told once
        newest[lane] = begin.position
        opened[lane].add(begin.event)


def _wrong_committed(lines: Sequence[Line], late: Mapping[Late, int]) -> Iterator[str]:
    """What `handled` has said to be settled was not delivered again, in any later run either."""
    committed: set[str] = set()
    left = Counter(late)
    for line in lines:
        if line[0] == "C":
            committed.add(line[1])
        elif line[0] == "B" and line[1] in committed and left[int(line[-1]), line[2]]:
            left[int(line[-1]), line[2]] -= 1
        elif line[0] == "B" and line[1] in committed:
            yield f"delivered after `handled` had returned: {line}"


# ------------------------------------------------------------------ what the database held


@attrs.frozen
class Snapshot:
    """What was settled when the child was killed."""

    lanes: dict[str, list[tuple[str, int, frozenset[int], int]]]
    rows: dict[tuple[str, int], int]
    keys: dict[tuple[str, str], int]
    dead: frozenset[tuple[str, str]]
    slots: dict[str, int]

    @classmethod
    def of(cls, connection: sqlite3.Connection) -> Snapshot:
        lanes = defaultdict(list)
        for name, lane, checkpoint, done, attempt in connection.execute(
            "SELECT subscription, lane, checkpoint, done, attempt FROM lanes"
        ):
            lanes[name].append((lane, checkpoint, frozenset(json.loads(done or "[]")), attempt))
        rows, keys = {}, {}
        for name, position, key, attempt in connection.execute(
            "SELECT subscription, position, key, attempt FROM deliveries ORDER BY position DESC"
        ):
            rows[name, position] = attempt
            if key is not None:
                keys[name, key] = position
        dead = frozenset((s, e) for s, e in connection.execute("SELECT subscription, event_id FROM dead_letters"))
        slots = dict(connection.execute("SELECT DISTINCT key, slot FROM events WHERE key IS NOT NULL"))
        return cls(dict(lanes), rows, keys, dead, slots)

    def attempts_of(self, begin: Begin, *, next_of_lane: bool) -> int | None:
        """Attempts that are stored for a delivery, or None if it is settled. 0 where nothing is known of it."""
        name, position = begin.subscription, begin.position
        if (name, begin.event) in self.dead:
            return None
        if (name, position) in self.rows:
            return self.rows[name, position]
        if begin.key is not None and self.keys.get((name, begin.key), position + 1) <= position:
            return 0  # held behind an earlier event of its key
        lane = self._lane(begin)
        if lane is None:
            return 0
        _, checkpoint, done, attempt = lane
        if position <= checkpoint or position in done:
            return None
        return attempt if next_of_lane else 0

    def _lane(self, begin: Begin) -> tuple[str, int, frozenset[int], int] | None:
        lanes = self.lanes.get(begin.subscription, [])
        if begin.subscription not in BY_KEY:
            return lanes[0] if lanes else None
        slot = self.slots.get(str(begin.key))
        return None if slot is None else next((lane for lane in lanes if int(lane[0]) == slot * KEY_LANES // 1024), None)
