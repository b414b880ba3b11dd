"""`python -m eventbus doctor`: the section on *health*: the structure of the file, and the checksums of its rows."""

from __future__ import annotations

from collections.abc import Callable

from eventbus.cli.doctor_report import Section, duration, few
from eventbus.errors import StoreError
from eventbus.stores.base import LogState, NextDue
from eventbus.stores.sqlite_inspect import VERSION, Damage, Inspection

NEWEST = 1_000
"""Events whose checksums are verified unless all are asked for."""

MOST = 10_000
"""Rows are counted up to this."""

OVERDUE = 60.0
"""Seconds after its time at which a scheduled event is late."""

_RESTORE = (
    "stop the bus and keep a copy of all its files; then restore a backup, or carry over what can be read with SQLite's .recover"
)
_WHAT_TO_DO = {
    "events": "a damaged event is dead-lettered when its turn comes; look at what else the disk has damaged, and at the disk",
    "scheduled": "a damaged event is dead-lettered when its turn comes; look at what else the disk has damaged, and at the disk",
    "subscriptions": "no bus opens the file: restore a backup; without its row a subscription would begin anew",
    "lanes": "a lane that does not match is not run: stop the bus and delete the row, and it begins again at its start",
    "deliveries": "the subscription is not run: rewind it to before the position (open a bus with dispatch=False), or delete the "
    "row and replay the event",
    "dead_letters": "it cannot be redriven as it is; look at it with the `dead_letters` table, and at the disk",
}


def health_section(inspection: Inspection, *, full: bool, now: float) -> Section:
    """Check what can be checked while a bus is running; of older tables, those whose rows have always had a checksum."""
    section = Section("health")
    section.facts |= {"full": full, "damaged": []}
    name = "integrity_check" if full else "quick_check"
    _guarded(section, name, lambda: _structure(section, inspection, name, full=full))
    current = inspection.version == VERSION
    if current:
        _guarded(section, "what holds the tables together", lambda: _unsound(section, inspection))
    checks: dict[str, Callable[[], tuple[int, list[Damage]]]] = {
        "events": lambda: inspection.damaged_events(None if full else NEWEST),
        "scheduled": inspection.damaged_scheduled,
        "subscriptions": inspection.damaged_subscriptions,
        "lanes": inspection.damaged_lanes,
        "deliveries": inspection.damaged_deliveries,
        "dead_letters": inspection.damaged_dead_letters,
    }
    checked = {}
    for table, check in checks.items():
        if not current and table in _CHANGED:
            continue
        seen = _guarded(section, table, lambda table=table, check=check: _rows(section, table, *check()))  # type: ignore[misc]
        checked[table] = seen
    section.facts["checked"] = checked
    counts = ", ".join(f"{count:,} {_WORDS[table]}" for table, count in checked.items() if count is not None)
    section.say(f"checksums looked at: {counts}{'' if full else ' (of the events the newest; --full takes all)'}")
    _guarded(section, "log_state", lambda: _counts(section, inspection, now))
    return section


_CHANGED = ("subscriptions", "deliveries")
"""Tables whose rows have had no checksum in version 1."""

_WORDS = {
    "events": "events",
    "scheduled": "scheduled",
    "subscriptions": "subscriptions",
    "lanes": "lanes",
    "deliveries": "waiting deliveries",
    "dead_letters": "dead letters",
}


def _guarded(section: Section, what: str, check: Callable[[], int | None]) -> int | None:
    try:
        return check()
    except StoreError as error:
        section.trouble("unreadable", f"{what} cannot be read: {error}", _RESTORE)
        return None


def _structure(section: Section, inspection: Inspection, name: str, *, full: bool) -> None:
    wrong = inspection.structure(full=full)
    section.facts[name] = wrong or ["ok"]
    section.say(f"{name}: {'ok' if not wrong else f'{len(wrong)} things are wrong'}")
    if wrong:
        section.trouble("corrupt", f"the file is damaged: {few(wrong, 3)}", _RESTORE)


def _unsound(section: Section, inspection: Inspection) -> None:
    found = inspection.unsound()
    if found is not None:
        section.trouble("unsound", found, _RESTORE)


def _rows(section: Section, table: str, seen: int, damaged: list[Damage]) -> int:
    section.facts["damaged"] += [{"table": each.table, "where": each.where, "what": each.what} for each in damaged]
    if damaged:
        section.trouble(
            f"damaged-{table.replace('_', '-')}",
            f"{len(damaged):,} rows of `{table}` are not what was written: {few([each.where for each in damaged])} "
            f"({damaged[0].what})",
            _WHAT_TO_DO[table],
        )
    return seen


def _counts(section: Section, inspection: Inspection, now: float) -> None:
    log, due = inspection.ask(LogState()), inspection.ask(NextDue())
    scheduled, keys = (inspection.count(table, MOST + 1) for table in ("scheduled", "idempotency"))
    section.facts |= {"head": log.head, "events": log.events, "scheduled": scheduled, "idempotency_keys": keys, "next_due": due}
    section.say(
        f"the log's head is {log.head:,}; {_up_to(log.events)} events kept, {_up_to(scheduled)} scheduled, "
        f"{_up_to(keys)} idempotency keys"
    )
    if due is not None and now - due > OVERDUE:
        section.note(
            "overdue",
            f"a scheduled event was due {duration(now - due)} ago: no bus is running that would bring it into the log, or it "
            "cannot write",
        )


def _up_to(count: int) -> str:
    return f"{MOST:,}+" if count > MOST else f"{count:,}"
