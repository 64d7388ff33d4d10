"""Strategies of searching a kernel's configurations, over recorded spaces: how close each comes to the optimum.

Every space is searched from nothing, and once begun with the best ten configurations of each other space. A figure is
the optimum's time over the best time found after so many measurements, failed ones included.

usage: python scripts/compare_strategies.py FOLDER [--seeds 20] [--json FILE]

FOLDER holds cachefiles of Kernel Tuner in which every valid configuration of one kernel was timed, NAME.json.gz.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

from search_comparison.recorded_space import SUFFIX, RecordedSpace, load_space
from search_comparison.strategies import STRATEGIES, Strategy

from layerzero_runtime.kernel import Configuration
from layerzero_tune.measure.statistics import geometric_mean
from layerzero_tune.search.configurations.trial import Trial

MARKS = (25, 50, 100)
# Of searches that are begun with the best of another space.
MARKS_BEGUN = (25, 50)
SEEDS_FROM_OTHERS = 10


@dataclass(frozen=True)
class Line:
    """What a strategy reached in a space after so many measurements: the optimum over the best found, of all seeds."""

    strategy: str
    space: str
    begun_with: str
    measurements: int
    geomean: float
    minimum: float
    seeds: int


def searched(
    strategy: Strategy, space: RecordedSpace, begun: Sequence[Configuration], seed: int, budget: int
) -> list[float]:
    """The share of the optimum after each measurement; before the first that has a time 0.

    Raises:
        ValueError: the strategy proposed something twice, something that is not valid, or nothing.
    """
    trials: list[Trial] = []
    shares: list[float] = []
    measured: set[str] = set()
    while len(trials) < budget:
        batch = space.trials(strategy(space, trials, begun, seed, budget))[: budget - len(trials)]
        if not batch:
            raise ValueError(f"nothing was proposed after {len(trials)} of {budget} measurements")
        for trial in batch:
            text = str(sorted(trial.configuration.items()))
            if text in measured:
                raise ValueError(f"{text} was proposed twice")
            measured.add(text)
            found = 0.0 if trial.time_ns is None else space.optimum * 1e6 / trial.time_ns
            shares.append(max(found, shares[-1] if shares else 0.0))
        trials += batch
    return shares


@dataclass(frozen=True)
class Search:
    """One seed of a strategy in a space, begun with the best of another one where that has a name."""

    strategy: str
    space: str
    begun_with: str
    seed: int


def run(search: Search, spaces: Mapping[str, RecordedSpace]) -> list[float]:
    begun = spaces[search.begun_with].best(SEEDS_FROM_OTHERS) if search.begun_with else ()
    budget = max(MARKS_BEGUN if begun else MARKS)
    return searched(STRATEGIES[search.strategy], spaces[search.space], begun, search.seed, budget)


def compare(spaces: Mapping[str, RecordedSpace], seeds: int) -> list[Line]:
    begins = [(space, "") for space in spaces]
    begins += [(space, other) for space in spaces for other in spaces if other != space]
    searches = [Search(strategy, *begin, seed) for strategy in STRATEGIES for begin in begins for seed in range(seeds)]
    with ProcessPoolExecutor() as pool:
        found = dict(zip(searches, pool.map(partial(run, spaces=spaces), searches), strict=True))
    lines: list[Line] = []
    for strategy in STRATEGIES:
        for space, other in begins:
            for mark in MARKS_BEGUN if other else MARKS:
                reached = [found[Search(strategy, space, other, seed)][mark - 1] for seed in range(seeds)]
                geomean = geometric_mean([max(share, 1e-9) for share in reached])
                lines.append(Line(strategy, space, other, mark, round(geomean, 4), round(min(reached), 4), seeds))
    return lines


def table(lines: Sequence[Line]) -> str:
    """A row per strategy, a column per space: geomean and minimum of the seeds after each number of measurements."""
    begins = list(dict.fromkeys((line.space, line.begun_with) for line in lines))
    names = list(dict.fromkeys(line.strategy for line in lines))
    found = {(line.strategy, line.space, line.begun_with, line.measurements): line for line in lines}
    heads = [f"{space}, begun with {other}'s best" if other else space for space, other in begins]
    rows = [f"| strategy | {' | '.join(heads)} |", f"|---|{'--:|' * len(heads)}"]
    for name in names:
        cells = [
            " / ".join(
                f"{line.geomean:.3f} ({line.minimum:.2f})"
                for mark in MARKS
                if (line := found.get((name, *begin, mark))) is not None
            )
            for begin in begins
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"folder of recorded spaces, NAME{SUFFIX}")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    spaces = [load_space(path) for path in sorted(arguments.folder.glob(f"*{SUFFIX}"))]
    if not spaces:
        parser.error(f"{arguments.folder} holds no recorded space, NAME{SUFFIX}")
    start = perf_counter()
    lines = compare({space.name: space for space in spaces}, arguments.seeds)
    for space in spaces:
        failed = sum(time is None for time in space.times.values())
        print(f"{space.name}: {len(space.valid):,} valid configurations, {failed:,} of which fail")
    print(f"Optimum over the best found: geometric mean (minimum) of {arguments.seeds} seeds after", *MARKS)
    print(table(lines))
    if arguments.json is not None:
        found = {
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in ("optuna", "numpy")},
            "duration_s": round(perf_counter() - start),
            "lines": [asdict(line) for line in lines],
        }
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
