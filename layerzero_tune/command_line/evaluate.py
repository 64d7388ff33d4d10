"""`layerzero-tune evaluate`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Self

import typer

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import ContextError, ResultsError
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.table import Table
from layerzero_tune.command_line.options import (
    JsonOption,
    check_writable,
    live_device,
    registry_with,
    table_in,
    use_tables,
)
from layerzero_tune.command_line.output import notes, print_json, print_table, progress_bar
from layerzero_tune.evaluate import public_calls
from layerzero_tune.evaluate.evaluation import evaluate
from layerzero_tune.evaluate.gate import Gate
from layerzero_tune.evaluate.one_table import snapshot_of
from layerzero_tune.evaluate.score import Score
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
    beside: Annotated[
        list[Path] | None,
        typer.Option("--beside", help="Another folder of tables, whose choices meet the table's in the same contests."),
    ] = None,
    gate: Annotated[
        list[str] | None, typer.Option("--gate", help="Condition over all shapes, such as 'efficiency_geomean>=0.98'.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure the tables on shapes that no tuning saw; status 2 where a shape has no time or a --gate fails."""
    gates = tuple(Gate.parse(text) for text in gate or ())
    rows = ResultsStore(results).read().rows
    if not rows:
        raise ResultsError(f"{results} holds no measurement; --results takes what layerzero-tune run measured")
    contexts = _contexts(workload, [row.context for row in rows], held_out, seed)
    spec = live_device(str(rows[0].device["platform"]))
    others = [_Other.of(folder, spec) for folder in beside or ()]
    table = use_tables(tables, spec)
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
        found = evaluate(
            device,
            snapshot_of(table),
            contexts,
            ResultsStore(out),
            [other.snapshot for other in others],
            lambda _: bar.advance(task),
        )
    measuring_s = perf_counter() - start - found.preparation_s
    if not found.scores:
        raise ResultsError(f"none of the {len(contexts)} held-out shapes has a time; {found.unscored[0].reason}")
    summaries = _summaries(found.scores, found.slower)
    if json:
        print_json(
            {
                "device": spec.to_dict(),
                "table": _table_id(table),
                "provenance": dict(table.provenance),
                "measured_from": found.measured_from,
                "measured_to": found.measured_to,
                "measuring_s": measuring_s,
                "preparing_s": found.preparation_s,
                "summaries": _documents(summaries),
                "beside": [
                    {"name": other.name, "table": other.table_id, "summaries": _documents(_summaries(scores))}
                    for other, scores in zip(others, found.beside, strict=True)
                ],
                "shapes": [_shape(*scores) for scores in zip(found.scores, *found.beside, strict=True)],
                "unscored": [{"context": shape.context.to_dict(), "reason": shape.reason} for shape in found.unscored],
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
        for other, scores in zip(others, found.beside, strict=True):
            cells = [summary_cells(*key, asdict(summary)) for key, summary in _summaries(scores)]
            print_table(f"{other.name} on the same shapes", SUMMARY_COLUMNS, cells)
    for shape in found.unscored:
        notes.print(f"not scored: {shape.reason}", style="red", soft_wrap=True)
    failed = [text for condition in gates if (text := condition.failure(summaries[-1][1])) is not None]
    for text in failed:
        notes.print(f"gate failed: {text}", style="red", soft_wrap=True)
    if failed or found.unscored:
        raise typer.Exit(2)


@dataclass(frozen=True)
class _Other:
    """Another table: what its folder is called, and a snapshot that has it alone."""

    name: str
    table_id: str
    snapshot: Snapshot

    @classmethod
    def of(cls, folder: Path, spec: DeviceSpec) -> Self:
        table = table_in(folder, spec)
        return cls(folder.resolve().name, _table_id(table), snapshot_of(table))


def _table_id(table: Table) -> str:
    assert table.path is not None
    return hashlib.sha256(Path(table.path).read_bytes()).hexdigest()[:32]


def _contexts(
    workload: Path | None, measured: Sequence[SelectionContext], held_out: int, seed: int
) -> tuple[SelectionContext, ...]:
    if workload is None:
        return draw_between(measured, held_out, seed)
    held_back = dict.fromkeys(line.context for line in read_workload(workload))
    known = set(measured)
    contexts = tuple(context for context in held_back if context not in known)
    if not contexts:
        raise ContextError(f"{workload} holds no shape that the tuning did not measure; name other shapes")
    if len(contexts) < len(held_back):
        notes.print(f"{len(held_back) - len(contexts)} shapes are left out, the tuning measured them", soft_wrap=True)
    return contexts


Summaries = list[tuple[tuple[str, str], Summary]]


def _summaries(scores: Sequence[Score], slower: frozenset[Score] | None = None) -> Summaries:
    grouped = [(key, summarise(found, slower)) for key, found in by_operation(scores).items()]
    return [*grouped, (("all", "all"), summarise(scores, slower))]


def _documents(summaries: Summaries) -> list[Mapping[str, Any]]:
    return [{"operation": operation, "mode": mode} | asdict(summary) for (operation, mode), summary in summaries]


def _shape(score: Score, *beside: Score) -> Mapping[str, Any]:
    others = [
        {"hit": other.hit, "chosen": other.chosen, "efficiency": other.efficiency, "speedup": other.speedup}
        for other in beside
    ]
    return asdict(score) | {"context": score.context.to_dict(), "beside": others}
