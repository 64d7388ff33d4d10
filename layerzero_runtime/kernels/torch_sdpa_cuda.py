"""The CUDA backends of torch's scaled dot product attention, by their bindings.

A binding skips what `scaled_dot_product_attention` does around it: the choice of a backend, its checks, padding of head
dimensions and masks. So the limits here are those of the checks (`can_use_flash_attention`, `can_use_cudnn_attention`,
`can_use_mem_efficient_attention` in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; `mha_fwd` in
cuda/flash_attn/flash_api.cpp beside it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerzero_runtime.context import ALIGNMENTS, SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels.attention_inputs import (
    SOURCES,
    are_aligned,
    are_dense_enough,
    dense_copies,
    on_seeing_rows,
    vector_mask,
)
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor

# `CustomMaskType::CausalFromBottomRight` of the memory-efficient kernel (torch.nn.attention.bias.CausalVariant).
_LOWER_RIGHT = 2


def _load_flash(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch import _scaled_dot_product_flash_attention as flash

    is_causal, mask = context.is_causal, vector_mask(context)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        if not are_aligned(query, key, value, mask):
            query, key, value = dense_copies(query, key, value)
        output: Tensor = flash(query, key, value, 0.0, is_causal, scale=scale)[0]
        return output

    return attend


def _load_cudnn(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch import _scaled_dot_product_cudnn_attention as cudnn

    is_causal, mask = context.is_causal, vector_mask(context)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        if not are_dense_enough(query, key, value, mask):
            query, key, value = dense_copies(query, key, value)
        # Without a bias, and without the logarithms of the sums, which a backward would need.
        output: Tensor = cudnn(query, key, value, None, False, 0.0, is_causal, scale=scale)[0]
        return output

    return attend


def _load_efficient(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    import torch

    binding = torch._scaled_dot_product_efficient_attention
    forward = torch.ops.aten._efficient_attention_forward.default
    is_causal, mask = context.is_causal, vector_mask(context)

    def attend_once(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        output: Tensor = binding(query, key, value, None, False, 0.0, is_causal, scale=scale)[0]
        return output

    def attend_bottom_right(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        output: Tensor = forward(
            query, key, value, None, None, None, None, None, 0.0, _LOWER_RIGHT, False, scale=scale
        )[0]
        return output.transpose(1, 2)

    bottom_right, top_left = context.causal_mask == "bottom_right", context.causal_mask == "top_left"
    attend = on_seeing_rows(attend_bottom_right) if bottom_right else attend_once
    is_grouped = context.gqa_group != 1

    def attend_aligned(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        if not are_aligned(query, key, value, mask):
            query, key, value = dense_copies(query, key, value)
        if top_left and key.shape[2] > query.shape[2]:
            # No query sees the keys behind: where there is one query, and keys are shared as below, it would.
            key, value = key.narrow(2, 0, query.shape[2]), value.narrow(2, 0, query.shape[2])
        if not is_grouped:
            return attend(query, key, value, attn_mask, dropout_p, scale)
        # It knows no groups: each becomes a batch of its own, whose heads share the keys by a stride of 0. Keys and
        # values are copied where batch and heads are not one dimension in memory, but never once per query head.
        batch, heads, length_q, width = query.shape
        kv_heads, length_k = key.shape[1], key.shape[2]
        groups, group = batch * kv_heads, heads // kv_heads
        rows = query.reshape(groups, group, length_q, width)
        key = key.reshape(groups, 1, length_k, width).expand(-1, group, -1, -1)
        value = value.reshape(groups, 1, length_k, value.shape[3]).expand(-1, group, -1, -1)
        return attend(rows, key, value, attn_mask, dropout_p, scale).reshape(batch, heads, length_q, -1)

    return attend_aligned


_OPERATIONS = ("attention.causal", "attention.full", "attention.cross")
_HALVES = ("float16", "bfloat16")
# The y and z of grids (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"), of which batches
# or batches times key/value heads are one. A limit on a field that is in no key would cost every call a description.
_BATCHES = Limit("batch_kv_heads", "at_most", 65535)
# FlashAttention 2: masks with more keys than queries lie bottom-right (`check_flash_causal_non_square_seqlens`), rows
# without a key are zero. Of its splits of the keys, the results lie beside the output.
_FLASH = KernelSpec(
    kernel_id="torch.sdpa.flash",
    operations=_OPERATIONS,
    platforms=("cuda",),
    dtypes=_HALVES,
    min_version="2.11",
    min_sm=(8, 0),
    max_head_dim=256,
    head_dim_multiple=8,
    min_seq_len=1,
    supports_gqa=True,
    causal_geometries=("square", "bottom_right"),
    requires_last_dim_stride1=True,
    workspace_bytes=64 * 2**20,
    priority=60,
)
# `check_cudnn_tensor_shapes`: one key is refused, batches and heads up to 65535. Head dimensions beyond 128 are right
# on an H100 with cuDNN 9.19 (136, 192, 256; full, causal, decode), and refused on older GPUs. Its own causal mask lies
# top-left. torch does not take it for deterministic.
# A plan is built, for milliseconds, for each new combination of sizes and strides in each thread (cudnn/MHA.cpp).
# Keys 2^26 elements apart came out wrong there: offsets within a batch have 32 bits.
_CUDNN = KernelSpec(
    kernel_id="torch.sdpa.cudnn",
    operations=_OPERATIONS,
    platforms=("cuda",),
    dtypes=_HALVES,
    min_version="2.11",
    min_sm=(9, 0),
    max_head_dim=256,
    head_dim_multiple=8,
    min_seq_len=1,
    supports_gqa=True,
    causal_geometries=("square", "top_left"),
    requires_last_dim_stride1=True,
    deterministic=False,
    workspace_bytes=64 * 2**20,
    priority=50,
    extra_limits=(Limit("seq_len_k", "at_least", 2), _BATCHES),
)
# `check_head_dim_size_mem_efficient`: multiples of 16 bytes, for the value's head dimension too. Copies of keys and
# values are as large as these. One query over keys that heads share by a stride of 0 loses its mask
# (mem_eff_attention/kernel_forward.h, `advance_to_block`), which only a mask that lies top-left would tell.
_EFFICIENT = KernelSpec(
    kernel_id="torch.sdpa.efficient",
    operations=_OPERATIONS,
    platforms=("cuda",),
    dtypes=("float32", *_HALVES),
    min_version="2.11",
    min_sm=(8, 0),
    head_dim_multiple=8,
    min_seq_len=1,
    supports_gqa=True,
    supports_v_head_dim=True,
    causal_geometries=("square", *ALIGNMENTS),
    requires_last_dim_stride1=True,
    workspace_bytes=2**40,
    priority=40,
    extra_limits=(Limit("other_v_head_dim", "multiple_of", 8), _BATCHES),
)

KERNELS = (
    Kernel(_FLASH, _load_flash, sources=SOURCES),
    Kernel(_CUDNN, _load_cudnn, sources=SOURCES),
    Kernel(_EFFICIENT, _load_efficient, sources=SOURCES),
)
