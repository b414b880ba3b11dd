"""From annotations to nodes: which annotation is encoded how, and which cannot be.

Beside the way publish → journal → store → lanes → workers → outcome: at registration. In comes an annotation, out comes a
`Node` of `_nodes.py`, or an `InvalidEventType` that says what to annotate instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
import msgspec
from cattrs import Converter
from cattrs.errors import StructureHandlerNotFoundError
from cattrs.preconf.msgspec import make_converter

from eventbus._fields import family_of, fields_of, hints_of, label, unwrap
from eventbus._foreign import foreign
from eventbus._immutable import is_deeply_immutable
from eventbus._leaves import LEAVES, STRAIGHT, TYPED, Hook, path_hooks, subclass_hooks
from eventbus._nodes import (
    JSON,
    MAPPINGS,
    SEQUENCES,
    SETS,
    Node,
    any_node,
    build_class,
    build_enum,
    build_literal,
    build_mapping,
    build_sequence,
    build_set,
    build_tuple,
)
from eventbus._unions import build_union
from eventbus.errors import InvalidEventType


class Forms:
    """The nodes of all annotations met so far. `converter` decides about types that are not known here."""

    def __init__(self) -> None:
        self.converter: Converter = make_converter(structure_fallback_factory=_not_found)
        self._any = any_node()
        self._nodes: dict[Any, Node] = {}
        self._begun: list[Any] = []
        for form, (dump, load, kind) in LEAVES.items():
            node = self._nodes[form] = Node(form, dump, load, frozenset({kind}), (form,), straight=STRAIGHT.get(form, ""))
            node.typed = form if form in TYPED else Any
        self._nodes[NoneType].values = frozenset({(NoneType, None)})
        self._teach_converter()

    def node(self, form: Any) -> Node:
        """The node of an annotation; built at first sight.

        Raises:
            InvalidEventType: it, or a type in it, cannot be stored; then nothing of it is kept.
        """
        form = unwrap(form)
        if form is None:
            form = NoneType
        if form is Any or form is object or isinstance(form, TypeVar):
            return self._any
        return self._nodes.get(form) or self._new_node(form)

    def _new_node(self, form: Any) -> Node:
        is_first, node = not self._begun, Node(form)
        self._begun.append(form)
        self._nodes[form] = node
        try:
            self._build(node, form)
        except BaseException:
            for begun in self._begun if is_first else ():  # also what was finished, for it may refer to what was not
                del self._nodes[begun]
            raise
        finally:
            if is_first:
                self._begun.clear()
        return node

    def _build(self, node: Node, form: Any) -> None:
        origin, args = get_origin(form) or form, get_args(form)
        if origin is Literal:
            build_literal(node, args, self.node)
        elif origin in {Union, UnionType}:
            build_union(node, [self.node(arg) for arg in args], self)
        elif _is_collection(origin):
            self._build_collection(node, origin, args)
        elif _is_named_tuple(origin):
            hints = hints_of(origin)
            build_tuple(node, tuple(self.node(hints.get(name, Any)) for name in origin._fields), origin)
        elif isinstance(origin, type) and issubclass(origin, Enum):
            build_enum(node, origin)
        elif isinstance(origin, type) and issubclass(origin, PurePath):
            self._fill(node, path_hooks(origin))
        elif isinstance(origin, type) and issubclass(origin, (str, int, float)):
            self._fill(node, subclass_hooks(origin))
            node.classes = (origin,)
        elif family_of(origin) in {"struct", "pydantic"}:
            _build_foreign(node, origin)
        else:
            self._build_by_converter(node, form, origin)

    def _build_collection(self, node: Node, origin: Any, args: tuple[Any, ...]) -> None:
        if origin is tuple:
            self._build_tuple(node, args)
        elif origin in MAPPINGS:
            key, item = args or (Any, Any)
            build_mapping(node, self.node(key), self.node(item))
        elif origin in SETS:
            build_set(node, *SETS[origin], self.node(args[0] if args else Any))
        else:
            build_sequence(node, *SEQUENCES[origin], self.node(args[0] if args else Any))

    def _build_tuple(self, node: Node, args: tuple[Any, ...]) -> None:
        if node.form is tuple or (len(args) == 2 and args[1] is Ellipsis):  # noqa: PLR2004  # tuple[T, ...]
            build_sequence(node, tuple, tuple, self.node(args[0] if args else Any))
        else:
            build_tuple(node, tuple(self.node(arg) for arg in args))

    def _fill(self, node: Node, hooks: tuple[Hook, Hook, type]) -> None:
        node.dump, node.load, kind = hooks
        node.kinds = frozenset({kind})

    # -------------------------------------------------------------- classes

    def _build_by_converter(self, node: Node, form: Any, origin: Any) -> None:
        """A user's hooks come before what is known here about attrs classes and dataclasses."""
        try:
            load = self.converter.get_structure_hook(form)
            dump = self.converter.get_unstructure_hook(form)
        except (StructureHandlerNotFoundError, NameError, TypeError, ValueError) as error:
            raise self._unknown(form) from error
        ours = isinstance(load, _Load), isinstance(dump, _Dump)
        if ours == (True, True):
            self._build_class(node, form, origin)
        elif any(ours) or not isinstance(origin, type):
            raise self._unknown(form)
        else:
            node.dump, node.load = dump, lambda value: load(value, form)
            node.kinds, node.reads_back = frozenset(JSON) - {NoneType}, True

    def _unknown(self, form: Any) -> InvalidEventType:
        return InvalidEventType(
            f"{label(form)} cannot be stored in an event: neither it nor its fields give it a form in JSON. Use a type that "
            "the documentation of events lists, or register both a structure and an unstructure hook for it: "
            "JSONCodec().converter is a cattrs converter."
        )

    def _build_class(self, node: Node, form: Any, cls: type) -> None:
        if any(f.default is dataclasses.MISSING for f in _init_vars(cls)):
            raise InvalidEventType(f"{label(cls)} cannot be made again from what is stored: it has an InitVar without default")
        node.kinds, node.classes = frozenset({dict}), (cls,)
        fields = fields_of(form)
        node.reads_back = _runs_code(cls) or any(not field.init and field.compare for field in fields)
        stored = [(field, self.node(field.type)) for field in fields if field.init]
        build_class(node, cls, stored)

    def _teach_converter(self) -> None:
        """What cattrs builds by itself (TypedDict, deque, …) uses our strict hooks inside."""
        for form, (dump, load, _) in LEAVES.items():
            self.converter.register_structure_hook(form, _ignoring_type(load))
            self.converter.register_unstructure_hook(form, dump)
        self.converter.register_structure_hook_factory(self._knows, lambda form: _Load(self.node(form)))
        self.converter.register_unstructure_hook_factory(self._knows, lambda form: _Dump(self.node(form)))

    def _knows(self, form: Any) -> bool:
        origin = get_origin(form) or form
        return (
            origin in {Literal, Union, UnionType}
            or _is_collection(origin)
            or family_of(origin) is not None
            or _is_named_tuple(origin)
            or (isinstance(origin, type) and issubclass(origin, (Enum, PurePath)))
        )


def _not_found(form: Any) -> Callable[[Any, Any], Any]:
    """Found out at registration; by itself an older cattrs would raise only when a value comes."""
    raise StructureHandlerNotFoundError(f"no hook for {label(form)}", form)


def _ignoring_type(load: Hook) -> Any:
    return lambda value, _: load(value)


class _Load(msgspec.Struct, frozen=True, eq=False):
    """A hook of ours in the converter; a class, so that it can be told from a user's."""

    node: Node

    def __call__(self, value: Any, _: Any) -> Any:
        return self.node.load(value)


class _Dump(msgspec.Struct, frozen=True, eq=False):
    node: Node

    def __call__(self, value: Any) -> Any:
        return self.node.dump(value)


def _is_collection(origin: Any) -> bool:
    try:
        return origin is tuple or origin in MAPPINGS or origin in SETS or origin in SEQUENCES
    except TypeError:
        return False


def _is_named_tuple(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, tuple) and hasattr(origin, "_fields")


def _build_foreign(node: Node, cls: type) -> None:
    own = foreign(cls)
    node.dump = lambda value: msgspec.Raw(own.dumps(value))
    node.load = lambda value: own.loads(msgspec.json.encode(value))
    node.kinds, node.classes, node.reads_back = _foreign_kinds(cls), (cls,), True


def _foreign_kinds(cls: Any) -> frozenset[type]:
    if getattr(cls, "__pydantic_root_model__", False):
        return frozenset(JSON) - {NoneType}
    is_array = family_of(cls) == "struct" and cls.__struct_config__.array_like
    return frozenset({list if is_array else dict})


# ------------------------------------------------------------------ code that runs when an object is made


def _init_vars(cls: type) -> list[Any]:
    fields: Mapping[str, Any] = getattr(cls, "__dataclass_fields__", {})
    return [field for field in fields.values() if repr(getattr(field, "_field_type", "")) == "_FIELD_INITVAR"]


def _runs_code(cls: Any) -> bool:
    """Whether making an object may give another one than the fields say: then each event is read back when it is published."""
    hooks = ("__post_init__", "__attrs_post_init__", "__attrs_pre_init__", "__attrs_init__", "__pydantic_validator__")
    mark = "__attrs_attrs__" if family_of(cls) == "attrs" else "__dataclass_fields__"
    if cls.__new__ is not object.__new__ or _owner(cls, "__init__") is not _owner(cls, mark):
        return True
    if any(hasattr(cls, name) for name in hooks):
        return True
    if mark == "__dataclass_fields__":
        return False
    may_have_changed = not is_deeply_immutable(cls)  # since its validators ran
    return any(a.converter is not None or (a.validator is not None and may_have_changed) for a in attrs.fields(cls))


def _owner(cls: type, name: str) -> type | None:
    return next((base for base in cls.__mro__ if name in base.__dict__), None)
