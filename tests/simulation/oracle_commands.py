"""The oracle's commands: each as its docstring in `eventbus.stores.commands` has it.

publish → journal → *store* → lanes → workers → outcome. In comes a command inside a transaction; out goes its result. One that
raises has changed nothing yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import msgspec

from eventbus.errors import InvalidSubscription, UnknownSubscription
from eventbus.stores.base import (
    Beat,
    Cancel,
    Claim,
    Discard,
    Floor,
    LaneState,
    Marking,
    Member,
    Pause,
    Promote,
    Promoted,
    Prune,
    Record,
    Redrive,
    Register,
    Registration,
    Release,
    Revive,
    Revived,
    Rewind,
    Subscribed,
    Unsubscribe,
    Waiting,
    WaitingRow,
    covers,
    since_of,
    type_matches,
)
from tests.simulation.disk import Disk, Lane, Marked, Present, anew
from tests.simulation.oracle_queries import position_before

Enter = Callable[[Record], int]
Lives = Callable[[str], bool | None]


@attrs.frozen
class Scene:
    """Where a command is carried out."""

    disk: Disk
    now: float
    lives: Lives
    enter: Enter


def carry_out(disk: Disk, command: object, now: float, lives: Lives, enter: Enter) -> object:
    """Carry out a command."""
    return _DO[type(command)](Scene(disk, now, lives, enter), command)


def _known(disk: Disk, name: str) -> Subscribed:
    if name not in disk.subscriptions:
        raise UnknownSubscription(f"no subscription {name!r} is stored")
    return disk.subscriptions[name]


def _epochs_of(generation: int) -> int:
    return generation << 32


# ------------------------------------------------------------------ subscriptions


def _register(scene: Scene, command: Register) -> tuple[Subscribed, ...]:
    results = []
    for wanted in command.subscriptions:
        known = scene.disk.subscriptions.get(wanted.name)
        stands = _add(scene, wanted) if known is None else _update(scene, command.instance, known, wanted)
        if stands != known:
            scene.disk.subscriptions[wanted.name] = stands
            scene.disk.changes += 1
        results.append(stands)
    return tuple(results)


def _add(scene: Scene, wanted: Registration) -> Subscribed:
    disk, start = scene.disk, wanted.start
    if start == "now":
        position = disk.head
    elif start == "beginning":
        position = 0
    else:
        position = start if isinstance(start, int) else position_before(disk, float(start))
    return Subscribed(
        wanted.name,
        wanted.types,
        dict.fromkeys(wanted.types, position),
        wanted.order,
        wanted.concurrency,
        paused=None,
        paused_at=None,
        created_at=scene.now,
        derived=tuple(sorted(wanted.derived)),
        generation=disk.changes + 1,
    )


def _update(scene: Scene, instance: str, known: Subscribed, wanted: Registration) -> Subscribed:
    disk = scene.disk
    others = [each.member for id, each in disk.present.items() if id != instance]
    served = [member.serves[known.name] for member in others if known.name in member.serves]
    shape = (known.order, known.concurrency)
    is_served = any((each.order, each.concurrency) == shape for each in served)
    is_other = (wanted.order, wanted.concurrency) != shape
    dispatched = wanted.dispatched and not (is_other and is_served)
    kept = [t for t in known.types if t not in wanted.types and any(t in each.types for each in served)]
    types = (*wanted.types, *kept) if dispatched else known.types
    now = msgspec.structs.replace(
        known,
        types=known.types if {*types} == {*known.types} else types,
        since={**dict.fromkeys(wanted.types, disk.head), **known.since},
        derived=tuple(sorted({*known.derived, *wanted.derived})),
    )
    if dispatched and is_other:
        return _switch(disk, known, msgspec.structs.replace(now, order=wanted.order, concurrency=wanted.concurrency))
    return _without_floors(disk, now if known.order == "type" else _change_types(disk, instance, known, now))


def _change_types(disk: Disk, instance: str, known: Subscribed, now: Subscribed) -> Subscribed:
    held, holds = {*known.types, *known.derived}, {*now.types, *now.derived}
    if held - holds:
        now = msgspec.structs.replace(now, floors=(*now.floors, _floor(disk, known)))
    reached = max((max(lane.state.checkpoint, *lane.state.done, 0) for lane in disk.lanes_of(known.name)), default=0)
    joined = [event for event in disk.log.values() if now.holds(event.type) and not known.holds(event.type)]
    late = {event.type for event in joined if event.position > _begins(now, event.type)} if holds - held else set()
    passed = [event for event in joined if event.position <= reached and disk.is_unsettled(_unheld(now), event)]
    if late and any(row.waiting.state == "parked" for row in disk.rows_of(known.name)):
        waiting = {each for each in holds - held if any(type_matches(each, type) for type in late)}
        types = [each for each in now.types if each not in waiting]
        types += [each for each in known.types if each not in types and covers(waiting, each)]
        derived = tuple(each for each in now.derived if each not in waiting)
        now, holds = msgspec.structs.replace(now, types=tuple(types), derived=derived), {*types, *derived}
    elif late and passed:
        return _switch(disk, known, now)
    if held != holds:
        spared = instance if not held - holds and not (holds - held) & known.since.keys() else ""
        for lane in disk.lanes_of(known.name):
            if lane.owner != spared:
                lane.state = msgspec.structs.replace(lane.state, epoch=lane.state.epoch + 1)
                lane.owner = None
    return now


def _begins(now: Subscribed, type: str) -> int:
    return max(since_of(now.since, type) or 0, *(floor.below(type) for floor in now.floors), 0)


def _unheld(subscribed: Subscribed) -> Subscribed:
    """As if its lanes held nothing: what they have passed is unsettled, unless floors say that it is settled."""
    return msgspec.structs.replace(subscribed, types=(), derived=())


def _without_floors(disk: Disk, now: Subscribed) -> Subscribed:
    reached = [lane.state.checkpoint for lane in disk.lanes_of(now.name)]
    reached += [row.waiting.position - 1 for row in disk.rows_of(now.name)]
    least, holds = min(reached, default=0), {*now.types, *now.derived}
    floors = [floor for floor in now.floors if floor.up_to() > least or (now.order != "type" and set(floor.types) - holds)]
    return msgspec.structs.replace(now, floors=tuple(floors))


def _floor(disk: Disk, known: Subscribed) -> Floor:
    settled = {lane.state.lane: (lane.state.checkpoint, lane.state.done) for lane in disk.lanes_of(known.name)}
    waiting = tuple((row.waiting.begins, row.waiting.key) for row in disk.rows_of(known.name))
    types = tuple(sorted(known.since)) if known.order == "type" else (*known.types, *known.derived)
    return Floor(known.order, known.concurrency, settled, waiting, types)


def _switch(disk: Disk, known: Subscribed, now: Subscribed) -> Subscribed:
    rows = disk.rows_of(known.name)
    if any(row.waiting.state == "parked" for row in rows):
        raise InvalidSubscription(f"keys of {known.name!r} are parked")
    before = msgspec.structs.replace(known, since=now.since, floors=now.floors)
    held = [event for event in disk.log.values() if known.holds(event.type) or now.holds(event.type)]
    unsettled = [event.position for event in held if disk.is_unsettled(before, event)]
    first = min([*unsettled, *(row.waiting.begins for row in rows)], default=None)
    now = msgspec.structs.replace(now, generation=disk.changes + 1, floors=(*now.floors, _floor(disk, known)))
    disk.forget(known.name)
    if now.order == "type":
        names = [type for type in disk.types() if since_of(now.since, type) is not None]
    else:
        names = [str(number) for number in range(now.concurrency)] if now.order == "key" else [""]
    start = disk.head if first is None else first - 1
    for name in names:
        disk.lanes[known.name, name] = Lane(LaneState(known.name, name, _epochs_of(now.generation), start))
    return _without_floors(disk, now)


def _pause(scene: Scene, command: Pause) -> None:
    disk, name = scene.disk, command.subscription
    known = _known(disk, name)
    paused_at = None if command.reason is None else scene.now
    disk.subscriptions[name] = msgspec.structs.replace(known, paused=command.reason, paused_at=paused_at)
    if command.reason is not None:
        return
    for row in disk.rows_of(name):
        if row.waiting.state == "parked":
            continue
        waiting = msgspec.structs.replace(row.waiting, attempt=0, due_at=scene.now)
        disk.rows[name, waiting.position] = msgspec.structs.replace(row, waiting=waiting)
    for lane in disk.lanes_of(name):
        if lane.state.attempt or lane.state.due_at:
            lane.state = anew(lane.state)


def _unsubscribe(scene: Scene, command: Unsubscribe) -> None:
    _known(scene.disk, command.subscription)
    del scene.disk.subscriptions[command.subscription]
    scene.disk.forget(command.subscription)


def _rewind(scene: Scene, command: Rewind) -> tuple[LaneState, ...]:
    disk, name, after = scene.disk, command.subscription, command.after
    known = _known(disk, name)
    since = {pattern: min(start, after) for pattern, start in known.since.items()}
    floors = tuple(floor.down_to(after) for floor in known.floors)
    disk.subscriptions[name] = msgspec.structs.replace(known, since=since, floors=floors)
    for row in disk.rows_of(name):
        if row.waiting.position > after:
            del disk.rows[name, row.waiting.position]
    for letter in list(disk.letters.values()):
        at = letter.record.position
        if letter.subscription == name and at > after and at in disk.log:
            del disk.letters[letter.id]
    for lane in disk.lanes_of(name):
        state = lane.state
        done = tuple(position for position in state.done if position <= after)
        lane.state = anew(state, epoch=state.epoch + 1, checkpoint=min(state.checkpoint, after), done=done)
    return tuple(lane.state for lane in disk.lanes_of(name))


# ------------------------------------------------------------------ instances and their lanes


def _beat(scene: Scene, command: Beat) -> bool:
    disk, id = scene.disk, command.instance.id
    if command.leaving:
        _acquit(disk, disk.marks_by({id}))
        _remove(disk, {id})
        return True
    gone = {
        other
        for other, each in disk.present.items()
        if other != id and (each.deadline <= command.monotonic or scene.lives(other) is False)
    }
    if gone:
        _suspect(disk, {other for other in gone if scene.lives(other) is not True})  # of the rest only the lease has ended
        _acquit(disk, disk.marks_by(gone))
        _remove(disk, gone)
    known = disk.present.get(id)
    member = Member(command.instance, scene.now, command.serves, command.holds)
    disk.present[id] = Present(member, command.monotonic + command.lease, command.pinned)
    if known is None or (known.member.serves, known.member.holds) != (member.serves, member.holds):
        disk.changes += 1
    return known is not None


def _remove(disk: Disk, instances: set[str]) -> None:
    for id in instances:
        disk.present.pop(id, None)
    for lane in disk.lanes.values():
        if lane.owner in instances:
            lane.owner = None
    disk.changes += 1


def _acquit(disk: Disk, places: Iterable[tuple[str, int]]) -> None:
    for place in places:
        marked = disk.marks[place]
        if marked.suspect:
            marked.by, marked.alone = None, False
        else:
            del disk.marks[place]


def _suspect(disk: Disk, dead: set[str]) -> None:
    for lane in disk.lanes.values():
        if lane.owner in dead:
            lane.deaths += 1
    for marked in disk.marks.values():
        if marked.by in dead:
            marked.suspect, marked.by = True, None
            marked.deaths += marked.alone
            marked.alone = False


def _marking(scene: Scene, command: Marking) -> bool:
    disk, name = scene.disk, command.subscription
    lane = disk.lanes.get((name, command.lane))
    if lane is None or lane.state.epoch != command.epoch:
        return False
    for position in command.over:
        disk.marks.pop((name, position), None)
    for mark in command.begun:
        marked = disk.marks.setdefault((name, mark.position), Marked(command.lane))
        marked.lane, marked.by, marked.alone = command.lane, command.instance, mark.alone
    if command.cleared:
        lane.deaths = 0
        for place in disk.marks_of(name, command.lane):
            del disk.marks[place]
    return True


def _claim(scene: Scene, command: Claim) -> tuple[LaneState | None, ...]:
    disk = scene.disk
    alive = disk.present.keys() - {command.instance}
    results: list[LaneState | None] = []
    free = {
        key for key in ((s, lane) for s, lane, _ in command.lanes) if key not in disk.lanes or disk.lanes[key].owner not in alive
    }
    for name, lane, start in command.lanes:
        generation = disk.subscriptions[name].generation if name in disk.subscriptions else 0
        if (name, lane) not in free or command.generations.get(name, generation) != generation:
            results.append(None)
            continue
        fresh = Lane(LaneState(name, lane, _epochs_of(generation), start))
        claimed = disk.lanes.setdefault((name, lane), fresh)
        claimed.state = msgspec.structs.replace(claimed.state, epoch=claimed.state.epoch + 1)
        claimed.owner = command.instance
        _acquit(disk, disk.marks_of(name, lane))
        results.append(claimed.state)
    return tuple(results)


def _release(scene: Scene, command: Release) -> None:
    for key in command.lanes:
        lane = scene.disk.lanes.get(key)
        if lane is not None and lane.owner == command.instance:
            lane.owner = None
    scene.disk.changes += 1


def _revive(scene: Scene, command: Revive) -> tuple[LaneState, ...]:
    disk, name = scene.disk, command.subscription
    order = disk.subscriptions[name].order if name in disk.subscriptions else None
    changed = []
    for lane in disk.lanes_of(name):
        here = (lane.state.lane, lane.state.epoch)
        deliveries = [d for d in command.deliveries if (d.lane, d.epoch) == here]
        if lane.owner != command.instance or not deliveries:
            continue
        changed.append(lane.state)
        back = _unsettled(disk, lane, order, [d for d in deliveries if d.position in disk.log])
        if not back:
            continue
        for letter in list(disk.letters.values()):
            if letter.subscription == name and letter.record.position in {d.position for d in back}:
                del disk.letters[letter.id]
        epoch = lane.state.epoch + 1
        if order in {"type", "log"}:
            checkpoint = min(lane.state.checkpoint, back[0].position - 1)
            lane.state = anew(lane.state, epoch=epoch, checkpoint=checkpoint, attempt=back[0].attempts)
        else:
            for delivery in back:
                _wait_again(scene, lane, delivery, by_key=order == "key")
            lane.state = msgspec.structs.replace(lane.state, epoch=epoch)
        changed[-1] = lane.state
    return tuple(changed)


def _unsettled(disk: Disk, lane: Lane, order: str | None, deliveries: Sequence[Revived]) -> list[Revived]:
    """Without what was settled meanwhile, and what came before that in its order."""
    name, state = lane.state.subscription, lane.state
    dead = {letter.record.position for letter in disk.letters.values() if letter.subscription == name}

    def before(one: Revived, other: Revived) -> bool:
        same = {"key": one.key is not None and one.key == other.key, "none": False}.get(order or "", True)
        return one.position == other.position or (one.position < other.position and same)

    def settled(delivery: Revived) -> bool:
        at, key = delivery.position, delivery.key if order == "key" else None
        passed = at <= state.checkpoint or at in state.done
        rows = [row.waiting for row in disk.rows_of(name)]
        held = any(row.begins <= at if key is not None and row.key == key else key is None and row.position == at for row in rows)
        return passed and at not in dead and not held

    gone = [delivery for delivery in deliveries if settled(delivery)]
    back = [delivery for delivery in deliveries if not any(before(delivery, other) for other in gone)]
    return sorted(back, key=lambda delivery: delivery.position)


def _wait_again(scene: Scene, lane: Lane, delivery: Revived, *, by_key: bool) -> None:
    """A row for what the checkpoint has passed. Deliveries come by position: a key's first one has its row."""
    disk, name, at = scene.disk, lane.state.subscription, delivery.position
    if at > lane.state.checkpoint and at not in lane.state.done:
        return
    key = delivery.key if by_key else None
    if key is not None:
        of_key = [row for row in disk.rows_of(name) if row.waiting.key == key]
        if any(row.waiting.position < at for row in of_key):
            return
        for row in of_key:
            del disk.rows[name, row.waiting.position]
    disk.rows[name, at] = WaitingRow(name, lane.state.lane, Waiting(at, key, delivery.attempts, scene.now))


# ------------------------------------------------------------------ scheduled events, dead letters, retention


def _cancel(scene: Scene, command: Cancel) -> bool:
    event = scene.disk.scheduled.pop(command.event_id, None)
    if event is not None and event.idempotency_key is not None:
        del scene.disk.keys[event.idempotency_key]
    return event is not None


def _promote(scene: Scene, command: Promote) -> Promoted:
    disk = scene.disk
    waiting = sorted((event.due_at or 0.0, id) for id, event in disk.scheduled.items())
    for due_at, id in waiting[: command.limit]:
        if due_at <= command.now:
            event = disk.scheduled.pop(id)
            position = scene.enter(msgspec.structs.replace(event, time=command.now, due_at=None))
            if event.idempotency_key is not None:
                disk.keys[event.idempotency_key].position = position
    return Promoted(min((event.due_at or 0.0 for event in disk.scheduled.values()), default=None))


def _redrive(scene: Scene, command: Redrive) -> tuple[str, ...]:
    found = [letter for letter in scene.disk.letters_like(command.filter) if not letter.redriving]
    for letter in found:
        marked = msgspec.structs.replace(letter, redriving=True, attempt=0, due_at=scene.now)
        scene.disk.letters[letter.id] = marked
    return tuple(letter.subscription for letter in found)


def _discard(scene: Scene, command: Discard) -> int:
    found = scene.disk.letters_like(command.filter)
    for letter in found:
        del scene.disk.letters[letter.id]
        scene.disk.free(letter.subscription, letter.record.position, scene.now)
    return len(found)


def _prune(scene: Scene, command: Prune) -> int | None:
    disk = scene.disk
    old = [key for key, known in disk.keys.items() if known.used_at < command.keys_before and known.position is not None]
    old.sort(key=lambda key: disk.keys[key].used_at)
    for key in old[: command.limit]:
        del disk.keys[key]
    more_keys = len(old) >= command.limit
    going_on = None if command.before is None else _prune_events(disk, command, command.before)
    return command.after if more_keys and going_on is None else going_on


def _prune_events(disk: Disk, command: Prune, before: float) -> int | None:
    rest = [event for position, event in disk.log.items() if position > command.after]
    pins = [command.pinned, *(each.pinned for each in disk.present.values())]
    pinned = min((pin for pin in pins if pin is not None), default=disk.head + 1)
    for event in rest[: command.limit]:
        needed = event.position >= pinned or any(
            disk.is_unsettled(subscribed, event) or disk.is_waited_for(subscribed, event)
            for subscribed in disk.subscriptions.values()
        )
        if event.time < before and not needed:
            del disk.log[event.position]
            if event.position > disk.pruned_to:
                disk.pruned_to, disk.pruned_time = event.position, event.time
    return rest[command.limit - 1].position if len(rest) > command.limit else None


_DO: Mapping[type, Callable[[Scene, Any], object]] = {
    Register: _register,
    Pause: _pause,
    Unsubscribe: _unsubscribe,
    Rewind: _rewind,
    Beat: _beat,
    Marking: _marking,
    Claim: _claim,
    Release: _release,
    Revive: _revive,
    Cancel: _cancel,
    Promote: _promote,
    Redrive: _redrive,
    Discard: _discard,
    Prune: _prune,
}
