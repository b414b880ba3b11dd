"""What a lane asks of where its deliveries come from: the log first of all, and redrives and replays beside it.

publish → journal → store → *lanes* → workers → outcome. A source gives out attempts and takes back what became of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from eventbus.stores.base import Record, Unit

if TYPE_CHECKING:
    from eventbus._intake import Intake
    from eventbus._outcomes import Attempt, Failure


class Source(Protocol):
    """Where a lane's deliveries come from.

    Attributes:
        beside: it delivers beside the log, as redrives and replays do.
        replay: the replay that it belongs to, or None.
    """

    beside: bool
    replay: object

    def is_idle(self) -> bool:
        """Whether it has nothing to give out, now or later, but first attempts from the log."""

    def take(self) -> Attempt | None:
        """The next attempt that can run now."""

    def acked(self, attempt: Attempt, published: Sequence[Record]) -> None:
        """It is done."""

    def failed(self, failure: Failure) -> None:
        """It failed: try again later, or give up."""

    def given_back(self, attempt: Attempt) -> None:
        """It did not run, or not to its end, and does not count; the latest taken comes first."""


class LogSource(Source, Protocol):
    """The log as a source: it knows the lane's checkpoint."""

    intake: Intake

    def go_on(self, attempt: Attempt) -> Attempt | None:
        """`acked` of an attempt that published nothing, and `take`; where nothing waits for another attempt."""

    @property
    def checkpoint(self) -> int:
        """Up to here everything is settled, or has a row."""

    @property
    def parked(self) -> int:
        """Keys that wait behind a dead letter."""

    def hindrance(self) -> str | None:
        """Why it gives nothing more out, if something must be done about it."""

    def parks(self, record: Record) -> bool:
        """Whether an event waits behind its key's dead letter."""

    def free(self, position: int) -> None:
        """The store has freed what was parked behind the dead letter at this position."""

    def done(self) -> tuple[int, ...]:
        """Positions above the checkpoint that are settled."""

    def clear_to(self, position: int) -> bool:
        """Whether everything up to a position is settled, and the store knows it."""

    def has_settled(self, record: Record) -> bool:
        """Whether this event of the lane is settled, and the store knows it."""

    def confirmed(self, unit: Unit) -> None:
        """A unit of this lane has been committed."""

    def retry_now(self) -> None:
        """The subscription has been resumed: what waits is due, at attempt 1."""

    @property
    def waiting(self) -> int:
        """Deliveries that wait for another attempt."""


class Recallable(Protocol):
    """Attempts of a lane that are on their way through a thread."""

    def give_back_rest(self) -> None:
        """Start no further one of them."""
