"""`layerzero-tune run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from layerzero_tune.command_line.options import (
    DeviceOption,
    JsonOption,
    KernelsOption,
    OpsOption,
    check_writable,
    live_device,
    operations_named,
    registry_with,
    results_of,
    split_list,
    torch_name,
)
from layerzero_tune.command_line.output import print_json
from layerzero_tune.command_line.run_progress import RunProgress
from layerzero_tune.command_line.run_summary import (
    announce,
    announce_shard,
    forecast_of,
    json_summary,
    print_dry_run,
    print_summary,
)
from layerzero_tune.measure.contest import MeasurementPolicy
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.budget import Deadline, parse_duration
from layerzero_tune.search.device import LiveDevice, MeasuringDevice, RecordedDevice
from layerzero_tune.search.shard import Shard
from layerzero_tune.search.tuning import agenda_of, plan_tuning, tune
from layerzero_tune.worker.process import WorkerProcess
from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.lines import WorkloadLine, read_workload
from layerzero_tune.workload.presets import PRESETS, preset_workload


def run_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; a run continues what it holds.")],
    device: DeviceOption = "auto",
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
    json: JsonOption = False,
) -> None:
    """Measure every legal kernel on each shape that the results do not hold yet, the most valuable shapes first."""
    budget_s = parse_duration(budget) if budget else None
    deadline = None if budget_s is None else Deadline.after(budget_s)
    part = Shard.parse(shard) if shard else None
    operations = operations_named(ops)
    recording = results_of(device)
    if workload is not None:
        lines: Sequence[WorkloadLine] = read_workload(workload)
    elif recording is None:
        lines = preset_workload(preset, operations)
    run = _Run(ResultsStore(out), operations, part, budget_s, deadline, dry_run, json)
    if recording is not None:
        recorded = RecordedDevice(ResultsStore(recording).read().rows)
        if workload is None:
            lines = tuple(WorkloadLine(context) for context in recorded.contexts)
        run(recorded, lines)
        return
    spec = live_device(device)
    if workload is None and spec.platform != "cpu":
        raise WorkloadError(f"presets are for CPUs, the device is {spec.name}: name its shapes with --workload")
    modules = split_list(kernels)
    registry = registry_with(modules)
    with WorkerProcess(modules, torch_name(spec)) as worker:
        run(LiveDevice(spec, registry, MeasurementPolicy(), worker), lines)


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

    def __call__(self, device: MeasuringDevice, lines: Sequence[WorkloadLine]) -> None:
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
            forecast = forecast_of(plan, agenda, self.budget_s)
            print_json(forecast) if self.json else print_dry_run(forecast)
            return
        announce(device.spec.name, plan, agenda, self.store, self.budget_s)
        start = perf_counter()
        with RunProgress(self.deadline, agenda.left) as progress:
            end = tune(device, agenda, self.store, progress, self.deadline)
        elapsed_s = perf_counter() - start
        results = self.store.read()
        if self.json:
            quarantined = [str(path) for path in (*plan.quarantined, *results.quarantined)]
            summary = json_summary(plan, results.rows, progress, end, elapsed_s)
            print_json({"device": device.spec.to_dict(), "quarantined": quarantined} | summary)
        else:
            print_summary(self.store, results.rows, progress, end, elapsed_s)
