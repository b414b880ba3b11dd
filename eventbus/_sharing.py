"""How instances share lanes out: pure decisions, the same in every instance that sees the same standing.

Beside the way publish → journal → store → *lanes* → workers → outcome. In come the instances that are alive, the subscriptions as
they are stored, and who owns which lane; out comes who should. Each instance takes what is free and meant for it, and gives
back what it has and is meant for another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from eventbus.stores.base import Member, Patterns, Serves, Standing, Subscribed

LaneKey = tuple[str, str]


def share(standing: Standing, lanes: Mapping[str, Iterable[str]]) -> dict[LaneKey, str | None]:
    """Who should own each lane; None where nobody can.

    Of a subscription each instance that serves it gets as many lanes as any other, or one less; who gets one more is who has
    least of all together. A lane stays where it is as long as that is so.

    Args:
        lanes: the lanes of each subscription.
    """
    shares: dict[LaneKey, str | None] = {}
    load: Counter[str] = Counter()
    owners = {(each.subscription, each.lane): each.owner for each in standing.lanes}
    whole = {
        member.instance.id
        for member in standing.members
        if all(owners.get((name, lane)) == member.instance.id for name in member.holds for lane in lanes.get(name, ()))
    }
    for subscribed in standing.subscriptions:
        names = sorted(set(lanes.get(subscribed.name, ())))
        candidates = _candidates(standing.members, subscribed, whole)
        if names:
            shares |= _share_one(subscribed, names, candidates, owners, load)
    return shares


def _candidates(members: Sequence[Member], subscribed: Subscribed, whole: Collection[str]) -> dict[str, _Candidate]:
    """The instances that can run its lanes; if some of them want it whole, one of these alone. That goes by one order for all
    subscriptions, or two instances could wait for each other: first who has all that it wants whole, and so keeps it."""
    name = subscribed.name
    serving = {m.instance.id: m for m in members if name in m.serves and fits(m.serves[name], subscribed)}
    holding = [id for id, member in serving.items() if name in member.holds]
    first = min(holding, key=lambda each: (each not in whole, each), default=None)
    return {id: _Candidate(member.serves[name]) for id, member in serving.items() if first is None or id == first}


def are_served(subscribed: Subscribed, members: Sequence[Member]) -> bool:
    """Whether each type that a subscription holds is declared by some instance that serves it."""
    serving = [member.serves[subscribed.name] for member in members if subscribed.name in member.serves]
    return _cover([type for serves in serving for type in serves.types], subscribed)


def fits(serves: Serves, subscribed: Subscribed) -> bool:
    """Whether an instance serves a subscription as it is stored. A lane that holds several types would pass by those that the
    instance does not declare; subclasses that it does not know make the lane wait instead."""
    if (serves.order, serves.concurrency) != (subscribed.order, subscribed.concurrency):
        return False
    return serves.order == "type" or _cover(serves.types, subscribed)


def _cover(types: Iterable[str], subscribed: Subscribed) -> bool:
    declared = Patterns(types)
    return all(declared.cover(each) for each in {*subscribed.types} - {*subscribed.derived})


class _Candidate:
    """An instance, as far as it serves one subscription."""

    def __init__(self, serves: Serves) -> None:
        self._cannot = frozenset(serves.cannot)
        self._patterns = Patterns(serves.types) if serves.order == "type" else None

    def can(self, lane: str) -> bool:
        """Whether it can run this lane."""
        return lane not in self._cannot and (self._patterns is None or self._patterns.cover(lane))


def _share_one(
    subscribed: Subscribed,
    lanes: Sequence[str],
    candidates: Mapping[str, _Candidate],
    owners: Mapping[LaneKey, str | None],
    load: Counter[str],
) -> dict[LaneKey, str | None]:
    quotas = _quotas(len(lanes), sorted(candidates, key=lambda each: (load[each], each)))
    shares: dict[LaneKey, str | None] = {}
    has: Counter[str] = Counter()
    for lane in lanes:
        owner = owners.get((subscribed.name, lane))
        if owner is not None and has[owner] < quotas.get(owner, 0) and candidates[owner].can(lane):
            shares[subscribed.name, lane] = owner
            has[owner] += 1
    for lane in lanes:
        if (subscribed.name, lane) not in shares:
            able = [id for id, candidate in candidates.items() if candidate.can(lane)]
            best = min(able, key=lambda each: (has[each] - quotas[each], load[each] + has[each], each), default=None)
            shares[subscribed.name, lane] = best
            if best is not None:
                has[best] += 1
    load.update(has)
    return shares


def _quotas(lanes: int, instances: Sequence[str]) -> dict[str, int]:
    """How many lanes each gets; the first ones get one more where it does not come out even."""
    if not instances:
        return {}
    each, more = divmod(lanes, len(instances))
    return {id: each + (index < more) for index, id in enumerate(instances)}
