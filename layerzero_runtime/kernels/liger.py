"""Liger's norms and gated activations: their forward functions, without the autograd function around them.

Limits are those of liger_kernel 0.8.5, in `ops/utils.py` (`calculate_settings`: one block for a row of at most 65,536),
`ops/rms_norm.py`, `ops/fused_add_rms_norm.py`, `ops/layer_norm.py`, `ops/swiglu.py` and `ops/geglu.py`. All take rows
at one stride, and of gate and up at the same one. Triton compiles the norms when a block, a power of two, or what 16
divides is new, and the activations for each width.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels.library_calls import guarded, is_aligned
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor

# "gemma": all in float32 and one rounding at the end, as torch's own kernel; "llama" rounds before the weight, too.
_CASTING = "gemma"
# From so many rows of at most so many columns on, `rms_norm_forward` takes its kernel for several rows at a time.
_BLOCK_ROWS, _BLOCK_WIDTH = 4096 * 8, 256


def _load_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    def normalise(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        output: Tensor = rms_norm_forward(x, weight, eps, offset, _CASTING, None)[0]
        return output

    return guarded("liger.rms_norm", normalise, _rms_form, context)


def _rms_form(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Hashable:
    width = x.shape[-1]
    rows = x.numel() // width
    in_blocks = width <= _BLOCK_WIDTH and rows >= _BLOCK_ROWS
    return _block_form(width), is_aligned(x, weight), in_blocks and 1 + (rows % 16 == 0)


def _norm_form(x: Tensor, *others: Any) -> Hashable:
    return _block_form(x.shape[-1]), is_aligned(x, *(part for part in others if not isinstance(part, float)))


def _gated_form(gate: Tensor, up: Tensor) -> Hashable:
    return gate.shape[-1], is_aligned(gate, up)


def _block_form(width: int) -> Hashable:
    return (width - 1).bit_length(), width % 16 == 0


def _load_add_rms(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

    def normalise(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        output, total, *_ = fused_add_rms_norm_forward(x, residual, weight, eps, 0.0, _CASTING)
        return output, total

    return guarded("liger.add_rms_norm", normalise, _norm_form, context)


def _load_layer(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from liger_kernel.ops.layer_norm import layer_norm_forward

    def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        output: Tensor = layer_norm_forward(x, weight, bias, eps)[0]
        return output

    return guarded("liger.layer_norm", normalise, _norm_form, context)


def _load_swiglu(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from liger_kernel.ops.swiglu import swiglu_forward

    def activate(gate: Tensor, up: Tensor) -> Tensor:
        output: Tensor = swiglu_forward(gate, up)[2]
        return output

    return guarded("liger.swiglu", activate, _gated_form, context)


def _load_geglu(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from liger_kernel.ops.geglu import geglu_forward

    def activate(gate: Tensor, up: Tensor) -> Tensor:
        output: Tensor = geglu_forward(gate, up)[2]
        return output

    return guarded("liger.geglu", activate, _gated_form, context)


def _declare(kernel_id: str, operation: str, *limits: Limit) -> KernelSpec:
    return KernelSpec(
        kernel_id=kernel_id,
        operations=(operation,),
        platforms=("cuda",),
        dtypes=("float32", "float16", "bfloat16"),
        library="liger-kernel",
        requires=("torch", "triton", "liger"),
        min_version="0.8.5",  # the oldest that was tried
        min_sm=(8, 0),  # Triton's own
        max_hidden_size=65536,
        supports_mixed_weight_dtype=True,
        requires_contiguous=True,
        compiles=True,
        priority=20,
        extra_limits=(
            *limits,
            Limit("mixed_weight_dtype", "one_of", (None, "float32", "float16", "bfloat16")),
            Limit("rows", "at_most", 2**31 - 1),  # a program per row: CUDA's largest grid
        ),
    )


_WEIGHT, _BIAS = Limit("has_weight", "one_of", (True,)), Limit("has_bias", "one_of", (True,))
_SOURCES = ("library_calls.py",)
KERNELS = (
    Kernel(_declare("liger.rms_norm", "norm.rms"), _load_rms, sources=_SOURCES),
    Kernel(_declare("liger.add_rms_norm", "norm.add_rms", _WEIGHT), _load_add_rms, sources=_SOURCES),
    Kernel(_declare("liger.layer_norm", "norm.layer", _WEIGHT, _BIAS), _load_layer, sources=_SOURCES),
    Kernel(_declare("liger.swiglu", "mlp.swiglu"), _load_swiglu, sources=_SOURCES),
    Kernel(
        _declare("liger.geglu", "mlp.geglu", Limit("approximate", "one_of", ("tanh",))), _load_geglu, sources=_SOURCES
    ),
)
