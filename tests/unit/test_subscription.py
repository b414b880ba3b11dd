"""What `bus.subscribe` accepts, and what it says to what it does not."""

from __future__ import annotations

import functools
import math
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from eventbus._retry import RetryPolicy
from eventbus._subscription import Subscription, split_types, subscription_of
from eventbus.errors import InvalidSubscription

OPTIONS: dict[str, Any] = {
    "name": None,
    "order": "type",
    "concurrency": None,
    "retry": RetryPolicy(),
    "on_exhausted": "dead_letter",
    "timeout": 60.0,
    "start": "now",
    "replay": True,
    "breaker": None,
}


class Created: ...


class Paid: ...


async def handler(event: Created) -> None: ...


def subscribe(*types: Any, to: Any = handler, **options: Any) -> Subscription:
    return subscription_of(types, to, **(OPTIONS | options))


def refused(*types: Any, to: Any = handler, **options: Any) -> str:
    with pytest.raises(InvalidSubscription) as caught:
        subscribe(*(types or (Created,)), to=to, **options)
    return str(caught.value)


# ------------------------------------------------------------------ types


def test_classes_are_kept_in_order_and_once() -> None:
    """The classes stand in the order given, a repeated one once."""
    made = subscribe(Created, Paid, Created)
    assert (made.classes, made.patterns, made.takes_envelope) == ((Created, Paid), (), False)


@pytest.mark.parametrize("pattern", ["order.created", "order.*", "a.b.*", "*", "Created", "größe.*"])
def test_a_string_is_a_name_a_prefix_or_everything(pattern: str) -> None:
    """A subscription by strings keeps them as patterns, and its handler takes envelopes."""
    made = subscribe(pattern)
    assert (made.classes, made.patterns, made.takes_envelope) == ((), (pattern,), True)


@pytest.mark.parametrize("pattern", ["", ".*", "*.created", "order.*.paid", "ord*", "**", "*.*", "order\n", "x" * 256])
def test_a_pattern_with_a_star_elsewhere_is_refused(pattern: str) -> None:
    """A pattern that would silently match nothing is an error that shows the three forms there are."""
    assert "'order.*'" in refused(pattern)


@pytest.mark.parametrize(
    ("types", "text"),
    [
        ((Created, "order.*"), "not both"),
        ((Created(),), "expected a class or a string, got a Created"),
        ((Created | Paid,), "one by one"),
        (([Created, Paid],), "one by one"),
        ((list[int],), "expected a class or a string"),
        ((None,), "got a NoneType"),
        ((handler,), "give the event type first"),
        ((len,), "give the event type first"),
    ],
)
def test_what_is_not_a_type_is_refused(types: tuple[Any, ...], text: str) -> None:
    """Something else than a class or a string is an error that says what to write."""
    assert text in refused(*types)


def test_no_type_is_refused() -> None:
    """A subscription to nothing is an error, found before there is a handler."""
    with pytest.raises(InvalidSubscription, match="at least one event type"):
        split_types(())


# ------------------------------------------------------------------ names


class Stock:
    async def reserve(self, event: Created) -> None: ...

    @staticmethod
    async def release(event: Created) -> None: ...

    @classmethod
    def count(cls, event: Created, delivery: object) -> None: ...

    def __call__(self, event: Created) -> None: ...


def test_the_name_is_the_handlers_qualname_without_what_is_around_it() -> None:
    """A handler has the same name wherever it is defined and whichever module runs it: neither module nor `<locals>` is in it."""

    def inner(event: Created) -> None: ...

    class Local:
        def method(self, event: Created) -> None: ...

    assert subscribe(Created).name == "handler"
    assert subscribe(Created, to=inner).name == "inner"
    assert subscribe(Created, to=Local().method).name == "Local.method"
    assert subscribe(Created, to=Stock().reserve).name == "Stock.reserve"
    assert subscribe(Created, name="mailer").name == "mailer"


@pytest.mark.parametrize("to", [lambda event: None, functools.partial(print, "x"), Stock(), [].append])
def test_a_handler_without_a_name_asks_for_one(to: Callable[..., Any]) -> None:
    """What has no name that stays the same is refused, unless it is given one."""
    assert "name='…'" in refused(to=to)


def test_a_handler_without_a_name_can_be_given_one() -> None:
    """Lambdas, partials, callable objects and built-in methods work with `name=`."""
    for to in [lambda event: None, functools.partial(handler), Stock(), [].append]:
        assert subscribe(Created, to=to, name="x").handler is to


@pytest.mark.parametrize("name", ["", "x" * 256, "a\nb", "a\x00", "\ud800", 3, b"x"])
def test_a_name_is_1_to_255_printable_characters(name: Any) -> None:
    """A name that could not be stored, shown or typed is refused."""
    assert "1 to 255 printable" in refused(name=name)


def test_a_name_may_use_any_script() -> None:
    """Names are text for people: spaces and every script are allowed, up to 255 characters."""
    for name in ("заказы", "mail the customer", "x" * 255):
        assert subscribe(Created, name=name).name == name


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(("order", "concurrency"), [("type", 1), ("log", 1), ("key", 16), ("none", 16)])
def test_concurrency_has_a_default_for_each_order(order: str, concurrency: int) -> None:
    """One at a time for "type" and "log", 16 for "key" and "none"."""
    assert subscribe(Created, order=order).concurrency == concurrency


@pytest.mark.parametrize("order", ["key", "none"])
@pytest.mark.parametrize("concurrency", [1, 5, 1024])
def test_concurrency_is_kept(order: str, concurrency: int) -> None:
    """A concurrency from 1 to 1024 is taken as it is."""
    assert subscribe(Created, order=order, concurrency=concurrency).concurrency == concurrency


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"order": "types"}, "expected one of 'type', 'key', 'log', 'none'"),
        ({"order": None}, "order=None"),
        ({"order": ["key"]}, r"order=['key']"),
        ({"concurrency": 1}, "one delivery at a time per event type"),
        ({"concurrency": 4, "order": "log"}, "needs order='key'"),
        ({"concurrency": 0, "order": "key"}, "from 1 to 1024"),
        ({"concurrency": 1025, "order": "none"}, "from 1 to 1024"),
        ({"concurrency": True, "order": "none"}, "concurrency=True"),
        ({"concurrency": 2.0, "order": "none"}, "concurrency=2.0"),
        ({"retry": 3}, "RetryPolicy(attempts=3)"),
        ({"retry": None}, "RetryPolicy(attempts=1)"),
        ({"on_exhausted": "drop"}, "'dead_letter', 'pause' or 'park'"),
        ({"on_exhausted": "park"}, "needs order='key'"),
        ({"timeout": 0}, "above 0"),
        ({"timeout": -1.0}, "above 0"),
        ({"timeout": math.inf}, "or None for no limit"),
        ({"timeout": math.nan}, "timeout=nan"),
        ({"timeout": True}, "timeout=True"),
        ({"timeout": "60"}, "timeout='60'"),
        ({"start": "end"}, "'now', 'beginning'"),
        ({"start": -1}, "start=-1"),
        ({"start": True}, "start=True"),
        ({"start": 1.5}, "start=1.5"),
        ({"start": None}, "start=None"),
        ({"start": datetime(2026, 1, 1)}, "no time zone"),  # noqa: DTZ001 this is what is refused
        ({"replay": 1}, "expected True or False"),
    ],
)
def test_a_wrong_option_is_refused_with_what_was_expected(options: dict[str, Any], text: str) -> None:
    """Each option is checked where it is written; the message names the subscription, the option and what was expected."""
    message = refused(name="mailer", **options)
    assert text in message
    assert "subscription 'mailer'" in message


def test_park_is_for_keys() -> None:
    """`on_exhausted="park"` is taken with key order."""
    assert subscribe(Created, order="key", on_exhausted="park").on_exhausted == "park"


@pytest.mark.parametrize("start", ["now", "beginning", 0, 17, datetime(2026, 1, 1, tzinfo=UTC)])
def test_a_start_is_kept(start: object) -> None:
    """A start is a word, a position or an aware datetime."""
    assert subscribe(Created, start=start).start == start


def test_other_options_are_kept() -> None:
    """What is given is what the subscription has."""
    retry = RetryPolicy(attempts=None)
    made = subscribe(Created, name="x", order="key", retry=retry, on_exhausted="pause", timeout=None, replay=False)
    assert (made.order, made.retry, made.on_exhausted, made.timeout, made.replay) == ("key", retry, "pause", None, False)
    assert subscribe(Created, timeout=5).timeout == 5.0


# ------------------------------------------------------------------ handlers


def plain(event: Created) -> None: ...


def wrapped_async() -> Callable[..., Any]:
    @functools.wraps(plain)
    async def wrapper(*args: Any) -> None: ...

    return wrapper


def wrapped_plain() -> Callable[..., Any]:
    @functools.wraps(handler)
    def wrapper(*args: Any) -> None: ...

    return wrapper


def injected() -> Callable[..., Any]:
    @functools.wraps(two)
    def wrapper(event: Created) -> None: ...

    return wrapper


class AsyncCall:
    async def __call__(self, event: Created, delivery: object) -> None: ...


@pytest.mark.parametrize(
    ("to", "is_async"),
    [
        (handler, True),
        (plain, False),
        (functools.partial(handler), True),
        (functools.partial(functools.partial(plain)), False),
        (Stock().reserve, True),
        (Stock.release, True),
        (Stock.__dict__["release"], True),  # the staticmethod itself, as a decorator inside the class body sees it
        (Stock.count, False),
        (Stock(), False),
        (AsyncCall(), True),
        (AsyncCall().__call__, True),
        (functools.partial(AsyncCall()), True),
        (wrapped_async(), True),
        (wrapped_plain(), False),
        ([].append, False),
    ],
)
def test_an_async_handler_is_known_as_one(to: Callable[..., Any], *, is_async: bool) -> None:
    """Coroutine functions are awaited, under partials, bound methods and objects too; a wrapper decides for itself."""
    assert subscribe(Created, to=to, name="x").is_async is is_async


def two(event: Created, delivery: object) -> None: ...


def one_and_default(event: Created, tries: int = 3) -> None: ...


def one_and_options(event: Created, *args: Any, flag: bool = False, **options: Any) -> None: ...


def two_and_default(event: Created, delivery: object, tries: int = 3, /) -> None: ...


@pytest.mark.parametrize(
    ("to", "takes_delivery"),
    [
        (plain, False),
        (two, True),
        (one_and_default, False),
        (one_and_options, False),
        (two_and_default, True),
        (functools.partial(two_and_default, Created()), False),
        (functools.partial(two, delivery=None), False),
        (Stock().reserve, False),
        (Stock.count, True),
        (AsyncCall(), True),
        (wrapped_async(), False),
        (injected(), False),  # what the wrapper itself requires counts, where it says so
        ([].append, False),
    ],
)
def test_the_delivery_is_given_to_handlers_that_require_two_arguments(to: Callable[..., Any], *, takes_delivery: bool) -> None:
    """Only positional parameters without a default count: one takes the event, two the event and the delivery."""
    assert subscribe(Created, to=to, name="x").takes_delivery is takes_delivery


def none() -> None: ...
def only_default(event: Created | None = None) -> None: ...
def three(event: Created, delivery: object, more: int) -> None: ...
def keyword(event: Created, *, database: object) -> None: ...
def arguments(*args: Any) -> None: ...
def generator(event: Created) -> Iterator[int]:
    yield 1


async def async_generator(event: Created) -> AsyncIterator[int]:
    yield 1


def unreadable(event: Created) -> None: ...


unreadable.__signature__ = "nonsense"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("to", "text"),
    [
        (none, "the handler takes (); a handler takes (event) or (event, delivery)"),
        (only_default, "without a default"),
        (three, "the handler takes (event, delivery, more)"),
        (keyword, "nothing would be given for database"),
        (arguments, "name its parameters"),
        (Stock.reserve, "subscribe the bound method"),
        (generator, "is a generator"),
        (async_generator, "is a generator"),
        (functools.partial(generator), "is a generator"),
        (Stock, "the class Stock cannot be a handler"),
        (None, "None cannot be a handler"),
        ("handler", "cannot be a handler"),
        (type, "cannot be a handler"),
        (unreadable, "cannot be read"),
    ],
)
def test_a_handler_that_could_not_be_called_is_refused(to: Any, text: str) -> None:
    """A handler that would fail at its first event is refused when it is registered, with its signature shown."""
    assert text in refused(to=to, name="x")
