"""FlashInfer's norms. nvcc compiles them once for all sizes, in some 20 seconds, at their first call.

Limits are those of flashinfer-python 0.6.6, in `norm.py`, `data/csrc/norm.cu` and `data/include/flashinfer/norm.cuh`:
float16 and bfloat16; the RMS norm reads the weight as if it were of the input's dtype, the layer norm takes bfloat16
beside a weight and a bias of float32.

Left out: `fused_add_rmsnorm` works in place, and two copies to keep the arguments cost more than it saves;
`silu_and_mul`, `gelu_and_mul` and `gelu_tanh_and_mul` take gate and up as the halves of one tensor, and calls here have
two tensors, which would have to be copied together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels.library_calls import aligned
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor


def _load_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    import torch
    from flashinfer.norm import gemma_rmsnorm, rmsnorm

    run = gemma_rmsnorm if context.offset else rmsnorm
    # Programmatic dependent launches, as `flashinfer.utils.device_support_pdl` has it; asked once, not in each call.
    early = context.sm is not None and context.sm >= (9, 0)

    def normalise(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        rows = _rows(x)
        output = torch.empty_like(rows)
        run(rows, aligned(weight), eps, output, early)
        return output if rows.shape == x.shape else output.view(x.shape)

    return normalise


def _load_layer(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from flashinfer.norm import layernorm

    def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows = _rows(x)
        output: Tensor = layernorm(rows, aligned(weight), aligned(bias), eps)
        return output if rows.shape == x.shape else output.view(x.shape)

    return normalise


def _rows(x: Tensor) -> Tensor:
    """x as a matrix, at an address from which whole vectors can be read: that is not checked there."""
    return aligned(x if x.dim() == 2 else x.view(-1, x.shape[-1]))


def _declare(kernel_id: str, operation: str, dtypes: tuple[str, ...], most_rows: int, *limits: Limit) -> KernelSpec:
    return KernelSpec(
        kernel_id=kernel_id,
        operations=(operation,),
        platforms=("cuda",),
        dtypes=dtypes,
        library="flashinfer-python",
        requires=("torch", "flashinfer_norm"),
        min_version="0.6.6",  # the oldest that was tried
        min_sm=(8, 0),  # bfloat16
        max_hidden_size=_WIDEST,
        supports_mixed_weight_dtype=True,
        requires_contiguous=True,
        compiles=True,
        priority=20,
        extra_limits=(
            *limits,
            Limit("has_weight", "one_of", (True,)),
            Limit("rows", "at_most", most_rows),
        ),
    )


# Elements are numbered in 32 bits, by the layer norm with a sign.
_WIDEST, _MOST_ROWS, _MOST_LAYER_ROWS = 2**14, 2**18, 2**17
_RMS = _declare(
    "flashinfer.rms_norm",
    "norm.rms",
    ("float16", "bfloat16"),
    _MOST_ROWS,
    Limit("mixed_weight_dtype", "one_of", (None,)),
    Limit("offset", "one_of", (0.0, 1.0)),
)
_LAYER = _declare(
    "flashinfer.layer_norm",
    "norm.layer",
    ("bfloat16",),
    _MOST_LAYER_ROWS,
    Limit("mixed_weight_dtype", "one_of", ("float32",)),
    Limit("has_bias", "one_of", (True,)),
)
KERNELS = (
    Kernel(_RMS, _load_rms, sources=("library_calls.py",)),
    Kernel(_LAYER, _load_layer, sources=("library_calls.py",)),
)
