"""Norms that break a GPU, each at one number of rows alone: one never ends, one writes where it may not."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.selection.limits import Limit

SPINS, WRITES_ASTRAY = "faulty.spins", "faulty.writes_astray"
SPINS_AT, WRITES_ASTRAY_AT = 33, 65


@triton.jit
def _store_at(pointer, offset):  # type: ignore[no-untyped-def]
    tl.store(pointer + offset, 1.0)


def _spin(x: torch.Tensor) -> None:
    torch.cuda._sleep(2**60)  # type: ignore[no-untyped-call]  # cycles: years


def _write_astray(x: torch.Tensor) -> None:
    _store_at[(1,)](x, 2**40)


def _faulty(kernel_id: str, rows: int, fault: Callable[[torch.Tensor], None]) -> Kernel:
    def load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
        def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
            fault(x)
            return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)

        return rms_norm

    spec = KernelSpec(
        kernel_id=kernel_id,
        operations=("norm.rms",),
        platforms=("cuda",),
        dtypes=("bfloat16",),
        extra_limits=(Limit("rows", "at_least", rows), Limit("rows", "at_most", rows)),
    )
    return Kernel(spec, load)


KERNELS = (
    _faulty(SPINS, SPINS_AT, _spin),
    _faulty(WRITES_ASTRAY, WRITES_ASTRAY_AT, _write_astray),
)
