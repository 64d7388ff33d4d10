"""The benchmark's rows as Markdown: all of them, and those that the README shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lookup_bench.row import GROUPS, Row

_COLUMNS = ("", "asked", "measured", "of the repeats", "time", "met")
_RULE = "|---|---|--:|--:|--:|---|"


def full_table(rows: Iterable[Row]) -> str:
    """All rows, and how they were measured."""
    lines = [_line((*_COLUMNS, "how")), _RULE + "---|"]
    return "\n".join([*lines, *(_line((*_cells(row), "" if row.ns is None else row.note)) for row in ordered(rows))])


def ordered(rows: Iterable[Row]) -> list[Row]:
    """By group, within a group as they were measured."""
    return sorted(rows, key=lambda row: GROUPS.index(row.group))


def readme_section(results: Mapping[str, Any], path: str) -> str:
    """What was asked for and what others take, from the content of the file at `path`."""
    rows = [Row(**row) for row in results["rows"]]
    shown = [row for row in rows if row.asked or (row.group == "peers" and row.ns is not None)]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    lines = [
        f"{results['device']['name']}; {versions}; measured {results['measured_at'][:10]}; over "
        f"`{results['table']}`; from `{path}`. 1.00x is {results['yardstick_ns']['median']:.0f} ns, a hit of an "
        "`lru_cache` with four fresh ints in the same run.",
        "",
        _line(_COLUMNS),
        _RULE,
        *(_line(_cells(row)) for row in ordered(shown)),
        "",
    ]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    measured = f"{row.ratio:.2f}x" if row.ratio is not None else row.note if row.ns is None else ""
    spread = ""
    if row.low is not None and row.high is not None:
        spread = (
            f"{row.low:.2f} to {row.high:.2f}" if row.ratio is not None else f"{_time(row.low)} to {_time(row.high)}"
        )
    met = {True: "yes", False: "NO", None: ""}[row.met]
    return row.name, row.asked, measured, spread, "" if row.ns is None else _time(row.ns), met


def _time(ns: float) -> str:
    return f"{ns:,.0f} ns" if ns < 1e5 else f"{ns / 1e6:.2f} ms"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
