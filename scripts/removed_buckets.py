"""Tables that lost buckets: compiles results and takes a share of the buckets out at random, so that an evaluation
tells what the live selector picks there (`layerzero-tune evaluate TABLES ... --beside OUT_0`).

usage: python scripts/removed_buckets.py RESULTS OUT [--share 0.2] [--tables 1]
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path

from layerzero_runtime.kernels import builtin_kernels
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.form import Leaf, TableForm, Tree
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.results.store import ResultsStore


def without_buckets(form: TableForm, share: float, chance: random.Random) -> TableForm:
    """The table with that share of its buckets missing."""

    def thinned(tree: Tree) -> Tree:
        if isinstance(tree, Leaf):
            return replace(tree, chain=()) if tree.chain and chance.random() < share else tree
        return replace(tree, low=thinned(tree.low), high=thinned(tree.high))

    return replace(form, entries=tuple(replace(entry, tree=thinned(entry.tree)) for entry in form.entries))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of the results that the table is compiled from")
    parser.add_argument("out", type=Path, help="beginning of the folders' names: OUT_0, OUT_1 and so on")
    parser.add_argument("--share", type=float, default=0.2, help="how much of the buckets is taken out")
    parser.add_argument("--tables", type=int, default=1, help="how many tables, each without others")
    arguments = parser.parse_args()
    whole = compile_table(ResultsStore(arguments.results).read().rows, builtin_kernels())
    for seed in range(arguments.tables):
        folder = arguments.out.with_name(f"{arguments.out.name}_{seed}")
        emit(without_buckets(whole, arguments.share, random.Random(seed))).write(folder)


if __name__ == "__main__":
    main()
