"""What is wrong with an event, and where in it.

*publish* → journal → store → lanes → *workers* → outcome. Encoding goes straight ahead; only when it fails, or for classes whose
own library lets too much pass, the functions here go through the event to find the field.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, time
from decimal import Decimal
from types import NoneType
from typing import Any, Final
from uuid import UUID

import attrs
import msgspec

from eventbus._fields import family_of, field_names, label

MAX_DEPTH: Final = 64
"""How deep the JSON of an event may nest."""

TOO_DEEP: Final = f"is nested deeper than {MAX_DEPTH} levels, or holds itself"

_MIN: Final = -(2**63)
_MAX: Final = 2**63 - 1
_STRINGS: Final = re.compile(rb'"[^"]*"')
_BRACKETS: Final = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b'[]{}"'))


class Fault(ValueError):
    """Raised by a codec: this event cannot be encoded as it is, or these bytes do not fit the class.

    The bus makes an `InvalidEvent` of it, with the event type's name.

    Attributes:
        field: path to the value, such as `lines[2].price`; "" if the fault is not in one field.
        reason: what is wrong with it.
    """

    def __init__(self, reason: str, field: str = "") -> None:
        super().__init__(reason, field)
        self.reason = reason
        self.field = field

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}" if self.field else self.reason


def mismatch(expected: Any, value: object) -> Fault:
    """The fault of a value that does not fit its annotation."""
    return Fault(f"expected {label(expected)}, got {shown(value)}")


def shown(value: object) -> str:
    """A value as messages show it: its type and the beginning of its repr."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # a user's __repr__ may do anything, and this is on the way to a better error
        text = "…"
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:59] + '…'}"  # noqa: PLR2004


def reason_of(error: BaseException) -> str:
    """The reason in an error of Python's, msgspec's or ours."""
    if isinstance(error, Fault):
        return error.reason
    if isinstance(error, UnicodeEncodeError):
        return "holds a lone surrogate, which is no character and has no UTF-8"
    if isinstance(error, RecursionError):
        return TOO_DEEP
    if isinstance(error, KeyError):
        return f"{error!r}"
    return str(error) or type(error).__name__


def depth(data: bytes) -> int:
    """How deep a JSON text nests: exact beyond the limit; below it, an upper bound that costs two scans.

    All in bytes' own methods, for a list of some hundred objects would take a loop longer than it takes to encode them.
    """
    brackets = data.count(b"{") + data.count(b"[")
    if brackets <= MAX_DEPTH:
        return brackets
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    skeleton = data.translate(_BRACKETS, _NO_BRACKETS).replace(b'""', b"")
    if b'"' in skeleton:  # texts with brackets in them
        skeleton = _STRINGS.sub(b"", skeleton)
    levels = 0
    while skeleton and levels <= MAX_DEPTH:
        skeleton = skeleton.replace(b"[]", b"")  # one pass takes off the innermost level
        levels += 1
    return levels


# ------------------------------------------------------------------ values that no annotation stands for


def check_json(value: Any, level: int = 0) -> Any:
    """The value, if it is JSON and comes back as it is: what a field may hold that is annotated Any, dict or list."""
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if kind is int:
        return check_int(value)
    if kind is float:
        return check_float(value)
    if level > MAX_DEPTH:
        raise Fault(TOO_DEEP)
    if kind is list:
        for item in value:
            kind = type(item)
            if kind is not str and not (kind is int and _MIN <= item <= _MAX):
                check_json(item, level + 1)
        return value
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise Fault(f"has the key {shown(key)}; where the annotation says no more, keys are str")
            kind = type(item)
            if kind is not str and not (kind is int and _MIN <= item <= _MAX):
                check_json(item, level + 1)
        return value
    raise Fault(
        f"holds {shown(value)} where its annotation gives no type to bring it back to; "
        "annotate it, or use str, int, float, bool, None, list and dict"
    )


def check_int(value: int) -> int:
    if _MIN <= value <= _MAX:
        return value
    raise Fault(f"is {shown(value)}: ints are stored in signed 64 bits; use str or Decimal")


def check_float(value: float) -> float:
    if math.isfinite(value):
        return value
    raise Fault(f"is {value}: JSON has no such number; use None")


def check_decimal(value: Decimal) -> Decimal:
    if value.is_finite():
        return value
    raise Fault(f"is {value}: not a finite number; use None")


def check_datetime(value: datetime) -> datetime:
    if value.utcoffset() is not None:
        return value
    raise Fault("is a naive datetime, which means another instant on another machine; give it a tzinfo, such as UTC")


def check_text(value: str) -> str:
    value.encode()  # raises for lone surrogates
    return value


# ------------------------------------------------------------------ objects of other libraries


_FINE: Final[Mapping[type, Callable[[Any], bool]]] = {
    str: lambda _: True,
    UUID: lambda _: True,
    NoneType: lambda _: True,
    int: lambda value: _MIN <= value <= _MAX,
    float: math.isfinite,
    Decimal: Decimal.is_finite,
    datetime: lambda value: value.utcoffset() is not None,
}


def is_fine(value: Any, level: int = 0) -> bool:
    """Whether `explain` would find nothing, but for texts, which every encoder checks by itself. Made to be fast."""
    kind = type(value)
    test = _FINE.get(kind)
    if test is not None:
        return test(value)
    if level > MAX_DEPTH:
        return False
    if kind is list or kind is tuple:
        return all(is_fine(item, level + 1) for item in value)
    fields = getattr(kind, "__struct_fields__", None) or getattr(kind, "__pydantic_fields__", None)
    if fields and not getattr(value, "__pydantic_extra__", None):
        return all(is_fine(getattr(value, name, None), level + 1) for name in fields)
    return _is_fine_otherwise(value, level)


def _is_fine_otherwise(value: Any, level: int) -> bool:
    try:
        _check_value(value)
    except ValueError:
        return False
    return all(is_fine(item, level + 1) for _, item in parts_of(value))


def explain(value: Any) -> None:
    """Look for what no library refuses by itself, anywhere in a msgspec.Struct or pydantic model.

    Raises:
        Fault: NaN, infinity, a naive datetime, a lone surrogate, an int beyond 64 bits or too much nesting, with its path.
    """
    waiting: list[tuple[str, Any, int]] = [("", value, 0)]
    while waiting:
        path, value, level = waiting.pop()
        try:
            if level > MAX_DEPTH:
                raise Fault(TOO_DEEP)
            _check_value(value)
        except ValueError as error:
            raise Fault(reason_of(error), path if level <= MAX_DEPTH else first_of(path)) from error
        waiting.extend(((path + segment).removeprefix("."), part, level + 1) for segment, part in parts_of(value))


def _check_value(value: Any) -> None:
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, float):
        check_float(value)
    elif isinstance(value, int):
        check_int(value)
    elif isinstance(value, Decimal):
        check_decimal(value)
    elif isinstance(value, datetime):
        check_datetime(value)


def parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value consists of, each part with its segment of the path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield f"[{key!r}]", key
            yield f"[{key!r}]", item
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif family_of(type(value)) is not None:
        yield from ((f".{name}", getattr(value, name, None)) for name in field_names(type(value)))
        yield from ((f".{name}", item) for name, item in (getattr(value, "__pydantic_extra__", None) or {}).items())


def first_of(path: str) -> str:
    """The field at the beginning of a path."""
    return re.split(r"[.\[]", path, maxsplit=1)[0]


class Difference(msgspec.Struct, frozen=True):
    """Where two values differ, and what stands there."""

    path: str
    before: Any
    after: Any


def difference(before: Any, after: Any, path: str = "") -> Difference | None:
    """The first difference between two values, by what they hold; None if there is none.

    Compares classes without `__eq__`, too, and leaves out fields that their class leaves out of `==`.
    """
    pairs = _pairs(before, after) if type(before) is type(after) else None
    if pairs is None:
        return None if _equal(before, after) else Difference(path, before, after)
    for segment, one, other in pairs:
        found = difference(one, other, (path + segment).removeprefix("."))
        if found is not None:
            return found
    return None


def _pairs(before: Any, after: Any) -> Iterable[tuple[str, Any, Any]] | None:
    """The parts of two values of one class; None if they are to be compared as they are."""
    if isinstance(before, Mapping):
        return [(f"[{k!r}]", before[k], after[k]) for k in before] if before.keys() == after.keys() else None
    if isinstance(before, (list, tuple)):
        return (
            [(f"[{i}]", b, a) for i, (b, a) in enumerate(zip(before, after, strict=True))] if len(before) == len(after) else None
        )
    if family_of(type(before)) is None:
        return None
    names = [*_compared(type(before)), *(getattr(before, "__pydantic_extra__", None) or {})]
    return [(f".{name}", getattr(before, name, None), getattr(after, name, None)) for name in names]


def _compared(cls: type) -> Sequence[str]:
    match family_of(cls):
        case "attrs":
            return [a.name for a in attrs.fields(cls) if a.eq]
        case "dataclass":
            return [f.name for f in dataclasses.fields(cls) if f.compare]
    return field_names(cls)


def _equal(before: Any, after: Any) -> bool:
    if isinstance(before, (datetime, time)) and isinstance(after, (datetime, time)):
        # an instant in the hour that a clock is set back never equals one in another zone (PEP 495)
        return before == after or before.isoformat() == after.isoformat()
    return bool(before == after)
