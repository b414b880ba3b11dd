"""Names for classes: `@event`, and the registry that ties stored names to the classes of a program.

*publish* → journal → store → lanes → *workers* → outcome. On the way in a class becomes the stored name and version, on the way
out the name becomes the class again. Nothing is imported by a name found in a store: only what was registered is known.
"""

from __future__ import annotations

import inspect
import threading
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar, overload

import msgspec

from eventbus._fields import family_of, field_names, fields_of, label
from eventbus._immutable import is_deeply_immutable
from eventbus.errors import InvalidEventType

C = TypeVar("C", bound=type)

_MARK: Final = "__eventbus_event__"
_MAX_NAME: Final = 255
_ACCEPTED: Final = "an attrs class, a dataclass, a msgspec.Struct or a pydantic (version 2) model"


class Declaration(msgspec.Struct, frozen=True):
    """What `@event` says about a class; kept in the class's own `__dict__`, so that subclasses do not share a name."""

    name: str | None = None
    version: int = 1
    key: str | None = None


class EventType(msgspec.Struct, frozen=True):
    """A class and what is stored about it.

    Attributes:
        name, version: as stored. key_field: the field that holds the key of `order="key"`, or None.
        shared: the class is deeply immutable by its annotations, so handlers may be given one and the same object.
    """

    name: str
    version: int
    cls: type
    key_field: str | None
    shared: bool


@overload
def event(name: C, /) -> C: ...


@overload
def event(name: str | None = None, *, version: int = 1, key: str | None = None) -> Callable[[C], C]: ...


def event(name: C | str | None = None, *, version: int = 1, key: str | None = None) -> C | Callable[[C], C]:
    """Give a class its stored name, version and key: `@event("order.created", version=2, key="order_id")`.

    Works above and below `@attrs.frozen`, `@dataclass` and the like; `@event` alone, or nothing at all, takes the class's own
    name and version 1. A subclass does not inherit it: it is a type of its own.

    Args:
        name: 1 to 255 characters, without "*", not ending in "."; None takes the class's name.
        version: 1 or more. Raise it when the class changes in a way that older programs cannot read.
        key: the field whose value `order="key"` orders by.

    Raises:
        InvalidEventType: a name or version that cannot be. A `key` that is no field is found when the class is registered.
    """
    if isinstance(name, type):
        return _declare(name, Declaration())
    declaration = Declaration(None if name is None else check_name(name), _check_version(version), key)
    return lambda cls: _declare(cls, declaration)


def _declare(cls: C, declaration: Declaration) -> C:
    setattr(cls, _MARK, declaration)
    return cls


def declaration_of(cls: type) -> Declaration:
    """What `@event` said about this very class."""
    found: Declaration = cls.__dict__.get(_MARK, Declaration())
    return found


def check_name(name: object) -> str:
    """The name, if it can be one of an event type.

    Raises:
        InvalidEventType: it cannot; says why.
    """
    if not isinstance(name, str):
        raise InvalidEventType(f"the name of an event type is a str, not {name!r}: write @event or @event('order.created')")
    if not name:
        raise InvalidEventType("the name of an event type is empty; leave it out to take the class's name")
    if "*" in name or name.endswith("."):
        raise InvalidEventType(
            f"{name!r} cannot be the name of an event type: '*' and '.' at the end belong to the patterns of `subscribe`"
        )
    if len(name) > _MAX_NAME:
        raise InvalidEventType(f"the name {name[:40]!r}… has {len(name)} characters; the limit is {_MAX_NAME}")
    if any(unicodedata.category(character) in {"Cc", "Cs"} for character in name):
        raise InvalidEventType(f"{name!r} cannot be the name of an event type: it holds control characters or lone surrogates")
    return name


_LARGEST_VERSION = 2**31 - 1


def _check_version(version: object) -> int:
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= _LARGEST_VERSION:
        raise InvalidEventType(f"the version of an event type is an int from 1 to {_LARGEST_VERSION:,}, not {version!r}")
    return version


def is_event_class(cls: object) -> bool:
    """Whether objects of this class can be events: attrs, dataclass, msgspec.Struct, pydantic. Imports nothing to find out."""
    return family_of(cls) is not None


class Registry:
    """The event types of one bus, by class and by name. May be used from any thread.

    Args:
        prepare: called once with each class before it is known (the codec's `prepare`); raises to refuse it.
    """

    def __init__(self, prepare: Callable[[type], object] = is_event_class) -> None:
        self._prepare = prepare
        self._by_class: dict[type, EventType] = {}
        self._by_name: dict[str, EventType] = {}
        self._lock = threading.RLock()

    def of(self, cls: type) -> EventType:
        """The event type of a class, which is registered at first sight.

        Raises:
            InvalidEventType: as `register`.
        """
        found = self._by_class.get(cls)
        return found if found is not None else self.register(cls)

    def by_name(self, name: str) -> EventType | None:
        """The event type with this stored name, if its class is registered."""
        return self._by_name.get(name)

    def register(self, cls: type) -> EventType:
        """Make a class known. Again is the same as once.

        Raises:
            InvalidEventType: it is no event class, its name is taken by another class, its key is no field, an annotation
                cannot be resolved, or the codec has no way to store it.
        """
        with self._lock:
            if cls in self._by_class:
                return self._by_class[cls]
            kind = _event_type(cls)
            taken = self._by_name.get(kind.name)
            if taken is not None:
                raise InvalidEventType(
                    f"two classes are called {kind.name!r}: {label(taken.cls)} and {label(cls)}. "
                    "Name one of them with @event('…'); a class that was made anew (a module loaded twice) needs a new bus."
                )
            self._prepare(cls)
            self._by_name[kind.name] = self._by_class[cls] = kind
            return kind

    def subclasses(self, base: type) -> list[EventType]:
        """The event types of a base class: itself, if it can be an event, and all subclasses known to Python by now.

        Raises:
            InvalidEventType: one of them cannot be registered, or the base is `object`.
        """
        if base is object:
            raise InvalidEventType("every class is an object; subscribe to '*' for all events")
        return [self.register(cls) for cls in _without_twins(list(dict.fromkeys(_family_tree(base)))) if _can_be_event(cls)]


def _event_type(cls: type) -> EventType:
    if not is_event_class(cls):
        raise InvalidEventType(f"{label(cls)} cannot be an event; make it {_ACCEPTED}")
    declaration = declaration_of(cls)
    name = check_name(declaration.name or cls.__name__)
    if declaration.key is not None and declaration.key not in field_names(cls):
        raise InvalidEventType(
            f"the key {declaration.key!r} of {label(cls)} is no field; its fields: {', '.join(field_names(cls)) or 'none'}"
        )
    fields_of(cls)  # annotations that cannot be resolved are found here, whatever the codec
    return EventType(name, declaration.version, cls, declaration.key, is_deeply_immutable(cls))


def _can_be_event(cls: type) -> bool:
    return is_event_class(cls) and not inspect.isabstract(cls) and not _is_pydantic_parametrization(cls)


def _is_pydantic_parametrization(cls: type) -> bool:
    metadata: dict[str, Any] = getattr(cls, "__pydantic_generic_metadata__", {})
    return metadata.get("origin") is not None


def _family_tree(base: type) -> Iterator[type]:
    yield base
    subclasses: list[type] = type.__subclasses__(base)
    for subclass in subclasses:
        yield from _family_tree(subclass)


def _without_twins(classes: list[type]) -> list[type]:
    """Leave out the classes that `slots=True` has replaced.

    attrs and dataclasses cannot add slots to a class that exists, so they make it anew; the first one stays in
    `__subclasses__()` until the garbage collector comes by.
    """
    places: dict[tuple[str, str], list[type]] = {}
    for cls in classes:
        places.setdefault((cls.__module__, cls.__qualname__), []).append(cls)
    return [cls for cls in classes if not any(_replaces(other, cls) for other in places[cls.__module__, cls.__qualname__])]


def _replaces(new: type, old: type) -> bool:
    if new is old or "__slots__" not in new.__dict__:
        return False
    if "__attrs_attrs__" in new.__dict__:
        return "__attrs_attrs__" not in old.__dict__
    fields = new.__dict__.get("__dataclass_fields__")  # both have the very same dict
    return fields is not None and fields is old.__dict__.get("__dataclass_fields__") and "__slots__" not in old.__dict__
