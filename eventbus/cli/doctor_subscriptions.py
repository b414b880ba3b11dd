"""`python -m eventbus doctor`: the section on *subscriptions*: who serves them, what waits, and what does not go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import attrs

from eventbus._sharing import fits
from eventbus._status import MOST
from eventbus.cli.doctor_file import age
from eventbus.cli.doctor_instances import alive, names, present
from eventbus.cli.doctor_report import Section, duration, few, table
from eventbus.cli.doctor_watch import LaneLook, Watched
from eventbus.stores.base import DeadLetterFilter, DeadLetters, Member, Subscribed, WaitingRow
from eventbus.stores.sqlite_inspect import Inspection

PATIENCE = 60.0
"""Seconds: the default `timeout` of a handler. A lane that is watched for so long and does not move is in trouble."""

NEWEST = 3
"""Dead letters that are shown of a subscription."""

_LONGEST = 120


def subscriptions_section(watched: Watched, inspection: Inspection) -> Section:
    """All stored subscriptions."""
    section, look = Section("subscriptions"), watched.last
    parts = [_Subscription(watched, stored) for stored in look.standing.subscriptions if stored.name in look.lanes]
    section.facts["subscriptions"] = {part.stored.name: part.facts() for part in parts}
    rows = [("name", "order", "lanes", "lag", "oldest", "waiting", "dead", "")]
    for line in table(rows + [part.row() for part in parts]) if parts else [] if look.damaged else ["none is stored"]:
        section.say(line)
    for name, why in look.damaged.items():
        section.trouble(
            "lanes-unreadable",
            f"{name}: {why}",
            f"stop the bus and delete the damaged row of `lanes`; {name} begins again at its start there",
        )
    for part in parts:
        part.judge(section)
    for name, count in sorted(look.dead.items()):
        _dead_letters(section, inspection, name, count)
    return section


class _Subscription:
    """One of them, and what can be told of it."""

    def __init__(self, watched: Watched, stored: Subscribed) -> None:
        look, name = watched.last, stored.name
        self.stored = stored
        self.watched = watched
        self.look = look
        self.lanes: Sequence[LaneLook] = look.lanes[name]
        self.rows: list[WaitingRow] = [row for row in look.rows if row.subscription == name]
        held, held_oldest = look.held.get(name, (0, None))
        self.lag = min(MOST, held + sum(lane.lag for lane in self.lanes))
        times = [held_oldest, *(lane.oldest for lane in self.lanes)]
        self.oldest = min((time for time in times if time is not None), default=None)
        self.alive = alive(look)
        self.present = present(look)
        self.serving = [m for m in look.members() if m.instance.id in self.present and name in m.serves]

    # -------------------------------------------------------------- what is so

    def facts(self) -> dict[str, Any]:
        """For machines."""
        waiting = Counter(row.waiting.state for row in self.rows)
        retrying = sum(1 for lane in self.lanes if lane.state.attempt)
        return {
            "order": self.stored.order,
            "concurrency": self.stored.concurrency,
            "generation": self.stored.generation,
            "types": list(self.stored.types),
            "paused": self.stored.paused,
            "paused_at": self.stored.paused_at,
            "lag": self.lag,
            "oldest": self.oldest,
            "waiting": dict(waiting),
            "lanes_retrying": retrying,
            "dead_letters": self.look.dead.get(self.stored.name, 0),
            "served_by": sorted(member.instance.id for member in self.serving),
            "stuck_handlers": sum(member.serves[self.stored.name].stuck for member in self.serving),
            "lanes": [
                {
                    "lane": each.state.lane,
                    "owner": each.owner,
                    "epoch": each.state.epoch,
                    "checkpoint": each.state.checkpoint,
                    "lag": each.lag,
                    "oldest": each.oldest,
                    "attempt": each.state.attempt,
                    "due_at": each.state.due_at,
                }
                for each in self.lanes
            ],
            "orphans": [lane.state.lane for lane in self.orphans()],
            "not_moving": [lane.state.lane for lane in self.not_moving()],
        }

    def row(self) -> tuple[str, ...]:
        """For people."""
        stored = self.stored
        waiting = len(self.rows) + sum(1 for lane in self.lanes if lane.state.attempt)
        state = "paused" if stored.paused is not None else "" if self.serving or not self.present else "no handler"
        return (
            *(stored.name[:30], stored.order, f"{len(self.lanes)}", _up_to(self.lag)),
            age(self.look.at, self.oldest) if self.lag else "",
            *(f"{waiting:,}" if waiting else "", f"{self.look.dead.get(stored.name, 0):,}", state),
        )

    def orphans(self) -> list[LaneLook]:
        """Lanes with something to do that nobody had, at both looks."""
        before = {lane.state.lane: lane for lane in self.watched.first.lanes.get(self.stored.name, ())}
        members = present(self.watched.first)
        return [
            lane
            for lane in self.lanes
            if self._has_work(lane)
            and lane.owner not in self.present
            and lane.state.lane in before
            and before[lane.state.lane].owner not in members
        ]

    def _has_work(self, lane: LaneLook) -> bool:
        return lane.lag > 0 or any(row.lane == lane.state.lane for row in self.rows)

    def not_moving(self) -> list[LaneLook]:
        """Lanes that somebody runs, in which events wait, and in which nothing has changed from one look to the other."""
        before = {lane.state.lane: lane for lane in self.watched.first.lanes.get(self.stored.name, ())}
        return [
            lane
            for lane in self.lanes
            if self.stored.paused is None
            and lane.owner in self.alive
            and lane.lag > 0
            and lane.state.lane in before
            and before[lane.state.lane].lag > 0
            and attrs.evolve(lane, lag=0, oldest=None) == attrs.evolve(before[lane.state.lane], lag=0, oldest=None)
            and not self._waits(lane)
        ]

    def _waits(self, lane: LaneLook) -> bool:
        """Whether it is known why it stands: its next event is to be tried later, or its owner cannot decode it."""
        if lane.state.attempt and (lane.state.due_at or 0.0) > self.watched.first.at:
            return True
        return any(lane.state.lane in m.serves[self.stored.name].cannot for m in self.serving if m.instance.id == lane.owner)

    # -------------------------------------------------------------- what it means

    def judge(self, section: Section) -> None:
        """What is worth saying."""
        self._judge_pause(section)
        self._judge_serving(section)
        self._judge_lanes(section)
        self._judge_waiting(section)

    def _judge_pause(self, section: Section) -> None:
        stored = self.stored
        if stored.paused is None:
            return
        text = f"{stored.name} is paused since {age(self.look.at, stored.paused_at)}: {_short(stored.paused)}"
        if self.lag:
            section.trouble(
                "paused", f"{text}; {_up_to(self.lag)} events wait", f"mend what it says, then bus.resume({stored.name!r})"
            )
        else:
            section.note("paused", f"{text}; no event waits yet")

    def _judge_serving(self, section: Section) -> None:
        name, stored = self.stored.name, self.stored
        others = [m for m in self.serving if not fits(m.serves[name], stored)]
        if not self.serving and self.present and self.lag:
            section.trouble(
                "not-served",
                f"no bus that is running has a handler for {name}: {_up_to(self.lag)} events wait",
                f"start the program that has it, or import the module that registers it; or bus.unsubscribe({name!r})",
            )
        elif not self.serving and self.present:
            section.note("not-served", f"no bus that is running has a handler for {name}; nothing waits")
        elif not self.serving and self.lag:
            section.note("not-running", f"{name}: {_up_to(self.lag)} events wait for a bus to be started")
        if others:
            what = f"order {stored.order}, concurrency {stored.concurrency}, types {few(list(stored.types))}"
            section.note(
                "other-deployment",
                f"{names({m.instance.id for m in others}, self.look)} declare {name} otherwise than it is stored ({what}), and "
                "wait: a deployment is under way",
            )

    def _judge_lanes(self, section: Section) -> None:
        name = self.stored.name
        cannot = {lane for m in self.serving for lane in m.serves[name].cannot}
        nobody = sorted(lane for lane in cannot if all(lane in m.serves[name].cannot for m in self.serving))
        if nobody:
            section.trouble(
                "cannot-decode",
                f"{name}: nobody that is running can decode the next event of {_lanes(nobody)}: of a type, or of a version, "
                "that is newer than the program",
                "deploy the program that knows the type or version",
            )
        elif cannot:
            section.note("cannot-decode", f"{name}: {_lanes(sorted(cannot))} cannot be decoded by all: a deployment is under way")
        orphans = [lane.state.lane for lane in self.orphans() if lane.state.lane not in nobody]
        if orphans and self.serving and self.stored.paused is None:
            section.trouble(
                "orphans",
                f"{name}: nobody has taken {_lanes(orphans)} for {self.watched.seconds:.1f} s, though events wait there",
                "look again in some seconds (--watch 10); if they stay, restart the bus that serves it, and report it",
            )
        stuck = [m for m in self.serving if m.serves[name].stuck]
        if stuck:
            count = sum(m.serves[name].stuck for m in stuck)
            section.trouble(
                "stuck-handlers",
                f"{name}: {count} handler threads of {names({m.instance.id for m in stuck}, self.look)} have outlived their "
                "timeout; their lanes stay closed until they return",
                f"see where they hang (py-spy dump --pid {stuck[0].instance.pid}), and restart that process",
            )
        self._judge_still(section, stuck)

    def _judge_still(self, section: Section, stuck: Sequence[Member]) -> None:
        still = self.not_moving()
        if not still or stuck:
            return
        seconds = self.watched.seconds
        owners = {lane.owner for lane in still if lane.owner is not None}
        text = (
            f"{self.stored.name}: {_lanes([lane.state.lane for lane in still])} of {names(owners, self.look)} did not move in "
            f"{seconds:.1f} s, though events wait"
        )
        pid = next(m.instance.pid for m in self.serving if m.instance.id in owners)
        if seconds >= PATIENCE:
            section.trouble("not-moving", text, f"see where its handler hangs (py-spy dump --pid {pid})")
        else:
            section.note("not-moving", f"{text}: a handler takes long, or hangs", f"watch for longer: --watch {PATIENCE:.0f}")

    def _judge_waiting(self, section: Section) -> None:
        name, now = self.stored.name, self.look.at
        attempts = [
            (row.waiting.attempt, row.waiting.due_at, row.waiting.error) for row in self.rows if row.waiting.state == "retrying"
        ]
        attempts += [(s.attempt, s.due_at or 0.0, s.error) for s in (lane.state for lane in self.lanes) if s.attempt]
        if attempts:
            most, _, error = max(attempts, key=lambda each: each[0])
            due = min(due for _, due, _ in attempts)
            soon = f"the next in {duration(due - now)}" if due > now else "one is due"
            section.note(
                "retrying",
                f"{name}: {len(attempts):,} deliveries have failed and are tried again, {soon}; the one tried most often, {most} "
                f"times: {_short(error or 'no error is stored')}",
            )
        running = sum(row.waiting.state == "running" for row in self.rows)
        if running:
            section.note("running-long", f"{name}: {running:,} attempts take long; their lanes have gone on without them")
        others = Counter(row.waiting.state for row in self.rows if row.waiting.state not in {"retrying", "running"})
        for state, count in others.items():
            section.note(f"rows-{state}", f"{name}: {count:,} rows of `deliveries` are {state}")


def _dead_letters(section: Section, inspection: Inspection, name: str, count: int) -> None:
    ids = inspection.column("SELECT id FROM dead_letters WHERE subscription = ? ORDER BY id DESC LIMIT ?", name, NEWEST)
    wanted = DeadLetterFilter(ids=tuple(int(str(id)) for id in ids))
    newest = sorted(inspection.ask(DeadLetters(wanted)), key=lambda row: -row.id)
    section.facts.setdefault("dead_letters", {})[name] = {
        "count": count,
        "newest": [
            {
                "id": row.id,
                "event_id": row.record.id,
                "type": row.record.type,
                "position": row.record.position,
                "error_type": row.death.error_type,
                "error": row.death.error,
                "last_failed_at": row.death.last_failed_at,
                "redriving": row.redriving,
            }
            for row in newest
        ],
    }
    errors = "; ".join(
        f"{row.record.type} at {row.record.position}: {_short(f'{row.death.error_type}: {row.death.error}')}" for row in newest
    )
    section.note(
        "dead-letters",
        f"{name}: {count:,} dead letters; the newest: {errors}",
        f"bus.dead_letters.list(subscription={name!r}) shows them; redrive or discard them",
    )


def _lanes(lanes: Sequence[str]) -> str:
    shown = few([repr(lane) for lane in lanes])
    return (
        f"its lane {shown}"
        if len(lanes) == 1 and lanes[0]
        else "its lane"
        if len(lanes) == 1
        else f"{len(lanes)} lanes ({shown})"
    )


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _up_to(count: int) -> str:
    return f"{MOST:,}+" if count >= MOST else f"{count:,}"
