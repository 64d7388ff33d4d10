"""torch's scaled dot product attention: as users call it, and its CPU backends by their bindings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerzero_runtime.context import ALIGNMENTS, SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor

_OPERATIONS = ("attention.causal", "attention.full", "attention.cross")
_DTYPES = ("float64", "float32", "float16", "bfloat16")
_GEOMETRIES = ("square", *ALIGNMENTS)


def _load_sdpa(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    is_causal, enable_gqa = context.is_causal, context.gqa_group != 1

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    if context.causal_mask != "bottom_right":
        return attend

    from torch.nn.attention.bias import causal_lower_right

    def attend_bottom_right(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        if attn_mask is not None:
            # torch documents a mask beside is_causal as an error and combines them on some paths; a bottom-right one
            # it cannot take at all.
            raise ContextError(
                "attn_mask is given beside a bottom-right causal mask, required is one of the two: combine them into "
                "one attn_mask and call without is_causal"
            )
        bias = causal_lower_right(query.shape[2], key.shape[2])
        return sdpa(query, key, value, bias, dropout_p, scale=scale, enable_gqa=enable_gqa)

    return attend_bottom_right


def _load_flash_cpu(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch import _scaled_dot_product_flash_attention_for_cpu as flash

    is_causal = context.is_causal

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        output: Tensor = flash(query, key, value, 0.0, is_causal, scale=scale)[0]
        return output

    def attend_bottom_right(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        mask = None if query.shape[2] == 1 else _bottom_right_mask(query, query.shape[2], key.shape[2])
        output: Tensor = flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)[0]
        return output

    return attend_bottom_right if context.causal_mask == "bottom_right" else attend


def _load_flash_cpu_folded(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    """The group's queries as further rows of one head: keys are read once per group, not once per query head."""
    from torch import _scaled_dot_product_flash_attention_for_cpu as flash

    is_causal = context.is_causal

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        batch, heads, length, width = query.shape
        kv_heads = key.shape[1]
        rows = query.reshape(batch, kv_heads, -1, width)
        mask = None
        if is_causal and length > 1:
            mask = _bottom_right_mask(query, length, key.shape[2]).repeat(heads // kv_heads, 1)
        output: Tensor = flash(rows, key, value, 0.0, False, attn_mask=mask, scale=scale)[0]
        return output.reshape(batch, heads, length, width)

    return attend


def _load_math(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch import _scaled_dot_product_attention_math as math_attention

    is_causal, enable_gqa = context.is_causal, context.gqa_group != 1
    bottom_right = context.causal_mask == "bottom_right"

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        # `scale` and `enable_gqa` are keywords; the None before them is the dropout mask.
        output: Tensor = math_attention(
            query, key, value, None, 0.0, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
        return output

    def attend_bottom_right(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        mask = _bottom_right_mask(query, query.shape[2], key.shape[2])
        output: Tensor = math_attention(query, key, value, mask, 0.0, False, None, scale=scale, enable_gqa=enable_gqa)[
            0
        ]
        return output

    return attend_bottom_right if bottom_right else attend


def _bottom_right_mask(like: Tensor, length_q: int, length_k: int) -> Tensor:
    """The additive causal mask (length_q, length_k) whose last row sees every key.

    Float, because the bindings add what they are given: one refuses a boolean mask, the other adds it as 0 and 1.
    """
    return like.new_full((length_q, length_k), float("-inf")).triu_(1 + length_k - length_q)


# The user's own call, so it is legal for whatever torch accepts, and torch reports what it does not accept.
_SDPA = KernelSpec(
    kernel_id="torch.sdpa",
    operations=_OPERATIONS,
    platforms=("cpu", "cuda"),
    dtypes=_DTYPES,
    supports_gqa=True,
    supports_attn_mask=True,
    supports_dropout=True,
    supports_v_head_dim=True,
    causal_geometries=_GEOMETRIES,
    supports_backward=True,
    traceable=True,
    priority=100,
)
# As in torch's own checks (sdp_utils_cpp.cpp), which a direct call skips: with another last stride the binding reads
# the wrong elements without an error, and a key length of 0 ends the process. Beyond them: it applies its own causal
# mask before the scale, so that a scale of 0 or below gives NaN (in SDPA as well).
_FLASH_CPU = KernelSpec(
    kernel_id="torch.sdpa.flash_cpu",
    operations=_OPERATIONS,
    platforms=("cpu",),
    dtypes=_DTYPES,
    min_seq_len=1,
    supports_gqa=True,
    causal_geometries=_GEOMETRIES,
    requires_last_dim_stride1=True,
    supports_backward=True,
    traceable=True,
    priority=60,
    extra_limits=(Limit("scale", "at_least", 2.0**-126),),  # the smallest normal float32
)
# Without a group it is the kernel above. A square or top-left mask over folded rows could not skip the masked blocks.
_FLASH_CPU_FOLDED = KernelSpec(
    kernel_id="torch.sdpa.flash_cpu_folded",
    operations=_OPERATIONS,
    platforms=("cpu",),
    dtypes=_DTYPES,
    min_seq_len=1,
    supports_gqa=True,
    causal_geometries=("bottom_right",),
    requires_last_dim_stride1=True,
    supports_backward=True,
    traceable=True,
    extra_limits=(Limit("gqa_group", "at_least", 2),),
)
_MATH = KernelSpec(
    kernel_id="torch.sdpa.math",
    operations=_OPERATIONS,
    platforms=("cpu", "cuda"),
    dtypes=_DTYPES,
    max_score_elements=2**27,  # 512 MiB of float32, of which it holds several copies
    supports_gqa=True,
    supports_v_head_dim=True,
    causal_geometries=_GEOMETRIES,
    supports_backward=True,
    traceable=True,
)

KERNELS = (
    Kernel(_SDPA, _load_sdpa),
    Kernel(_FLASH_CPU, _load_flash_cpu),
    Kernel(_FLASH_CPU_FOLDED, _load_flash_cpu_folded),
    Kernel(_MATH, _load_math),
)
