"""FlashAttention-3 (`flash_attn_interface`), for Hopper, by its public function."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels.attention_inputs import SOURCES, on_dense
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor


def _load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from flash_attn_interface import flash_attn_func

    causal = context.is_causal

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        result = flash_attn_func(query, key, value, softmax_scale=scale, causal=causal)
        # Earlier versions gave the logarithms of the sums too.
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    return on_dense(attend, context)


# hopper/flash_api.cpp (`mha_fwd`, `get_max_headdim`) and the docstring of `flash_attn_func` in
# hopper/flash_attn_interface.py: sm_90, 16-bit types, head dimensions up to 256 in multiples of 8; causal masks lie
# bottom-right, rows without a key are zero. Not tried on a device: no wheel of it was at hand.
_KERNEL = KernelSpec(
    kernel_id="flash_attn_3.forward",
    operations=("attention.causal", "attention.full", "attention.cross"),
    platforms=("cuda",),
    dtypes=("float16", "bfloat16"),
    library="flash_attn_3",
    version_digits=2,
    requires=("torch", "flash_attn_3"),
    min_sm=(9, 0),
    max_sm=(9, 0),
    layouts=("bshd",),
    max_head_dim=256,
    head_dim_multiple=8,
    min_seq_len=1,
    supports_gqa=True,
    causal_geometries=("square", "bottom_right"),
    requires_last_dim_stride1=True,
    workspace_bytes=64 * 2**20,
    priority=44,
    extra_limits=(Limit("batch_kv_heads", "at_most", 65535),),
)

KERNELS = (Kernel(_KERNEL, _load, sources=SOURCES),)
