"""`layerzero-tune run`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
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
from layerzero_tune.command_line.run_summary import announce, forecast_of, json_summary, print_dry_run, print_summary
from layerzero_tune.measure.contest import MeasurementPolicy
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.budget import Deadline, parse_duration
from layerzero_tune.search.device import LiveDevice, MeasuringDevice, RecordedDevice
from layerzero_tune.search.tuning import agenda_of, plan_tuning, tune
from layerzero_tune.worker.compilers import Compilers
from layerzero_tune.worker.process import WorkerProcess
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its expected time alone.")] = False,
    kernels: KernelsOption = "",
    json: JsonOption = False,
) -> None:
    """Measure every legal kernel on each shape that the results do not hold yet, the most valuable shapes first."""
    budget_s = parse_duration(budget) if budget else None
    deadline = None if budget_s is None else Deadline.after(budget_s)
    operations = operations_named(ops)
    recording = results_of(device)
    lines: Sequence[WorkloadLine] = () if workload is None else read_workload(workload)
    run = _Run(ResultsStore(out), budget_s, deadline, dry_run, json)
    if recording is not None:
        recorded = RecordedDevice(ResultsStore(recording).read().rows)
        if workload is None:
            lines = tuple(WorkloadLine(context) for context in recorded.contexts)
        run(recorded, _of_operations(lines, operations))
        return
    spec = live_device(device)
    if workload is None:
        lines = preset_workload(preset, operations, spec)
    modules = split_list(kernels)
    registry = registry_with(modules)
    with WorkerProcess(modules, torch_name(spec)) as worker, ExitStack() as stack:
        # On a CPU they would take the processors from what is timed: there the worker compiles, between its contests.
        compilers = stack.enter_context(Compilers(modules)) if spec.platform == "cuda" else None
        live = LiveDevice(spec, registry, MeasurementPolicy(), worker, compilers=compilers)
        run(live, _of_operations(lines, operations))


def _of_operations(lines: Sequence[WorkloadLine], operations: Sequence[str]) -> tuple[WorkloadLine, ...]:
    return tuple(line for line in lines if line.context.operation in operations)


@dataclass(frozen=True)
class _Run:
    """What of a run does not depend on the device."""

    store: ResultsStore
    budget_s: float | None
    deadline: Deadline | None
    is_dry: bool
    json: bool

    def __call__(self, device: MeasuringDevice, lines: Sequence[WorkloadLine]) -> None:
        if not self.is_dry:
            check_writable(self.store.directory)
        plan = plan_tuning(device, lines, self.store)
        agenda = agenda_of(device, plan, refine=self.deadline is not None and not self.is_dry)
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
