"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import typer

from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.errors import ContextError, ResultsError, TableError
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.registry import Registry
from layerzero_runtime.tables.table import Table
from layerzero_runtime.tables.table_files import TABLES_VARIABLE, check_device, load_table_file
from layerzero_tune.worker.kernels import load_kernels

RECORDED_PREFIX = "recorded:"

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda:N, or recorded:RESULTS to replay results instead of a clock.")
]
KernelsOption = Annotated[
    str, typer.Option("--kernels", help="Modules with further kernels (attribute KERNELS), separated by commas.")
]
OpsOption = Annotated[
    str, typer.Option("--ops", help="Operations or families, separated by commas: attention,norm.rms. Default: all.")
]


def split_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def operations_named(text: str) -> tuple[str, ...]:
    """The operations that names and families ("attention") stand for, all of them for an empty text.

    Raises:
        ContextError: a name stands for none.
    """
    names = split_list(text)
    for name in names:
        if not any(_belongs(operation, name) for operation in OPERATIONS):
            families = sorted({operation.split(".")[0] for operation in OPERATIONS})
            raise ContextError(
                f"--ops names {name!r}, known operations: {', '.join(OPERATIONS)}; families: {', '.join(families)}"
            )
    return tuple(op for op in OPERATIONS if not names or any(_belongs(op, name) for name in names))


def _belongs(operation: str, name: str) -> bool:
    return operation == name or operation.startswith(name + ".")


def registry_with(modules: Sequence[str]) -> Registry:
    """The built-in kernels and those of the named modules.

    Raises:
        SpecError: a module cannot be imported, has no KERNELS, or declares an id again.
    """
    return Registry(load_kernels(modules).values())


def live_device(name: str) -> DeviceSpec:
    """The named device of this machine.

    Raises:
        ContextError: there is no such device, or it cannot be measured.
    """
    spec = detect_device(name)
    if spec.platform not in ("cpu", "cuda"):
        raise ContextError(f"device {name!r} is {spec.name}: this version measures CPUs and CUDA devices")
    return spec


def results_of(text: str) -> Path | None:
    """The results folder of `recorded:RESULTS`, None for a live device."""
    return Path(text.removeprefix(RECORDED_PREFIX)) if text.startswith(RECORDED_PREFIX) else None


def check_writable(folder: Path) -> None:
    """Make the folder for results, before anything is measured that could not be kept.

    Raises:
        ResultsError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResultsError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from error


def use_tables(tables: Path, device: DeviceSpec) -> Table:
    """The device's table of this folder, which this process and its workers will find first.

    Raises:
        TableError: as `table_in`.
    """
    table = table_in(tables, device)
    os.environ[TABLES_VARIABLE] = str(tables.resolve())
    return table


def table_in(tables: Path, device: DeviceSpec) -> Table:
    """The device's table of this folder.

    Raises:
        TableError: the folder has none, or one that is damaged, of another schema or of another device.
    """
    path = tables / device.slug / "__init__.py"
    if not path.is_file():
        others = sorted(found.parent.name for found in tables.glob("*/__init__.py"))
        raise TableError(
            f"{tables} holds no table for {device.slug}, it has: {', '.join(others) or 'none'}; "
            f"compile results of this device with --out {tables}"
        )
    table = load_table_file(path)
    check_device(table, device)
    return table
