"""The demo's shop: its events, and which of them will meet trouble.

Everything follows from a seed and a number, so that the process that publishes, the one that is started after the kill, and
the check at the end agree on what each event is without having to tell each other.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Literal
from uuid import UUID

import attrs

from eventbus import event

ORDERS_AT_ONCE = 48
"""Orders are worked on side by side in rounds of this many: all are created, then all are paid, then all are shipped."""

_STAGES = 3
_OPENED = datetime(2025, 3, 1, 9, tzinfo=UTC)
_CUSTOMERS = ("ada", "grace", "linus", "barbara", "edsger", "margaret", "donald", "radia")
_GOODS = {"tea": Decimal("4.20"), "kettle": Decimal("39.90"), "cup": Decimal("7.50"), "biscuits": Decimal("2.95")}


class Method(Enum):
    """How an order is paid."""

    CARD = "card"
    INVOICE = "invoice"


@attrs.frozen
class Line:
    """One line of an order."""

    article: str
    quantity: int
    price: Decimal


@event("shop.order_created", key="order_id")
@attrs.frozen
class OrderCreated:
    """A customer has ordered."""

    order_id: UUID
    customer: str
    lines: tuple[Line, ...]
    total: Decimal
    at: datetime


@event("shop.payment_taken", key="order_id")
@attrs.frozen
class PaymentTaken:
    """An order was paid."""

    order_id: UUID
    amount: Decimal
    method: Method
    at: datetime


@event("shop.order_shipped", key="order_id")
@attrs.frozen
class OrderShipped:
    """An order has left the house."""

    order_id: UUID
    parcel: str
    at: datetime


ShopEvent = OrderCreated | PaymentTaken | OrderShipped

TAKES: dict[str, tuple[type[ShopEvent], ...]] = {
    "stock": (OrderCreated, OrderShipped),
    "mailer": (OrderCreated, PaymentTaken, OrderShipped),
    "ledger": (PaymentTaken, OrderShipped),
}
"""The event types of each subscription."""

ORDER: dict[str, Literal["type", "key", "log"]] = {"stock": "type", "mailer": "key", "ledger": "log"}
"""The order of each subscription, as given to `subscribe`."""


def order_of(number: int) -> tuple[int, int]:
    """Which order the event is about, and which of its stages (0, 1, 2) it is."""
    round_, place = divmod(number, ORDERS_AT_ONCE * _STAGES)
    stage, order = divmod(place, ORDERS_AT_ONCE)
    return round_ * ORDERS_AT_ONCE + order, stage


def shop_event(seed: int, number: int) -> ShopEvent:
    """The event with this number, from 0."""
    order, stage = order_of(number)
    chance = random.Random(f"{seed}/{order}")
    order_id = UUID(int=chance.getrandbits(128), version=4)
    lines = tuple(Line(article, chance.randint(1, 9), _GOODS[article]) for article in chance.sample(sorted(_GOODS), 2))
    total = sum((line.quantity * line.price for line in lines), Decimal(0))
    at = _OPENED + timedelta(milliseconds=number)
    if stage == 0:
        return OrderCreated(order_id, chance.choice(_CUSTOMERS), lines, total, at)
    if stage == 1:
        return PaymentTaken(order_id, total, chance.choice(list(Method)), at)
    return OrderShipped(order_id, f"parcel-{order:06}", at)


@attrs.frozen
class Mishap:
    """What the mailer will meet with an event: `failures` attempts that fail, or an address that will never work."""

    failures: int = 0
    rejected: bool = False


def mishap(event: ShopEvent) -> Mishap:
    """3 mails in 100 fail at first, once or twice; 5 in 1,000 are given up."""
    chance = random.Random(f"{event.order_id}/{type(event).__name__}").random()
    if chance < 0.005:  # noqa: PLR2004
        return Mishap(rejected=True)
    if chance < 0.025:  # noqa: PLR2004
        return Mishap(failures=1)
    if chance < 0.035:  # noqa: PLR2004
        return Mishap(failures=2)
    return Mishap()
