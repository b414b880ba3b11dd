"""`python -m eventbus doctor`: the section on *instances*: who has the file open, who is well, and who holds locks."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Literal

from eventbus.cli.doctor_file import LARGE_WAL, age
from eventbus.cli.doctor_processes import Process
from eventbus.cli.doctor_report import Section, duration, few, table
from eventbus.cli.doctor_watch import Look, Watched
from eventbus.stores.base import Member
from eventbus.stores.sqlite_inspect import Lease, boot

State = Literal["alive", "stopped", "late", "dead"]

_MEANING: Mapping[State, str] = {
    "alive": "alive",
    "stopped": "STOPPED",
    "late": "LEASE ENDED",
    "dead": "dead, its row was left",
}


def state_of(member: Member, look: Look) -> State:
    """How an instance is: alive; its process stopped by a signal; there, but its lease has ended; or dead."""
    lease = look.leases.get(member.instance.id)
    if lease is None or lease.lives is False or lease.boot != boot():
        return "dead"
    process = process_of(member, look)
    if process is not None and process.is_stopped:
        return "stopped"
    if lease.left <= 0:
        return "late" if lease.lives else "dead"
    return "alive"


def process_of(member: Member, look: Look) -> Process | None:
    """Its process, where it is one of this machine that can be seen from here: the number alone may be another's by now."""
    return look.users.get(member.instance.pid) if member.instance.host == socket.gethostname() else None


def alive(look: Look) -> set[str]:
    """The ids of those that hold lanes and run them."""
    return {m.instance.id for m in look.members() if state_of(m, look) == "alive"}


def present(look: Look) -> set[str]:
    """The ids of those whose lanes are theirs still, whether or not they run them."""
    return {m.instance.id for m in look.members() if state_of(m, look) in {"alive", "stopped"}}


def instances_section(watched: Watched, wal_bytes: int) -> Section:
    """Who is there."""
    section, look = Section("instances"), watched.last
    states = {member.instance.id: state_of(member, look) for member in look.members()}
    section.facts["instances"] = [_facts(member, states[member.instance.id], look) for member in look.members()]
    rows: list[tuple[str, ...]] = [("name", "host", "process", "started", "seen", "lease", "")]
    rows += [_row(member, states[member.instance.id], look) for member in look.members()]
    for line in table(rows) if look.members() else ["no bus has it open"]:
        section.say(line)
    for member in look.members():
        _judge(section, member, states[member.instance.id], look)
    _judge_others(section, look)
    _judge_locks(section, watched, wal_bytes)
    if not look.has_lock and set(states.values()) - {"dead"}:
        section.trouble(
            "lock-missing",
            "instances are there, and the file -lock is not: it was deleted under them, and they refuse to write",
            "restart all buses; never delete files of a bus that is running",
        )
    return section


def _row(member: Member, state: State, look: Look) -> tuple[str, ...]:
    who, lease = member.instance, look.leases.get(member.instance.id)
    left = (
        ""
        if lease is None or state == "dead"
        else f"{lease.left:.0f} s left"
        if lease.left > 0
        else f"ended {-lease.left:.0f} s ago"
    )
    return who.name[:20], who.host[:20], str(who.pid), age(look.at, who.started), age(look.at, member.seen), left, _MEANING[state]


def _facts(member: Member, state: State, look: Look) -> dict[str, object]:
    who, lease = member.instance, look.leases.get(member.instance.id)
    left = None if lease is None or not math.isfinite(lease.left) or state == "dead" else lease.left
    return {
        "id": who.id,
        "name": who.name,
        "host": who.host,
        "pid": who.pid,
        "started": who.started,
        "seen": member.seen,
        "state": state,
        "lease_left_seconds": left,
        "serves": sorted(member.serves),
        "lanes": sum(each.owner == who.id for each in look.standing.lanes),
    }


def _judge(section: Section, member: Member, state: State, look: Look) -> None:
    who = member.instance
    lanes = sum(each.owner == who.id for each in look.standing.lanes)
    lease: Lease | None = look.leases.get(who.id)
    if state == "stopped":
        section.trouble(
            "instance-stopped",
            f"process {who.pid} ({who.name}) is stopped by a signal: its {lanes} lanes stand still until its lease ends, and "
            "what it has locked stays locked",
            f"kill -CONT {who.pid}, or kill -KILL {who.pid}: then others go on with its lanes",
        )
    elif state == "late" and lease is not None:
        section.trouble(
            "lease-ended",
            f"process {who.pid} ({who.name}) is there, but its lease ended {duration(-lease.left)} ago and was not renewed: its "
            "event loop hangs, or it cannot write; its lanes go to others as soon as there are some",
            f"look at process {who.pid} (py-spy dump --pid {who.pid}); if it does not come back, kill it and start it again",
        )
    elif state == "dead":
        section.note(
            "instance-dead",
            f"process {who.pid} ({who.name}) on {who.host} did not sign off: it was killed, or the machine was; the next bus "
            "removes its row and goes on with its lanes",
        )


def _judge_others(section: Section, look: Look) -> None:
    """Processes that have the file open, and are none of those."""
    known = {member.instance.pid for member in look.members()}
    others = [process for pid, process in sorted(look.users.items()) if pid not in known]
    section.facts["other_processes"] = [{"pid": p.pid, "state": p.state, "command": p.command} for p in others]
    running = [str(process) for process in others if not process.is_stopped]
    for process in others:
        if process.is_stopped:
            section.trouble(
                "process-stopped",
                f"{process} has the file open and is stopped by a signal; it is no instance, or its lease has ended and the "
                "others have taken it for dead; what it has locked stays locked",
                f"kill -CONT {process.pid}, or kill -KILL {process.pid}",
            )
    if running:
        section.note(
            "other-programs",
            f"open also in {few(running)}, not as a bus: fine as long as it only reads, and not for long",
        )


def _judge_locks(section: Section, watched: Watched, wal_bytes: int) -> None:
    held = sorted({(each.kind, each.pid) for each in watched.held if each.pid != os.getpid()})
    section.facts["locks_held_all_the_time"] = [{"kind": kind, "pid": pid} for kind, pid in held]
    if not watched.stands_still:
        return
    writers = sorted({pid for kind, pid in held if kind != "read"})
    readers = [str(pid) for kind, pid in held if kind == "read"]
    for pid in writers:
        who = watched.last.users.get(pid) or f"process {pid}"
        section.trouble(
            "write-lock-held",
            f"{who} has held the write lock for all of the {watched.seconds:.1f} s, and nothing was committed: nobody "
            "else can write",
            f"look at process {pid}; end its transaction, or kill it: what it has not committed is rolled back",
        )
    if readers and wal_bytes > LARGE_WAL:
        section.note("reader-open", f"a read transaction was open all the time in process {few(readers)}: it keeps the WAL large")


def names(ids: Iterator[str] | set[str], look: Look) -> str:
    """Instances in words."""
    of = {member.instance.id: f"{member.instance.name} ({member.instance.pid})" for member in look.members()}
    return few(sorted(of.get(id, id) for id in ids))
