"""The start: from what is stored to lanes that run.

Nothing is repaired at the start, for nothing is ever half done: the checkpoints say what was settled, the rows of `deliveries`
what waits, the dead letters what is being redriven; the log holds everything else. The start registers the subscriptions, claims
their lanes, and lets each of them read from its checkpoint. After a kill, a stop or a week it is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from eventbus._declared import Wanted
from eventbus._dispatch import Dispatcher, Serving
from eventbus.errors import EventBusError
from eventbus.stores.base import (
    Beat,
    Claim,
    Instance,
    LaneState,
    Register,
    Subscriptions,
    Types,
    WaitingRows,
    since_of,
)

if TYPE_CHECKING:
    from eventbus._journal import Journal
    from eventbus._reader import Reader

_log = logging.getLogger("eventbus")


async def recover(dispatcher: Dispatcher, journal: Journal, reader: Reader, instance: Instance, wanted: Sequence[Wanted]) -> None:
    """Register, claim, and build the lanes; they do not run yet."""
    await journal.command(Beat(instance))
    stored = await journal.command(Register(tuple(w.registration for w in wanted)))
    types = await reader.ask(Types())
    dispatcher.known_types.update(types)
    by_name = {s.name: s for s in stored}
    servings = []
    for each in wanted:
        if each.dispatched:
            serving = Serving(dispatcher, each.options, by_name[each.options.name])
            dispatcher.servings[each.options.name] = serving
            servings.append(serving)
    await _claim(dispatcher, journal, reader, instance, servings, types)
    await note_others(dispatcher, reader, {w.options.name for w in wanted})
    for serving in servings:
        serving.redriver.kick()


async def _claim(
    dispatcher: Dispatcher,
    journal: Journal,
    reader: Reader,
    instance: Instance,
    servings: Sequence[Serving],
    types: Mapping[str, int],
) -> None:
    lanes = tuple((s.options.name, lane, start) for s in servings for lane, start in s.lanes_wanted(types))
    if not lanes:
        return
    states = await journal.command(Claim(instance.id, lanes))
    rows = await reader.ask(WaitingRows())
    for state in states:
        serving = dispatcher.servings[state.subscription]
        own = [row for row in rows if row.subscription == state.subscription]
        dispatcher.add_lane(serving, state, own)
    for serving in servings:
        _catch_up(serving, types, dispatcher.head)


def _catch_up(serving: Serving, last: Mapping[str, int], head: int) -> None:
    """Lanes that have nothing to read are live at once; the others read."""
    for feed in serving.feeds.values():
        for intake in feed.intakes:
            types = [t for t in last if serving.wants(t)] if feed.types is None else feed.types
            if all(last.get(t, 0) <= intake.taken for t in types):
                intake.taken = max(intake.taken, head)
                intake.live = True


def claim_lane(dispatcher: Dispatcher, journal: Journal, instance: Instance, serving: Serving, type: str) -> None:
    """A type has come up that a subscription in order "type" wants and has no lane for yet; its events wait in the log."""
    if type in serving.claiming or type in serving.lanes:
        return
    serving.claiming.add(type)

    def claimed(result: tuple[LaneState, ...] | Exception) -> None:
        serving.claiming.discard(type)
        if isinstance(result, Exception):
            _log.error("%s: the lane %r could not be claimed: %s", serving.options.name, type, result)
        elif serving.options.name in dispatcher.servings and not dispatcher.closing:
            dispatcher.add_lane(serving, result[0]).log.intake.feed.read()
            serving.redriver.kick()
        dispatcher.lanes_changed()

    try:
        journal.submit(Claim(instance.id, ((serving.options.name, type, since_of(serving.since, type) or 0),)), claimed)
    except EventBusError:  # the bus is closing, or the journal has stopped
        serving.claiming.discard(type)
        dispatcher.lanes_changed()


async def note_others(dispatcher: Dispatcher, reader: Reader, registered: Collection[str]) -> None:
    """Remember the stored subscriptions that are not dispatched here, and report those without a handler, once."""
    known = set(dispatcher.others)
    dispatcher.others.clear()
    for stored in await reader.ask(Subscriptions()):
        if stored.name in dispatcher.servings:
            continue
        reason = "not dispatched here" if stored.name in registered else "no handler"
        dispatcher.others[stored.name] = (stored, reason)
        if reason == "no handler" and stored.name not in known:
            _log.warning(
                "the stored subscription %r has no handler in this program; its events wait. "
                "Import the module that registers it, or remove it with `await bus.unsubscribe(%r)`",
                stored.name,
                stored.name,
            )
