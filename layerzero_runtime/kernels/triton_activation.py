"""Gated activations in Triton: one pass over gate and up, which may be halves of one tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, ConfigurationSpace, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels.triton_device import ITEM_BYTES, multiprocessors, stay_resident
from layerzero_runtime.kernels.triton_launch import TritonForm
from layerzero_runtime.kernels.triton_rows import LEAST_PER_THREAD, matrix_and_result, strided_rows
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor

_DEFAULTS: Configuration = {"block_size": 1024, "num_warps": 4, "num_stages": 1, "programs_per_multiprocessor": 0}
# Values of a block that a thread holds, of gate and of up.
_MOST_PER_THREAD = 32


def _load_swiglu(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    return _load(context, configuration, "silu")


def _load_geglu(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    return _load(context, configuration, "gelu_tanh" if context.approximate == "tanh" else "gelu")


def _load(context: SelectionContext, configuration: Configuration, activation: str) -> KernelFunction:
    import torch

    from layerzero_runtime.kernels.triton_sources.activation import gated

    dtype = getattr(torch, context.dtype)
    chosen = configuration or _DEFAULTS
    block = chosen["block_size"]
    form = TritonForm(
        gated,
        pointers=(dtype, dtype, dtype),
        divisible=3,
        numbers=(int,),
        constants={"ACTIVATION": activation, "BLOCK": block, "STAGES": chosen["num_stages"]},
        num_warps=chosen["num_warps"],
    )
    launch = form.launcher(context)
    most = chosen["programs_per_multiprocessor"] * multiprocessors(context)

    def activate(gate: Tensor, up: Tensor) -> Tensor:
        if gate.is_contiguous() and up.is_contiguous():
            # One long row.
            output = torch.empty_like(gate)
            rows, width = 1, gate.numel()
            gate_stride = up_stride = width
        else:
            width = gate.shape[-1]
            gate, gate_stride, output = matrix_and_result(gate, width)
            up, up_stride = strided_rows(up, width)
            rows = gate.numel() // width if width else 0
        blocks = rows * -(-width // block)
        launch(most if 0 < most < blocks else blocks, (gate, up, output), (gate_stride, up_stride, width), (rows,))
        return output

    return activate


def _fits(configuration: Configuration, context: SelectionContext) -> bool:
    block, warps = configuration["block_size"], configuration["num_warps"]
    programs: int = configuration["programs_per_multiprocessor"]
    stages: int = configuration["num_stages"]
    # Registers.
    if not LEAST_PER_THREAD <= block // (32 * warps) <= _MOST_PER_THREAD:
        return False
    # Blocks of gate and of up are in flight.
    if not stay_resident(context, programs, warps, (stages - 1) * 2 * block * ITEM_BYTES[context.dtype]):
        return False
    # Loads are in flight ahead of a loop alone.
    return stages == 1 or programs > 0


_SPACE = ConfigurationSpace(
    {
        "block_size": (256, 512, 1024, 2048, 4096, 8192),
        "num_warps": (1, 2, 4, 8, 16),
        "num_stages": (1, 2, 3, 4),
        "programs_per_multiprocessor": (0, 1, 2, 4, 8, 16),
    },
    _fits,
)


def _declare(kernel_id: str, operation: str) -> KernelSpec:
    return KernelSpec(
        kernel_id=kernel_id,
        operations=(operation,),
        platforms=("cuda",),
        dtypes=("float32", "float16", "bfloat16"),
        library="triton",
        requires=("torch", "triton"),
        min_version="3.4",
        min_sm=(8, 0),  # Triton's own
        compiles=True,
        priority=30,
        extra_limits=(Limit("rows", "at_most", 2**30),),  # blocks are numbered in 32 bits, one grid beyond the last
    )


_SOURCES = ("triton_rows.py", "triton_device.py", "triton_launch.py", "triton_sources/activation.py")
KERNELS = (
    Kernel(_declare("triton.swiglu", "mlp.swiglu"), _load_swiglu, _SPACE, _SOURCES),
    Kernel(_declare("triton.geglu", "mlp.geglu"), _load_geglu, _SPACE, _SOURCES),
)
