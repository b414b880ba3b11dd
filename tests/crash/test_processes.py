"""Four processes on one file, killed at random moments; see `processes` and `checks` for what must hold."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.crash import processes
from tests.crash.members import Members
from tests.crash.nursery import Nursery
from tests.first_version import make_first_version

pytestmark = pytest.mark.timeout(300)  # each wait has a patience of its own, and says what did not come


@pytest.mark.parametrize("number", range(2))
def test_nothing_acknowledged_is_lost_by_kills_among_several(nursery: Nursery, number: int) -> None:
    """Whoever of four is killed, and however many: what was acknowledged is settled once by every subscription, in order."""
    case = processes.case(1, number, nursery)
    assert not case.faults, case.told()
    assert case.checked >= processes.KILLS


def test_one_publishes_another_handles(members: Members) -> None:
    """What a process publishes that handles nothing (`dispatch=False`), another handles, in order."""
    members.start("worker")
    web = members.start("web", dispatch=False)
    web.tell("publish", 0, 20)
    assert [said.value for said in members.wait_for("handled", 20)] == list(range(20))
    assert {said.who for said in members.said("handled")} == {"worker"}


def test_shares_of_those_who_come_and_go(members: Members) -> None:
    """Who joins gets its share; who leaves, or is killed, has its share go to the others. One process may have two buses."""
    one = members.start("one", order="key", concurrency=12)
    members.wait_for_lanes({one: 12})
    two = members.start("two", order="key", concurrency=12)
    members.wait_for_lanes({one: 6, two: 6})
    pair = members.start("pair", order="key", concurrency=12, buses=2)
    lanes = members.wait_for_lanes({one: 3, two: 3, pair: 6})
    assert sorted(lane for each in lanes.values() for lane in each) == sorted(map(str, range(12)))
    pair.tell("publish", 0, 50)
    pair.leave()
    members.wait_for_lanes({one: 6, two: 6})
    two.kill()
    members.wait_for_lanes({one: 12})
    one.tell("drain")
    assert members.wait_for("drained")[0].value == 0
    assert {said.value for said in members.said("handled")} == set(range(50))


def test_a_killed_process_has_its_lanes_go_on_elsewhere(members: Members) -> None:
    """That it is dead is seen by its lock, long before its lease ends: the keys that it had go on in another process."""
    one, two = (members.start(name, order="key", concurrency=4, lease=3600.0) for name in ("one", "two"))
    members.wait_for_lanes({one: 2, two: 2})
    two.kill()
    one.tell("publish", 0, 16)
    assert sorted(said.value for said in members.wait_for("handled", 16)) == list(range(16))


def test_a_forked_child(members: Members) -> None:
    """The parent's bus says in a forked child what to do instead; and the child keeps nothing of the parent's alive."""
    parent = members.start("parent", lease=3600.0)
    other = members.start("other", lease=3600.0)
    parent.tell("fork")
    (forked,), (raised,) = members.wait_for("forked"), members.wait_for("raised")
    try:
        assert raised.value.startswith("WrongLoop: ")
        assert "make and open an EventBus of its own here" in raised.value
        parent.tell("publish", 0, 1)
        members.wait_for("handled", 1)
        parent.kill()
        other.tell("publish", 1, 1)
        assert members.wait_for("handled", 2)[-1].who == "other"
    finally:
        os.kill(forked.value, signal.SIGKILL)


def test_a_process_with_a_slow_disk(members: Members) -> None:
    """One whose transactions take long has the others wait their turn; all is handled, and nothing is refused."""
    members.start("slow", order="key", concurrency=4, slow_disk=0.05)
    quick = members.start("quick", order="key", concurrency=4)
    quick.tell("publish", 0, 30)
    members.wait_for("handled", 30)
    assert sorted(said.value for said in members.said("handled")) == list(range(30))
    assert members.said("refused") == []


def test_a_rolling_deployment(members: Members) -> None:
    """From one order to another, and another, with a backlog, process by process: each event is handled once, keys stay in order."""
    names = iter("abcdef")
    running = [members.start(next(names), order="type", slow=0.002) for _ in range(2)]
    running[0].tell("publish", 0, 200)
    orders: tuple[dict[str, Any], ...] = ({"order": "key", "concurrency": 4}, {"order": "none", "concurrency": 8})
    for options in orders:
        for old in running[:2]:
            running.append(members.start(next(names), slow=0.002, **options))
            old.leave()
        del running[:2]
    running[0].tell("publish", 200, 50)
    members.wait_for("handled", 250)
    running[0].tell("drain")
    assert members.wait_for("drained")[0].value == 0
    handled = [said.value for said in members.said("handled")]
    assert sorted(handled) == list(range(250))
    for key in range(16):
        of_key = [n for n in handled if n % 16 == key and n < 200]
        assert of_key == sorted(of_key)


@pytest.mark.parametrize("version", [0, 1])
def test_four_start_at_the_same_instant(tmp_path: Path, nursery: Nursery, version: int) -> None:
    """On a file that is not there yet, or whose tables are of the first version: one of them makes the tables, all of them work."""
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        with Members(folder, nursery, ("asyncio", "trio")[number % 2]) as members:
            if version:
                make_first_version(members.database)
            at = time.monotonic() + 0.05
            four = [members.start(name, wait=False, at=at, order="key", concurrency=4) for name in "abcd"]
            members.wait_for("open", 4)
            for first, member in enumerate(four):
                member.tell("publish", 4 * first, 4)
            assert sorted(said.value for said in members.wait_for("handled", 16)) == list(range(16))
