"""What finds the faults: the depth of JSON, the difference of two events, and the order of sets."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import InitVar, dataclass
from datetime import time, timedelta, timezone
from typing import Any

import attrs
import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from eventbus._codec import Fault, JSONCodec
from eventbus._faults import MAX_DEPTH, depth, difference
from eventbus.errors import InvalidEventType

# ------------------------------------------------------------------ depth


def measured(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(measured, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(measured, value), default=0)
    return 0


texts = st.text('[]{}"\\\n,: a', max_size=9)
trees = st.recursive(texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=30)


@given(trees, st.integers(0, 80), st.booleans())
def test_the_depth_of_json_is_exact_where_it_matters(tree: Any, more: int, as_dict: bool) -> None:
    """Whatever brackets, quotes and backslashes stand in the texts."""
    for _ in range(more):
        tree = {'"[': tree} if as_dict else [tree, "]"]
    data, found = msgspec.json.encode([tree, ["["] * 70, [[]] * 70]), 1 + max(measured(tree), 2)
    assert depth(data) == min(found, MAX_DEPTH + 1)


# ------------------------------------------------------------------ differences


@attrs.define(eq=False)
class Loose:
    a: Any
    b: Any = None


@pytest.mark.parametrize(
    ("before", "after", "path"),
    [
        (Loose(1), Loose(2), "a"),
        (Loose(Loose(1, [1, 2])), Loose(Loose(1, [1, 3])), "a.b[1]"),
        (Loose({"x": Loose(1)}), Loose({"x": Loose(2)}), "a['x'].a"),
        (Loose({"x": 1}), Loose({"y": 1}), "a"),
        (Loose([1]), Loose([1, 2]), "a"),
        (Loose((1,)), Loose([1]), "a"),
        (Loose(None), Loose({}), "a"),
    ],
)
def test_the_first_difference_is_named(before: Any, after: Any, path: str) -> None:
    """Also where classes have no equality of their own."""
    found = difference(before, after)
    assert found is not None
    assert found.path == path


@pytest.mark.parametrize("value", [Loose(1), Loose({"x": [Loose(1, (1, None))]}), [1], {"a": {1}}])
def test_the_same_has_no_difference(value: Any) -> None:
    """An equal copy is the same."""
    copied = attrs.evolve(value) if isinstance(value, Loose) else value.copy()
    assert difference(value, copied) is None


# ------------------------------------------------------------------ what else is refused


def test_an_init_var_without_default_is_refused() -> None:
    """What it was is not stored, so the object could not be made again."""

    @dataclass
    class Salted:
        x: int
        salt: InitVar[str]

    with pytest.raises(InvalidEventType, match="InitVar"):
        JSONCodec().prepare(Salted)


def test_a_time_with_an_offset_below_a_second_is_refused() -> None:
    """Python reads it back as UTC."""

    @attrs.frozen
    class Late:
        at: time

    with pytest.raises(Fault, match="whole seconds"):
        JSONCodec().encode(Late(time(1, tzinfo=timezone(timedelta(microseconds=1)))))


def test_an_object_that_cannot_be_compared_is_refused_not_raised() -> None:
    """Only faults come out of the codec, whatever an `__eq__` does."""

    class Odd:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("neither true nor false")

        __hash__ = None  # type: ignore[assignment]

    codec = JSONCodec()
    codec.converter.register_unstructure_hook(Odd, lambda _: 1)
    codec.converter.register_structure_hook(Odd, lambda _, __: Odd())
    event = attrs.make_class("Holder", {"value": attrs.field(type=Odd)})(Odd())
    with pytest.raises(Fault, match="neither true nor false"):
        codec.encode(event)


SETS = """
import attrs, msgspec, pydantic
from eventbus import JSONCodec
words = {"a b c d e f g".split()[i] for i in range(7)}
class S(msgspec.Struct):
    words: set[str]
class M(pydantic.BaseModel):
    words: set[str]
A = attrs.make_class("A", {"words": attrs.field(type=frozenset[str])})
for event in (A(frozenset(words)), S(words), M(words=words)):
    print(JSONCodec().encode(event).decode())
"""


def test_equal_events_give_equal_bytes_in_every_process() -> None:
    """An idempotency key is compared with the content, and the order of a set of str changes with each start of Python."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SETS],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
    assert '["a","b","c","d","e","f","g"]' in outputs.pop()
