"""The options of `EventBus`, checked: what is wrong is said when the bus is made, not when it runs."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Literal

from eventbus.errors import ConfigurationError, NotSupported
from eventbus.stores.base import Store

Durability = Literal["full", "fast"]


def store_of(store: str | os.PathLike[str] | Store | None, durability: Durability) -> Store:
    """The store that is meant; a path is a SQLite file."""
    if store is None:
        raise ConfigurationError("no store: give a path to EventBus(…) or to open(…)")
    if not isinstance(store, (str, os.PathLike)):
        return store
    address = os.fspath(store)
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


def check_durability(durability: object) -> None:
    """One of the two."""
    if durability not in ("full", "fast"):
        raise ConfigurationError(f"durability={durability!r}; expected 'full' or 'fast'")


def check_numbers(**numbers: object) -> None:
    """Each must be a number above 0."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigurationError(f"{name}={value!r}; expected a number above 0")
