"""Single values ⇄ JSON, strictly: what does not fit its annotation is refused on the way in, and on the way out.

*publish* → journal → store → lanes → *workers* → outcome. In comes one value of an event, out comes what msgspec writes as
JSON (it writes UUID, Decimal, dates and bytes by itself), and back. Each function takes one value and raises `Fault`.
"""

from __future__ import annotations

from binascii import a2b_base64
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from math import isfinite
from pathlib import PurePath
from types import NoneType
from typing import Any, Final, TypeVar
from uuid import UUID

from msgspec import convert

from eventbus._faults import Fault, check_decimal, check_float, check_int, mismatch, shown

Hook = Callable[[Any], Any]
T = TypeVar("T")

_MAX: Final = 2**63 - 1
_MIN: Final = -(2**63)


# ------------------------------------------------------------------ towards JSON


def dump_str(value: Any) -> str:
    if type(value) is str:
        return value
    if isinstance(value, str):
        return str.__str__(value)  # members of a StrEnum and the like: equal to what comes back
    raise mismatch(str, value)


def dump_int(value: Any) -> int:
    if type(value) is int and _MIN <= value <= _MAX:
        return value
    if isinstance(value, int) and type(value) is not bool:
        return check_int(int.__int__(value))
    raise mismatch(int, value)


def dump_float(value: Any) -> float:
    if type(value) is float and isfinite(value):
        return value
    if isinstance(value, float):
        return check_float(float.__float__(value))
    if isinstance(value, int) and type(value) is not bool:
        return _float_of_int(value)
    raise mismatch(float, value)


def _float_of_int(value: int) -> float:
    """An int stands for a float, as typing has it; but only one that loses nothing by it."""
    try:
        number = float(value)
    except OverflowError:
        number = -1.0 if value > 0 else 1.0
    if number == value:
        return number
    raise Fault(f"is {value}, which no float can hold exactly")


def dump_bool(value: Any) -> bool:
    if type(value) is bool:
        return value
    raise mismatch(bool, value)


def dump_none(value: Any) -> None:
    if value is not None:
        raise mismatch(None, value)


def dump_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    raise mismatch(bytes, value)


def dump_decimal(value: Any) -> Decimal | str:
    if type(value) is Decimal:
        return check_decimal(value)
    if isinstance(value, Decimal):
        return str(check_decimal(Decimal(value)))
    raise mismatch(Decimal, value)


def dump_uuid(value: Any) -> UUID | str:
    if type(value) is UUID:
        return value
    if isinstance(value, UUID):
        return str(value)
    raise mismatch(UUID, value)


def dump_datetime(value: Any) -> datetime | str:
    if not isinstance(value, datetime):
        raise mismatch(datetime, value)
    if value.tzinfo is UTC and type(value) is datetime:
        return value
    offset = value.utcoffset()
    if offset is None:
        raise Fault("is a naive datetime, which means another instant on another machine; give it a tzinfo, such as UTC")
    if offset.microseconds:
        value = value.astimezone(UTC)  # the same instant: fromisoformat takes an offset below a second for none
    text = datetime.isoformat(value)  # msgspec would round an offset to minutes
    return text[:-6] + "Z" if text.endswith("+00:00") else text  # as msgspec writes UTC


def dump_date(value: Any) -> str:
    if isinstance(value, date) and not isinstance(value, datetime):
        return date.isoformat(value)
    raise mismatch(date, value)


def dump_time(value: Any) -> str:
    if not isinstance(value, time):
        raise mismatch(time, value)
    offset = value.utcoffset()
    if offset is not None and offset.microseconds:
        raise Fault(f"is {shown(value)}, whose offset from UTC is not in whole seconds")
    return time.isoformat(value)


def dump_timedelta(value: Any) -> timedelta:
    if type(value) is timedelta:
        return value
    if isinstance(value, timedelta):
        return timedelta(value.days, value.seconds, value.microseconds)
    raise mismatch(timedelta, value)


# ------------------------------------------------------------------ from JSON


def _loader(kind: type, expected: Any, make: Callable[[Any], T]) -> Callable[[Any], T]:
    def load(value: Any) -> T:
        if type(value) is kind:
            return make(value)
        raise mismatch(expected, value)

    return load


def load_str(value: Any) -> str:
    if type(value) is str:
        return value
    raise mismatch(str, value)


def load_int(value: Any) -> int:
    if type(value) is int:
        return value
    raise mismatch(int, value)


def load_float(value: Any) -> float:
    if type(value) is float:
        return value
    if type(value) is int:
        return float(value)
    raise mismatch(float, value)


def load_decimal(value: Any) -> Decimal:
    if type(value) is str:
        return check_decimal(Decimal(value))
    raise mismatch(Decimal, value)


def load_uuid(value: Any) -> UUID:
    if type(value) is str:
        return convert(value, UUID)  # a third of UUID(value)'s time
    raise mismatch(UUID, value)


def load_datetime(value: Any) -> datetime:
    if type(value) is str:
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is not None:
            return moment
    raise mismatch(datetime, value)


LEAVES: Final[dict[type, tuple[Hook, Hook, type]]] = {
    str: (dump_str, load_str, str),
    int: (dump_int, load_int, int),
    float: (dump_float, load_float, float),
    bool: (dump_bool, dump_bool, bool),
    NoneType: (dump_none, dump_none, NoneType),
    bytes: (dump_bytes, _loader(str, bytes, lambda text: a2b_base64(text, strict_mode=True)), str),
    Decimal: (dump_decimal, load_decimal, str),
    UUID: (dump_uuid, load_uuid, str),
    datetime: (dump_datetime, load_datetime, str),
    date: (dump_date, _loader(str, date, date.fromisoformat), str),
    time: (dump_time, _loader(str, time, time.fromisoformat), str),
    timedelta: (dump_timedelta, _loader(str, timedelta, lambda text: convert(text, timedelta)), str),
}
"""For each class: towards JSON, from JSON, and the Python class of its JSON."""


STRAIGHT: Final[dict[type, str]] = {
    str: "{0}.__class__ is str",
    int: "{0}.__class__ is int and -0x8000000000000000 <= {0} <= 0x7FFFFFFFFFFFFFFF",
    float: "{0}.__class__ is float and {0} - {0} == 0.0",  # false for infinity and NaN
    bool: "{0}.__class__ is bool",
    NoneType: "{0} is None",
    Decimal: "{0}.__class__ is Decimal and {0}.is_finite()",
    UUID: "{0}.__class__ is UUID",
    datetime: "{0}.__class__ is datetime and {0}.tzinfo is UTC",
}
"""Conditions on a local variable under which the first hook of `LEAVES` gives the value back as it is. They stand in the
functions that are made for classes, and save a call for each field."""

TYPED: Final[frozenset[type]] = frozenset({str, int, float, bool, NoneType, UUID})
"""Classes for which msgspec, told to decode to them, takes and makes just what the second hook of `LEAVES` does."""

STRAIGHT_NAMES: Final[dict[str, Any]] = {"Decimal": Decimal, "UUID": UUID, "datetime": datetime, "UTC": UTC}
"""What the conditions refer to, beside builtins."""


def path_hooks(cls: type[PurePath]) -> tuple[Hook, Hook, type]:
    """The hooks of `pathlib`'s classes: as their text."""

    def dump(value: Any) -> str:
        if isinstance(value, cls) and cls(str(value)) == value:
            return str(value)
        raise mismatch(cls, value)

    return dump, _loader(str, cls, cls), str


def subclass_hooks(cls: type) -> tuple[Hook, Hook, type]:
    """The hooks of a user's subclass of str, int or float: as the value it is, and made again by calling the class."""
    base = next(base for base in (str, int, float) if issubclass(cls, base))
    dump_base, load_base, kind = LEAVES[base]

    def dump(value: Any) -> Any:
        if type(value) is cls:
            return dump_base(value)
        raise mismatch(cls, value)

    return dump, lambda value: cls(load_base(value)), kind
