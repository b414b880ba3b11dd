"""How the values of an annotation are encoded and decoded: one `Node` for each type that occurs in an event.

*publish* → journal → store → lanes → *workers* → outcome. Built once, when a class is registered: in comes an annotation, out
comes a pair of functions, value → JSON and JSON → value, strict in both directions, and what is needed to say where a fault is.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum, Flag
from keyword import iskeyword
from types import NoneType
from typing import Any, Final, TypeAlias, cast

import msgspec

from eventbus._faults import MAX_DEPTH, Fault, check_json, mismatch, shown
from eventbus._fields import Field, label
from eventbus._leaves import STRAIGHT_NAMES, Hook
from eventbus.errors import InvalidEventType

Part: TypeAlias = "tuple[str, Node, Any]"
Parts: TypeAlias = Callable[[Any], Iterable[Part]]

SCALARS: Final[tuple[type, ...]] = (str, int, float, bool, NoneType)
JSON: Final[tuple[type, ...]] = (*SCALARS, list, dict)

_INT64: Final = 2**63

_Accepted: TypeAlias = type[Collection[Any]] | tuple[type[Collection[Any]], ...]


def _no_parts(value: Any) -> Iterable[Part]:  # noqa: ARG001
    return ()


def _unfinished(value: Any) -> Any:
    raise AssertionError(f"a node was used before it was built, for {value!r}")


class Node(msgspec.Struct, eq=False):
    """What an annotation means.

    Attributes:
        dump: value → JSON, or what msgspec writes as JSON. load: JSON → value. Both raise for what does not fit.
        kinds: Python's classes of the JSON that `dump` gives: of `JSON`.
        classes: exact classes of the values that this takes; empty if they do not tell.
        values: for a closed set of values, their JSON.
        parts, loaded_parts: what a value, or its JSON, consists of: (segment of the path, node, part).
        children: the nodes inside.
        reads_back: decoding runs code of the user's or of another library; an event with such a value is read back before it
            is accepted.
        straight: a condition under which `dump` gives a value back as it is, as Python over `{0}`; "" where there is none.
        typed: what msgspec may be told to decode to, for the value that `load` would make; Any where it cannot.
        make_reader: of a class, makes a function from bytes of JSON to its object, in one go. It raises for whatever is unusual,
            such as a missing field; then `load` says what it is. Made when it is needed: it takes some kilobytes.
        form: the annotation.
    """

    form: Any
    dump: Hook = _unfinished
    load: Hook = _unfinished
    kinds: frozenset[type] = frozenset()
    classes: tuple[type, ...] = ()
    values: frozenset[tuple[type, Any]] | None = None
    parts: Parts = _no_parts
    loaded_parts: Parts = _no_parts
    children: tuple[Node, ...] = ()
    reads_back: bool = False
    straight: str = ""
    typed: Any = Any
    make_reader: Callable[[], Hook | None] | None = None

    @property
    def dumper(self) -> Hook:
        """`dump`, also while this node is still being built (a type that refers to itself)."""
        return self.dump if self.dump is not _unfinished else lambda value: self.dump(value)  # noqa: PLW0108  # bound late

    @property
    def loader(self) -> Hook:
        """`load`, also while this node is still being built."""
        return self.load if self.load is not _unfinished else lambda value: self.load(value)  # noqa: PLW0108  # bound late


def reads_back(node: Node) -> bool:
    """Whether this node, or one inside it, asks for its values to be read back."""
    seen, waiting = {id(node)}, [node]
    while waiting:
        node = waiting.pop()
        if node.reads_back:
            return True
        fresh = [child for child in node.children if id(child) not in seen]
        seen.update(map(id, fresh))
        waiting.extend(fresh)
    return False


def deepest(node: Node, known: dict[int, int] | None = None) -> int:
    """How deep the JSON of a node can nest at most; more than `MAX_DEPTH` where the types set no bound."""
    known = {} if known is None else known
    if id(node) not in known:
        known[id(node)] = MAX_DEPTH + 1  # what it is, if it is met again inside itself
        if node.children or not node.kinds & {list, dict}:
            known[id(node)] = 1 + max((deepest(child, known) for child in node.children), default=0)
    return known[id(node)]


def _identity(value: Any) -> Any:
    return value


def any_node() -> Node:
    """Any, object, no annotation: JSON as it is."""
    node = Node(Any, check_json, _identity, frozenset(JSON))
    node.parts = node.loaded_parts = lambda value: _json_parts(value, node)
    return node


def _json_parts(value: Any, node: Node) -> Iterable[Part]:
    if type(value) is list:
        return [(f"[{index}]", node, item) for index, item in enumerate(value)]
    if type(value) is dict:
        return [(f"[{key!r}]", node, item) for key, item in value.items()]
    return ()


# ------------------------------------------------------------------ closed sets of values


def build_enum(node: Node, cls: type[Enum]) -> None:
    """Members by value where all values are str, or all are 64-bit ints; otherwise by name."""
    node.classes = (cls,)
    members = list(cls.__members__.values())
    kinds = {type(member.value) for member in members}
    if not issubclass(cls, Flag):
        node.values = frozenset((type(j), j) for j in (_enum_json(member, kinds) for member in members))
    if kinds == {str} or (kinds == {int} and all(-_INT64 <= member.value < _INT64 for member in members)):
        _by_value(node, cls, kinds.pop())
    else:
        _by_name(node, cls)


def _enum_json(member: Enum, kinds: set[type]) -> Any:
    return member.value if kinds in ({str}, {int}) else member.name


def _by_value(node: Node, cls: type[Enum], kind: type) -> None:
    def dump(value: Any) -> Any:
        if isinstance(value, cls):
            return value.value
        raise mismatch(cls, value)

    def load(value: Any) -> Any:
        if type(value) is kind:
            return cls(value)
        raise mismatch(cls, value)

    node.dump, node.load, node.kinds = dump, load, frozenset({kind})


def _by_name(node: Node, cls: type[Enum]) -> None:
    def dump(value: Any) -> Any:
        if isinstance(value, cls) and value.name in cls.__members__:
            return value.name
        raise mismatch(cls, value)

    def load(value: Any) -> Any:
        if type(value) is str and value in cls.__members__:
            return cls[value]
        raise mismatch(cls, value)

    node.dump, node.load, node.kinds = dump, load, frozenset({str})


def build_literal(node: Node, args: tuple[Any, ...], node_of: Callable[[Any], Node]) -> None:
    towards: dict[tuple[type, Any], Any] = {}
    back: dict[tuple[type, Any], Any] = {}
    for value in args:
        if not isinstance(value, (Enum, *SCALARS)):
            raise InvalidEventType(f"{label(node.form)}: {shown(value)} cannot be stored as a literal")
        json = node_of(type(value)).dump(value)
        if (type(json), json) in back:
            raise InvalidEventType(f"{label(node.form)}: two of its values are both stored as {json!r}")
        towards[type(value), value] = json
        back[type(json), json] = value
    node.dump, node.load = _lookup(node.form, towards), _lookup(node.form, back)
    node.kinds = frozenset(kind for kind, _ in back)
    node.values = frozenset(back)


def _lookup(form: Any, table: Mapping[tuple[type, Any], Any]) -> Hook:
    def look_up(value: Any) -> Any:
        try:
            return table[type(value), value]
        except (KeyError, TypeError):
            raise mismatch(form, value) from None

    return look_up


# ------------------------------------------------------------------ collections


def build_sequence(node: Node, accepted: type[Collection[Any]], made: type[Collection[Any]], item: Node) -> None:
    """list[T], tuple[T, ...], Sequence[T]."""
    dump_item, load_item, construct = item.dumper, item.loader, cast("Hook", made)

    def dump(value: Any) -> Any:
        if isinstance(value, accepted):
            return [dump_item(part) for part in value]
        raise mismatch(node.form, value)

    def load(value: Any) -> Any:
        if type(value) is list:
            items = [load_item(part) for part in value]
            return items if made is list else construct(items)
        raise mismatch(node.form, value)

    node.dump, node.load = dump, load
    node.kinds, node.classes, node.children = frozenset({list}), (accepted,), (item,)
    node.parts = lambda value: _items(value, accepted, item)
    node.loaded_parts = lambda value: _items(value, list, item)


def _items(value: Any, accepted: _Accepted, item: Node) -> Iterable[Part]:
    return [(f"[{index}]", item, part) for index, part in enumerate(value)] if isinstance(value, accepted) else ()


def build_set(node: Node, accepted: tuple[type[Collection[Any]], ...], made: type[Collection[Any]], item: Node) -> None:
    """set[T], frozenset[T]: stored in order, so that equal events give equal bytes in every process."""
    build_sequence(node, list, made, item)
    dump_item = item.dumper

    def dump(value: Any) -> Any:
        if isinstance(value, accepted):
            return _in_order([dump_item(part) for part in value])
        raise mismatch(node.form, value)

    node.dump, node.classes = dump, accepted
    node.parts = lambda value: _items(value, accepted, item)


def _in_order(items: list[Any]) -> list[Any]:
    try:
        items.sort()
    except TypeError:
        items.sort(key=msgspec.json.encode)
    return items


def build_tuple(node: Node, items: tuple[Node, ...], cls: type[tuple[Any, ...]] = tuple) -> None:
    """tuple[A, B], and subclasses of NamedTuple."""
    dumps, loads, size = [item.dumper for item in items], [item.loader for item in items], len(items)
    segments = [f".{name}" for name in getattr(cls, "_fields", ())] or [f"[{i}]" for i in range(size)]
    construct = tuple if cls is tuple else cast("Any", cls)._make

    def dump(value: Any) -> Any:
        if isinstance(value, cls) and len(value) == size:
            return [dump_item(part) for dump_item, part in zip(dumps, value, strict=True)]
        raise mismatch(node.form, value)

    def load(value: Any) -> Any:
        if type(value) is list and len(value) == size:
            return construct([load_item(part) for load_item, part in zip(loads, value, strict=True)])
        raise mismatch(node.form, value)

    def parts(value: Any) -> Iterable[Part]:
        return list(zip(segments, items, value, strict=False))

    node.dump, node.load = dump, load
    node.kinds, node.classes, node.children = frozenset({list}), (cls,), items
    node.parts = lambda value: parts(value) if isinstance(value, cls) else ()
    node.loaded_parts = lambda value: parts(value) if isinstance(value, list) else ()


def build_mapping(node: Node, key: Node, item: Node) -> None:
    """dict[K, V], Mapping[K, V]. JSON's keys are strings; keys of other types are stored as their text."""
    (dump_key, load_key), dump_item, load_item = _key_hooks(node, key), item.dumper, item.loader

    def dump(value: Any) -> Any:
        if not isinstance(value, dict):
            raise mismatch(node.form, value)
        found = {dump_key(k): dump_item(v) for k, v in value.items()}
        if len(found) != len(value):
            raise Fault("has two keys that are stored as the same text")
        return found

    def load(value: Any) -> Any:
        if type(value) is dict:
            return {load_key(k): load_item(v) for k, v in value.items()}
        raise mismatch(node.form, value)

    def parts(value: Any) -> Iterable[Part]:
        return [(f"[{k!r}]", item, v) for k, v in value.items()] if isinstance(value, dict) else ()

    node.dump, node.load = dump, load
    node.kinds, node.classes, node.children = frozenset({dict}), (dict,), (key, item)
    node.parts = node.loaded_parts = parts


def _key_hooks(node: Node, key: Node) -> tuple[Hook, Hook]:
    dump, load = key.dumper, key.loader
    if key.form is str:
        return _explained(dump), load
    if key.form is Any:
        return lambda k: k if type(k) is str else _refuse_key(k, mismatch(str, k)), _identity
    if key.kinds == {str}:
        return _explained(lambda k: _as_text(dump(k))), load
    if key.kinds == {int}:
        return _explained(lambda k: str(dump(k))), lambda text: load(_int_of(text))
    raise InvalidEventType(
        f"{label(node.form)}: {label(key.form)} cannot be the key of a dict in JSON; use str, int, UUID, an Enum or a date"
    )


def _explained(dump: Hook) -> Hook:
    def dump_key(key: Any) -> Any:
        try:
            return dump(key)
        except Fault as fault:
            return _refuse_key(key, fault)

    return dump_key


def _refuse_key(key: Any, fault: Fault) -> Any:
    raise Fault(f"its key {shown(key)}: {fault.reason}") from fault


def _as_text(json: Any) -> Any:
    return json if type(json) is str else msgspec.to_builtins(json)


def _int_of(text: str) -> int:
    number = int(text)
    if str(number) == text:
        return number
    raise Fault(f"{text!r} is no int as a key is stored")


# ------------------------------------------------------------------ classes


def build_class(node: Node, cls: type, fields: list[tuple[Field, Node]]) -> None:
    """Classes of attrs and dataclasses, by functions made for the class, as attrs makes an `__init__`."""
    node.kinds, node.classes = frozenset({dict}), (cls,)
    node.children = tuple(child for _, child in fields)
    node.dump, node.load = _class_dumper(node, cls, fields), _class_loader(node, cls, fields)
    node.make_reader = lambda: _class_reader(cls, fields)

    def parts(value: Any) -> Iterable[Part]:
        return [(f".{f.name}", child, getattr(value, f.name)) for f, child in fields] if type(value) is cls else ()

    def loaded_parts(value: Any) -> Iterable[Part]:
        present = fields if type(value) is dict else []
        return [(f".{f.name}", child, value[f.name]) for f, child in present if f.name in value]

    node.parts, node.loaded_parts = parts, loaded_parts


def _class_dumper(node: Node, cls: type, fields: list[tuple[Field, Node]]) -> Hook:
    values = [f"    v{i} = {_attribute(field.name)}" for i, (field, _) in enumerate(fields)]
    entries = [f"{field.name!r}: {_dumped(child, i)}" for i, (field, child) in enumerate(fields)]
    source = f"""
def dump(value):
    if value.__class__ is not cls:
        raise mismatch(form, value)
{_LINE.join(values)}
    return {{{", ".join(entries)}}}
"""
    own = {"cls": cls, "form": node.form, "mismatch": mismatch}
    names = {f"dump_{i}": child.dumper for i, (_, child) in enumerate(fields)}
    return _compiled(source, "dump", STRAIGHT_NAMES | own | names)


_LINE: Final = "\n"


def _dumped(child: Node, i: int) -> str:
    """The JSON of the local variable `v<i>`: as it is where that is known to be right, else by its node."""
    return f"v{i} if {child.straight.format(f'v{i}')} else dump_{i}(v{i})" if child.straight else f"dump_{i}(v{i})"


def _attribute(name: str) -> str:
    return f"value.{name}" if _is_plain(name) else f"getattr(value, {name!r})"


def _is_plain(name: str) -> bool:
    return name.isidentifier() and not iskeyword(name)


def _class_loader(node: Node, cls: type, fields: list[tuple[Field, Node]]) -> Hook:
    """What this program has stored has every field; what an older one has, may lack those with defaults."""

    def load_older(value: Any) -> Any:
        given = {}
        for field, child in fields:
            if field.name in value:
                given[field.alias] = child.load(value[field.name])
            elif field.required:
                raise Fault("is missing, and has no default", field.name)
        return cls(**given)

    if not all(_is_plain(field.alias) for field, _ in fields):
        return load_older
    arguments = [
        f"{field.alias + '=' if field.kw_only else ''}load_{i}(value[{field.name!r}])" for i, (field, _) in enumerate(fields)
    ]
    source = f"""
def load(value):
    if value.__class__ is not dict:
        raise mismatch(form, value)
    if value.keys() >= names:
        return cls({", ".join(arguments)})
    return load_older(value)
"""
    names = {f"load_{i}": child.loader for i, (_, child) in enumerate(fields)}
    stored = frozenset(field.name for field, _ in fields)
    values = {"cls": cls, "form": node.form, "mismatch": mismatch, "names": stored, "load_older": load_older, **names}
    return _compiled(source, "load", values)


def _class_reader(cls: type, fields: list[tuple[Field, Node]]) -> Hook | None:
    """By way of a Struct that has the stored names and types of the fields: no dict, and no call for most of the values.

    What stands in the JSON beside the fields is passed over unread, also where it is no valid text.
    """
    if not all(_is_plain(field.alias) for field, _ in fields):
        return None
    attributes = [(f"f{i}", child.typed) for i, (_, child) in enumerate(fields)]
    stored = msgspec.defstruct("Stored", attributes, rename={f"f{i}": field.name for i, (field, _) in enumerate(fields)})
    values = [f"stored.f{i}" if child.typed is not Any else f"load_{i}(stored.f{i})" for i, (_, child) in enumerate(fields)]
    arguments = [f"{f.alias + '=' if f.kw_only else ''}{value}" for (f, _), value in zip(fields, values, strict=True)]
    source = f"""
def read(data):
    stored = decode(data)
    return cls({", ".join(arguments)})
"""
    names = {f"load_{i}": child.loader for i, (_, child) in enumerate(fields)}
    return _compiled(source, "read", {"cls": cls, "decode": msgspec.json.Decoder(stored).decode, **names})


def _compiled(source: str, name: str, names: dict[str, Any]) -> Hook:
    exec(compile(source, f"<eventbus {name} {label(names['cls'])}>", "exec"), names)  # noqa: S102  # our text, names checked
    made: Hook = names[name]
    return made


SEQUENCES: Final[Mapping[Any, tuple[type[Collection[Any]], type[Collection[Any]]]]] = {
    list: (list, list),
    abc.MutableSequence: (list, list),
    abc.Sequence: (tuple, tuple),
}
"""For each annotation, the class taken and the class made. A Sequence comes back as a tuple, so it must be one."""

SETS: Final[Mapping[Any, tuple[tuple[type[Collection[Any]], ...], type[Collection[Any]]]]] = {
    set: ((set,), set),
    abc.MutableSet: ((set,), set),
    frozenset: ((frozenset,), frozenset),
    abc.Set: ((frozenset, set), frozenset),
}

MAPPINGS: Final = (dict, abc.Mapping, abc.MutableMapping)
