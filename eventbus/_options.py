"""The options of `EventBus`, checked: what is wrong is said when the bus is made, not when it runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import msgspec

from eventbus.errors import ConfigurationError, NotSupported
from eventbus.stores.base import Store, storable

if TYPE_CHECKING:
    from eventbus._clock import Clock
    from eventbus._codec import Codec
    from eventbus._events import Registry
    from eventbus.hooks import Hook

Durability = Literal["full", "fast"]

PRUNE_EVERY = 60.0
"""Seconds between two applications of the retention, at most."""


class Keeping(msgspec.Struct, frozen=True):
    """How long things are kept; seconds."""

    retention: float | None
    dedup_for: float
    prune_every: float


class Settings(msgspec.Struct, frozen=True):
    """What `EventBus` was given, checked; seconds."""

    name: str | None
    workers: int
    max_pending: int
    max_event_bytes: int
    lease: float
    keeping: Keeping
    hooks: Sequence[Hook]
    clock: Clock
    codec: Codec
    registry: Registry


def store_of(store: str | os.PathLike[str] | Store | None, durability: Durability) -> Store:
    """The store that is meant; a path is a SQLite file."""
    if store is None:
        raise ConfigurationError("no store: give a path to EventBus(…) or to open(…)")
    if not isinstance(store, (str, os.PathLike)):
        check_methods(store=store, methods=("features", "open", "close", "commit", "monotonic", "notice", "read"))
        return store
    address = os.fspath(store)
    if not address or not isinstance(address, str):
        raise ConfigurationError(f"{store!r} cannot be a store; give the path of a SQLite file, or ':memory:'")
    if "://" in address:
        scheme = address.partition("://")[0]
        raise NotSupported(f"stores of the kind {scheme!r} are not there yet in this version; give a path to a SQLite file")
    from eventbus.stores.sqlite import SQLiteStore  # noqa: PLC0415  # only where it is used

    return SQLiteStore(address, durability=durability)


def check_counts(**counts: object) -> None:
    """Each must be an int from 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigurationError(f"{name}={count!r}; expected an int from 1")


def check_spans(**spans: object) -> None:
    """Each must be a timedelta above 0; `retention` may be None."""
    for name, span in spans.items():
        if span is None and name == "retention":
            continue
        if not isinstance(span, timedelta) or span.total_seconds() <= 0:
            raise ConfigurationError(f"{name}={span!r}; expected a timedelta above 0")


def check_iterable(events: object) -> None:
    """Several events, not one."""
    if not isinstance(events, Iterable) or isinstance(events, (str, bytes)):
        raise ConfigurationError(f"publish_many takes several events, not {events!r:.80}; for one of them use publish")


def event_id_of(event_id: object) -> str:
    """An event's id as text; "", which no event has, for what cannot be one."""
    text = str(event_id)
    return text if storable(text) else ""


def key_of(key: object) -> str:
    """A key as it is stored."""
    text = str(key)
    if not storable(text):
        raise ConfigurationError(f"key={text!r:.80} cannot be the key of an event")
    return text


def prune_every(retention: timedelta | None) -> float:
    """Seconds between two applications of the retention: half of it, at least 0.5 s and at most `PRUNE_EVERY`."""
    return PRUNE_EVERY if retention is None else min(PRUNE_EVERY, max(0.5, retention.total_seconds() / 2))


def check_durability(durability: object) -> None:
    """One of the two."""
    if durability not in ("full", "fast"):
        raise ConfigurationError(f"durability={durability!r}; expected 'full' or 'fast'")


def check_numbers(**numbers: object) -> None:
    """Each must be a number above 0."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigurationError(f"{name}={value!r}; expected a number above 0")


def check_stop_timeout(seconds: object) -> None:
    """A number from 0."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise ConfigurationError(f"stop_timeout={seconds!r}; expected seconds, from 0")


def check_instance_name(name: object) -> None:
    """A text that people can read, or None."""
    if name is not None and (not isinstance(name, str) or not name or not name.isprintable()):
        raise ConfigurationError(f"name={name!r}; expected a printable str, or None for host and process")


def check_hooks(hooks: object) -> None:
    """Each can be called."""
    if not isinstance(hooks, (list, tuple)) or not all(callable(hook) for hook in hooks):
        raise ConfigurationError(f"hooks={hooks!r:.80}; expected a list of callables, see eventbus.hooks")


def check_methods(*, methods: Sequence[str], **parts: object) -> None:
    """Each must have these methods."""
    for name, part in parts.items():
        missing = [method for method in methods if not hasattr(part, method)]
        if missing:
            raise ConfigurationError(f"{name}={part!r:.80} cannot be a {name}: it has no {', '.join(missing)}")
