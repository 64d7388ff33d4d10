"""The public functions as kernels, so that a contest times whole calls, dispatch included, beside kernels alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerzero_runtime.context import ALIGNMENTS, DTYPES, LAYOUTS, SelectionContext
from layerzero_runtime.kernel import Kernel, KernelFunction, KernelSpec
from layerzero_runtime.operations import OPERATIONS

PUBLIC_CALL = "layerzero.public_call"


def _load(context: SelectionContext, configuration: Mapping[str, Any]) -> KernelFunction:
    import layerzero_runtime as lz

    # Kernels that compile do so before the clock begins; under capture only what is prepared serves.
    lz.preparation("on_first_use")
    lz.warmup([context])
    functions: dict[str, KernelFunction] = {
        "norm.rms": lz.rms_norm,
        "norm.add_rms": lz.add_rms_norm,
        "norm.layer": lz.layer_norm,
        "mlp.swiglu": lz.swiglu,
        "linear.fp8": lz.linear_fp8,
        "linear.int8": lz.linear_int8,
        "mlp.geglu": lambda gate, up: lz.geglu(gate, up, context.approximate),
    }
    return functions.get(context.operation) or _attention(context)


def _attention(context: SelectionContext) -> KernelFunction:
    import layerzero_runtime as lz

    causal, layout, alignment = context.is_causal, context.layout, context.causal_alignment

    def call(query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, scale: float | None) -> Any:
        return lz.attention(
            query, key, value, attn_mask, dropout_p, causal, scale, True, layout=layout, causal_alignment=alignment
        )

    return call


KERNELS = (
    Kernel(
        KernelSpec(
            kernel_id=PUBLIC_CALL,
            operations=tuple(OPERATIONS),
            platforms=("cpu", "cuda"),
            dtypes=DTYPES,
            layouts=LAYOUTS,
            supports_gqa=True,
            supports_attn_mask=True,
            supports_mixed_weight_dtype=True,
            supports_v_head_dim=True,
            causal_geometries=("square", *ALIGNMENTS),
        ),
        _load,
    ),
)
