"""`layerzero-tune compile`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from layerzero_tune.command_line.options import JsonOption, KernelsOption, registry_with, split_list
from layerzero_tune.command_line.output import console, print_json, write_workload
from layerzero_tune.compile.distrust import disturbed_contests
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.pipeline import compile_rows
from layerzero_tune.compile.self_check import check_emitted
from layerzero_tune.compile.wanted import wanted_lines
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.lines import read_workload


def compile_command(
    results: Annotated[Path, typer.Argument(help="Folder of results that run has written.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of tables; the device gets a folder of its own in it.")],
    wanted: Annotated[
        Path | None,
        typer.Option("--wanted", help="File for the shapes that would close its holes, most valuable first."),
    ] = None,
    workload: Annotated[
        Path | None,
        typer.Option("--workload", help="With --wanted: what is served; shapes near none of its lines are left out."),
    ] = None,
    kernels: KernelsOption = "",
    json: JsonOption = False,
) -> None:
    """Compile results into a Python lookup module, and check that it answers as meant."""
    if workload is not None and wanted is None:
        raise WorkloadError(f"--workload {workload} weighs what --wanted writes; give --wanted FILE as well")
    asked = () if workload is None else read_workload(workload)
    held = ResultsStore(results).read()
    compilation = compile_rows(held.rows, registry_with(split_list(kernels)))
    form = compilation.form
    emitted = emit(form)
    with TemporaryDirectory() as draft:  # a table that is in use already gives way to one that was checked
        probes = check_emitted(form, emitted.write(Path(draft)))
    folder = emitted.write(out)
    lines = () if wanted is None else wanted_lines(compilation, held.rows, asked)
    if wanted is not None:
        write_workload(lines, wanted, "--wanted")
    buckets = sum(len(entry.leaves()) for entry in form.entries)
    distrusted = len(disturbed_contests(held.rows))
    if json:
        print_json(
            {
                "table": str(folder),
                "entries": len(form.entries),
                "buckets": buckets,
                "probes": probes,
                "provenance": dict(form.provenance),
                "wanted": None if wanted is None else len(lines),
                "distrusted_contests": distrusted,
                "quarantined": [str(path) for path in held.quarantined],
            }
        )
        return
    console.print(
        f"{folder}: {len(form.entries)} static keys, {buckets} buckets from {form.provenance['measurements']} "
        f"measurements; the module answers as meant at {probes} probes",
        soft_wrap=True,
    )
    if wanted is not None and lines:
        console.print(
            f"{wanted}: {len(lines)} shapes would close the holes in which it misses; "
            f"next: layerzero-tune run --workload {wanted} --out {results}",
            soft_wrap=True,
        )
    elif wanted is not None:
        console.print(f"{wanted}: empty, there is no hole to close", soft_wrap=True)
    if distrusted:
        console.print(
            f"{distrusted} contests ran beside other processes or while the machine drifted: others at the same sizes "
            "go before them, else their intervals are wider",
            soft_wrap=True,
        )
