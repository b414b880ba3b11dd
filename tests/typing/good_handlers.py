"""Handlers as users write them. Every type checker must find nothing here; see test_typing.py."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, assert_type

import attrs

from eventbus import Delivery, Draft, Envelope, EventBus, RetryPolicy, event


class Base(ABC):
    """A base class of events."""


@event("order.created", version=1, key="order_id")
@attrs.frozen
class Created(Base):
    order_id: str


@event
@dataclass(frozen=True)
class Paid(Base):
    order_id: str


class Shipped:
    """Not of the same base."""


class A1: ...


class A2: ...


class A3: ...


class A4: ...


class A5: ...


class A6: ...


bus = EventBus("shop.db")


@bus.subscribe(Created)
async def async_one(order: Created) -> None: ...


@bus.subscribe(Created)
async def async_two(order: Created, delivery: Delivery) -> None: ...


@bus.subscribe(Created)
def plain_one(order: Created) -> None: ...


@bus.subscribe(Created, name="mailer", order="key", concurrency=4, retry=RetryPolicy(attempts=None), timeout=30, replay=False)
def plain_two(order: Created, delivery: Delivery) -> None:
    delivery.publish(Paid(order.order_id))
    assert_type(delivery.attempt, int)


@bus.subscribe(Created)
async def returns_event(order: Created) -> Paid | None:
    return Paid(order.order_id)


@bus.subscribe(Created)
def returns_list(order: Created) -> list[Paid | Draft]:
    return [Paid(order.order_id), Draft(Paid(order.order_id), key="k")]


@bus.subscribe(Base)
async def of_base(fact: Base) -> None: ...


@bus.subscribe(Created)
async def takes_base(fact: Base) -> None: ...


@bus.subscribe(Created)
async def takes_anything(fact: object) -> None: ...


@bus.subscribe(Created, Paid)
async def of_two(fact: Created | Paid) -> None: ...


@bus.subscribe(Created, Paid)
async def of_two_by_base(fact: Base, delivery: Delivery) -> None: ...


@bus.subscribe(Created, Paid, Shipped, order="log")
async def of_three(fact: Created | Paid | Shipped) -> None: ...


@bus.subscribe(A1, A2, A3, A4, A5, A6, Created, Paid)
async def of_eight(fact: A1 | A2 | A3 | A4 | A5 | A6 | Created | Paid) -> None: ...


@bus.subscribe(A1, A2, A3, A4, A5, A6, Created, Paid, Shipped)
async def of_nine(fact: A1 | A2 | A3 | A4 | A5 | A6 | Created | Paid | Shipped) -> None: ...


@bus.subscribe("order.*")
async def audit(envelope: Envelope) -> None: ...


@bus.subscribe("order.created", "order.paid", start="beginning")
def audit_two(envelope: Envelope, delivery: Delivery) -> None: ...


@bus.subscribe("*")
def audit_all(envelope: Envelope) -> None: ...


@bus.subscribe(Created)
async def with_default(order: Created, tries: int = 3) -> None: ...


@bus.subscribe(Created)
async def with_any(order: Any) -> None: ...


class Stock:
    async def reserve(self, order: Created) -> None: ...

    def release(self, order: Created, delivery: Delivery) -> None: ...

    async def __call__(self, order: Created) -> None: ...


def register(stock: Stock, seen: list[Created]) -> None:
    """Methods, callable objects, lambdas and functions of others are handlers like any other."""
    bus.subscribe(Created)(stock.reserve)
    bus.subscribe(Created)(stock.release)
    bus.subscribe(Created, name="stock")(stock)
    bus.subscribe(Created, name="seen")(seen.append)
    bus.subscribe(Created, name="lambda")(lambda order: order.order_id)
    bus.subscribe(Created, name="lambda-2")(lambda order, delivery: delivery.publish(order))


async def handlers_keep_their_types(order: Created, delivery: Delivery) -> None:
    """A decorated handler can be called, awaited and passed on as what it was."""
    await async_one(order)
    await async_two(order, delivery)
    assert_type(await returns_event(order), Paid | None)
    assert_type(returns_list(order), list[Paid | Draft])
    assert_type(plain_one(order), None)
