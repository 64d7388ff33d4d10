"""Judge a GPU's table: its held-out evaluation, its live selector, its losers, its ceilings, a second tuning.

usage: python scripts/check_table.py [tables/nvidia_h100_80gb_hbm3] [scripts/results/h100_table]
The second folder holds what was measured beside the table: facts.json, tuning_runs.jsonl, ceilings/ (results),
ceilings.json, not_run.json and second_results/.
Exits with status 1 where a condition does not hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from table_checks.ceilings import ceiling_conditions
from table_checks.condition import Condition
from table_checks.held_out import held_out_conditions
from table_checks.live import live_conditions
from table_checks.losers import loser_conditions
from table_checks.second_tuning import second_tuning_conditions

from layerzero_tune.results.store import ResultsStore

ROOT = Path(__file__).parent.parent


def conditions(table: Path, beside: Path) -> Iterator[Condition]:
    evaluation, facts = _read(table / "evaluation.json"), _read(beside / "facts.json")
    print(f"commit {facts['commit']}, {facts['device']}, {facts['versions']}, evaluated {evaluation['measured_to']}")
    runs = [json.loads(line) for line in (beside / "tuning_runs.jsonl").read_text().splitlines()]
    for results in ("results", "second_results"):
        times = [run["device_s"] for run in runs if run["results"] == results]
        print(f"device time of {results}: {sum(times) / 60:.0f} min in {len(times)} runs")
    yield from held_out_conditions(evaluation)
    yield from live_conditions(evaluation)
    rows = ResultsStore(table / "results").read().rows
    yield from loser_conditions(rows, _read(beside / "not_run.json"))
    yield from ceiling_conditions(_read(beside / "ceilings.json"), beside / "ceilings")
    yield from second_tuning_conditions(evaluation, rows, ResultsStore(beside / "second_results").read().rows)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    given = [Path(argument) for argument in sys.argv[1:]]
    default = (ROOT / "tables" / "nvidia_h100_80gb_hbm3", ROOT / "scripts" / "results" / "h100_table")
    found = list(conditions(*(*given, *default[len(given) :])))
    for condition in found:
        print(condition)
    sys.exit(0 if all(condition.holds for condition in found) else 1)


if __name__ == "__main__":
    main()
