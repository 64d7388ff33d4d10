"""FlashInfer's RMS norm. nvcc compiles it once for all sizes, in some 20 seconds, at its first call.

Limits are those of flashinfer-python 0.6.6, in `norm.py`, `data/csrc/norm.cu` and `data/include/flashinfer/norm.cuh`:
float16 and bfloat16; the weight is read as if it were of the input's dtype.

Left out: `fused_add_rmsnorm` works in place, and two copies to keep the arguments cost more than it saves;
`silu_and_mul`, `gelu_and_mul` and `gelu_tanh_and_mul` take gate and up as the halves of one tensor, and calls here have
two tensors, which would have to be copied together. `layernorm` takes bfloat16 beside a weight and a bias of float32
alone, and these torch's layer norm, the default that always has to compete, refuses on CUDA devices ("expected scalar
type BFloat16 but found Float", on an H100).
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


def _rows(x: Tensor) -> Tensor:
    """x as a matrix, at an address from which whole vectors can be read: that is not checked there."""
    return aligned(x if x.dim() == 2 else x.view(-1, x.shape[-1]))


_RMS = KernelSpec(
    kernel_id="flashinfer.rms_norm",
    operations=("norm.rms",),
    platforms=("cuda",),
    dtypes=("float16", "bfloat16"),
    library="flashinfer-python",
    requires=("torch", "flashinfer_norm"),
    min_version="0.6.6",  # the oldest that was tried
    min_sm=(8, 0),  # bfloat16
    max_hidden_size=2**14,
    requires_contiguous=True,
    compiles=True,
    priority=20,
    extra_limits=(
        Limit("offset", "one_of", (0.0, 1.0)),
        Limit("has_weight", "one_of", (True,)),
        Limit("rows", "at_most", 2**18),  # elements are numbered in 32 bits
    ),
)
KERNELS = (Kernel(_RMS, _load_rms, sources=("library_calls.py",)),)
