"""Held-out regret against measurements spent, in the order of a budgeted run, in the grid's order and at random.

Replays results: a share of the points is held out, the others are offered to a run over the recorded device. After each
share of the measurements what is there is compiled, the runtime selects a plan for each held-out point (the live
selector's on a miss), and the results say what that plan loses to the best.

usage: python scripts/regret_against_measurements.py RESULTS [--seeds 3] [--out FILE.json] [--picture FILE.svg]
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from regret_curve.picture import Curve, picture
from table_plans import plans_of

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import OPERATIONS
from layerzero_tune.compile.cell import cell_of
from layerzero_tune.compile.judge import Verdict, judge
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.identity import canonical_json
from layerzero_tune.results.content import results_hash
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.agenda import Agenda
from layerzero_tune.search.recorded_device import RecordedDevice
from layerzero_tune.workload.lines import WorkloadLine

SHARES = (0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7, 1.0)
HELD_OUT = 0.2


@dataclass(frozen=True)
class Spent:
    """What a table of the first contests of an order is worth.

    Attributes:
        share: of the contests of the whole grid.
        contests: how many these are, the mean over the seeds.
        seconds: what they take, as a run expects it.
        regret: mean over the held-out points of log(time of the selected plan / time of the best).
        hit_rate: share of the held-out points that the table serves itself.
    """

    order: str
    share: float
    contests: float
    seconds: float
    regret: float
    hit_rate: float


@dataclass(frozen=True)
class Step:
    """A contest in an order: its point, and the seconds that it is expected to take."""

    context: SelectionContext
    seconds: float


def orders(device: RecordedDevice, offered: Sequence[SelectionContext], seed: int) -> Mapping[str, Sequence[Step]]:
    """The same points three times: as a run with a budget takes them, along the axes of the grid, at random."""
    budgeted = tuple(budgeted_order(device, offered))
    seconds = {step.context: step.seconds for step in budgeted}
    names = list(OPERATIONS)
    grid = sorted(offered, key=lambda context: (names.index(context.operation), repr(cell_of(context))))
    shuffled = random.Random(seed).sample(grid, len(grid))
    return {
        "budgeted": budgeted,
        "grid": [Step(context, seconds[context]) for context in grid],
        "random": [Step(context, seconds[context]) for context in shuffled],
    }


def budgeted_order(device: RecordedDevice, offered: Sequence[SelectionContext]) -> Iterator[Step]:
    contests = {context: device.contests(context)[:1] for context in offered}
    agenda = Agenda(device, [WorkloadLine(context) for context in offered], contests, {}, refine=False)
    while (planned := agenda.next()) is not None:
        rows, _ = device.measure(planned.contest)
        agenda.learn(planned, rows)
        if planned.kind == "point":  # and no repeat
            yield Step(planned.contest.context, planned.seconds)


def selected(rows: Sequence[Measurement], contexts: Sequence[SelectionContext]) -> dict[SelectionContext, Selected]:
    """What the runtime selects with the table of these rows."""
    plans = plans_of(compile_table(rows, builtin_kernels()), contexts)
    return {
        context: Selected(plan.kernel_id, canonical_json(dict(plan.configuration)), plan.source == "table")
        for context, plan in plans.items()
    }


@dataclass(frozen=True)
class Selected:
    """A plan, and whether it is the table's."""

    kernel_id: str
    configuration: str
    hit: bool


def worth(rows: Sequence[Measurement], held_out: Mapping[SelectionContext, Verdict]) -> tuple[float, float]:
    """Mean regret and hit rate; plans without a time count as the default does, where that has one."""
    plans = selected(rows, list(held_out))
    regrets = []
    for context, verdict in held_out.items():
        plan = plans[context]
        regret = verdict.regret((plan.kernel_id, plan.configuration))
        regrets.append(regret if math.isfinite(regret) else verdict.regret(verdict.default))
    finite = [regret for regret in regrets if math.isfinite(regret)]
    return math.fsum(finite) / len(finite), sum(plan.hit for plan in plans.values()) / len(plans)


def curves(rows: Sequence[Measurement], seeds: int) -> tuple[Spent, ...]:
    """Every order at every share, means over the seeds."""
    with ProcessPoolExecutor(min(seeds, os.cpu_count() or 1), mp_context=multiprocessing.get_context("fork")) as pool:
        each = list(pool.map(functools.partial(spent, rows), range(seeds)))
    return tuple(
        Spent(
            order,
            share,
            *(math.fsum(values) / seeds for values in zip(*(one[order, share] for one in each), strict=True)),
        )
        for order, share in each[0]
    )


def spent(rows: Sequence[Measurement], seed: int) -> Mapping[tuple[str, float], tuple[int, float, float, float]]:
    """By order and share, for one choice of what is held out: contests, seconds, regret and hit rate."""
    device = RecordedDevice(rows)
    by_context: dict[SelectionContext, list[Measurement]] = {}
    for row in rows:
        by_context.setdefault(row.context, []).append(row)
    verdicts = {(key, verdict.sizes): verdict for key, found in judge(rows).items() for verdict in found}
    held_out, offered = parted(sorted(by_context, key=lambda context: repr(context.to_dict())), seed)
    judged = {context: verdicts[cell_of(context)] for context in held_out if cell_of(context) in verdicts}
    found = {}
    for name, steps in orders(device, offered, seed).items():
        for share in SHARES:
            taken = steps[: round(share * len(steps))]
            seconds = math.fsum(step.seconds for step in taken)
            regret, hit_rate = worth([row for step in taken for row in by_context[step.context]], judged)
            found[name, share] = len(taken), seconds, regret, hit_rate
    return found


def parted(
    contexts: Sequence[SelectionContext], seed: int
) -> tuple[tuple[SelectionContext, ...], tuple[SelectionContext, ...]]:
    """The points held out and those offered; the points of one cell stay together."""
    cells = sorted({cell_of(context) for context in contexts}, key=repr)
    chosen = set(random.Random(seed).sample(cells, round(HELD_OUT * len(cells))))
    return (
        tuple(context for context in contexts if cell_of(context) in chosen),
        tuple(context for context in contexts if cell_of(context) not in chosen),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of results that run has written")
    parser.add_argument("--seeds", type=int, default=3, help="how often points are held out, a fifth each time")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    parser.add_argument("--picture", type=Path, help="file for the curves as SVG")
    arguments = parser.parse_args()
    rows = ResultsStore(arguments.results).read().rows
    found = curves(rows, arguments.seeds)
    print("order      share  contests  seconds  regret  hit rate")
    for each in found:
        print(
            f"{each.order:9} {each.share:6.1%} {each.contests:9.0f} {each.seconds:8.0f} {each.regret:7.2%} "
            f"{each.hit_rate:9.1%}"
        )
    if arguments.out:
        provenance = {"results": results_hash(rows), "device": dict(rows[0].device), "seeds": arguments.seeds}
        arguments.out.write_text(json.dumps(provenance | {"curves": [asdict(each) for each in found]}, indent=1) + "\n")
    if arguments.picture:
        names = list(dict.fromkeys(each.order for each in found))
        drawn = [Curve(name, [(each.share, each.regret) for each in found if each.order == name]) for name in names]
        arguments.picture.write_text(picture(drawn))


if __name__ == "__main__":
    main()
