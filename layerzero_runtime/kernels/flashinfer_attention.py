"""FlashInfer's attention of a single request, started by the module that it compiles.

Its public functions (`single_prefill_with_kv_cache`, and `single_decode_with_kv_cache` with tensor cores, which starts
the same code for one query) look that module up anew in every call. Wrappers for batches are left out: they need
`plan()` on the host for each new set of lengths, which a call of attention cannot hold, and which nothing here charges.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.kernels.attention_inputs import SOURCES, are_dense_enough, on_dense, on_seeing_rows
from layerzero_runtime.kernels.plain_calls import warn_of_plain_calls
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor

_LIBRARY, _KNOWN = "flashinfer-python", "flashinfer-python 0.6"
# Where results of split keys are put; as large as in flashinfer/prefill.py, but of each call, so that calls on several
# streams do not share it.
_SCRATCH_BYTES = 32 * 2**20
# Of the module's `run` in flashinfer/prefill.py, `get_single_prefill_module`.
_RUN_PARAMETERS = (
    *("q", "k", "v", "tmp", "o", "maybe_lse", "mask_mode", "layout", "window_left", "maybe_packed_custom_mask"),
    *("maybe_alibi_slopes", "logits_soft_cap", "sm_scale", "scale_q", "scale_k", "scale_v", "rope_scale", "rope_theta"),
)
_NO_WINDOW, _NO_SOFT_CAP = -1, 0.0
# Read where positions are rotated, which they are not here.
_ROPE_SCALE, _ROPE_THETA = 1.0, 1e4


def _load_fa2(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    return _load("fa2", context)


def _load_fa3(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    return _load("fa3", context)


def _load(backend: str, context: SelectionContext) -> KernelFunction:
    import torch
    from flashinfer.prefill import single_prefill_with_kv_cache
    from flashinfer.utils import MaskMode, TensorLayout

    is_causal, is_bhsd = context.is_causal, context.layout == "bhsd"
    needs_scratch = backend == "fa2"
    mask_mode = (MaskMode.CAUSAL if is_causal else MaskMode.NON_CAUSAL).value
    # In flashinfer/data/csrc/single_prefill_sm90.cu of 0.6.6, lengths are wrong in the other layout.
    layout = TensorLayout.NHD.value
    assert context.head_dim
    usual_scale = 1.0 / math.sqrt(context.head_dim)
    run = _compiled(backend, getattr(torch, context.dtype), context.head_dim)

    def rows_of(x: Tensor) -> Tensor:
        """(length, heads, head_dim) of the single request."""
        return x.squeeze(0).transpose(0, 1) if is_bhsd else x.squeeze(0)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        query, key, value = rows_of(query), rows_of(key), rows_of(value)
        if run is None:
            output: Tensor = single_prefill_with_kv_cache(
                query, key, value, causal=is_causal, kv_layout="NHD", sm_scale=scale, backend=backend
            )
        else:
            # Its strides are taken for granted (prefill.cuh, `o_stride_n`).
            output = torch.empty_like(query, memory_format=torch.contiguous_format)
            scratch = query.new_empty(_SCRATCH_BYTES, dtype=torch.uint8) if needs_scratch else output
            run(
                query,
                key,
                value,
                scratch,
                output,
                None,
                mask_mode,
                layout,
                _NO_WINDOW,
                None,
                None,
                _NO_SOFT_CAP,
                usual_scale if scale is None else scale,
                None,
                None,
                None,
                _ROPE_SCALE,
                _ROPE_THETA,
            )
        return (output.transpose(0, 1) if is_bhsd else output).unsqueeze(0)

    function = on_dense(attend, context, are_dense_enough)
    return on_seeing_rows(function, length=2 if is_bhsd else 1) if context.causal_mask == "bottom_right" else function


def _compiled(backend: str, dtype: Any, head_dim: int) -> Any:
    """What starts the module, compiled here; None where only the public function can."""
    import inspect

    from flashinfer import prefill

    build = getattr(prefill, "get_single_prefill_module", None)
    if build is None:
        warn_of_plain_calls("flashinfer", "it has no get_single_prefill_module", _KNOWN)
        return None
    # Rotated positions, sliding windows, a soft cap and sums of scores in float16 are all left out.
    run = build(backend, dtype, dtype, dtype, head_dim, head_dim, 0, False, False, False).run
    parameters = tuple(inspect.signature(run).parameters)
    if parameters != _RUN_PARAMETERS:
        warn_of_plain_calls("flashinfer", f"its modules take {', '.join(parameters)}", _KNOWN)
        return None
    return run


def _declare(kernel_id: str, **others: Any) -> KernelSpec:
    return KernelSpec(
        kernel_id=kernel_id,
        operations=("attention.causal", "attention.full", "attention.cross"),
        platforms=("cuda",),
        dtypes=("float16", "bfloat16"),
        library=_LIBRARY,
        requires=("torch", "flashinfer"),
        min_version="0.6.6",
        layouts=("bshd", "bhsd"),
        # Strides and offsets of keys are unsigned 32-bit numbers: up to 64 heads of 256 elements.
        max_seq_len=2**18,
        min_seq_len=1,
        max_batch_size=1,
        supports_gqa=True,
        causal_geometries=("square", "bottom_right"),
        requires_last_dim_stride1=True,
        workspace_bytes=_SCRATCH_BYTES,
        compiles=True,
        # flashinfer/data/include/flashinfer/attention/hopper/prefill_sm90.cuh; what the documentation names for both.
        extra_limits=(Limit("head_dim", "one_of", (64, 128, 256)),),
        **others,
    )


KERNELS = (
    Kernel(
        _declare("flashinfer.single_fa2", min_sm=(8, 0), priority=32),
        _load_fa2,
        sources=(*SOURCES, "plain_calls.py"),
    ),
    Kernel(
        _declare("flashinfer.single_fa3", min_sm=(9, 0), max_sm=(9, 0), priority=33),
        _load_fa3,
        sources=(*SOURCES, "plain_calls.py"),
    ),
)
