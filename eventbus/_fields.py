"""What the fields of an event class are: their names and their resolved types.

Beside the way publish → journal → store → lanes → workers → outcome: read once, when a class is registered. In comes an attrs
class, dataclass, msgspec.Struct or pydantic model; out come its fields, with strings, type variables and `Annotated` resolved.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from types import UnionType
from typing import Any, Generic, Literal, NewType, TypeAlias, TypeVar, Union, get_args, get_origin

import attrs
import msgspec

from eventbus.errors import InvalidEventType

Family: TypeAlias = Literal["attrs", "dataclass", "struct", "pydantic"]


class Field(msgspec.Struct, frozen=True):
    """One field of an event class.

    Attributes:
        alias: what its `__init__` calls it; differs from `name` for attrs' private fields.
        required: its `__init__` needs it. init: its `__init__` takes it. compare: it counts for `==`.
    """

    name: str
    alias: str
    type: Any
    required: bool = True
    init: bool = True
    kw_only: bool = False
    compare: bool = True


def family_of(cls: object) -> Family | None:
    """Which kind of event class this is; None if it is none. Never imports pydantic."""
    if not isinstance(cls, type):
        return None
    if issubclass(cls, msgspec.Struct):
        return "struct" if cls is not msgspec.Struct else None
    if hasattr(cls, "__attrs_attrs__"):
        return "attrs"
    if hasattr(cls, "__dataclass_fields__"):
        return "dataclass"
    return "pydantic" if _is_pydantic_model(cls) else None


def _is_pydantic_model(cls: type) -> bool:
    base = getattr(sys.modules.get("pydantic"), "BaseModel", None)
    return base is not None and cls is not base and issubclass(cls, base)


def field_names(cls: type) -> tuple[str, ...]:
    """The fields' names, without looking at their types."""
    match family_of(cls):
        case "attrs":
            return tuple(field.name for field in attrs.fields(cls))
        case "dataclass":
            return tuple(field.name for field in dataclasses.fields(cls))
        case "struct":
            return tuple(typing.cast("Any", cls).__struct_fields__)
        case "pydantic":
            return tuple(typing.cast("Any", cls).model_fields)
    return ()


def fields_of(form: Any) -> tuple[Field, ...]:
    """The fields of a class, or of a generic class with its arguments such as `Box[int]`.

    Raises:
        InvalidEventType: an annotation cannot be resolved; names it.
    """
    cls = get_origin(form) or form
    family = family_of(cls)
    if family == "pydantic":
        return tuple(Field(name, name, info.annotation, required=info.is_required()) for name, info in cls.model_fields.items())
    hints = hints_of(cls)
    variables = _variables(cls, get_args(form))
    fields = {"attrs": _attrs_fields, "dataclass": _dataclass_fields, "struct": _struct_fields}[str(family)](cls, hints)
    return tuple(msgspec.structs.replace(field, type=_filled(field, cls, variables)) for field in fields)


def _attrs_fields(cls: type, hints: Mapping[str, Any]) -> Iterator[Field]:
    for a in attrs.fields(cls):
        hint = hints.get(a.name, Any if a.type is None else a.type)
        yield Field(a.name, a.alias or a.name, hint, a.default is attrs.NOTHING, a.init, a.kw_only, bool(a.eq))


def _dataclass_fields(cls: type, hints: Mapping[str, Any]) -> Iterator[Field]:
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        yield Field(f.name, f.name, hints.get(f.name, f.type), required, f.init, bool(f.kw_only), f.compare)


def _struct_fields(cls: type[msgspec.Struct], hints: Mapping[str, Any]) -> Iterator[Field]:
    for name in cls.__struct_fields__:
        yield Field(name, name, hints[name])


# ------------------------------------------------------------------ annotations


def hints_of(cls: type) -> dict[str, Any]:
    """Annotations of a class and its bases, with strings evaluated and `Annotated` taken off.

    Raises:
        InvalidEventType: one cannot be resolved.
    """
    try:
        return typing.get_type_hints(cls)
    except NameError:
        pass
    except Exception as error:
        raise InvalidEventType(f"the annotations of {label(cls)} cannot be resolved: {error}") from error
    try:  # a class inside a function that refers to itself
        return typing.get_type_hints(cls, localns={cls.__name__: cls})
    except NameError as error:
        raise InvalidEventType(
            f"the annotation of {_users_of(cls, error.name)} cannot be resolved: {error.name!r} is not a name of the module "
            f"{cls.__module__!r}. Import or define it there, at the top level and not under TYPE_CHECKING or in a function."
        ) from error


def _users_of(cls: type, name: str | None) -> str:
    for owner in cls.__mro__:
        for field, annotation in inspect.get_annotations(owner).items():
            if name and name in str(annotation):
                return f"{label(cls)}.{field}"
    return label(cls)


def _filled(field: Field, cls: type, variables: Mapping[type, Mapping[Any, Any]]) -> Any:
    owner = next((base for base in cls.__mro__ if field.name in inspect.get_annotations(base)), cls)
    return fill(field.type, variables.get(owner, {}), cls)


def _variables(cls: type, args: tuple[Any, ...]) -> dict[type, Mapping[Any, Any]]:
    """For each generic class in the bases, what its type variables stand for (the same variable may stand for two things)."""
    found: dict[type, Mapping[Any, Any]] = {cls: dict(zip(getattr(cls, "__parameters__", ()), args, strict=False))}
    for base in cls.__dict__.get("__orig_bases__", cls.__bases__):
        origin = get_origin(base) or base
        if origin is Generic or not isinstance(origin, type) or not hasattr(origin, "__parameters__"):
            continue
        found.update(_variables(origin, tuple(fill(arg, found[cls]) for arg in get_args(base))))
    return found


def fill(form: Any, values: Mapping[Any, Any], owner: Any = Any) -> Any:
    """The form with its type variables replaced; those without a value by Any, `Self` by the owner."""
    if isinstance(form, TypeVar):
        return values.get(form, Any)
    if form is typing.Self:
        return owner
    origin = get_origin(form)
    if origin is None or origin is Literal:
        return form
    if getattr(form, "__parameters__", ()):
        form = form[tuple(values.get(parameter, Any) for parameter in form.__parameters__)]
    args = get_args(form)
    filled = tuple(fill(arg, values, owner) for arg in args)
    if filled == args:
        return form
    return Union[filled] if origin is UnionType else origin[filled]  # noqa: UP007  # made at run time


def unwrap(form: Any) -> Any:
    """The form without `Annotated`, `NewType`, `Final` and type aliases."""
    while True:
        origin = get_origin(form)
        if origin is typing.Annotated or origin is typing.Final:
            form = get_args(form)[0]
        elif isinstance(form, NewType):
            form = form.__supertype__
        elif hasattr(form, "__value__") and hasattr(origin or form, "__type_params__"):
            form = fill(form.__value__, dict(zip(getattr(origin, "__type_params__", ()), get_args(form), strict=False)))
        else:
            return form


def label(form: Any) -> str:
    """How messages call a class or an annotation."""
    if isinstance(form, type) and get_origin(form) is None:
        return form.__qualname__ if form.__module__ == "builtins" else f"{form.__module__}.{form.__qualname__}"
    return repr(form).replace("typing.", "")


def mentions_sets(form: Any, seen: set[Any] | None = None) -> bool:
    """Whether values of this annotation may hold sets, whose order differs between processes."""
    seen = set() if seen is None else seen
    form = unwrap(form)
    if form in seen:
        return False
    seen.add(form)
    origin = get_origin(form) or form
    if isinstance(origin, type) and issubclass(origin, AbstractSet):
        return True
    inside = [] if origin is Literal else list(get_args(form))
    if family_of(origin) is not None:
        inside += [field.type for field in fields_of(form)]
    return any(mentions_sets(part, seen) for part in inside if not isinstance(part, list))
