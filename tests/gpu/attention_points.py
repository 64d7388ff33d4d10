"""Points at which attention kernels are tried on a device, their tensors, and the error of what they give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.selection.transforms import apply_transforms

CAUSAL, FULL, CROSS = "attention.causal", "attention.full", "attention.cross"
# (batch, heads, kv_heads, seq_len_q, seq_len_k, head_dim)
Sizes = tuple[int, int, int, int, int, int]

WIDTHS = (64, 96, 128, 192, 256)
GROUPS = (1, 4, 8, 16)
# Prefill, chunks (queries at the end of the keys), decode and cross attention, with lengths that fill no tile.
LENGTHS: dict[str, tuple[tuple[int, int], ...]] = {
    CAUSAL: ((1, 1), (2, 2), (129, 129), (777, 777), (64, 513), (300, 1000), (1, 700), (200, 150)),
    FULL: ((2, 2), (65, 65), (513, 513)),
    CROSS: ((1, 2), (1, 63), (1, 4097), (4, 1001), (100, 700), (700, 100)),
}
# Of kernels that compile for each: (head_dim, group) by operation.
FEW: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {
    "flash_attn_4.forward": {CAUSAL: ((64, 4), (192, 1)), FULL: ((96, 1),), CROSS: ((128, 16), (256, 4))},
    "flashinfer.single_fa2": {CAUSAL: ((128, 4),), FULL: ((128, 1),), CROSS: ((128, 16),)},
    "flashinfer.single_fa3": {CAUSAL: ((128, 4),), FULL: ((128, 1),), CROSS: ((128, 16),)},
    "xformers.split_k": {FULL: ((64, 1),), CROSS: ((64, 1), (128, 8))},
    "sageattention.causal": {CAUSAL: ((96, 4),)},
    "sageattention.full": {FULL: ((64, 1),), CROSS: ((128, 8),)},
}
# What is allowed beside the reference in float64, relative L2 norm: kernels for 16-bit types sum in float32 and round
# the weights and the output (EVIDENCE: 3e-3 in bfloat16); scores from 8 bits are good to 1e-2.
ALLOWED = {"bfloat16": 8e-3, "float16": 1.5e-3, "float32": 1e-5}
ALLOWED_OF_INT8 = 4e-2

_loaded: dict[Any, Any] = {}


def drawn(sizes: Sizes, dtype: str, layout: str, placement: str = "dense", value_dim: int | None = None) -> list[Any]:
    """query, key and value; "transposed" ones have their memory in the other dense layout."""
    batch, heads, kv_heads, length_q, length_k, width = sizes
    value_dim = value_dim or width
    generator = torch.Generator("cuda").manual_seed(sum(sizes))
    tensors = []
    for count, length, last in ((heads, length_q, width), (kv_heads, length_k, width), (kv_heads, length_k, value_dim)):
        shape = (batch, count, length, last) if layout == "bhsd" else (batch, length, count, last)
        stored = (shape[0], shape[2], shape[1], shape[3]) if placement == "transposed" else shape
        if placement == "sliced":
            stored = (*shape[:3], shape[3] + 3)
        elif placement == "vectors":  # of a buffer with room beside, as of keys and values in one cache
            stored = (*shape[:3], 2 * shape[3])
        tensor = torch.randn(stored, device="cuda", generator=generator).to(getattr(torch, dtype))
        if placement == "transposed":
            tensor = tensor.transpose(1, 2)
        elif placement in ("sliced", "vectors"):
            tensor = tensor[..., -shape[3] :]
        tensors.append(tensor)
    return tensors


def described(operation: str, tensors: list[Any], **features: Any) -> SelectionContext:
    return OPERATIONS[operation].describe(*tensors, None, 0.0, None, **features)


def function_of(kernel: Kernel, context: SelectionContext) -> Any:
    key = (kernel.kernel_id, context.operation, OPERATIONS[context.operation].static_key(context))
    if key not in _loaded:
        _loaded[key] = apply_transforms(kernel.load(context, {}), kernel.spec, context)
    return _loaded[key]


def error_of(output: torch.Tensor, context: SelectionContext, tensors: list[Any], scale: float | None = None) -> float:
    """Against the reference in float64; NaN counts as infinite."""
    [right] = OPERATIONS[context.operation].reference(context, *(part.double() for part in tensors), None, 0.0, scale)
    if output.shape != right.shape:
        return math.inf
    error = float((output.double() - right).norm() / right.norm())
    return error if math.isfinite(error) else math.inf


def points(kernel: Kernel, operation: str) -> Iterator[tuple[Sizes, str, str, str, str]]:
    """(sizes, dtype, layout, placement, alignment), so that each value of each comes with several of the others."""
    few = FEW.get(kernel.kernel_id, {}).get(operation)
    every_other = [pair for number, pair in enumerate(itertools.product(WIDTHS, GROUPS)) if (number + number // 4) % 2]
    static = few or every_other
    variants = [
        (layout, placement, alignment)
        for layout in ("bhsd", "bshd")
        for placement in ("dense", "transposed", "vectors")
        for alignment in ("bottom_right", "top_left")
    ]
    turn = 0
    for number, (width, group) in enumerate(static):
        for length_q, length_k in LENGTHS[operation]:
            if kernel.kernel_id == "sageattention.full":
                length_q, length_k = length_q + -length_q % 64, length_k + -length_k % 64
                length_k += 64 if operation == CROSS and length_q == length_k else 0
            layout, placement, alignment = variants[(5 * turn + number) % len(variants)]
            dtype = kernel.spec.dtypes[(turn // 3 + number) % len(kernel.spec.dtypes)]
            if few is not None:  # whose other dtypes and layouts would be compiled too
                layout, dtype = "bhsd", kernel.spec.dtypes[(number - 1) % len(kernel.spec.dtypes)]
            batch = kernel.spec.max_batch_size or (1, 3)[(turn + number) % 2]
            yield (batch, 2 * group, 2, length_q, length_k, width), dtype, layout, placement, alignment
            turn += 1
