"""`layerzero-tune run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from layerzero_runtime.context import SelectionContext
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
from layerzero_tune.command_line.output import notes, print_json, print_table, progress_bar, shape_text
from layerzero_tune.compile.distrust import disturbed_points
from layerzero_tune.measure.contest import MeasurementPolicy
from layerzero_tune.report.wins import kernel_wins
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.device import MAX_TAKES, LiveDevice, MeasuringDevice, RecordedDevice
from layerzero_tune.search.tuning import FinishedContest, plan_tuning, tune
from layerzero_tune.worker.process import WorkerProcess
from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.lines import read_workload
from layerzero_tune.workload.presets import PRESETS, preset_workload


def run_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; a run continues what it holds.")],
    device: DeviceOption = "auto",
    ops: OpsOption = "",
    preset: Annotated[str, typer.Option("--preset", help=f"Grid of shapes: {', '.join(PRESETS)}.")] = "quick",
    workload: Annotated[Path | None, typer.Option("--workload", help="Shapes from a workload file instead.")] = None,
    kernels: KernelsOption = "",
    json: JsonOption = False,
) -> None:
    """Measure every legal kernel on each shape that the results do not hold yet."""
    operations = operations_named(ops)
    store = ResultsStore(out)
    recording = results_of(device)
    if recording is not None:
        recorded = RecordedDevice(ResultsStore(recording).read().rows)
        contexts = recorded.contexts if workload is None else _workload_contexts(workload)
        _run(recorded, [context for context in contexts if context.operation in operations], store, json)
        return
    spec = live_device(device)
    if workload is None:
        if spec.platform != "cpu":
            raise WorkloadError(f"presets are for CPUs, the device is {spec.name}: name its shapes with --workload")
        lines = preset_workload(preset, operations)
        contexts = tuple(line.context for line in lines)
    else:
        contexts = tuple(context for context in _workload_contexts(workload) if context.operation in operations)
    modules = split_list(kernels)
    registry = registry_with(modules)
    with WorkerProcess(modules, torch_name(spec)) as worker:
        _run(LiveDevice(spec, registry, MeasurementPolicy(), worker), contexts, store, json)


def _workload_contexts(path: Path) -> tuple[SelectionContext, ...]:
    return tuple(line.context for line in read_workload(path))


def _run(device: MeasuringDevice, contexts: Sequence[SelectionContext], store: ResultsStore, json: bool) -> None:
    check_writable(store.directory)
    plan = plan_tuning(device, contexts, store)
    notes.print(
        f"{device.spec.name}: {len(plan.contests)} contests to measure, {plan.held} held already in {store.directory}",
        soft_wrap=True,
    )
    start = perf_counter()
    preparing, measured = 0.0, 0
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=len(plan.contests))

        def finished(contest: FinishedContest) -> None:
            nonlocal preparing, measured
            preparing += contest.preparation_s
            measured += 1
            context = contest.contest.context
            bar.update(
                task,
                completed=measured,
                total=measured + contest.left,
                description=f"{context.operation} {context.dtype} {shape_text(context)}",
            )

        tune(device, plan, store, finished)
    elapsed = perf_counter() - start
    results = store.read()
    statuses = Counter(row.status for row in results.rows)
    if json:
        print_json(
            {
                "device": device.spec.to_dict(),
                "contests_measured": measured,
                "contests_held": plan.held,
                "measuring_s": elapsed - preparing,
                "preparing_s": preparing,
                "statuses": dict(statuses),
                "points_without_candidates": [context.to_dict() for context in plan.without_candidates],
                "quarantined": [str(path) for path in (*plan.quarantined, *results.quarantined)],
            }
        )
        return
    notes.print(
        f"measured {measured} contests in {elapsed - preparing:.0f} s, beside {preparing:.0f} s of loading "
        f"and compiling kernels; next: layerzero-tune compile {store.directory} --out TABLES",
        soft_wrap=True,
    )
    print_table(
        "Where each kernel wins",
        ("operation", "dtype", "kernel", "points", "best at", "largest gain over the default"),
        [
            (
                found.operation,
                found.dtype,
                found.kernel_id,
                str(found.points),
                str(found.wins),
                "-" if found.largest_gain is None else f"{found.largest_gain:.2f}x",
            )
            for found in kernel_wins(results.rows)
        ],
    )
    disturbed = len(disturbed_points(results.rows))
    if disturbed:
        notes.print(
            f"{disturbed} points were disturbed by other processes or by a drift of the machine, {MAX_TAKES} times "
            "over; measure on a quiet machine",
            style="yellow",
            soft_wrap=True,
        )
    failures: dict[tuple[str, str], list[str]] = {}
    for row in results.rows:
        if row.status != "ok":
            failures.setdefault((row.kernel_id, row.status), []).append(row.message)
    if failures:
        print_table(
            "Without a time",
            ("kernel", "status", "jobs", "first message"),
            [
                (kernel_id, status, str(len(messages)), messages[0])
                for (kernel_id, status), messages in sorted(failures.items())
            ],
        )
