"""Unions: which of its types a value is, and which of them some JSON is.

*publish* → journal → store → lanes → *workers* → outcome. Towards JSON the value's class decides; back, all there is to see is
JSON, so a union whose types look alike in it is refused at registration rather than guessed at.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType
from typing import Any, Protocol, Union, get_args, get_origin

from cattrs import Converter
from cattrs.disambiguators import create_default_dis_func

from eventbus._faults import mismatch
from eventbus._fields import family_of, fields_of, label
from eventbus._leaves import Hook
from eventbus._nodes import JSON, SCALARS, Node, Part
from eventbus.errors import InvalidEventType


class Known(Protocol):
    """What a union needs of `Forms`."""

    converter: Converter

    def node(self, form: Any) -> Node:
        """The node of an annotation."""


def build_union(node: Node, arms: list[Node], forms: Known) -> None:
    """Optional, and unions of types whose JSON differs.

    Raises:
        InvalidEventType: two of them could not be told apart.
    """
    arms = _simplified(node, arms)
    node.children = tuple(arms)
    node.kinds = frozenset().union(*(arm.kinds for arm in arms))
    node.classes = tuple(cls for arm in arms for cls in arm.classes)
    if all(arm.values is not None for arm in arms):
        node.values = frozenset().union(*(arm.values or () for arm in arms))
    others = [arm for arm in arms if arm.form is not NoneType]
    if len(arms) == 1 or (len(others) == 1 and NoneType not in others[0].kinds):
        _optional(node, others[0])
    else:
        _one_of(node, arms, _by_kind(node, arms, forms))


def _simplified(node: Node, arms: list[Node]) -> list[Node]:
    """Any takes in whatever is JSON; str takes in literals that are str."""
    universal = next((arm for arm in arms if arm.form is Any), None)
    if universal is not None:
        if all(arm is universal or arm.form in SCALARS for arm in arms):
            return [universal]
        raise InvalidEventType(f"{label(node.form)}: beside Any nothing can be told apart; leave out Any, or the others")
    plain = {arm.form for arm in arms if arm.form in SCALARS}
    return [arm for arm in arms if not (get_origin(arm.form) and _is_within(arm, plain))]


def _is_within(literal: Node, plain: set[Any]) -> bool:
    """Whether a Literal's values are stored as they are, and all belong to types that are in the union anyway."""
    values = get_args(literal.form) if literal.values is not None else ()
    return bool(values) and all(type(value) in plain for value in values)


def _optional(node: Node, other: Node) -> None:
    dump, load = other.dumper, other.loader
    if NoneType in node.kinds and NoneType not in other.kinds:
        node.dump = lambda value: None if value is None else dump(value)
        node.load = lambda value: None if value is None else load(value)
        node.straight = f"({{0}} is None or {other.straight})" if other.straight else "{0} is None"
        node.typed = Any if other.typed is Any else other.typed | None
    else:
        node.dump, node.load = dump, load
    node.parts = lambda value: () if value is None else other.parts(value)
    node.loaded_parts = lambda value: () if value is None else other.loaded_parts(value)


def _one_of(node: Node, arms: list[Node], by_kind: dict[type, Hook]) -> None:
    by_class = {cls: arm for arm in arms for cls in arm.classes}

    def dump(value: Any) -> Any:
        arm = by_class.get(type(value))
        if arm is not None:
            return arm.dump(value)
        for arm in arms:
            try:
                return arm.dump(value)
            except ValueError:  # a Fault, or a surrogate in it; the next may take it
                continue
        raise mismatch(node.form, value)

    def load(value: Any) -> Any:
        hook = by_kind.get(type(value))
        if hook is None:
            raise mismatch(node.form, value)
        return hook(value)

    def parts(value: Any) -> Iterable[Part]:
        arm = by_class.get(type(value))
        return arm.parts(value) if arm is not None else ()

    def loaded_parts(value: Any) -> Iterable[Part]:
        candidates = [arm for arm in arms if type(value) in arm.kinds]
        return candidates[0].loaded_parts(value) if len(candidates) == 1 else ()

    node.dump, node.load, node.parts, node.loaded_parts = dump, load, parts, loaded_parts


# ------------------------------------------------------------------ from JSON


def _by_kind(node: Node, arms: list[Node], forms: Known) -> dict[type, Hook]:
    hooks: dict[type, Hook] = {}
    for kind in JSON:
        candidates = [arm for arm in arms if kind in arm.kinds]
        if len(candidates) == 1:
            hooks[kind] = candidates[0].loader
        elif candidates:
            hooks[kind] = _told_apart(node, kind, candidates, forms)
    if float in hooks:
        hooks.setdefault(int, hooks[float])
    return hooks


def _told_apart(node: Node, kind: type, arms: list[Node], forms: Known) -> Hook:
    if all(arm.values is not None for arm in arms):
        return _by_value(node, arms)
    if kind is dict and all(family_of(get_origin(arm.form) or arm.form) in {"attrs", "dataclass"} for arm in arms):
        return _by_fields(node, arms, forms)
    raise _alike(node, arms, "are stored as the same kind of JSON")


def _alike(node: Node, arms: list[Node], why: str) -> InvalidEventType:
    return InvalidEventType(
        f"{label(node.form)}: {', '.join(label(arm.form) for arm in arms)} {why}, so they cannot be told apart when they are "
        'read again. Use one of them, or classes with a field such as kind: Literal["…"].'
    )


def _by_value(node: Node, arms: list[Node]) -> Hook:
    table = {value: arm for arm in arms for value in arm.values or ()}
    if len(table) != sum(len(arm.values or ()) for arm in arms):
        raise _alike(node, arms, "have values that are stored alike")

    def load(value: Any) -> Any:
        arm = table.get((type(value), value))
        if arm is None:
            raise mismatch(node.form, value)
        return arm.load(value)

    return load


def _by_fields(node: Node, arms: list[Node], forms: Known) -> Hook:
    by_form = {arm.form: arm for arm in arms}
    try:
        choose = create_default_dis_func(forms.converter, *by_form, overrides={})
    except (TypeError, ValueError) as error:
        raise _alike(node, arms, "have no field each that the others lack") from error
    for form in list(by_form):
        for sample in _samples(form, forms):
            try:
                chosen = choose(sample)
            except (KeyError, ValueError) as error:
                raise _alike(node, arms, "have no field to tell them by") from error
            if form not in _forms_in(chosen):
                raise _alike(node, arms, "have no field to tell them by")
            by_form.setdefault(chosen, forms.node(chosen))  # a literal that leaves a smaller union to be told apart

    def load(value: Any) -> Any:
        return by_form[choose(value)].load(value)

    return load


def _samples(form: Any, forms: Known) -> Iterable[dict[str, Any]]:
    """What is stored of a class, as far as it tells it from others: its fields, and its literals' values."""
    fields = [(field.name, forms.node(field.type)) for field in fields_of(form) if field.init]
    everything: dict[str, Any] = dict.fromkeys(name for name, _ in fields)
    closed = {name: [json for _, json in child.values] for name, child in fields if child.values}
    everything.update({name: values[0] for name, values in closed.items()})
    yield everything
    for name, values in closed.items():
        yield from (everything | {name: value} for value in values)


def _forms_in(chosen: Any) -> tuple[Any, ...]:
    return get_args(chosen) if get_origin(chosen) is Union else (chosen,)
