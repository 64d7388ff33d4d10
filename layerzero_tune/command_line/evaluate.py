"""`layerzero-tune evaluate`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.dispatch import publish_snapshot
from layerzero_runtime.errors import ContextError
from layerzero_tune.command_line.options import (
    JsonOption,
    check_writable,
    live_device,
    registry_with,
    use_tables,
)
from layerzero_tune.command_line.output import notes, print_json, print_table, progress_bar
from layerzero_tune.evaluate import public_calls
from layerzero_tune.evaluate.evaluation import Evaluation, evaluate
from layerzero_tune.evaluate.gate import Gate
from layerzero_tune.evaluate.summary import SUMMARY_COLUMNS, Summary, by_operation, summarise, summary_cells
from layerzero_tune.measure.contest import MeasurementPolicy
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.device import LiveDevice, torch_name
from layerzero_tune.worker.compilers import Compilers
from layerzero_tune.worker.process import WorkerProcess
from layerzero_tune.workload.draw import draw_between
from layerzero_tune.workload.lines import read_workload


def evaluate_command(
    tables: Annotated[Path, typer.Argument(help="Folder of tables that compile has written.")],
    results: Annotated[
        Path, typer.Option("--results", help="Results the table was compiled from; shapes lie between them.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the measurements of the held-out shapes.")],
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Number of shapes to draw.")] = 48,
    workload: Annotated[Path | None, typer.Option("--workload", help="Held-out shapes from a file instead.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draw.")] = 0,
    gate: Annotated[
        list[str] | None, typer.Option("--gate", help="Condition over all shapes, such as 'efficiency_geomean>=0.98'.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure the tables on shapes that no tuning saw; with --gate, exit with status 2 where a condition fails."""
    gates = tuple(Gate.parse(text) for text in gate or ())
    rows = ResultsStore(results).read().rows
    contexts = _contexts(workload, [row.context for row in rows], held_out, seed)
    spec = live_device(str(rows[0].device["platform"]))
    table = use_tables(tables, spec)
    snapshot = publish_snapshot()
    assert table.path is not None
    table_id = hashlib.sha256(Path(table.path).read_bytes()).hexdigest()[:32]
    check_writable(out)
    start = perf_counter()
    modules = (public_calls.__name__,)
    with ExitStack() as stack:
        # On a CPU they would take the processors from what is timed.
        compilers = stack.enter_context(Compilers(modules)) if spec.platform == "cuda" else None
        worker = stack.enter_context(WorkerProcess(modules, torch_name(spec)))
        bar = stack.enter_context(progress_bar())
        device = LiveDevice(spec, registry_with(modules), MeasurementPolicy(), worker, compilers=compilers)
        task = bar.add_task("held-out shapes", total=len(contexts))
        found = evaluate(device, snapshot, contexts, ResultsStore(out), table_id, lambda _: bar.advance(task))
    measuring_s = perf_counter() - start - found.preparation_s
    summaries = _summaries(found)
    if json:
        print_json(
            {
                "device": spec.to_dict(),
                "table": table_id,
                "provenance": dict(table.provenance),
                "measured_to": found.measured_to,
                "measuring_s": measuring_s,
                "preparing_s": found.preparation_s,
                "summaries": [
                    {"operation": operation, "mode": mode} | asdict(summary) for (operation, mode), summary in summaries
                ],
                "shapes": [_shape(score) for score in found.scores],
            }
        )
    else:
        notes.print(
            f"measured {len(found.scores)} held-out shapes in {measuring_s:.0f} s, beside {found.preparation_s:.0f} s "
            "of loading and compiling kernels",
            soft_wrap=True,
        )
        cells = [summary_cells(*key, asdict(summary)) for key, summary in summaries]
        print_table(f"Held-out evaluation, {len(found.scores)} shapes", SUMMARY_COLUMNS, cells)
    failed = [text for condition in gates if (text := condition.failure(summaries[-1][1])) is not None]
    for text in failed:
        notes.print(f"gate failed: {text}", style="red", soft_wrap=True)
    if failed:
        raise typer.Exit(2)


def _contexts(
    workload: Path | None, measured: Sequence[SelectionContext], held_out: int, seed: int
) -> tuple[SelectionContext, ...]:
    if workload is None:
        return draw_between(measured, held_out, seed)
    contexts = tuple(line.context for line in read_workload(workload))
    tuned = sorted({context.operation for context in set(measured).intersection(contexts)})
    if tuned:
        raise ContextError(f"{workload} holds shapes that the tuning measured ({', '.join(tuned)}); leave those out")
    return contexts


def _summaries(found: Evaluation) -> list[tuple[tuple[str, str], Summary]]:
    grouped = [(key, summarise(scores, found.slower)) for key, scores in by_operation(found.scores).items()]
    return [*grouped, (("all", "all"), summarise(found.scores, found.slower))]


def _shape(score: Any) -> Mapping[str, Any]:
    return asdict(score) | {"context": score.context.to_dict()}
