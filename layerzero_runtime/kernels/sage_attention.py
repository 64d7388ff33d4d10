"""SageAttention: scores from 8-bit queries and keys, for calls that ask for `quant_format="int8"`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, KernelSpec
from layerzero_runtime.selection.limits import Limit

if TYPE_CHECKING:
    from torch import Tensor


def _load(context: SelectionContext, configuration: Configuration) -> KernelFunction:
    from sageattention import sageattn

    is_causal = context.is_causal
    is_bhsd = context.layout == "bhsd"
    tensor_layout, length = ("HND", 2) if is_bhsd else ("NHD", 1)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        # Its own smoothing subtracts the mean of the keys, which no softmax sees, from the caller's keys in place.
        smooth = key - key.mean(dim=length, keepdim=True)
        output: Tensor = sageattn(
            query,
            smooth,
            value,
            tensor_layout=tensor_layout,
            is_causal=is_causal,
            sm_scale=scale,
            smooth_k=False,
        )
        return output

    return attend


def _declare(kernel_id: str, operations: tuple[str, ...], *limits: Limit) -> KernelSpec:
    # `sageattn` in sageattention/core.py of 1.0: these head dimensions, dense rows.
    return KernelSpec(
        kernel_id=kernel_id,
        operations=operations,
        platforms=("cuda",),
        dtypes=("float32", "float16", "bfloat16"),
        library="sageattention",
        requires=("torch", "triton", "sageattention"),
        min_version="1.0.6",
        min_sm=(8, 0),
        layouts=("bhsd", "bshd"),
        min_seq_len=1,
        supports_gqa=True,
        requires_last_dim_stride1=True,
        quant_formats=("int8",),
        workspace_bytes=2**40,
        compiles=True,
        priority=34,
        extra_limits=(
            Limit("head_dim", "one_of", (64, 96, 128)),
            Limit("batch_kv_heads", "at_most", 65535),
            *limits,
        ),
    )


# Its causal kernel takes equal lengths alone. The other one (attn_qk_int8_per_block.py) gives keys beyond the last a
# score of 0 in place of minus infinity: right where the last block of 64 keys is full.
_CAUSAL = _declare("sageattention.causal", ("attention.causal",))
_FULL = _declare("sageattention.full", ("attention.full", "attention.cross"), Limit("seq_len_k", "multiple_of", 64))

KERNELS = (Kernel(_CAUSAL, _load), Kernel(_FULL, _load))
