"""`layerzero-tune wheel`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated

import typer

from layerzero_tune.command_line.options import JsonOption
from layerzero_tune.command_line.output import console, print_json
from layerzero_tune.results.atomic import write_atomically
from layerzero_tune.wheel.archive import EARLIEST
from layerzero_tune.wheel.build import build_wheel
from layerzero_tune.wheel.errors import WheelError
from layerzero_tune.wheel.naming import version_of_results, wheel_name
from layerzero_tune.wheel.table_folder import read_tables

EPOCH_VARIABLE = "SOURCE_DATE_EPOCH"


def wheel_command(
    tables: Annotated[list[Path], typer.Argument(metavar="TABLES...", help="Folders of tables, or of one device's.")],
    name: Annotated[str, typer.Option("--name", help="Name of the distribution, such as acme-kernels-h100.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the wheel.")],
    version: Annotated[
        str, typer.Option("--version", help="Its version. Default: the day of the newest results.")
    ] = "",
    json: JsonOption = False,
) -> None:
    """Pack tables into a wheel that the runtime finds once it is installed.

    The wheel holds the generated modules, their evidence and, where evaluation.json lies beside them, their evaluation;
    none of our code. Every module is checked first. Equal tables give equal bytes; the files carry the time of
    SOURCE_DATE_EPOCH, if that is set.
    """
    folders = read_tables(tables)
    measured_to = [folder.table.provenance["measured_to"] for folder in folders]
    named = wheel_name(name, version or version_of_results(measured_to))
    data = build_wheel(named, folders, _modified())
    path = out / named.file_name
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise WheelError(f"cannot write {path}: {error.strerror or error}; choose another folder with --out") from error
    if json:
        print_json(
            {
                "wheel": str(path),
                "name": named.name,
                "version": named.version,
                "package": named.package,
                "sha256": hashlib.sha256(data).hexdigest(),
                "bytes": len(data),
                "tables": {folder.slug: dict(folder.table.provenance) for folder in folders},
            }
        )
        return
    console.print(
        f"{path}: {len(data)} bytes, tables of {', '.join(folder.slug for folder in folders)}; "
        f"next: pip install {path}, then layerzero-tune doctor",
        soft_wrap=True,
    )


def _modified() -> int:
    text = os.environ.get(EPOCH_VARIABLE, "")
    try:
        return int(text) if text else EARLIEST
    except ValueError:
        raise WheelError(f"{EPOCH_VARIABLE} is {text!r}, required whole seconds since 1970") from None
