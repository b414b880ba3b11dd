"""`python -m eventbus bench`: *what is shown*, in lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from eventbus.cli.bench_floor import BATCH, Floor
from eventbus.cli.bench_work import Singles, Throughput
from eventbus.cli.demo_show import percentile

MEANING = (
    "Rates: from the first publish until the last ack is committed, encoding and decoding included; the handlers do nothing.",
    "C is one durable commit of this disk and F what SQLite inserts on it without a bus; times are from the call of publish.",
)

_HEADINGS = ("what", "events/s", "of F", "publish p50 / p99", "handler called p50 / p99")


def disk_lines(floors: Sequence[Floor]) -> Iterator[str]:
    """What the bare loops did."""
    commits = sorted(second for floor in floors for second in floor.commits)
    p50, p99 = (percentile(commits, percent) for percent in (50, 99))
    rates = [floor.per_second for floor in floors]
    yield (
        f"your disk   one durable commit takes {_ms(p50)} (C, the median of {len(commits):,}); "
        f"99 % take less than {_ms(p99)}, the longest took {_ms(commits[-1])}"
    )
    yield f"SQLite      {median(rates):,.0f} events/s inserted bare, {BATCH} a commit (F; {min(rates):,.0f} to {max(rates):,.0f})"


def table_lines(floors: Sequence[Floor], results: Mapping[str, Sequence[Throughput | Singles]]) -> Iterator[str]:
    """A line for each work."""
    lines = [_HEADINGS, *(_cells(what, floors, done) for what, done in results.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    for line in lines:
        numbers = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        yield "  ".join([line[0].ljust(widths[0]), *numbers]).rstrip()


def _cells(what: str, floors: Sequence[Floor], done: Sequence[Throughput | Singles]) -> tuple[str, str, str, str, str]:
    ratio = median(each.per_second / floor.per_second for floor, each in zip(floors, done, strict=True))
    rate, of_floor = median(each.per_second for each in done), f"{ratio:.2f}"
    singles = [each for each in done if isinstance(each, Singles)]
    publishing, calling = "", ""
    if singles:
        of_floor = of_floor if singles[0].tasks > 1 else ""  # one at a time is measured by C
        publishing = " / ".join(_ms(median(each.publishing(percent) for each in singles)) for percent in (50, 99))
        calling = " / ".join(_ms(median(each.calling(percent) for each in singles)) for percent in (50, 99))
    return what, f"{rate:,.0f}", of_floor, publishing, calling


def _ms(seconds: float) -> str:
    """In milliseconds, with three figures that mean something."""
    milliseconds = seconds * 1_000
    decimals = 2 if milliseconds < 10 else 1 if milliseconds < 100 else 0  # noqa: PLR2004
    return f"{milliseconds:.{decimals}f} ms"
