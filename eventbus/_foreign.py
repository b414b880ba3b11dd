"""msgspec Structs and pydantic models, which have encoders of their own: those are used, and checked.

*publish* → journal → store → lanes → *workers* → outcome. In comes a class of another library, out comes its pair of functions,
object ⇄ JSON bytes. Both libraries let pass what could not be read back, so whoever uses these reads back each event.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec

from eventbus._faults import Fault, explain, is_fine
from eventbus._fields import family_of, label, mentions_sets
from eventbus.errors import InvalidEventType


class Foreign(msgspec.Struct, frozen=True):
    """An object's own way to JSON bytes and back. Both raise `Fault` with the field's path."""

    dumps: Callable[[Any], bytes]
    loads: Callable[[bytes], Any]


def foreign(cls: type) -> Foreign:
    """The functions of a Struct or a pydantic model.

    Raises:
        InvalidEventType: its library cannot decode it.
    """
    own = _struct(cast("type[msgspec.Struct]", cls)) if family_of(cls) == "struct" else _pydantic(cls)

    def dumps(value: Any) -> bytes:
        if type(value) is not cls:
            raise Fault(f"expected {label(cls)}, got {label(type(value))}")
        if not is_fine(value):
            explain(value)
        try:
            return own.dumps(value)
        except Exception:
            explain(value)  # knows the field of a lone surrogate
            raise

    return Foreign(dumps, own.loads)


def _struct(cls: type[msgspec.Struct]) -> Foreign:
    try:
        decoder = msgspec.json.Decoder(cls)
    except (TypeError, NameError) as error:
        raise InvalidEventType(f"msgspec cannot decode {label(cls)}: {error}") from error

    def loads(data: bytes) -> Any:
        try:
            return decoder.decode(data)
        except msgspec.ValidationError as error:
            reason, _, path = str(error).partition(" - at `$")
            raise Fault(reason, path.rstrip("`").removeprefix(".")) from error

    # equal events give equal bytes; `deterministic` orders dicts, too, so only where there are sets
    encoder = msgspec.json.Encoder(order="deterministic" if mentions_sets(cls) else None)
    return Foreign(encoder.encode, loads)


def _pydantic(cls: Any) -> Foreign:
    from pydantic import ValidationError  # noqa: PLC0415  # the class is there, so pydantic is
    from pydantic_core import PydanticSerializationError  # noqa: PLC0415

    # Field names, where pydantic can be told so (from 2.11 on): then it does not matter what the aliases are.
    has_sets = mentions_sets(cls)
    by_name = "by_name" in inspect.signature(cls.model_validate_json).parameters
    options = {"by_alias": False, "by_name": True} if by_name else {}

    def dumps(value: Any) -> bytes:
        try:
            text: str = value.model_dump_json(by_alias=not by_name, round_trip=True, warnings="error")
        except PydanticSerializationError as error:
            field = re.search(r"field_name='([^']*)'", str(error))
            raise Fault(_flat(str(error)), field[1] if field else "") from error
        return _ordered(value.model_dump(round_trip=True), text) if has_sets else text.encode()

    def loads(data: bytes) -> Any:
        try:
            return cls.model_validate_json(data, **options)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = "".join(f".{step}" if isinstance(step, str) else f"[{step}]" for step in first["loc"])
            raise Fault(first["msg"], path.removeprefix(".")) from error

    return Foreign(dumps, loads)


def _ordered(value: Any, text: str) -> bytes:
    """Pydantic's JSON with the items of sets in order, so that equal events give equal bytes in every process."""
    json = msgspec.json.decode(text)
    _put_in_order(value, json)
    return msgspec.json.encode(json)


def _put_in_order(value: Any, json: Any) -> None:
    if isinstance(value, Mapping) and isinstance(json, dict):
        for part, inside in zip(value.values(), json.values(), strict=False):
            _put_in_order(part, inside)
    elif isinstance(value, (list, tuple, set, frozenset)) and isinstance(json, list):
        for part, inside in zip(value, json, strict=False):
            _put_in_order(part, inside)
        if isinstance(value, (set, frozenset)):
            json.sort(key=msgspec.json.encode)


def _flat(text: str) -> str:
    return " ".join(text.split())
