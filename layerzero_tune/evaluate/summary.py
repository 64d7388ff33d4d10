"""Summaries of scores, per operation and mode and over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerzero_tune.evaluate.score import Score
from layerzero_tune.measure.statistics import geometric_mean, percentile

SUMMARY_COLUMNS = (
    "operation",
    "mode",
    "shapes",
    "hit rate",
    "efficiency",
    "p10",
    "min",
    "speedup",
    "end to end",
    "slower",
)


@dataclass(frozen=True)
class Summary:
    """The figures of `evaluate --json`; efficiency is best time / chosen time. What is slower than the default is None
    where no remeasurement has confirmed it."""

    n: int
    hit_rate: float
    efficiency_geomean: float
    efficiency_p10: float
    efficiency_min: float
    speedup_vs_default_geomean: float
    speedup_end_to_end_geomean: float | None
    slower_than_default: int | None


def summarise(scores: Sequence[Score], slower: frozenset[Score] | None) -> Summary:
    """The summary of at least one score; `slower` are those confirmed to be slower than the default.

    Raises:
        ValueError: no scores.
    """
    efficiencies = [score.efficiency for score in scores]
    end_to_end = [score.end_to_end for score in scores if score.end_to_end is not None]
    return Summary(
        n=len(scores),
        hit_rate=sum(score.hit for score in scores) / max(len(scores), 1),
        efficiency_geomean=geometric_mean(efficiencies),
        efficiency_p10=percentile(efficiencies, 10),
        efficiency_min=min(efficiencies),
        speedup_vs_default_geomean=geometric_mean([score.speedup for score in scores]),
        speedup_end_to_end_geomean=geometric_mean(end_to_end) if end_to_end else None,
        slower_than_default=None if slower is None else sum(score in slower for score in scores),
    )


def summary_cells(operation: str, mode: str, summary: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of a table for people, in the order of `SUMMARY_COLUMNS`; `summary` has the fields of `Summary`."""
    end_to_end, slower = summary["speedup_end_to_end_geomean"], summary["slower_than_default"]
    return (
        operation,
        mode,
        str(summary["n"]),
        f"{summary['hit_rate']:.3f}",
        f"{summary['efficiency_geomean']:.3f}",
        f"{summary['efficiency_p10']:.3f}",
        f"{summary['efficiency_min']:.3f}",
        f"{summary['speedup_vs_default_geomean']:.2f}x",
        "-" if end_to_end is None else f"{end_to_end:.2f}x",
        "-" if slower is None else str(slower),
    )


def by_operation(scores: Sequence[Score]) -> dict[tuple[str, str], tuple[Score, ...]]:
    """The scores by (operation, mode), in order of name."""
    grouped: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        grouped.setdefault((score.context.operation, score.context.mode), []).append(score)
    return {key: tuple(grouped[key]) for key in sorted(grouped)}
