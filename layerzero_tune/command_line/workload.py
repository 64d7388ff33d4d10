"""`layerzero-tune workload`: make, show, sample and merge workload files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from layerzero_tune.command_line.options import JsonOption, OpsOption, operations_named, split_list
from layerzero_tune.command_line.output import notes, print_json, print_table, write_workload
from layerzero_tune.workload.describe import describe_workload
from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.lines import WorkloadLine, format_workload, merge_workloads, read_workload
from layerzero_tune.workload.make import make_workload
from layerzero_tune.workload.merge import merge_sorted
from layerzero_tune.workload.model_share import divides
from layerzero_tune.workload.models import GROUPS, MODELS, models_named
from layerzero_tune.workload.sample import sample_lines
from layerzero_tune.workload.serving import draw_serving
from layerzero_tune.workload.unseen import unseen_lines

OutOption = Annotated[Path | None, typer.Option("--out", help="File to write; standard output without it.")]

workload_app = typer.Typer(help="Make, show, sample and merge workload files.", no_args_is_help=True)


@workload_app.command("make")
def make_command(
    model: Annotated[
        str,
        typer.Option("--model", help=f"Models and groups ({', '.join(GROUPS)}), by commas: {', '.join(MODELS)}."),
    ],
    tp: Annotated[
        str, typer.Option("--tp", help="Devices that share a model; of several numbers those that divide it.")
    ] = "1",
    mode: Annotated[str, typer.Option("--mode", help="eager, graph, or both.")] = "eager",
    dtype: Annotated[str, typer.Option("--dtype", help="Separated by commas.")] = "bfloat16",
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", help="Separated by commas.")] = "1,8",
    lengths: Annotated[str, typer.Option("--lengths", help="Sequence lengths, separated by commas.")] = "128,1024,4096",
    draws: Annotated[
        int,
        typer.Option(
            "--draws",
            help="So many random points each of prefill, chunked prefill, decode and encoding, up to 128K tokens, in "
            "place of --batch-sizes and --lengths.",
        ),
    ] = 0,
    unseen_by: Annotated[
        Path | None,
        typer.Option(
            "--unseen-by",
            help="To evaluate a tuning on this workload file: leave out its calls, and those with features or sizes "
            "beyond them.",
        ),
    ] = None,
    ops: OpsOption = "",
    out: OutOption = None,
) -> None:
    """Write the calls that serving a model makes, as JSON Lines."""
    operations = operations_named(ops)
    batches, sizes = _integers("--batch-sizes", batch_sizes), _integers("--lengths", lengths)
    shares = _shares(models_named(split_list(model)), tp)
    served = itertools.product(shares, split_list(mode) or (mode,), split_list(dtype) or (dtype,))
    made = merge_workloads(
        *(
            draw_serving(name, devices, kind, number, draws)
            if draws
            else make_workload(name, devices, kind, number, batches, sizes)
            for (name, devices), kind, number in served
        )
    )
    lines = tuple(line for line in made if line.context.operation in operations)
    if unseen_by is not None:
        lines = unseen_lines(lines, read_workload(unseen_by))
    if not lines:
        raise WorkloadError("no call is left: name models that make calls of these --ops, of those --unseen-by leaves")
    _write(lines, out)


def _shares(models: tuple[str, ...], tp: str) -> list[tuple[str, int]]:
    """Models and numbers of devices; of several numbers those that divide a model, or else the first, which then says
    why it does not."""
    try:
        devices = [int(part) for part in split_list(tp)]
    except ValueError:
        raise typer.BadParameter(f"{tp!r} is no whole number, or several with commas", param_hint="'--tp'") from None
    found: list[tuple[str, int]] = []
    for model in models:
        dividing = [number for number in devices if number > 0 and divides(model, number)]
        found += [(model, number) for number in dividing or devices[:1]]
    return found


@workload_app.command("merge")
def merge_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Workload files.")],
    out: OutOption = None,
) -> None:
    """Join workload files: equal calls become one line, their weights added. For the files of several processes."""
    _write(merge_sorted([read_workload(file) for file in files]), out)


@workload_app.command("sample")
def sample_command(
    file: Annotated[Path, typer.Argument(help="Workload file.")],
    at_most: Annotated[int, typer.Option("--at-most", min=1, help="Lines to keep of each operation and mode.")],
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draw.")] = 0,
    ops: OpsOption = "",
    out: OutOption = None,
) -> None:
    """Keep lines at random, for what has not the time to measure all."""
    operations = operations_named(ops)
    lines = [line for line in read_workload(file) if line.context.operation in operations]
    if not lines:
        raise WorkloadError(f"{file} has no call of these --ops, use others or leave the option out")
    _write(sample_lines(lines, at_most, seed), out)


def _write(lines: Sequence[WorkloadLine], out: Path | None) -> None:
    text = format_workload(lines)
    if out is None:
        print(text, end="")
        return
    write_workload(lines, out, "--out")
    notes.print(f"{out}: {len(lines)} lines", soft_wrap=True)


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in split_list(text))
    except ValueError:
        raise WorkloadError(f"{option} is {text!r}, required whole numbers separated by commas") from None


@workload_app.command("show")
def show_command(
    file: Annotated[Path, typer.Argument(help="Workload file.")],
    json: JsonOption = False,
) -> None:
    """Check a workload file and summarise it by operation and static key."""
    summaries = describe_workload(read_workload(file))
    if json:
        print_json([summary.to_dict() for summary in summaries])
        return
    print_table(
        str(file),
        ("operation", "key", "lines", "weight", "sizes"),
        [
            (
                summary.operation,
                ", ".join((summary.mode, summary.dtype, *(f"{name} {value}" for name, value in summary.features))),
                str(summary.lines),
                f"{summary.weight:g}",
                ", ".join(f"{name} {low} to {high}" for name, low, high in summary.ranges),
            )
            for summary in summaries
        ],
    )
