"""A subscription as its program declares it: options checked, the handler's signature read.

On the way publish → journal → store → *lanes* → *workers* → outcome this is what both work by: which events, in what order,
to which function, and what happens when it fails. In goes what was given to `bus.subscribe`; out comes a `Subscription`,
or an error that says what to write instead, before anything runs.
"""

from __future__ import annotations

import functools
import inspect
import math
import types as _types
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Literal, NoReturn, TypeGuard, get_args

import msgspec

from eventbus._breaker import Breaker
from eventbus._retry import RetryPolicy
from eventbus.errors import InvalidSubscription
from eventbus.stores.base import LARGEST, Order

OnExhausted = Literal["dead_letter", "pause", "park"]
Start = Literal["now", "beginning"] | datetime | int
Handler = Callable[..., Any]

LONGEST_NAME = 255
MOST_LANES = 1024
"""As many as there are slots: more lanes would have nothing to do."""

DEFAULT_CONCURRENCY: dict[Order, int] = {"type": 1, "log": 1, "key": 16, "none": 16}


class Subscription(msgspec.Struct, frozen=True, eq=False):
    """A durable tie between event types and a handler, and the options of `bus.subscribe`.

    Attributes:
        name: the durable identity.
        classes: the classes given; the handler takes their events. Empty where `patterns` is not.
        patterns: the names and patterns given as strings; the handler takes envelopes.
        concurrency: lanes for order "key", deliveries at once for "none"; 1 for "type" and "log".
        timeout: seconds for one attempt, None for no limit.
        is_async: the handler is awaited; otherwise it runs in a thread.
        takes_delivery: the handler is called with `(event, delivery)`, otherwise with `(event)`.
    """

    name: str
    handler: Handler
    classes: tuple[type, ...]
    patterns: tuple[str, ...]
    order: Order
    concurrency: int
    retry: RetryPolicy
    on_exhausted: OnExhausted
    timeout: float | None
    start: Start
    replay: bool
    breaker: Breaker | None
    is_async: bool
    takes_delivery: bool

    @property
    def takes_envelope(self) -> bool:
        """The handler's first argument is the `Envelope`, since its types were given as strings."""
        return bool(self.patterns)


def subscription_of(
    types: Sequence[type | str],
    handler: Handler,
    *,
    name: str | None,
    order: Order,
    concurrency: int | None,
    retry: RetryPolicy,
    on_exhausted: OnExhausted,
    timeout: float | None,
    start: Start,
    replay: bool,
    breaker: Breaker | None,
) -> Subscription:
    """Check everything that can be checked without a bus or a store.

    Raises:
        InvalidSubscription: the handler or an option cannot work; the message says what to write instead.
    """
    classes, patterns = split_types(types)
    _check_callable(handler)
    name = _default_name(handler) if name is None else name
    say = _Complaint(name)
    _check_name(name)
    _check_order(say, order)
    _check_retry(say, retry)
    _check_on_exhausted(say, on_exhausted, order)
    _check_timeout(say, timeout)
    _check_start(say, start)
    if breaker is not None and not isinstance(breaker, Breaker):
        say(f"breaker={breaker!r}; expected a Breaker, such as Breaker(failures=20), or None for no breaker")
    if not isinstance(replay, bool):
        say(f"replay={replay!r}; expected True or False")
    return Subscription(
        name=name,
        handler=handler,
        classes=classes,
        patterns=patterns,
        order=order,
        concurrency=_checked_concurrency(say, concurrency, order),
        retry=retry,
        on_exhausted=on_exhausted,
        timeout=None if timeout is None else float(timeout),
        start=start,
        replay=replay,
        breaker=breaker,
        is_async=_is_async(say, handler),
        takes_delivery=_takes_delivery(say, handler),
    )


class _Complaint(msgspec.Struct, frozen=True):
    """Raises InvalidSubscription with the subscription's name in front."""

    name: str

    def __call__(self, text: str) -> NoReturn:
        raise InvalidSubscription(f"subscription {self.name!r}: {text}")


# ------------------------------------------------------------------ types


def split_types(types: Sequence[type | str]) -> tuple[tuple[type, ...], tuple[str, ...]]:
    """The classes and the patterns among `types`, each once; one of the two is empty.

    The bus calls it as soon as `subscribe` is called, so that `@bus.subscribe` without its parentheses is an error at once.

    Raises:
        InvalidSubscription: none given, both kinds given, or something else among them.
    """
    if not types:
        raise InvalidSubscription(
            "subscribe() needs at least one event type: @bus.subscribe(OrderCreated), or @bus.subscribe('order.*')"
        )
    for item in types:
        if isinstance(item, str):
            _check_pattern(item)
        elif not isinstance(item, type) or isinstance(item, _types.GenericAlias):
            raise InvalidSubscription(f"subscribe({_shown(item)}): {_not_a_type(item)}")
    classes = tuple(dict.fromkeys(item for item in types if isinstance(item, type)))
    patterns = tuple(dict.fromkeys(item for item in types if isinstance(item, str)))
    if classes and patterns:
        raise InvalidSubscription(
            f"subscribe({', '.join(map(_shown, types))}): give classes or strings, not both. With classes the handler takes the "
            "events themselves, with strings the envelopes; use two handlers"
        )
    return classes, patterns


def _shown(item: object) -> str:
    return item.__qualname__ if isinstance(item, (type, _types.FunctionType, _types.MethodType)) else repr(item)


def _not_a_type(item: object) -> str:
    if inspect.isroutine(item):
        return "this is a function; give the event type first: @bus.subscribe(OrderCreated) above the handler"
    if isinstance(item, _types.UnionType):
        return "this is a union; give its classes one by one: subscribe(A, B)"
    if isinstance(item, (list, tuple, set, frozenset)):
        return "give the classes one by one: subscribe(A, B)"
    return f"expected a class or a string, got a {type(item).__name__}"


def _check_pattern(pattern: str) -> None:
    if pattern == "*":
        return
    stem = pattern.removesuffix(".*")
    if not stem or "*" in stem or not pattern.isprintable() or len(pattern) > LONGEST_NAME:
        raise InvalidSubscription(
            f"subscribe({pattern!r}): a string is the name of an event type ('order.created'), a prefix with '.*' behind it "
            "('order.*'), or '*' for all types; '*' stands nowhere else"
        )


# ------------------------------------------------------------------ name


def _default_name(handler: Handler) -> str:
    qualname = getattr(handler, "__qualname__", None)
    if not isinstance(qualname, str) or inspect.isbuiltin(handler):
        raise InvalidSubscription(
            f"subscribe(): {handler!r} has no name of its own that would stay the same; give one with name='…' "
            "(it is the durable identity of the subscription)"
        )
    name = qualname.rpartition("<locals>.")[2]
    if "<lambda>" in name:
        raise InvalidSubscription(
            "subscribe(): a lambda has no name; give one with name='…' (it is the durable identity of the subscription)"
        )
    return name


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
        raise InvalidSubscription(f"subscribe(name={name!r}): expected a string of 1 to {LONGEST_NAME} printable characters")


# ------------------------------------------------------------------ options


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_order(say: _Complaint, order: object) -> None:
    if order not in get_args(Order):
        say(f"order={order!r}; expected one of {', '.join(map(repr, get_args(Order)))}")


def _checked_concurrency(say: _Complaint, concurrency: int | None, order: Order) -> int:
    if concurrency is None:
        return DEFAULT_CONCURRENCY[order]
    if order in {"type", "log"}:
        unit = "event type" if order == "type" else "subscription"
        say(f"order={order!r} runs one delivery at a time per {unit}; concurrency={concurrency!r} needs order='key' or 'none'")
    if not _is_int(concurrency) or not 1 <= concurrency <= MOST_LANES:
        say(f"concurrency={concurrency!r}; expected an int from 1 to {MOST_LANES}")
    return concurrency


def _check_retry(say: _Complaint, retry: object) -> None:
    if not isinstance(retry, RetryPolicy):
        example = f"RetryPolicy(attempts={retry})" if _is_int(retry) else "RetryPolicy(attempts=1), which tries once"
        say(f"retry={retry!r}; expected a RetryPolicy, such as {example}")


def _check_on_exhausted(say: _Complaint, on_exhausted: object, order: Order) -> None:
    if on_exhausted not in get_args(OnExhausted):
        say(f"on_exhausted={on_exhausted!r}; expected 'dead_letter', 'pause' or 'park'")
    if on_exhausted == "park" and order != "key":
        say(f"on_exhausted='park' holds the later events of a key, so it needs order='key', not {order!r}")


def _check_timeout(say: _Complaint, timeout: object) -> None:
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        say(f"timeout={timeout!r}; expected seconds above 0, or None for no limit")


def _check_start(say: _Complaint, start: object) -> None:
    if isinstance(start, datetime) and start.utcoffset() is None:
        say(f"start={start!r} has no time zone; give an aware datetime, such as datetime.now(UTC)")
    word_or_time = isinstance(start, datetime) or (isinstance(start, str) and start in {"now", "beginning"})
    if not word_or_time and not (_is_int(start) and 0 <= start <= LARGEST):
        say(f"start={start!r}; expected 'now', 'beginning', an aware datetime, or a position (an int from 0)")


# ------------------------------------------------------------------ handler


def _check_callable(handler: object) -> None:
    if isinstance(handler, type):
        raise InvalidSubscription(
            f"subscribe(): the class {handler.__qualname__} cannot be a handler; give a function or an object with __call__"
        )
    if not callable(handler):
        raise InvalidSubscription(f"subscribe(): {handler!r} cannot be a handler; give a function")


def _function_of(handler: Handler) -> Handler:
    """What is run in the end, under partials, static methods and `__call__`.

    Not what `functools.wraps` names: a wrapper decides for itself whether it is awaited.
    """
    while True:
        if isinstance(handler, functools.partial):
            handler = handler.func
        elif isinstance(handler, staticmethod):
            handler = handler.__func__
        elif inspect.isroutine(handler) or isinstance(handler, type):
            return handler
        else:
            handler = type(handler).__call__


def _is_async(say: _Complaint, handler: Handler) -> bool:
    function = _function_of(handler)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        say("the handler is a generator, which would never run; return a list of events instead of yielding them")
    return inspect.iscoroutinefunction(function)


def _takes_delivery(say: _Complaint, handler: Handler) -> bool:
    signature = _signature(say, handler)
    parameters = signature.parameters.values()
    required = _required(signature)
    shown = f"the handler takes {_without_annotations(signature)}"
    keywords = [p.name for p in required if p.kind is p.KEYWORD_ONLY]
    if keywords:
        say(f"{shown}; nothing would be given for {', '.join(keywords)}. A handler takes (event) or (event, delivery)")
    if not required and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        say(f"{shown}; name its parameters, so that it shows whether it takes (event) or (event, delivery)")
    if len(required) not in {1, 2}:
        say(f"{shown}; a handler takes (event) or (event, delivery): one or two positional parameters without a default")
    if required[0].name in {"self", "cls"} and inspect.isfunction(handler):
        say(f"{shown}, a method without its object; subscribe the bound method: bus.subscribe(…)(thing.method)")
    return len(required) == 2  # noqa: PLR2004 the two of (event, delivery)


def _signature(say: _Complaint, handler: Handler) -> inspect.Signature:
    """The handler's own signature; only where that says nothing, as `*args` does, that of the function which it wraps."""
    if isinstance(handler, staticmethod):
        handler = handler.__func__
    try:
        own = inspect.signature(handler, follow_wrapped=False)
        return own if _required(own) else inspect.signature(handler)
    except (TypeError, ValueError):
        say(f"the signature of {handler!r} cannot be read; wrap it in a function that takes (event) or (event, delivery)")


def _required(signature: inspect.Signature) -> list[inspect.Parameter]:
    parameters = signature.parameters.values()
    return [p for p in parameters if p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}]


def _without_annotations(signature: inspect.Signature) -> inspect.Signature:
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=signature.empty)
