"""Kernels whose loads do what compilations may do; `COMPILING_FOLDER` names a folder for their notes."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction
from tests.tune.torture_kernels import kernel, rms_norm

# Far longer than a test waits for anything.
PATIENCE_S = 60.0


def note(name: str, text: str = "") -> None:
    (Path(os.environ["COMPILING_FOLDER"]) / f"{name}-{os.getpid()}-{time.monotonic_ns()}").write_text(text)


def notes(name: str) -> list[str]:
    return [path.read_text() for path in sorted(Path(os.environ["COMPILING_FOLDER"]).glob(f"{name}-*"))]


def _notes_where(configuration: Configuration) -> None:
    note("noted", f"{os.nice(0)} {os.environ.get('CUDA_VISIBLE_DEVICES')}")


def _notes_environment(configuration: Configuration) -> None:
    note("environment", json.dumps(dict(os.environ)))


def _notes_number(configuration: Configuration) -> None:
    note(f"number-{configuration['number']}", str(os.getpid()))


_imported: set[str] = set()


def _imports_slowly(configuration: Configuration) -> None:
    if not _imported:
        time.sleep(1.0)
        _imported.add("slow")
    _notes_number(configuration)


def _meets(configuration: Configuration) -> None:
    """Comes to an end only where so many processes are here at once."""
    note("meets")
    waited_s = 0.0
    while len(notes("meets")) < configuration["number"]:
        time.sleep(0.01)
        waited_s += 0.01
        if waited_s > PATIENCE_S:
            raise TimeoutError("nobody else came")


def _takes_its_time(configuration: Configuration) -> None:
    """Many short steps, each noted."""
    for _ in range(configuration["steps"]):
        time.sleep(0.01)
        note("step")


def _has_it_done(configuration: Configuration) -> None:
    """The same by a process in a group of its own, as ninja starts a compiler."""
    steps = f"from {__name__} import _takes_its_time; _takes_its_time({dict(configuration)})"
    subprocess.run([sys.executable, "-c", steps], process_group=0, check=True)


def _hangs(configuration: Configuration) -> None:
    note("hangs")
    ctypes.PyDLL(None).sleep(3600)


def _dies(configuration: Configuration) -> None:
    note("dies")
    os.kill(os.getpid(), signal.SIGKILL)


def _raises(configuration: Configuration) -> None:
    note("raises")
    raise RuntimeError("no GPU")


def _compiling(name: str, compilation: Callable[[Configuration], None], library: str = "compiling") -> Kernel:
    def load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
        compilation(configuration)
        return rms_norm

    made = kernel(name, rms_norm, compiles=True, platforms=("cpu", "cuda"))
    return replace(made, spec=replace(made.spec, kernel_id=f"{library}.{name}"), load=load)


KERNELS: tuple[Kernel, ...] = (
    *(_compiling("meets", _meets, library) for library in ("first", "second")),
    *(_compiling("number", _notes_number, library) for library in ("first", "second")),
    _compiling("number", _imports_slowly, "slow"),
    *(
        _compiling(name, compilation)
        for name, compilation in {
            "notes": _notes_where,
            "environment": _notes_environment,
            "meets": _meets,
            "takes_its_time": _takes_its_time,
            "has_it_done": _has_it_done,
            "hangs": _hangs,
            "dies": _dies,
            "raises": _raises,
        }.items()
    ),
)


def by_id(*others: Kernel) -> dict[str, Any]:
    return {found.kernel_id: found for found in (*KERNELS, *others)}
