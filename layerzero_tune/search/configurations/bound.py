"""The roofline of a call as far as the memory makes it: no configuration is faster."""

from __future__ import annotations

import math
import re

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import operation_named


def memory_bound_ns(context: SelectionContext) -> float | None:
    """The time in ns that the peak bandwidth of the context's device takes to read each input and write each result
    once; None where the bandwidth is unknown, as it is of CPUs, or not all inputs are read."""
    bandwidth = None if context.device is None else context.device.bandwidth_bytes_per_s
    if bandwidth is None or _leaves_keys_out(context):
        return None
    operation = operation_named(context.operation)
    read = sum(
        math.prod(tensor.shape(context)) * _item_bytes(tensor.dtype(context))
        for tensor in operation.present_tensors(context)
    )
    written = sum(map(math.prod, operation.outputs(context))) * _item_bytes(context.result_dtype)
    return (read + written) / bandwidth * 1e9


def _leaves_keys_out(context: SelectionContext) -> bool:
    """A mask that is aligned at the top left hides the keys beyond the queries."""
    if not context.is_causal or context.causal_alignment != "top_left":
        return False
    return (context.seq_len_k or 0) > (context.seq_len_q or 0)


def _item_bytes(dtype: str) -> int:
    """Names of dtypes begin with the kind and the bits: "float8_e4m3fn"."""
    bits = re.search(r"\d+", dtype)
    assert bits is not None
    return int(bits[0]) // 8
