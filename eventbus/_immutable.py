"""Whether one object of a class may be given to several handlers: is it immutable all the way down, by its annotations?

Beside the way publish → journal → store → lanes → workers → outcome: decided once, when a class is registered.
"""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin
from uuid import UUID

from eventbus._fields import family_of, fields_of, unwrap

_LEAVES: Final = frozenset({str, int, float, bool, bytes, NoneType, Decimal, UUID, date, datetime, time, timedelta})


def is_deeply_immutable(form: Any) -> bool:
    """Whether every value that fits this annotation is immutable.

    True for str, numbers, bytes, None, Decimal, UUID, dates and times, Enum, Literal, unions, tuples and frozensets of
    these, and for frozen classes all of whose fields are so.
    """
    return _check(form, set())


def _check(form: Any, seen: set[Any]) -> bool:
    form = unwrap(form)
    if form is None or form in _LEAVES:
        return True
    origin, args = get_origin(form), get_args(form)
    if origin is Literal:
        return True
    if origin in {Union, UnionType}:
        return all(_check(arg, seen) for arg in args)
    if origin in {tuple, frozenset}:
        return all(arg is Ellipsis or _check(arg, seen) for arg in args)
    if isinstance(form, type) and issubclass(form, Enum):
        return True
    if form in seen:  # a class that refers to itself is as immutable as the rest of it
        return True
    seen.add(form)
    return _is_frozen(origin or form) and all(_check(field.type, seen) for field in fields_of(form))


def _is_frozen(cls: Any) -> bool:
    match family_of(cls):
        case "attrs":
            return _is_frozen_attrs(cls)
        case "dataclass":
            return bool(cls.__dataclass_params__.frozen)
        case "struct":
            return bool(cls.__struct_config__.frozen)
        case "pydantic":
            # what `extra="allow"` and private attributes hold is not annotated, or not protected
            config = cls.model_config
            return bool(config.get("frozen")) and config.get("extra") != "allow" and not cls.__private_attributes__
    return False


def _is_frozen_attrs(cls: type) -> bool:
    """By the `__setattr__` that attrs gives to frozen classes; `attrs.inspect` is experimental, and blind to subclasses."""
    return cls.__setattr__.__name__ == "_frozen_setattrs"
