"""Attention as batched matrix products, with the query heads of a group folded into the rows of one product."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from layerzero_runtime.context import ALIGNMENTS, SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec

if TYPE_CHECKING:
    from torch import Tensor

# Query rows per block of the causal form: as large as pays before the scores leave the cache. Measured with AVX-512:
# 128 and 64 are equal in float32; in bfloat16 256 is up to 20% faster than 128 from 512 rows on.
_BLOCK_ROWS = {"bfloat16": 256}
_DEFAULT_BLOCK_ROWS = 128


def _load_weights(context: SelectionContext) -> Callable[..., Tensor]:
    """The function for softmax(rows columns x alpha), with a function that hides scores in place.

    In bfloat16 a score is rounded to 8 bits, an error that grows with it: at a standard deviation of 9 the outputs
    would be wrong by 1.5%. There the product is computed a second time with each row's largest score, less one,
    subtracted before the rounding: the scores that weigh are then near zero, and the error stays within 1.7 times
    SDPA's at every magnitude (without the "less one", by which the largest scores give up precision to the many
    smaller ones, 2.0 times at a standard deviation of 1).
    """
    import torch
    from torch import baddbmm, softmax

    dtype = getattr(torch, context.dtype)
    unread = torch.empty((), dtype=dtype)  # the addend that beta=0 leaves unread
    rounds_scores = context.dtype == "bfloat16"

    def weights(rows: Tensor, columns: Tensor, alpha: float, hide: Callable[[Tensor], None] | None) -> Tensor:
        scores = baddbmm(unread, rows, columns, beta=0, alpha=alpha)
        if hide is not None:
            hide(scores)
        if rounds_scores:
            shifts = scores.amax(-1, keepdim=True).sub_(1.0)
            baddbmm(shifts, rows, columns, beta=-1, alpha=alpha, out=scores)
            if hide is not None:
                hide(scores)
        return softmax(scores, -1, out=scores)

    return weights


def _load_whole(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from torch import bmm

    assert context.head_dim
    usual_scale = 1.0 / math.sqrt(context.head_dim)
    weights = _load_weights(context)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        batch, heads, length, width = query.shape
        sequences = batch * key.shape[1]
        value_width = value.shape[3]
        rows = query.reshape(sequences, -1, width)
        columns = key.reshape(sequences, -1, width).transpose(1, 2)
        probabilities = weights(rows, columns, usual_scale if scale is None else scale, None)
        return bmm(probabilities, value.reshape(sequences, -1, value_width)).view(batch, heads, length, value_width)

    return attend


def _load_causal(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    """Blocks of query rows, each against the keys that its last row sees; what lies above the diagonal is skipped."""
    import torch
    from torch import bmm

    assert context.head_dim
    usual_scale = 1.0 / math.sqrt(context.head_dim)
    weights = _load_weights(context)
    block = _BLOCK_ROWS.get(context.dtype, _DEFAULT_BLOCK_ROWS)
    triangle = torch.full((block, block), -math.inf, dtype=getattr(torch, context.dtype)).triu_(1)
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
            on_diagonal = seen - start - shift

            def hide(scores: Tensor) -> None:
                by_head = scores.view(sequences, group, count, seen)
                by_head[..., start + shift :].add_(triangle[:count, :on_diagonal])

            part = grouped[:, :, start : start + count].reshape(sequences, group * count, width)
            # All rows of the block see the first column on its diagonal.
            probabilities = weights(part, columns[:, :, :seen], alpha, hide if on_diagonal > 1 else None)
            return bmm(probabilities, values[:, :seen]).view(sequences, group, count, value_width)

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
