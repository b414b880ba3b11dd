"""Events ⇄ bytes: the protocol, and the JSON that is used unless a bus is given another.

*publish* → journal → store → lanes → *workers* → outcome. In comes an event, out come the bytes that are stored; back, the bytes
and the class. What cannot be read back as it was is refused when it is published, naming the field.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Protocol

import msgspec
from cattrs import Converter

from eventbus._faults import MAX_DEPTH, TOO_DEEP, Fault, depth, difference, reason_of, shown
from eventbus._fields import family_of, label
from eventbus._foreign import foreign
from eventbus._forms import Forms
from eventbus._nodes import Node, Parts, deepest, reads_back
from eventbus.errors import InvalidEventType

__all__ = ["Codec", "Fault", "JSONCodec"]


class Codec(Protocol):
    """How events become bytes. Give a bus one of your own with `EventBus(codec=…)`.

    Methods may be called from several threads at once. What `encode` accepts, `decode` must give back equal.
    """

    @property
    def content_type(self) -> str:
        """Stored with each event; events with another are not handed to this codec."""

    def prepare(self, cls: type) -> object:
        """Called once for each class, when it is registered, before anything else.

        Raises:
            InvalidEventType: events of this class cannot be stored.
        """

    def encode(self, event: Any) -> bytes:
        """The bytes of an event.

        Raises:
            Fault: it cannot be stored as it is; the bus makes an `InvalidEvent` of it.
        """

    def decode(self, data: bytes, cls: type) -> Any:
        """The event of these bytes.

        Raises:
            Exception: of any kind: they do not fit the class; the bus makes an `UndecodableEvent` of it.
        """


class _Plan(msgspec.Struct, frozen=True, eq=False):
    """What is decided about a class.

    Attributes:
        dumps, loads: straight there and back.
        measured: its types set no bound to how deep it nests.
        reads_back: each event is read back before it is accepted.
        node: says where a fault is; None where `dumps` and `loads` say so themselves.
    """

    dumps: Callable[[Any], bytes]
    loads: Callable[[bytes], Any]
    measured: bool
    reads_back: bool
    node: Node | None


class JSONCodec:
    """Strict JSON: an event is stored only if exactly what was published can be read back; otherwise it is refused.

    - A value must fit its annotation, as it is: "5" is no int, nor are 5.0 and True. An int may stand for a float, and is made
      one; a str of a subclass (a StrEnum's member) becomes a str.
    - Refused in any case: NaN and infinity, naive datetimes, lone surrogates, ints beyond signed 64 bits, nesting deeper than
      64 levels, objects of a subclass where the annotation names the base class.
    - Where there is no annotation (Any, object, dict, list): what JSON has, and nothing else.
    - Stored are the fields that `__init__` takes. Those with `init=False` are made again by the class.
    - A class whose making runs code (attrs converters, `__post_init__`, fields with `init=False`), a msgspec.Struct and a
      pydantic model are read back before they are accepted, because that code may give something else.
    - When it is decoded, missing fields take their defaults and unknown ones are left out, so that classes can grow.

    Attributes:
        content_type: "application/json".
        converter: a cattrs converter. Register a structure and an unstructure hook on it for types that eventbus does not
            know, before the classes that use them are registered.
    """

    content_type = "application/json"

    def __init__(self) -> None:
        self._forms = Forms()
        self._plans: dict[type, _Plan] = {}
        self._lock = threading.RLock()

    @property
    def converter(self) -> Converter:
        return self._forms.converter

    def prepare(self, cls: type) -> None:
        """Make ready for a class. Again is the same as once.

        Raises:
            InvalidEventType: it, or a type in it, cannot be stored, or not so that it can be read back; says which and why.
        """
        self._plan(cls)

    def _plan(self, cls: type) -> _Plan:
        with self._lock:
            found = self._plans.get(cls)
            if found is None:
                found = self._plans[cls] = self._make_plan(cls)
            return found

    def _make_plan(self, cls: type) -> _Plan:
        if family_of(cls) in {"struct", "pydantic"}:
            own = foreign(cls)
            return _Plan(own.dumps, own.loads, measured=True, reads_back=True, node=None)
        if family_of(cls) is None:
            raise InvalidEventType(f"{label(cls)} is no event class")
        node = self._forms.node(cls)
        dump = node.dump
        to_json, from_json = msgspec.json.Encoder().encode, msgspec.json.Decoder().decode
        return _Plan(
            dumps=lambda event: to_json(dump(event)),
            loads=_loads(node, from_json),
            measured=deepest(node) > MAX_DEPTH,
            reads_back=reads_back(node),
            node=node,
        )

    def encode(self, event: Any) -> bytes:
        """The event as UTF-8 JSON.

        Raises:
            Fault: it cannot be stored so that it could be read back; with the field's path and the reason.
            InvalidEventType: its class was not registered and cannot be.
        """
        plan = self._plans.get(type(event)) or self._plan(type(event))
        try:
            data = plan.dumps(event)
            if plan.measured and depth(data) > MAX_DEPTH:
                raise Fault(TOO_DEEP)  # noqa: TRY301  # one place makes the message
        except Exception as error:
            raise _explained(plan, event, error) from error
        if plan.reads_back:
            _read_back(plan, event, data)
        return data

    def decode(self, data: bytes, cls: type) -> Any:
        """An event of `encode`, also of an older version of its class.

        Raises:
            Fault: the JSON does not fit the class; says where.
            Exception: what the class's own validators raise; or the bytes are no JSON.
        """
        plan = self._plans.get(cls) or self._plan(cls)
        try:
            return plan.loads(data)
        except Exception as error:
            if plan.node is None:
                raise
            raise _locate(plan.node, msgspec.json.decode(data), error, _try_load, attrgetter("loaded_parts")) from error


def _loads(node: Node, from_json: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    load, make_reader = node.load, node.make_reader
    read: Callable[[bytes], Any] | None = None

    def loads(data: bytes) -> Any:
        nonlocal read, make_reader
        if (make := make_reader) is not None:  # two threads may both make one
            read, make_reader = make(), None
        if read is not None:
            try:
                return read(data)
            except Exception:  # noqa: BLE001, S110  # raised again below, if it is not an event of an older version
                pass
        return load(from_json(data))

    return loads


# ------------------------------------------------------------------ after a failure


def _read_back(plan: _Plan, event: Any, data: bytes) -> None:
    try:
        again = plan.loads(data)
    except Exception as error:
        where = error.field if isinstance(error, Fault) else ""
        raise Fault(f"could not be read back: {reason_of(error)}", where) from error
    try:
        found = None if again == event else difference(event, again)
    except Exception as error:
        raise Fault(f"cannot be compared with what would come back: {reason_of(error)}") from error
    if found is not None:
        raise Fault(f"would come back as {shown(found.after)}, not {shown(found.before)}", found.path)


def _explained(plan: _Plan, event: Any, error: Exception) -> Fault:
    if plan.node is None:
        return Fault(reason_of(error), error.field if isinstance(error, Fault) else "")
    return _locate(plan.node, event, error, _try_dump, attrgetter("parts"))


def _try_dump(node: Node, value: Any) -> None:
    if depth(msgspec.json.encode(node.dump(value))) >= MAX_DEPTH:  # it lies inside something else
        raise Fault(TOO_DEEP)


def _try_load(node: Node, value: Any) -> None:
    node.load(value)


def _locate(
    node: Node, value: Any, error: Exception, attempt: Callable[[Node, Any], None], parts_of: Callable[[Node], Parts]
) -> Fault:
    """Go down to the part that fails by itself. Where it is the nesting, the first field says more than the last."""
    path = ""
    while not (path and reason_of(error) == TOO_DEEP):
        failing = _first_failing(node, value, attempt, parts_of)
        if failing is None:
            break
        segment, node, value, error = failing
        path += segment
    if isinstance(error, Fault) and error.field:
        path += error.field if error.field.startswith("[") else f".{error.field}"
    return Fault(reason_of(error), path.removeprefix("."))


def _first_failing(
    node: Node, value: Any, attempt: Callable[[Node, Any], None], parts_of: Callable[[Node], Parts]
) -> tuple[str, Node, Any, Exception] | None:
    try:
        parts = list(parts_of(node)(value))
    except Exception:  # noqa: BLE001  # the error that is being explained stands
        return None
    for segment, child, part in parts:
        try:
            attempt(child, part)
        except Exception as error:  # noqa: BLE001  # any error is what is looked for
            return segment, child, part, error
    return None
