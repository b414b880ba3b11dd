"""`python -m eventbus bench`: *the events* that are published. Six fields each, none of them trivial."""

from __future__ import annotations

import random
import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import attrs

from eventbus import event

KEYS = 1_000
"""Different keys among `KeyedOrder`s."""


@event("bench.order")
@attrs.frozen
class Order:
    """The event of the measure."""

    order_id: uuid.UUID
    customer: str
    total: Decimal
    number: int
    placed_at: datetime
    note: str | None


@event("bench.keyed_order", key="customer")
@attrs.frozen
class KeyedOrder:
    """The same with a key."""

    order_id: uuid.UUID
    customer: str
    total: Decimal
    number: int
    placed_at: datetime
    note: str | None


@event("bench.order_paid")
@attrs.frozen
class OrderPaid:
    """What a handler makes of an `Order` in a chain of two; as large."""

    order_id: uuid.UUID
    customer: str
    total: Decimal
    number: int
    paid_at: datetime
    note: str | None


def orders(count: int) -> list[Order]:
    """Orders, numbered from 0; the same ones each time."""
    return [Order(*_fields(number)) for number in range(count)]


def keyed_orders(count: int) -> list[KeyedOrder]:
    """The same with keys, which take turns."""
    return [KeyedOrder(*_fields(number)) for number in range(count)]


def numbered(like: Order, number: int) -> Order:
    """The same order with another number."""
    return Order(like.order_id, like.customer, like.total, number, like.placed_at, like.note)


def paid(order: Order) -> OrderPaid:
    """What follows from an order."""
    return OrderPaid(order.order_id, order.customer, order.total, order.number, order.placed_at, order.note)


def _fields(number: int) -> tuple[uuid.UUID, str, Decimal, int, datetime, str | None]:
    chance = random.Random(number)
    return (
        uuid.UUID(int=chance.getrandbits(128), version=4),
        f"customer-{number % KEYS:03}",
        Decimal(chance.randrange(100, 100_000)) / 100,
        number,
        datetime(2026, 1, 1, tzinfo=UTC) + timedelta(milliseconds=chance.randrange(10**10)),
        "please ring twice" if number % 2 else None,
    )
