"""Instances in the SQLite store: who is alive, and who owns which lane.

publish → journal → *store* → lanes → workers → outcome. In come `Beat`, `Claim` and `Release`, inside a transaction and so one
after the other, whichever process they are of; out goes what the instance has. An instance that has died leaves its row and its
lanes behind; the next `Beat` of any other removes the row, and a lane whose owner has no row is free.
"""

from __future__ import annotations

import functools
import pathlib
import sqlite3
from collections.abc import Callable

import msgspec

from eventbus.stores._sqlite_commit import BUMP
from eventbus.stores._sqlite_read import lanes, owners, subscriptions
from eventbus.stores._sqlite_rows import one, to_micros
from eventbus.stores._sqlite_units import write_lanes
from eventbus.stores.base import Beat, Claim, LaneState, Marking, Release

Connection = sqlite3.Connection
Lives = Callable[[str], bool | None]
_AMONG = "(subscription, lane) IN (SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(?))"


@functools.cache
def boot() -> str:
    """Which start of the machine this is: its clocks begin anew with each. "" where the kernel does not tell."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def beat(connection: Connection, command: Beat, now: float, lives: Lives) -> bool:
    """See `Beat`. `lives` tells whether an instance holds its lock, None where that cannot be told."""
    who = command.instance
    if command.leaving:
        _acquit(connection, "instance = ?", who.id)
        _remove(connection, [who.id])
        return True
    rows = one(connection, _MEMBERS, (), _MEMBER_ROWS, "instances")
    own = next((row for row in rows if row[0] == who.id), None)
    gone = [row for row in rows if row[0] != who.id and not _is_alive(row, command.monotonic, lives)]
    if gone:
        _suspect(connection, [row[0] for row in gone if _has_died(row, lives)])
        for row in gone:
            _acquit(connection, "instance = ?", row[0])
        _remove(connection, [row[0] for row in gone])
    serves, holds = (msgspec.json.encode(value, order="sorted").decode() for value in (command.serves, command.holds))
    connection.execute(
        "INSERT INTO instances (id, name, host, pid, started, seen, boot, deadline, serves, holds, pinned) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET seen = excluded.seen, boot = excluded.boot, "
        "deadline = excluded.deadline, serves = excluded.serves, holds = excluded.holds, pinned = excluded.pinned",
        (
            *(who.id, who.name, who.host, who.pid, to_micros(who.started), to_micros(now), boot()),
            *(command.monotonic + command.lease, serves, holds, command.pinned),
        ),
    )
    if own is None or own[3:] != (serves, holds):
        connection.execute(BUMP)
    return own is not None


def _is_alive(row: _MemberRow, monotonic: float, lives: Lives) -> bool:
    id, started_in, deadline, *_ = row
    return started_in == boot() and deadline > monotonic and lives(id) is not False


def _has_died(row: _MemberRow, lives: Lives) -> bool:
    """Whether the process of an instance that is not alive has ended: it is not stopped, or hangs, past its lease, nor was the
    machine started anew. Where nobody can tell, the end of the lease stands for it."""
    id, started_in, *_ = row
    return started_in == boot() and lives(id) is not True


def _remove(connection: Connection, instances: list[str]) -> None:
    ids = (msgspec.json.encode(instances).decode(),)
    connection.execute("DELETE FROM instances WHERE id IN (SELECT value FROM json_each(?))", ids)
    connection.execute("UPDATE lanes SET owner = NULL WHERE owner IN (SELECT value FROM json_each(?))", ids)
    connection.execute(BUMP)


_MemberRow = tuple[str, str, float, str, str]
_MEMBERS = "SELECT CAST(json_group_array(json_array(id, boot, deadline, serves, holds)) AS BLOB) FROM instances"
_MEMBER_ROWS = msgspec.json.Decoder(list[_MemberRow])
_IDS = msgspec.json.Decoder(list[str])


def claim(connection: Connection, command: Claim) -> tuple[LaneState | None, ...]:
    """See `Claim`."""
    wanted = sorted({subscription for subscription, _, _ in command.lanes})
    known = {(state.subscription, state.lane): state for name in wanted for state in lanes(connection, name)}
    alive = set(one(connection, "SELECT CAST(json_group_array(id) AS BLOB) FROM instances", (), _IDS, "instances"))
    alive.discard(command.instance)
    taken = {(each.subscription, each.lane) for each in owners(connection, wanted) if each.owner in alive}
    generations = {each.name: each.generation for each in subscriptions(connection)}
    results: list[LaneState | None] = []
    for subscription, lane, start in command.lanes:
        generation = generations.get(subscription, 0)
        if (subscription, lane) in taken or command.generations.get(subscription, generation) != generation:
            results.append(None)
            continue
        state = known.get((subscription, lane)) or LaneState(subscription, lane, first_epoch(generation), start)
        results.append(msgspec.structs.replace(state, epoch=state.epoch + 1))
    claimed = [state for state in results if state is not None]
    if claimed:
        write_lanes(connection, claimed, command.instance)
        pairs = msgspec.json.encode([(state.subscription, state.lane) for state in claimed]).decode()
        _acquit(connection, _AMONG, pairs)
    return tuple(results)


def first_epoch(generation: int) -> int:
    """An epoch that no lane of an earlier generation has ever come to, so that who owned one of the same name stays fenced."""
    return generation << 32


def release(connection: Connection, command: Release) -> None:
    """See `Release`."""
    pairs = (msgspec.json.encode(command.lanes).decode(),)
    connection.execute(f"UPDATE lanes SET owner = NULL WHERE owner = ? AND {_AMONG}", (command.instance, *pairs))
    connection.execute(BUMP)


def fence(connection: Connection, subscription: str, instance: str) -> None:
    """Whoever owns lanes of a subscription owns them no more, but for this instance."""
    foreign = {each.lane for each in owners(connection, [subscription]) if each.owner != instance}
    states = [state for state in lanes(connection, subscription) if state.lane in foreign]
    if states:
        write_lanes(connection, [msgspec.structs.replace(state, epoch=state.epoch + 1) for state in states])
        connection.execute("UPDATE lanes SET owner = NULL WHERE subscription = ? AND owner IS NOT ?", (subscription, instance))


# ------------------------------------------------------------------ probation


def _acquit(connection: Connection, which: str, value: str) -> None:
    """What was under way is no more suspicious than before: an instance has left, or has not died; or a lane begins anew."""
    connection.execute(f"DELETE FROM marks WHERE {which} AND suspect = 0", (value,))
    connection.execute(f"UPDATE marks SET instance = NULL, alone = 0 WHERE {which}", (value,))


def _suspect(connection: Connection, dead: list[str]) -> None:
    """Put the lanes of instances that have died on probation; what they had marked is suspected."""
    ids = (msgspec.json.encode(dead).decode(),)
    connection.execute("UPDATE lanes SET deaths = deaths + 1 WHERE owner IN (SELECT value FROM json_each(?))", ids)
    connection.execute(
        "UPDATE marks SET suspect = 1, deaths = deaths + alone, alone = 0, instance = NULL "
        "WHERE instance IN (SELECT value FROM json_each(?))",
        ids,
    )


def mark(connection: Connection, command: Marking) -> bool:
    """See `Marking`."""
    name, lane = place = command.subscription, command.lane
    ours = "SELECT 1 FROM lanes WHERE subscription = ? AND lane = ? AND epoch = ?"
    if connection.execute(ours, (*place, command.epoch)).fetchone() is None:
        return False
    for position in command.over:
        connection.execute("DELETE FROM marks WHERE subscription = ? AND position = ?", (name, position))
    for each in command.begun:
        connection.execute(
            "INSERT INTO marks (subscription, position, lane, instance, alone, suspect, deaths) VALUES (?, ?, ?, ?, ?, 0, 0) "
            "ON CONFLICT (subscription, position) DO UPDATE SET lane = excluded.lane, instance = excluded.instance, "
            "alone = excluded.alone",
            (name, each.position, lane, command.instance, int(each.alone)),
        )
    if command.cleared:
        connection.execute("UPDATE lanes SET deaths = 0 WHERE subscription = ? AND lane = ?", place)
        connection.execute("DELETE FROM marks WHERE subscription = ? AND lane = ?", place)
    return True
