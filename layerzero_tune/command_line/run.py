"""`layerzero-tune run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from layerzero_tune.command_line.options import (
    JsonOption,
    KernelsOption,
    OpsOption,
    check_writable,
    operations_named,
    split_list,
)
from layerzero_tune.command_line.output import print_json
from layerzero_tune.command_line.run_devices import EXECUTORS, measuring_on
from layerzero_tune.command_line.run_progress import RunProgress
from layerzero_tune.command_line.run_summary import (
    announce,
    announce_shard,
    forecast_of,
    json_summary,
    print_dry_run,
    print_summary,
)
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.budget import Deadline, parse_duration
from layerzero_tune.search.device import MeasuringDevice
from layerzero_tune.search.executor import Executor
from layerzero_tune.search.recorded_device import RecordedDevice
from layerzero_tune.search.shard import Shard
from layerzero_tune.search.tuning import agenda_of, plan_tuning, tune
from layerzero_tune.workload.lines import WorkloadLine, read_workload
from layerzero_tune.workload.presets import PRESETS, preset_workload


def run_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; a run continues what it holds.")],
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="auto, cpu, cuda:N, all (every GPU of this host, at once), or recorded:RESULTS to replay results.",
        ),
    ] = "auto",
    ops: OpsOption = "",
    preset: Annotated[str, typer.Option("--preset", help=f"Grid of shapes: {', '.join(PRESETS)}.")] = "quick",
    workload: Annotated[Path | None, typer.Option("--workload", help="Shapes from a workload file instead.")] = None,
    budget: Annotated[
        str, typer.Option("--budget", help="Time for the whole run, such as 90s, 10m or 1h30m: best first, then skip.")
    ] = "",
    shard: Annotated[
        str, typer.Option("--shard", help="Measure the i-th of n parts alone, such as 2/3; merge joins all n.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its expected time alone.")] = False,
    kernels: KernelsOption = "",
    executor: Annotated[
        str, typer.Option("--executor", help=f"Who measures: {' or '.join(EXECUTORS)} (the hosts of a Ray cluster).")
    ] = EXECUTORS[0],
    json: JsonOption = False,
) -> None:
    """Measure every legal kernel on each shape that the results do not hold yet, the most valuable shapes first."""
    budget_s = parse_duration(budget) if budget else None
    deadline = None if budget_s is None else Deadline.after(budget_s)
    part = Shard.parse(shard) if shard else None
    operations = operations_named(ops)
    run = _Run(ResultsStore(out), operations, part, budget_s, deadline, dry_run, json)
    if workload is not None:
        lines: Sequence[WorkloadLine] = read_workload(workload)
    with measuring_on(device, executor, split_list(kernels)) as (measured, measurer):
        if workload is None:
            lines = _lines_of(measured, preset, operations)
        run(measured, measurer, lines)


def _lines_of(device: MeasuringDevice, preset: str, operations: Sequence[str]) -> Sequence[WorkloadLine]:
    """The shapes that are measured where none are named."""
    if isinstance(device, RecordedDevice):
        return tuple(WorkloadLine(context) for context in device.contexts)
    return preset_workload(preset, operations, device.spec)


@dataclass(frozen=True)
class _Run:
    """What of a run does not depend on the device."""

    store: ResultsStore
    operations: Sequence[str]
    shard: Shard | None
    budget_s: float | None
    deadline: Deadline | None
    is_dry: bool
    json: bool

    def __call__(self, device: MeasuringDevice, executor: Executor, lines: Sequence[WorkloadLine]) -> None:
        if not self.is_dry:
            check_writable(self.store.directory)
        asked = [line for line in lines if line.context.operation in self.operations]
        own = asked if self.shard is None else self.shard.part(asked)
        plan = plan_tuning(device, own, self.store)
        # A shard does not know the points between its own, which are other shards'.
        refine = self.deadline is not None and self.shard is None and not self.is_dry
        agenda = agenda_of(device, plan, refine=refine)
        if self.shard is not None:
            announce_shard(self.shard, len(own), len(asked))
        if self.is_dry:
            forecast = forecast_of(plan, agenda, self.budget_s, executor.slots)
            print_json(forecast) if self.json else print_dry_run(forecast)
            return
        announce(device.spec.name, plan, agenda, self.store, self.budget_s, executor.slots)
        start = perf_counter()
        with RunProgress(self.deadline, agenda.left) as progress:
            end = tune(device, agenda, self.store, progress, self.deadline, executor)
        elapsed_s = perf_counter() - start
        results = self.store.read()
        if self.json:
            quarantined = [str(path) for path in (*plan.quarantined, *results.quarantined)]
            summary = json_summary(plan, results.rows, progress, end, elapsed_s)
            print_json({"device": device.spec.to_dict(), "quarantined": quarantined} | summary)
        else:
            print_summary(self.store, results.rows, progress, end, elapsed_s)
