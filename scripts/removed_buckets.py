"""How well the live selector does where a table lost buckets: a share of them is taken out at random, and what it picks
there is looked up in the held-out measurements of the table's evaluation.

Run it where the table was measured: the live selector goes by the libraries that are installed.

usage: python scripts/removed_buckets.py RESULTS HELD_OUT [--share 0.2] [--seeds 10] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from table_plans import choice_in, plans_of

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.emit import leaf_at
from layerzero_tune.compile.form import Leaf, TableForm, Tree
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.evaluate.public_calls import PUBLIC_CALL
from layerzero_tune.identity import choice_of
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore

Contests = Mapping[SelectionContext, Sequence[Measurement]]


@dataclass(frozen=True)
class Figures:
    """Over the held-out shapes in removed buckets, of all seeds: best time / time of the live selector's pick."""

    operation: str
    mode: str
    shapes: int
    efficiency_geomean: float
    efficiency_min: float


def without_buckets(form: TableForm, share: float, chance: random.Random) -> TableForm:
    """The table with that share of its buckets missing."""

    def thinned(tree: Tree) -> Tree:
        if isinstance(tree, Leaf):
            return replace(tree, chain=()) if tree.chain and chance.random() < share else tree
        return replace(tree, low=thinned(tree.low), high=thinned(tree.high))

    return replace(form, entries=tuple(replace(entry, tree=thinned(entry.tree)) for entry in form.entries))


def served_of(form: TableForm, contexts: Iterable[SelectionContext]) -> frozenset[SelectionContext]:
    """The contexts that lie in buckets of the table."""
    entries = {(entry.operation, entry.static_key): entry for entry in form.entries}

    def is_served(context: SelectionContext) -> bool:
        operation = operation_named(context.operation)
        entry, sizes = entries.get((operation.name, operation.static_key(context))), operation.sizes(context)
        return entry is not None and entry.covers(sizes) and bool(leaf_at(entry.tree, sizes).chain)

    return frozenset(filter(is_served, contexts))


def efficiency(rows: Sequence[Measurement], choice: Choice) -> float | None:
    """Of a contest, by its final rounds, or by its screening where the choice went no further; None without a time."""
    timed = {
        choice_of(row.kernel_id, row.configuration): row
        for row in rows
        if row.status == "ok" and row.screen_ns and row.kernel_id != PUBLIC_CALL
    }
    if choice not in timed:
        return None
    if timed[choice].samples_ns:
        finalists = [row.samples_ns for row in timed.values() if row.samples_ns]
        return min(1.0, min(map(median, finalists)) / median(timed[choice].samples_ns))
    screened = [row.screen_ns for row in timed.values() if row.screen_ns]
    return min(screened) / (timed[choice].screen_ns or math.inf)


def figures(rows: Sequence[Measurement], held_out: Contests, share: float, seeds: int) -> tuple[Figures, ...]:
    """Per operation and mode, and over all.

    Raises:
        ValueError: no held-out shape lies in a removed bucket.
    """
    whole = compile_table(rows, builtin_kernels())
    served = served_of(whole, held_out)
    groups: dict[tuple[str, str], list[float]] = {}
    for seed in range(seeds):
        thinned = without_buckets(whole, share, random.Random(seed))
        left = served_of(thinned, served)
        lost = [context for context in held_out if context in served - left]
        for context, plan in plans_of(thinned, lost).items():
            choice = choice_in(plan)
            found = efficiency(held_out[context], choice)
            if found is None:
                raise ValueError(f"{choice} was not timed at {context.to_dict()}: evaluate with the same libraries")
            groups.setdefault((context.operation, context.mode), []).append(math.log(found))
    if not groups:
        raise ValueError(
            "no held-out shape lies in a removed bucket: remove a larger share, or evaluate on more shapes"
        )
    together = [found for group in groups.values() for found in group]
    return (*(_figures(*key, groups[key]) for key in sorted(groups)), _figures("all", "all", together))


def _figures(operation: str, mode: str, logs: Sequence[float]) -> Figures:
    return Figures(operation, mode, len(logs), math.exp(math.fsum(logs) / len(logs)), math.exp(min(logs)))


def contests_of(rows: Sequence[Measurement]) -> Contests:
    """By shape the rows of its first contest."""
    found: dict[SelectionContext, dict[str, list[Measurement]]] = {}
    for row in rows:
        found.setdefault(row.context, {}).setdefault(row.contest_id, []).append(row)
    return {
        context: min(contests.values(), key=lambda contest: (contest[0].measured_at, contest[0].contest_id))
        for context, contests in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of the results that the table is compiled from")
    parser.add_argument("held_out", type=Path, help="folder of the evaluation's measurements")
    parser.add_argument("--share", type=float, default=0.2, help="how much of the buckets is taken out")
    parser.add_argument("--seeds", type=int, default=10, help="how often, each time others")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = ResultsStore(arguments.results).read().rows
    held_out = contests_of(ResultsStore(arguments.held_out).read().rows)
    found = figures(rows, held_out, arguments.share, arguments.seeds)
    if arguments.json:
        print(json.dumps([asdict(line) for line in found], indent=1))
        return
    print("operation            mode   shapes  efficiency    min")
    for line in found:
        print(
            f"{line.operation:20} {line.mode:5}  {line.shapes:6}  {line.efficiency_geomean:10.4f}"
            f"  {line.efficiency_min:.3f}"
        )


if __name__ == "__main__":
    main()
