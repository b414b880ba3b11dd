"""What a program has declared on a bus: its subscriptions, by name and by handler.

Beside the way publish → journal → store → lanes → workers → outcome: wherever users may name a subscription, a type or a handler,
it is looked up here, and what is not known gets an answer that says what is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from eventbus.errors import ConfigurationError, InvalidSubscription, UnknownSubscription
from eventbus.stores.base import Registration, storable

if TYPE_CHECKING:
    from eventbus._events import Registry
    from eventbus._subscription import Subscription


class Wanted(msgspec.Struct, frozen=True):
    """A subscription of this program: its options, the types it is for now, and whether it is dispatched here."""

    options: Subscription
    registration: Registration
    dispatched: bool


class Declared:
    """The subscriptions of one bus."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._subscriptions: dict[str, Subscription] = {}

    def add(self, subscription: Subscription) -> None:
        """Declare a subscription; its name must be free."""
        other = self._subscriptions.get(subscription.name)
        if other is not None:
            raise InvalidSubscription(
                f"two subscriptions are named {subscription.name!r}: {where(other.handler)} and {where(subscription.handler)}; "
                "give one of them another name with name='…'"
            )
        self._subscriptions[subscription.name] = subscription

    def remove(self, name: str) -> None:
        """Forget a subscription, if it is declared."""
        self._subscriptions.pop(name, None)

    def names(self) -> set[str]:
        """The names of all."""
        return set(self._subscriptions)

    def wanted(self, dispatched: Iterable[str]) -> list[Wanted]:
        """All of them as they are to be registered, with the types that are known by now."""
        return [self._wanted(each, each.name in dispatched) for each in self._subscriptions.values()]

    def _wanted(self, subscription: Subscription, dispatched: bool) -> Wanted:
        start = subscription.start.timestamp() if isinstance(subscription.start, datetime) else subscription.start
        own = {kind.cls: kind.name for cls in subscription.classes for kind in self._registry.subclasses(cls)}
        derived = tuple(sorted(name for cls, name in own.items() if cls not in subscription.classes))
        types = (*sorted(own.values()), *subscription.patterns)
        registration = Registration(
            subscription.name, types, subscription.order, subscription.concurrency, start, derived, dispatched
        )
        return Wanted(subscription, registration, dispatched)

    # -------------------------------------------------------------- looking up

    def name_of(self, subscription: object) -> str:
        """The name of a subscription that is given by name or handler; a name may belong to one that is only stored."""
        if isinstance(subscription, str):
            if not storable(subscription):
                raise UnknownSubscription(f"{subscription!r} cannot be the name of a subscription; {self._known()}")
            return subscription
        names = [each.name for each in self._subscriptions.values() if each.handler == subscription]
        if len(names) == 1:
            return names[0]
        if names:
            raise UnknownSubscription(f"{where(subscription)} handles several subscriptions: {', '.join(names)}; give a name")
        raise UnknownSubscription(f"{where(subscription)} is not the handler of a subscription; {self._known()}")

    def declared_name(self, subscription: object) -> str:
        """The name of a subscription that this program declares."""
        name = self.name_of(subscription)
        if name not in self._subscriptions:
            raise UnknownSubscription(f"no handler for subscription {name!r}; {self._known()}")
        return name

    def type_of(self, type: type | str) -> str:
        """The stored name of a class, or the name or pattern itself."""
        return _name(type) if isinstance(type, str) else self._registry.of(type).name

    def patterns(self, types: Sequence[type | str]) -> list[str]:
        """The names and patterns of some classes (with their subclasses), names and patterns."""
        patterns: list[str] = []
        for each in types:
            if isinstance(each, str):
                patterns.append(_name(each))
            else:
                patterns += [kind.name for kind in self._registry.subclasses(each)]
        return patterns

    def _known(self) -> str:
        names = ", ".join(repr(name) for name in self._subscriptions) or "none"
        return f"known: {names}. Import the module that registers it before the bus starts"


def _name(type: str) -> str:
    if not storable(type):
        raise ConfigurationError(f"{type!r} cannot be the name of an event type")
    return type


def where(handler: object) -> str:
    """A function and where it stands, for messages."""
    code = getattr(handler, "__code__", None)
    name = getattr(handler, "__qualname__", repr(handler))
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None else str(name)
