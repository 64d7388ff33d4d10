"""Do two tunings of one device agree? Compiles both results and compares what the tables pick on held-out shapes.

usage: python scripts/agreement.py RESULTS RESULTS [--held-out N] [--seed N] [--json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from table_plans import choice_in, plans_of

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernels import builtin_kernels
from layerzero_tune.command_line.output import shape_text
from layerzero_tune.compile.cell import Key, cell_of
from layerzero_tune.compile.judge import Choice
from layerzero_tune.compile.pipeline import compile_rows
from layerzero_tune.compile.regret import RegretModel
from layerzero_tune.evaluate.agreement import TIE_WITHIN, Agreement, Alike, Tuning, agreement
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.workload.draw import draw_between


def tuning(rows: Sequence[Measurement], contexts: Sequence[SelectionContext]) -> Tuning:
    """What the runtime selects with the table of these results."""
    compiled = compile_rows(rows, builtin_kernels())
    picks = {context: choice_in(plan) for context, plan in plans_of(compiled.form, contexts).items()}
    return Tuning(picks, alike_by(compiled.models))


def alike_by(models: Mapping[Key, RegretModel]) -> Alike:
    """By the regret models of the static keys; where there is none, nothing is known to be as good."""

    def alike(context: SelectionContext, choice: Choice) -> Collection[Choice]:
        key, sizes = cell_of(context)
        model = models.get(key)
        return {choice} if model is None else model.alike(choice, sizes, TIE_WITHIN)

    return alike


def print_found(found: Agreement) -> None:
    print(
        f"{found.shapes} held-out shapes: the same plan on {found.same:.1%}, the same or a tied one on {found.tied:.1%}"
    )
    for each in found.rest:
        shape = f"{each.context.operation} {each.context.dtype} {shape_text(each.context)}"
        print(f"  {shape}: {each.first[0]} / {each.second[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--held-out", type=int, default=400, metavar="N", help="number of shapes to draw")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = [ResultsStore(path).read().rows for path in (arguments.first, arguments.second)]
    # Shapes that lie between points which both have measured, and repeat none of them.
    measured = [{row.context for row in rows} for rows in results]
    contexts = draw_between(measured[0] & measured[1], arguments.held_out, arguments.seed)
    first, second = (tuning(rows, contexts) for rows in results)
    found = agreement(first, second, contexts)
    if arguments.json:
        rest = [asdict(each) | {"context": each.context.to_dict()} for each in found.rest]
        print(json.dumps(asdict(found) | {"rest": rest}, indent=1))
    else:
        print_found(found)


if __name__ == "__main__":
    main()
