"""How the loop gives way to a thread."""

from __future__ import annotations

import threading
import time

from eventbus._gates import GIVE_WAY, Turn


def test_a_thread_that_is_done_without_having_come() -> None:
    """The loop does not wait for a thread that has done all that it was called for, whether or not it said that it came."""
    turn = Turn()
    turn.call()
    turn.take()
    turn.leave()
    began = time.perf_counter()
    for _ in range(100):
        turn.give_way()
    assert time.perf_counter() - began < 50 * GIVE_WAY


def test_the_loop_goes_on_when_the_thread_has_come() -> None:
    """It waits for the thread, and goes on with it."""
    turn, called, gone_on = Turn(), threading.Event(), threading.Event()

    def give_way() -> None:
        turn.call()
        called.set()
        turn.give_way()
        gone_on.set()

    loop = threading.Thread(target=give_way)
    loop.start()
    assert called.wait(10)
    turn.come()
    assert gone_on.wait(10)
    turn.leave()
    loop.join()


def test_a_thread_that_is_late() -> None:
    """A thread that waits for others is waited for once, and again only when it has come meanwhile."""
    turn = Turn()
    turn.call()
    turn.take()
    began = time.perf_counter()
    for _ in range(100):
        turn.give_way()
        turn.call()
    assert GIVE_WAY <= time.perf_counter() - began < 50 * GIVE_WAY
    turn.come()
    turn.leave()
    assert _waits(turn)


def test_what_it_was_called_for_meanwhile() -> None:
    """A call that comes after the thread has taken what there was is not forgotten when it begins."""
    turn = Turn()
    turn.call()
    turn.take()
    turn.call()
    turn.come()
    turn.leave()
    assert _waits(turn)


def _waits(turn: Turn) -> bool:
    began = time.perf_counter()
    turn.give_way()
    return time.perf_counter() - began >= GIVE_WAY
