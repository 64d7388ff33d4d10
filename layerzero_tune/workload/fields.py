"""Which fields of a context mean something to an operation, derived from its declaration."""

from __future__ import annotations

from layerzero_runtime.context import FIELD_NAMES
from layerzero_runtime.operation import Operation

# Every call has these, whatever it computes.
_COMMON = frozenset(
    {
        "operation",
        "dtype",
        "mode",
        "requires_grad",
        "requires_deterministic",
        "is_contiguous",
        "stride_last_dim",
    }
)
# The fields from which a derived attribute of `SelectionContext` is computed.
_SOURCES: dict[str, tuple[str, ...]] = {
    "gqa_group": ("num_heads", "num_kv_heads"),
    "batch_kv_heads": ("batch_size", "num_kv_heads"),
    "causal_geometry": ("seq_len_q", "seq_len_k", "causal_alignment"),
    "mixed_weight_dtype": ("weight_dtype",),
    "other_v_head_dim": ("v_head_dim",),
    "other_output_dtype": ("output_dtype",),
    "scale_is_usual": ("scale",),
}


def fields_of(operation: Operation) -> tuple[str, ...]:
    """The fields that a context of this operation may give, in the order of their declaration."""
    features = (*operation.required, *operation.static, *operation.plain, *(axis.name for axis in operation.axes))
    names = _COMMON.union(*(_SOURCES.get(feature, (feature,)) for feature in features))
    return tuple(name for name in FIELD_NAMES if name in names)
