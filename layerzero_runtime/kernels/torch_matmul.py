"""Attention as two batched matrix products, with the query heads of a group folded into the rows of one product.

The score matrices are written out in the input's dtype, then replaced by their softmax. In bfloat16 that rounds each
score to 8 bits: on standard normal inputs the error is about twice SDPA's, and it grows with the magnitude of the scores.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from layerzero_runtime.context import ALIGNMENTS, SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec

if TYPE_CHECKING:
    from torch import Tensor

# Query rows per block of the causal form: as large as pays before the scores leave the cache (measured with AVX-512:
# 128 and 64 are equal in float32; in bfloat16 256 is up to 20% faster than 128 from 512 rows on).
_BLOCK_ROWS = {"bfloat16": 256}
_DEFAULT_BLOCK_ROWS = 128


def _load_whole(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    import torch
    from torch import baddbmm, bmm, softmax

    assert context.head_dim
    usual_scale = 1.0 / math.sqrt(context.head_dim)
    unread = torch.empty((), dtype=getattr(torch, context.dtype))  # baddbmm's addend, which beta=0 leaves unread

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        batch, heads, length, width = query.shape
        sequences = batch * key.shape[1]
        value_width = value.shape[3]
        rows = query.reshape(sequences, -1, width)
        columns = key.reshape(sequences, -1, width).transpose(1, 2)
        scores = baddbmm(unread, rows, columns, beta=0, alpha=usual_scale if scale is None else scale)
        softmax(scores, -1, out=scores)
        return bmm(scores, value.reshape(sequences, -1, value_width)).view(batch, heads, length, value_width)

    return attend


def _load_causal(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    """Blocks of query rows, each against the keys that its last row sees; what lies above the diagonal is skipped."""
    import torch
    from torch import baddbmm, bmm, softmax

    assert context.head_dim
    usual_scale = 1.0 / math.sqrt(context.head_dim)
    dtype = getattr(torch, context.dtype)
    unread = torch.empty((), dtype=dtype)
    block = _BLOCK_ROWS.get(context.dtype, _DEFAULT_BLOCK_ROWS)
    triangle = torch.full((block, block), -math.inf, dtype=dtype).triu_(1)
    bottom_right = context.causal_mask == "bottom_right"

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        batch, heads, length, width = query.shape
        kv_heads, length_k = key.shape[1], key.shape[2]
        sequences, group, value_width = batch * kv_heads, heads // kv_heads, value.shape[3]
        alpha = usual_scale if scale is None else scale
        grouped = query.reshape(sequences, group, length, width)
        columns = key.reshape(sequences, length_k, width).transpose(1, 2)
        values = value.reshape(sequences, length_k, value_width)
        # Row i sees the keys up to i + shift; rows before the first that sees any give zeros, as in torch.
        shift = length_k - length if bottom_right else 0
        first = max(0, -shift)

        def rows(start: int, count: int) -> Tensor:
            seen = min(length_k, start + count + shift)
            part = grouped[:, :, start : start + count].reshape(sequences, group * count, width)
            scores = baddbmm(unread, part, columns[:, :, :seen], beta=0, alpha=alpha)
            masked = seen - start - shift  # columns from the block's diagonal on; the first is seen by all its rows
            if masked > 1:
                diagonal = scores.view(sequences, group, count, seen)[..., start + shift :]
                diagonal.add_(triangle[:count, :masked])
            softmax(scores, -1, out=scores)
            return bmm(scores, values[:, :seen]).view(sequences, group, count, value_width)

        if first == 0 and length <= block:
            return rows(0, length).view(batch, heads, length, value_width)
        output = query.new_empty(sequences, group, length, value_width)
        output[:, :, :first] = 0
        for start in range(first, length, block):
            count = min(block, length - start)
            output[:, :, start : start + count] = rows(start, count)
        return output.view(batch, heads, length, value_width)

    return attend


# float16 is left out: a score above 65504 would overflow, where SDPA's float32 scores do not.
_DTYPES = ("float64", "float32", "bfloat16")
_WHOLE = KernelSpec(
    kernel_id="torch.matmul",
    operations=("attention.full", "attention.cross"),
    platforms=("cpu",),
    dtypes=_DTYPES,
    max_score_elements=2**27,  # 512 MiB of float32
    supports_gqa=True,
    supports_v_head_dim=True,
)
_CAUSAL = KernelSpec(
    kernel_id="torch.matmul.causal",
    operations=("attention.causal",),
    platforms=("cpu",),
    dtypes=_DTYPES,
    max_score_elements=2**29,  # of which one block of rows is held at a time
    supports_gqa=True,
    supports_v_head_dim=True,
    causal_geometries=("square", *ALIGNMENTS),
)

KERNELS = (Kernel(_WHOLE, _load_whole), Kernel(_CAUSAL, _load_causal))
