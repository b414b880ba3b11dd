"""`python -m eventbus demo`: it runs to its end, and its verdict can be bad."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import msgspec
import pytest

from eventbus.__main__ import main
from eventbus.cli.demo_check import Evidence, Run, Stored, check
from eventbus.cli.demo_reports import Attempt, Published, Replayed, read
from eventbus.cli.demo_shop import TAKES, PaymentTaken, mishap, order_of, shop_event
from eventbus.cli.demo_show import percentile, rows, table, verdict

SEED, EVENTS, KILLED_AT = 7, 600, 300


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eventbus", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


# ------------------------------------------------------------------ end to end


def test_the_demo_kills_recovers_replays_and_finds_nothing_wrong() -> None:
    """It exits with 0, says what it saw, writes no control codes into a pipe, and leaves no file."""
    done = run_demo("demo", "--events", "1152", "--seed", "11")
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("SIGKILL", "recovered", "replayed 768 events", "1,152 events", "redelivered", "checks hold"):
        assert words in done.stdout
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    (folder,) = (Path(word[:-1]).parent for word in done.stdout.split() if word.endswith("shop.db;"))
    assert not folder.exists()


def test_a_file_that_is_asked_for_is_kept(tmp_path: Path) -> None:
    """`--db` keeps the file, and a second demo does not run into it."""
    file = tmp_path / "kept.db"
    done = run_demo("demo", "--events", "400", "--db", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert file.exists()
    assert run_demo("demo", "--db", str(file)).returncode == 2


def test_a_child_that_cannot_work_is_a_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A demo that could not be played is not a demo that found nothing wrong."""
    assert main(["demo", "--events", "400", "--db", str(tmp_path / "no such folder" / "shop.db")]) == 1
    assert "FAILED: the process ended by itself" in capfd.readouterr().out


def test_without_a_command_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m eventbus` prints its help."""
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_too_few_events_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A stream too short to be killed in is refused."""
    assert main(["demo", "--events", "10"]) == 2
    assert "at least" in capsys.readouterr().out


# ------------------------------------------------------------------ evidence of a good run, without a bus


def receipt(number: int) -> Published:
    return Published(number, f"id-{number:04}", number + 1, duplicate=False, began=float(number), at=number + 0.5)


def attempts_of(name: str, number: int, *, replaying: bool = False) -> list[Attempt]:
    event, sent = shop_event(SEED, number), receipt(number)
    if not isinstance(event, TAKES[name]):
        return []
    trouble = mishap(event) if name == "mailer" else None
    failures = trouble.failures if trouble else 0
    last = "rejected" if trouble and trouble.rejected else "handled"
    outcomes = ["failed"] * failures + [last]
    return [
        Attempt(name, sent.id, sent.position, n, outcome, replaying, number + 0.002)  # type: ignore[arg-type]
        for n, outcome in enumerate(outcomes, start=1)
    ]


def run_of(first: int, stop: int, delivered_from: int) -> Run:
    attempts = [a for n in range(delivered_from, stop) for name in TAKES for a in attempts_of(name, n)]
    return Run([receipt(n) for n in range(first, stop)], attempts)


def good() -> Evidence:
    """What a demo without a fault leaves; the last ten events before the kill are delivered again after it."""
    events = [shop_event(SEED, n) for n in range(EVENTS)]
    before, after = run_of(0, KILLED_AT, 0), run_of(KILLED_AT, EVENTS, KILLED_AT - 10)
    replay = [a for n in range(EVENTS) for a in attempts_of("ledger", n, replaying=True)]
    takings = sum(e.amount for e in events if isinstance(e, PaymentTaken))
    return Evidence(
        SEED,
        (before, Run(after.published, [*after.attempts, *replay])),
        [Stored(receipt(n).position, receipt(n).id, event) for n, event in enumerate(events)],
        frozenset(("mailer", receipt(n).id) for n, event in enumerate(events) if mishap(event).rejected),
        dict.fromkeys(TAKES, 0),
        Replayed("ledger", len(replay), 0.1, str(takings)),
    )


def change_run(evidence: Evidence, which: int, attempts: Callable[[list[Attempt]], list[Attempt]]) -> Evidence:
    runs = list(evidence.runs)
    runs[which] = attrs.evolve(runs[which], attempts=attempts(list(runs[which].attempts)))
    return attrs.evolve(evidence, runs=tuple(runs))


def bad_claims(evidence: Evidence) -> list[str]:
    """The first words of the claims that do not hold."""
    return [each.claim.split(":")[0] for each in check(evidence) if each.faults]


def test_a_run_without_fault_passes() -> None:
    """Redeliveries after a kill, retries, and dead letters that were to come are no faults."""
    assert bad_claims(good()) == []
    assert verdict(check(good()))[-1] == "All 8 checks hold."


# ------------------------------------------------------------------ evidence of bad runs


def lose(evidence: Evidence) -> Evidence:
    return attrs.evolve(evidence, stored=[s for s in evidence.stored if s.id != "id-0042"])


def alter(evidence: Evidence) -> Evidence:
    stored = [attrs.evolve(s, event=shop_event(SEED, 1)) if s.id == "id-0042" else s for s in evidence.stored]
    return attrs.evolve(evidence, stored=stored)


def move(evidence: Evidence) -> Evidence:
    return attrs.evolve(evidence, stored=[attrs.evolve(s, position=9_999) if s.id == "id-0042" else s for s in evidence.stored])


def store_twice(evidence: Evidence) -> Evidence:
    again = Published(42, "id-9999", 9_999, duplicate=False, began=0.0, at=0.1)
    runs = (evidence.runs[0], attrs.evolve(evidence.runs[1], published=[again, *evidence.runs[1].published]))
    return attrs.evolve(evidence, runs=runs, stored=[*evidence.stored, Stored(9_999, "id-9999", shop_event(SEED, 42))])


def test_no_acknowledgement_at_all_is_a_fault() -> None:
    """Nothing published is not nothing lost."""
    empty = Evidence(SEED, (Run([], []), Run([], [])), [], frozenset(), {}, None)
    assert "nothing lost" in bad_claims(empty)


@pytest.mark.parametrize("tamper", [lose, alter, move, store_twice])
def test_an_acknowledged_event_that_is_not_in_the_file_as_it_was_is_lost(tamper: Callable[[Evidence], Evidence]) -> None:
    """Missing, changed, elsewhere, or twice: each is seen."""
    assert "nothing lost" in bad_claims(tamper(good()))


def test_an_event_that_nobody_published_is_seen() -> None:
    """A position that no receipt names is a fault, and so is a delivery of such an event, or of one that is not asked for."""
    evidence = good()
    assert bad_claims(attrs.evolve(evidence, stored=[*evidence.stored, Stored(9_999, "x", object())])) == ["nothing extra"]
    ghost = Attempt("stock", "x", 9_999, 1, "handled", replaying=False, at=1.0)
    assert "nothing extra" in bad_claims(change_run(evidence, 1, lambda attempts: [*attempts, ghost]))
    payment = next(n for n in range(EVENTS) if isinstance(shop_event(SEED, n), PaymentTaken))
    stray = msgspec.structs.replace(attempts_of("ledger", payment)[0], by="stock")
    assert "nothing extra" in bad_claims(change_run(evidence, 1, lambda attempts: [stray, *attempts]))


@pytest.mark.parametrize("name", list(TAKES))
def test_an_event_that_one_subscription_missed_is_seen(name: str) -> None:
    """Handled by the others is not handled by all."""
    number = next(n for n in range(50, EVENTS) if attempts_of(name, n) and attempts_of(name, n)[-1].outcome == "handled")

    def drop(attempts: list[Attempt]) -> list[Attempt]:
        return [a for a in attempts if a.replaying or (a.by, a.id) != (name, receipt(number).id)]

    assert bad_claims(change_run(good(), 0, drop)) == ["nothing missed"]


def test_a_failed_attempt_alone_is_a_miss() -> None:
    """To have failed is not to have handled."""

    def fail(attempts: list[Attempt]) -> list[Attempt]:
        return [msgspec.structs.replace(a, outcome="failed") if (a.by, a.id) == ("stock", "id-0000") else a for a in attempts]

    assert "nothing missed" in bad_claims(change_run(good(), 0, fail))


def swap(name: str, first: int, second: int) -> Callable[[list[Attempt]], list[Attempt]]:
    """Exchange the reports of two events."""

    def exchange(attempts: list[Attempt]) -> list[Attempt]:
        places = [i for i, a in enumerate(attempts) if a.by == name and a.id in (receipt(first).id, receipt(second).id)]
        one, other = places[0], places[-1]
        attempts[one], attempts[other] = attempts[other], attempts[one]
        return attempts

    return exchange


def test_an_overtaken_delivery_is_seen_in_each_order() -> None:
    """By type, by key, and over the log: two deliveries of a lane that change places are a fault."""
    by_type = swap("stock", 10, 11)
    stages = [n for n in range(200) if order_of(n)[0] == 5]
    assert not any(mishap(shop_event(SEED, n)).failures for n in stages)
    for tamper in (by_type, swap("mailer", stages[0], stages[1]), swap("ledger", 60, 61)):
        assert bad_claims(change_run(good(), 0, tamper)) == ["nothing out of order"]


def test_other_lanes_may_overtake() -> None:
    """Two keys owe each other no order."""
    assert bad_claims(change_run(good(), 0, swap("mailer", 10, 11))) == []


def test_overtaking_a_retry_is_seen() -> None:
    """What comes after an event that waits for its next attempt must wait in its lane."""

    def overtake(attempts: list[Attempt]) -> list[Attempt]:
        place = next(i for i, a in enumerate(attempts) if (a.by, a.id) == ("stock", "id-0010"))
        failed = msgspec.structs.replace(attempts[place], outcome="failed")
        later = next(i for i, a in enumerate(attempts) if (a.by, a.id) == ("stock", "id-0012"))
        return [*attempts[:place], failed, *attempts[place + 1 : later + 1], attempts[place], *attempts[later + 1 :]]

    assert bad_claims(change_run(good(), 0, overtake)) == ["nothing out of order"]


def test_handling_twice_in_one_process_is_seen() -> None:
    """A redelivery is for a kill; without one it is a fault."""

    def repeat(attempts: list[Attempt]) -> list[Attempt]:
        place = next(i for i, a in enumerate(attempts) if (a.by, a.id) == ("stock", "id-0010"))
        return [*attempts[: place + 1], attempts[place], *attempts[place + 1 :]]

    assert bad_claims(change_run(good(), 0, repeat)) == ["nothing out of order"]


def test_order_is_judged_across_the_kill() -> None:
    """An event that the first process skipped may not come late, in the second."""
    number = 12

    def skip(attempts: list[Attempt]) -> list[Attempt]:
        return [a for a in attempts if (a.by, a.id) != ("stock", receipt(number).id)]

    late = change_run(change_run(good(), 0, skip), 1, lambda attempts: [*attempts_of("stock", number), *attempts])
    assert bad_claims(late) == ["nothing out of order"]


def test_dead_letters_too_few_and_too_many_are_seen() -> None:
    """Given up on without need, or not in the file though rejected."""
    evidence = good()
    assert evidence.dead
    assert "dead letters" in bad_claims(attrs.evolve(evidence, dead=frozenset()))
    assert bad_claims(attrs.evolve(evidence, dead=evidence.dead | {("stock", "id-0000")})) == ["dead letters"]


def test_a_backlog_in_the_file_is_seen() -> None:
    """What the file calls unsettled is left; a subscription it does not know is, too."""
    assert bad_claims(attrs.evolve(good(), lag={"stock": 0, "mailer": 3, "ledger": 0})) == ["nothing left"]
    assert bad_claims(attrs.evolve(good(), lag={"stock": 0, "mailer": 0})) == ["nothing left"]


def test_an_incomplete_replay_is_seen() -> None:
    """Not ended, one short, out of order, or with another sum."""
    evidence = good()
    assert evidence.replayed is not None
    assert bad_claims(attrs.evolve(evidence, replayed=None)) == ["replay"]
    wrong = msgspec.structs.replace(evidence.replayed, takings="0.01")
    assert bad_claims(attrs.evolve(evidence, replayed=wrong)) == ["replay"]
    assert bad_claims(change_run(evidence, 1, lambda attempts: attempts[:-1])) == ["replay"]
    assert bad_claims(change_run(evidence, 1, lambda a: [*a[:-2], a[-1], a[-2]])) == ["replay"]


def test_events_published_out_of_order_are_seen() -> None:
    """An order's payment may not stand in the file before the order."""
    first, second = [n for n in range(200) if order_of(n)[0] == 5][:2]
    evidence = good()
    published = list(evidence.runs[0].published)
    published[first] = msgspec.structs.replace(published[first], position=receipt(second).position)
    published[second] = msgspec.structs.replace(published[second], position=receipt(first).position)
    runs = (attrs.evolve(evidence.runs[0], published=published), evidence.runs[1])
    assert "published in order" in bad_claims(attrs.evolve(evidence, runs=runs))


def test_a_bad_verdict_says_what_and_how_much() -> None:
    """The faults are named, the first few of them."""
    lines = verdict(check(attrs.evolve(good(), stored=[])))
    assert "          - event 0 was acknowledged, and is not in the file" in lines
    assert "          - and 595 more" in lines
    assert lines[-1] == "1 of 8 checks FAILED."


# ------------------------------------------------------------------ the table


def test_the_table_counts_each_delivery_once() -> None:
    """Handled, retried, dead and redelivered are deliveries, whatever the number of attempts."""
    stock, mailer, ledger = rows(good())
    assert (stock.handled, ledger.handled, ledger.replayed, stock.replayed) == (408, 384, 384, 0)
    assert mailer.handled + mailer.dead == EVENTS
    assert mailer.redelivered == 10
    assert mailer.retried > 0
    assert stock.p50 == pytest.approx(2.0)
    assert any(line.startswith("mailer") for line in table(good()))


def test_percentiles() -> None:
    """The smallest value that so many in a hundred do not exceed."""
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile([3.0], 99)) == (50.0, 99.0, 3.0)


def test_reports_survive_the_pipe() -> None:
    """What is told is read."""
    assert read(msgspec.json.encode(receipt(3))) == receipt(3)
