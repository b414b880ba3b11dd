"""Processes that are stopped (SIGSTOP) and go on; see `stops` for those that are stopped at random moments."""

from __future__ import annotations

import os
import signal

import pytest

from tests.crash import stops
from tests.crash.members import Members
from tests.crash.nursery import Nursery

pytestmark = pytest.mark.timeout(300)  # each wait has a patience of its own, and says what did not come


@pytest.mark.parametrize("number", range(2))
def test_processes_that_are_stopped_past_their_lease(nursery: Nursery, number: int) -> None:
    """Others go on with their lanes; what they write afterwards is refused, they take part again, and nothing is lost or doubled."""
    case = stops.case(1, number, nursery)
    assert not case.faults, case.told()
    assert case.checked >= stops.STOPS


def test_a_process_that_is_stopped_in_a_handler(members: Members) -> None:
    """When its lease has ended, another handles the event; the outcome of the stopped one is refused, with what it would publish."""
    one = members.start("one", lease=0.5)
    one.tell("freeze", "handler")
    one.tell("publish", 0, 1)
    members.wait_for("begun")
    two = members.start("two", lease=0.5)
    assert [said.who for said in members.wait_for("handled")] == ["two"]
    two.tell("drain")
    members.wait_for("drained")
    os.kill(one.pid, signal.SIGCONT)
    members.wait_for("handled", who="one")
    one.tell("publish", 1, 10)
    one.tell("drain")
    assert members.wait_for("drained", who="one")[0].value == 0
    one.leave()
    two.leave()
    paid = members.paid()
    assert paid[0] == (0, "two")
    assert [n for n, _ in paid] == list(range(11))


def test_a_process_that_was_stopped_and_fails(members: Members) -> None:
    """Its failure counts for nothing while another, to whom the lane has gone, is handling the event. It has not died, so the
    lane is not on probation."""
    one = members.start("one", lease=0.5, fails=True)
    one.tell("freeze", "handler")
    one.tell("publish", 0, 1)
    members.wait_for("begun")
    two = members.start("two", lease=0.5, slow=1.0)
    members.wait_for("begun", who="two")
    assert members.suspicions() == []
    os.kill(one.pid, signal.SIGCONT)
    members.wait_for("handled", who="two")
    two.tell("drain")
    assert members.wait_for("drained")[0].value == 0
    one.leave()
    two.leave()
    assert (members.paid(), members.dead()) == ([(0, "two")], 0)


def test_a_process_that_is_stopped_while_it_has_the_turn_to_write(members: Members) -> None:
    """Nobody can write until it goes on; they are told whose turn it is, that nothing was stored, and all of it goes on then."""
    one = members.start("one", lease=0.5, busy=0.3)
    two = members.start("two", lease=0.5, busy=0.3)
    one.tell("freeze", "turn")
    one.tell("publish", 0, 1)
    members.until(lambda: one.is_stopped() or None, "one to be stopped")
    two.tell("publish", 1, 5)
    (refused, *_) = members.wait_for("refused", who="two")
    assert "another process has held its turn to write for 0.3 s; it may be stopped" in refused.value
    assert "Nothing was stored" in refused.value
    os.kill(one.pid, signal.SIGCONT)
    members.wait_for("published", 6)
    members.wait_for("handled", 6)
    two.tell("drain")
    assert members.wait_for("drained")[0].value == 0
    one.leave()
    two.leave()
    assert sorted(n for n, _ in members.paid()) == list(range(6))
