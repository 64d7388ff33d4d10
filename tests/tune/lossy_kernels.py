"""Kernels that lose their process where a test wants it; `TORTURE_FOLDER` names a folder for their notes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction
from tests.tune.torture_kernels import kernel, rms_norm

_kept: list[Any] = []


def _processes_seen(name: str) -> int:
    """How many processes have called the kernel so far, this one included; counted in the folder that a test names."""
    folder = Path(os.environ["TORTURE_FOLDER"])
    (folder / f"{name}-{os.getpid()}").touch()
    return len(list(folder.glob(f"{name}-*")))


def _dies_once(x: Any, weight: Any, eps: float, offset: float) -> Any:
    if _processes_seen("dies_once") == 1:
        os.abort()
    return rms_norm(x, weight, eps, offset)


def _hangs_once(x: Any, weight: Any, eps: float, offset: float) -> Any:
    if _processes_seen("hangs_once") == 1:
        time.sleep(3600)
    return rms_norm(x, weight, eps, offset)


def _pauses(x: Any, weight: Any, eps: float, offset: float) -> Any:
    global _has_paused
    if not _has_paused:
        _has_paused = True
        _processes_seen("pauses")
        time.sleep(2.0)
    return rms_norm(x, weight, eps, offset)


_has_paused = False


def _dies_beside_others(x: Any, weight: Any, eps: float, offset: float) -> Any:
    _processes_seen("dies_beside_others" if _has_company else "dies_beside_others-alone")
    if _has_company:
        os.abort()
    return rms_norm(x, weight, eps, offset)


def _is_company(x: Any, weight: Any, eps: float, offset: float) -> Any:
    global _has_company
    _has_company = True
    return rms_norm(x, weight, eps, offset)


_has_company = False


def _oom_killed(x: Any, weight: Any, eps: float, offset: float) -> Any:
    (Path(os.environ["TORTURE_FOLDER"]) / "vmstat").write_text(f"oom_kill {time.monotonic_ns()}")
    os.kill(os.getpid(), signal.SIGKILL)


def _load_hangs(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    _processes_seen("compiles_for_ever")
    time.sleep(3600)
    return rms_norm


def _load_keeps_much(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    import torch

    _kept.append(torch.empty(1 << 30))
    return rms_norm


OOM_KILLED = kernel("oom_killed", _oom_killed)
COMPILES_FOR_EVER = replace(kernel("compiles_for_ever", rms_norm), load=_load_hangs)
KEEPS_MUCH = replace(kernel("keeps_much", rms_norm), load=_load_keeps_much)
DIES_ONCE = kernel("dies_once", _dies_once)
HANGS_ONCE = kernel("hangs_once", _hangs_once)
PAUSES = kernel("pauses", _pauses)
DIES_BESIDE_OTHERS = kernel("dies_beside_others", _dies_beside_others)
COMPANY = kernel("company", _is_company)

KERNELS = tuple(value for value in list(globals().values()) if isinstance(value, Kernel))
