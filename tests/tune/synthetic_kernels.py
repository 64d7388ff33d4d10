"""Kernels with limits of every kind, as a user's own module declares them; what they compute is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec

if TYPE_CHECKING:
    from torch import Tensor


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    scaled = x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return scaled if weight is None else scaled * (weight + offset)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, scale=scale, enable_gqa=grouped)


def _causal_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, True, scale=scale, enable_gqa=grouped)


def _kernel(name: str, function: Callable[..., Any], *operations: str, **spec: Any) -> Kernel:
    def load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
        return function

    return Kernel(
        KernelSpec(
            kernel_id=f"synthetic.{name}",
            operations=operations,
            platforms=("cpu",),
            dtypes=("float32", "bfloat16"),
            **{"supports_gqa": True, **spec},
        ),
        load,
    )


_ATTENTION = ("attention.full", "attention.cross")

LEAN = _kernel("lean", _rms_norm, "norm.rms")
WIDE = _kernel("wide", _rms_norm, "norm.rms")
NARROW = _kernel("narrow", _rms_norm, "norm.rms", max_hidden_size=2000)
EVEN = _kernel("even", _rms_norm, "norm.rms", hidden_size_multiple=128)
DENSE = _kernel("dense", _rms_norm, "norm.rms", requires_last_dim_stride1=True)
FUSED = _kernel("fused", _attention, *_ATTENTION)
BOUNDED = _kernel("bounded", _attention, *_ATTENTION, min_seq_len=20, max_seq_len=600)
CAUSAL = _kernel("causal", _causal_attention, "attention.causal", max_seq_len=600)
SINGLE = _kernel("single", _attention, *_ATTENTION, max_batch_size=2)
SMALL_SCORES = _kernel("small_scores", _attention, *_ATTENTION, max_score_elements=2**20)

KERNELS = (LEAN, WIDE, NARROW, EVEN, DENSE, FUSED, BOUNDED, CAUSAL, SINGLE, SMALL_SCORES)
