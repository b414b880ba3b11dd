"""The types of `bus.subscribe`, made so that mypy, pyright and ty flag a wrong handler with a short message.

Beside the way publish → journal → store → lanes → workers → outcome: nothing here does anything at run time but `given`.
tests/typing holds what users get to read; how it came to look like this stands in the comments.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, Never, Protocol, overload

from typing_extensions import TypeVar

from eventbus._model import Delivery, Envelope, ReplaySummary

Point = datetime | int | None
"""A place in the log: an aware datetime, or a position."""
Progress = Callable[[ReplaySummary], object]

E = TypeVar("E")
R = TypeVar("R")

# One variable for each place: `*types: type[E]` would join A and B to object, and a right handler of A | B be refused. Places
# that are not given solve to their defaults: Never vanishes from the union. The first one's is for `subscribe("order.*")`,
# whose handler takes the envelope.
E1 = TypeVar("E1", default=Envelope)
E2 = TypeVar("E2", default=Never)
E3 = TypeVar("E3", default=Never)
E4 = TypeVar("E4", default=Never)
E5 = TypeVar("E5", default=Never)
E6 = TypeVar("E6", default=Never)
E7 = TypeVar("E7", default=Never)
E8 = TypeVar("E8", default=Never)


class _NotGiven(str):
    """A str of its own identity, since a place takes classes and strings."""

    __slots__ = ()


# Not `...`: outside of stubs pyright checks a default against the parameter's type, at every call. A string fits the type
# and says nothing about the place's variable.
NOT_GIVEN: Final[str] = _NotGiven()


def given(*types: type[Any] | str) -> tuple[type[Any] | str, ...]:
    """The types that were given, without the places that were left empty."""
    return tuple(item for item in types if item is not NOT_GIVEN)


class On(Protocol[E]):
    """What `bus.subscribe(…)` returns: a decorator for a handler of `E`, which it returns unchanged.

    The handler may be async or not, and may return what it likes: None, an event, a list of events or of `Draft`.
    """

    @overload
    def __call__(self, handler: Callable[[E], R], /) -> Callable[[E], R]: ...

    @overload
    def __call__(self, handler: Callable[[E, Delivery], R], /) -> Callable[[E, Delivery], R]: ...

    # The first one again: where none fits, mypy shows what the first expects and pyright what the last does, and for nearly
    # every handler this is the one that it wanted to fit.
    @overload
    def __call__(self, handler: Callable[[E], R], /) -> Callable[[E], R]: ...  # type: ignore[overload-cannot-match]  # pyright: ignore[reportOverlappingOverload]
