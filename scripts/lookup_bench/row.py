"""`Row`: one line of the benchmark of dispatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lookup_bench.stopwatch import Timed


@dataclass(frozen=True)
class Row:
    """What was asked of one path, and what it took.

    Attributes:
        name: what is measured; unique over all groups.
        asked: the bound, such as "<= 2.0x", or "" where the row is there for comparison.
        ns: median time of one call in nanoseconds; None where it was not measured or the row is not about time.
        ratio: median over the repeats of the time against the yardstick's of the same repeat; in group "tail" of the
            99.9th percentile against the median. None where the row is not compared.
        low, high: the smallest and the largest of the repeats: of the ratio where there is one, else of the time.
        note: how it was measured where the name does not say it, or why it was not.
        met: whether the median keeps the bound; None without a bound or without a measurement.
        group: one of GROUPS.
    """

    name: str
    asked: str
    ns: float | None
    ratio: float | None
    low: float | None
    high: float | None
    note: str
    met: bool | None
    group: str


# In the order of the report.
GROUPS = ("floor", "ours", "tail", "memory", "loading", "peers")


def within(
    found: Timed, name: str, group: str, most: float | None = None, *, goal: float | None = None, note: str = ""
) -> Row:
    """The row of a path that may take `most` times the yardstick; without a bound it is there for comparison."""
    asked = "" if most is None else f"<= {most:g}x" if goal is None else f"<= {most:g}x, goal {goal:g}x"
    met = None if most is None else found.ratio <= most
    return Row(name, asked, found.ns, found.ratio, found.low, found.high, note, met, group)
