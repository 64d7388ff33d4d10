"""xFormers' attention with keys split between programs (`xformers.ops.fmha.triton_splitk`), in Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels.attention_inputs import SOURCES, on_dense
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor


def _load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from xformers.ops.fmha.common import Inputs
    from xformers.ops.fmha.triton_splitk import FwOp

    # Past `memory_efficient_attention`, which checks what the limits have checked and records for a backward.
    def attend_single(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        output: Tensor = FwOp.apply(Inputs(query, key, value, scale=scale), needs_gradient=False)[0]
        return output

    def attend_grouped(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        kv_heads = key.shape[2]
        group = query.shape[2] // kv_heads
        # Heads that share keys by a stride of 0 become further rows of one head there.
        query = query.view(*query.shape[:2], kv_heads, group, -1)
        key = key.unsqueeze(3).expand(-1, -1, -1, group, -1)
        value = value.unsqueeze(3).expand(-1, -1, -1, group, -1)
        output: Tensor = FwOp.apply(Inputs(query, key, value, scale=scale), needs_gradient=False)[0]
        return output.flatten(2, 3)

    return on_dense(attend_single if context.gqa_group == 1 else attend_grouped, context)


# `FwOp` and its `shape_not_supported_reasons`, `not_supported_reasons` in xformers/ops/fmha/triton_splitk.py: 16-bit
# types, these head dimensions, strides that are multiples of 8 elements, sm_80. Of causal masks it has those of ragged
# batches alone, which are left out. More queries than these would read the keys more often than kernels made for many.
_KERNEL = KernelSpec(
    kernel_id="xformers.split_k",
    operations=("attention.full", "attention.cross"),
    platforms=("cuda",),
    dtypes=("float16", "bfloat16"),
    library="xformers",
    version_digits=3,
    requires=("torch", "triton", "xformers_split_k"),
    min_version="0.0.30",
    min_sm=(8, 0),
    layouts=("bshd",),
    min_seq_len=1,
    supports_gqa=True,
    requires_last_dim_stride1=True,
    workspace_bytes=2**40,
    compiles=True,
    priority=31,
    extra_limits=(Limit("head_dim", "one_of", (16, 32, 64, 128, 256)), Limit("seq_len_q", "at_most", 64)),
)

KERNELS = (Kernel(_KERNEL, _load, sources=SOURCES),)
