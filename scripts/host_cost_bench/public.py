"""The public functions of libraries, called as their users do, for calls of our kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from layerzero_runtime.context import SelectionContext

Function = Callable[..., Any]


def _flash_attention(module: str) -> Callable[[SelectionContext], Function]:
    def load(context: SelectionContext) -> Function:
        from importlib import import_module

        attend, causal = import_module(module).flash_attn_func, context.is_causal

        def call(query: Any, key: Any, value: Any, *rest: Any) -> Any:
            swapped = (part.transpose(1, 2) for part in (query, key, value))
            result = attend(*swapped, causal=causal)
            return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

        return call

    return load


def _flashinfer(backend: str) -> Callable[[SelectionContext], Function]:
    def load(context: SelectionContext) -> Function:
        from flashinfer import single_prefill_with_kv_cache as attend

        causal = context.is_causal

        def call(query: Any, key: Any, value: Any, *rest: Any) -> Any:
            rows = (part[0].transpose(0, 1) for part in (query, key, value))
            return attend(*rows, causal=causal, backend=backend).transpose(0, 1)[None]

        return call

    return load


def _xformers(context: SelectionContext) -> Function:
    from xformers.ops import fmha

    kv_heads, group = context.num_kv_heads, context.gqa_group

    def call(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        query = query.unflatten(2, (kv_heads, group))
        key, value = (part.unsqueeze(3).expand(-1, -1, -1, group, -1) for part in (key, value))
        return fmha.memory_efficient_attention_forward(query, key, value, op=fmha.triton_splitk.FwOp).flatten(2, 3)

    return call


def _sage(context: SelectionContext) -> Function:
    from sageattention import sageattn

    causal = context.is_causal
    return lambda query, key, value, *rest: sageattn(query, key, value, is_causal=causal)


# By kernel's id; torch's own functions, the defaults of the operations, are what all others are compared with.
PUBLIC: Mapping[str, Callable[[SelectionContext], Function]] = {
    "flash_attn_4.forward": _flash_attention("flash_attn.cute"),
    "flash_attn_3.forward": _flash_attention("flash_attn_interface"),
    "flash_attn.forward": _flash_attention("flash_attn"),
    "flashinfer.single_fa2": _flashinfer("fa2"),
    "flashinfer.single_fa3": _flashinfer("fa3"),
    "xformers.split_k": _xformers,
    "sageattention.causal": _sage,
    "sageattention.full": _sage,
}
