"""Judge what scripts/budget_run.sh left: a table from five minutes on a GPU, and a run beside kernels that break it.

usage: python scripts/check_budget_run.py [scripts/results/h100_budget_5m]
Exits with status 1 where a condition does not hold.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from layerzero_tune.compile.judge import judge
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore

BUDGET_S = 300.0
EFFICIENCY = 0.95
SHAPES = 60
# What the kernels of tests/gpu/faulty_kernels.py do, and where.
FAULTS = {("faulty.spins", 33): "timeout", ("faulty.writes_astray", 65): "device_error"}


def conditions(folder: Path) -> Iterator[tuple[str, bool]]:
    """What has to hold, with its figures, and whether it does."""
    facts = json.loads((folder / "facts.json").read_text())
    rows = ResultsStore(folder / "results").read().rows
    dates = sorted(row.measured_at for row in rows)
    print(f"commit {facts['commit']}, {facts['device']}, {facts['versions']}, measured {dates[0]} to {dates[-1]}")
    run = json.loads((folder / "run.json").read_text())
    taken_s = run["measuring_s"] + run["preparing_s"]
    yield f"from its plan to its end the run took {taken_s:.1f} s, compilation included", taken_s <= BUDGET_S
    operations = Counter({row.contest_id: row.context.operation for row in rows}.values())
    yield f"contests: {dict(operations)}", {name.split(".")[0] for name in operations} == {"attention", "norm"}
    yield from _held_out(json.loads((folder / "evaluation.json").read_text()))
    slowed = {row.contest_id for row in rows if row.is_slowed}
    used = [row for row in rows if row.contest_id not in slowed]
    yield f"contests on a GPU that was slowed down: {len(slowed)}, of which the table uses none", _same(rows, used)
    yield from _faults(ResultsStore(folder / "faults").read().rows)


def _held_out(evaluation: dict[str, object]) -> Iterator[tuple[str, bool]]:
    shapes = evaluation["shapes"]
    assert isinstance(shapes, list)
    graph = [shape["efficiency"] for shape in shapes if shape["context"]["mode"] == "graph"]
    mean = math.exp(math.fsum(map(math.log, graph)) / len(graph))
    yield f"held-out shapes in graph mode: {len(graph)}", len(graph) >= SHAPES
    yield f"their efficiency: {mean:.4f} (geometric mean), {min(graph):.3f} at the least", mean >= EFFICIENCY


def _same(rows: tuple[Measurement, ...], used: list[Measurement]) -> bool:
    return judge(rows) == judge(used)


def _faults(rows: tuple[Measurement, ...]) -> Iterator[tuple[str, bool]]:
    modes = sorted({row.context.mode for row in rows})
    for mode in modes:
        broken = Counter(
            (row.kernel_id, row.context.rows, row.status)
            for row in rows
            if row.context.mode == mode and row.status != "ok"
        )
        expected = Counter({(kernel, size, status): 1 for (kernel, size), status in FAULTS.items()})
        yield f"{mode}: without a time are {dict(broken)}", broken == expected
        timed = {row.context.rows for row in rows if row.context.mode == mode and row.is_default and row.samples_ns}
        yield (
            f"{mode}: the default is timed at {sorted(timed)} rows",
            len(timed) == len({row.context.rows for row in rows}),
        )


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("results") / "h100_budget_5m")
    found = list(conditions(folder))
    for text, holds in found:
        print("holds " if holds else "FAILS ", text)
    sys.exit(0 if all(holds for _, holds in found) else 1)


if __name__ == "__main__":
    main()
