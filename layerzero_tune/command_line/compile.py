"""`layerzero-tune compile`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from layerzero_tune.command_line.options import JsonOption, KernelsOption, registry_with, split_list
from layerzero_tune.command_line.output import console, print_json
from layerzero_tune.compile.distrust import disturbed_contests
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.pipeline import compile_table
from layerzero_tune.compile.self_check import check_emitted
from layerzero_tune.results.store import ResultsStore


def compile_command(
    results: Annotated[Path, typer.Argument(help="Folder of results that run has written.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of tables; the device gets a folder of its own in it.")],
    kernels: KernelsOption = "",
    json: JsonOption = False,
) -> None:
    """Compile results into a Python lookup module, and check that it answers as meant."""
    held = ResultsStore(results).read()
    form = compile_table(held.rows, registry_with(split_list(kernels)))
    emitted = emit(form)
    with TemporaryDirectory() as draft:  # a table that is in use already gives way to one that was checked
        probes = check_emitted(form, emitted.write(Path(draft)))
    folder = emitted.write(out)
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
    if distrusted:
        console.print(
            f"{distrusted} contests ran beside other processes or while the machine drifted: others at the same sizes "
            "go before them, else their intervals are wider",
            soft_wrap=True,
        )
