"""What a table is worth between its measured sizes: compile results without a fold of their cells, score it on those.

A judge for changes to the compiler that needs no measuring: the times of the cells left out are in the results. The
smaller table misses at some of them, such as those that bounded the measured range; efficiency is over the hits.
Compare figures of one command line alone: with fewer points than the results have, all are worse than an evaluation's.

With --on the whole table is scored on the contests of an evaluation instead (`layerzero-tune evaluate --out`).

usage: python scripts/cross_validate.py RESULTS [--folds 5] [--seeds 3] [--on HELD_OUT] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.cell import Key, cell_of
from layerzero_tune.compile.emit import leaf_at
from layerzero_tune.compile.form import Entry
from layerzero_tune.compile.judge import Choice, Verdict, judge
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.evaluate.public_calls import PUBLIC_CALL
from layerzero_tune.measure.statistics import SLOWER_THRESHOLD, percentile
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore

Verdicts = Mapping[Key, Mapping[Sizes, Verdict]]
Cells = frozenset[tuple[Key, Sizes]]


@dataclass(frozen=True)
class Served:
    """What a table that never saw a cell does there; a miss is served by the default."""

    operation: str
    mode: str
    hit: bool
    regret: float
    slower: bool


@dataclass(frozen=True)
class Figures:
    """Over the cells left out in every fold and seed; `slower_than_default` are those whose 95% interval of the ratio
    to the default lies above `SLOWER_THRESHOLD`. Where nothing was a hit, efficiencies are 1."""

    operation: str
    mode: str
    cells: int
    hit_rate: float
    efficiency_geomean: float
    efficiency_p10: float
    efficiency_min: float
    slower_than_default: int


def served_by(rows: Sequence[Measurement], verdicts: Verdicts, cells: Cells) -> Iterator[Served]:
    """What the table of the rows serves at the cells, by their verdicts; cells at which that has no time, such as
    those where its configuration was not tried, are left out."""
    form = compile_table(rows, builtin_kernels())
    entries = {(entry.operation, entry.static_key): entry for entry in form.entries}
    for key, sizes in sorted(cells, key=repr):
        verdict = verdicts[key].get(sizes)
        if verdict is None:
            continue
        choice = _choice(entries.get(key), verdict)
        chosen = verdict.default if choice is None else choice
        standing = verdict.standings.get(chosen)
        if standing is None:
            continue
        slower = standing.low > math.log(SLOWER_THRESHOLD)
        yield Served(
            key[0],
            verdict.context.mode,
            choice is not None,
            verdict.regret(chosen),
            slower and verdict.reference != chosen,
        )


def _choice(entry: Entry | None, verdict: Verdict) -> Choice | None:
    if entry is None or not entry.covers(verdict.sizes):
        return None
    chain = leaf_at(entry.tree, verdict.sizes).chain
    passing = (step.choice for step in chain if all(guard.reject(verdict.context) is None for guard in step.guards))
    return next(passing, None)


def figures(operation: str, mode: str, served: Sequence[Served]) -> Figures:
    regrets = [one.regret for one in served if one.hit] or [0.0]
    efficiencies = [math.exp(-regret) for regret in regrets]
    return Figures(
        operation,
        mode,
        len(served),
        sum(one.hit for one in served) / len(served),
        math.exp(-math.fsum(regrets) / len(regrets)),
        percentile(efficiencies, 10),
        min(efficiencies),
        sum(one.slower for one in served),
    )


def verdicts_of(rows: Iterable[Measurement]) -> Verdicts:
    return {key: {verdict.sizes: verdict for verdict in found} for key, found in judge(rows).items()}


def cross_validated(rows: Sequence[Measurement], folds: int, seeds: int) -> Iterator[Served]:
    """Each cell of the rows, as often as there are seeds, by a table that never saw it."""
    verdicts = verdicts_of(rows)
    cells = sorted({cell_of(row.context) for row in rows}, key=repr)
    for seed in range(seeds):
        shuffled = random.Random(seed).sample(cells, len(cells))
        for fold in range(folds):
            left_out = frozenset(shuffled[fold::folds])
            yield from served_by([row for row in rows if cell_of(row.context) not in left_out], verdicts, left_out)


def held_out(rows: Sequence[Measurement], evaluated: Sequence[Measurement]) -> Iterator[Served]:
    """Each cell of an evaluation, by the table of the rows."""
    kernels = [row for row in evaluated if row.kernel_id != PUBLIC_CALL]
    return served_by(rows, verdicts_of(kernels), frozenset(cell_of(row.context) for row in kernels))


def grouped(served: Sequence[Served]) -> tuple[Figures, ...]:
    """The figures per operation and mode, and over all."""
    groups: dict[tuple[str, str], list[Served]] = {}
    for one in served:
        groups.setdefault((one.operation, one.mode), []).append(one)
    return (*(figures(*key, group) for key, group in sorted(groups.items())), figures("all", "all", served))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of results that run has written")
    parser.add_argument("--folds", type=int, default=5, help="one fold is left out, the others are compiled")
    parser.add_argument("--seeds", type=int, default=3, help="how often the cells are dealt into folds")
    parser.add_argument("--on", type=Path, help="folder of an evaluation's contests: score on these alone")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = ResultsStore(arguments.results).read().rows
    if arguments.on is None:
        found = grouped(list(cross_validated(rows, arguments.folds, arguments.seeds)))
    else:
        found = grouped(list(held_out(rows, ResultsStore(arguments.on).read().rows)))
    if arguments.json:
        print(json.dumps([asdict(line) for line in found], indent=1))
        return
    print("operation            mode   cells  hit rate  efficiency    p10    min  slower")
    for line in found:
        print(
            f"{line.operation:20} {line.mode:5}  {line.cells:5}  {line.hit_rate:8.3f}  {line.efficiency_geomean:10.4f}"
            f"  {line.efficiency_p10:.3f}  {line.efficiency_min:.3f}  {line.slower_than_default:6}"
        )


if __name__ == "__main__":
    main()
