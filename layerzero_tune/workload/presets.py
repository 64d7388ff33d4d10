"""Presets: grids over every operation, coarse to fine, for a device without a workload of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import OPERATIONS
from layerzero_tune.workload.draw import draw_between
from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.lines import WorkloadLine


@dataclass(frozen=True)
class Grid:
    """The axes of a preset. Sizes step by factors of 2 to 16: what a measured point vouches for meets its neighbour's.
    Most lengths and rows are no round numbers, as in serving: round ones flatter kernels that work in whole tiles.
    Some come in pairs, because odd lengths cost some kernels twice what even ones do.

    Attributes:
        heads: (num_heads, num_kv_heads, head_dim) of the attention points.
        batches: batch sizes of attention.
        lengths: query lengths where both lengths are equal.
        chunks: (seq_len_q, seq_len_k) with unequal lengths, of a causal prefill in chunks.
        crosses: (seq_len_q, seq_len_k) without a mask: decode (one query) and attention to an encoder.
        max_scores: attention points with more score elements are left out.
        rows, hidden_sizes: of norms and activations.
        max_elements: points with more elements are left out.
        probes: further points, drawn at random between those of the grid.
    """

    heads: Sequence[tuple[int, int, int]]
    batches: Sequence[int]
    lengths: Sequence[int]
    chunks: Sequence[tuple[int, int]]
    crosses: Sequence[tuple[int, int]]
    max_scores: int
    rows: Sequence[int]
    hidden_sizes: Sequence[int]
    max_elements: int
    probes: int


# Llama-3.2-1B's heads (32 over 8 of 64) stand for grouped queries, GPT-2's (12 of 64) for ungrouped ones.
_CPU_GRIDS = {
    "quick": Grid(
        heads=((32, 8, 64),),
        batches=(1, 4),
        lengths=(16, 37, 38, 83, 84, 150, 151, 256),
        chunks=(*itertools.product((16, 37, 64), (128, 250, 251, 512)),),
        crosses=(*itertools.product((1, 5, 16), (64, 150, 151, 400, 1024)),),
        max_scores=2**23,
        rows=(1, 3, 6, 12, 24, 37, 80, 150, 512),
        hidden_sizes=(1024, 2048, 4096),
        max_elements=2**21,
        probes=170,
    ),
    "standard": Grid(
        heads=((32, 8, 64), (12, 12, 64), (32, 8, 128)),
        batches=(1, 3, 8),
        lengths=(16, 37, 64, 113, 211, 401, 512),
        chunks=(*((q, k) for q, k in itertools.product((16, 61, 128, 300), (128, 301, 777, 2048)) if q < k),),
        crosses=(*itertools.product((1, 5, 16, 64), (31, 90, 257, 777, 2048)),),
        max_scores=2**25,
        rows=(1, 3, 12, 37, 150, 401, 1024),
        hidden_sizes=(512, 1024, 2048, 4096, 8192),
        max_elements=2**23,
        probes=400,
    ),
    "full": Grid(
        heads=((32, 8, 64), (12, 12, 64), (32, 8, 128), (16, 2, 128), (8, 8, 96)),
        batches=(1, 2, 5, 13, 32),
        lengths=(16, 31, 64, 113, 211, 256, 401, 777, 1024),
        chunks=(*((q, k) for q, k in itertools.product((16, 61, 128, 300, 512), (128, 301, 512, 777, 2048)) if q < k),),
        crosses=(*itertools.product((1, 2, 5, 16, 48), (31, 64, 150, 257, 512, 777, 2048, 4096)),),
        max_scores=2**26,
        rows=(1, 2, 5, 12, 25, 37, 80, 150, 401, 777, 2048),
        hidden_sizes=(512, 768, 1024, 2048, 3072, 4096, 8192, 14336),
        max_elements=2**24,
        probes=1200,
    ),
}
PRESETS = tuple(_CPU_GRIDS)
_DTYPES = ("float32", "bfloat16")
_PROBE_SEED = 1  # any fixed number


def preset_workload(name: str, operations: Sequence[str]) -> tuple[WorkloadLine, ...]:
    """The points of a preset on a CPU for these operations, in eager mode.

    Raises:
        WorkloadError: the preset is unknown.
    """
    grid = _CPU_GRIDS.get(name)
    if grid is None:
        raise WorkloadError(f"preset is {name!r}, allowed: {', '.join(PRESETS)}")
    points = (*_attention_points(grid), *_row_points(grid))
    contexts = tuple(
        SelectionContext(dtype=dtype, **point)
        for operation in OPERATIONS
        for dtype in _DTYPES
        for point in points
        if point["operation"] == operation
    )
    # Drawn over all operations, so that a run over some of them measures the same points. They find what a grid steps
    # over: kernels that are fast at most sizes and slow at a few.
    probes = draw_between(contexts, grid.probes, _PROBE_SEED)
    chosen = (context for context in (*contexts, *probes) if context.operation in operations)
    order = {operation: index for index, operation in enumerate(OPERATIONS)}
    return tuple(WorkloadLine(context) for context in sorted(chosen, key=lambda context: order[context.operation]))


def _attention_points(grid: Grid) -> Iterable[dict[str, Any]]:
    for (heads, kv_heads, head_dim), batch in itertools.product(grid.heads, grid.batches):
        common = {"batch_size": batch, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}

        def point(
            operation: str, q: int, k: int, common: dict[str, Any] = common, **features: Any
        ) -> Iterable[dict[str, Any]]:
            if common["batch_size"] * common["num_heads"] * q * k <= grid.max_scores:
                yield {"operation": operation, "seq_len_q": q, "seq_len_k": k, **common, **features}

        for length in grid.lengths:
            yield from point("attention.causal", length, length)
            yield from point("attention.full", length, length)
        for (q, k), alignment in itertools.product(grid.chunks, ("top_left", "bottom_right")):
            yield from point("attention.causal", q, k, causal_alignment=alignment)
        for q, k in grid.crosses:
            yield from point("attention.cross", q, k)


def _row_points(grid: Grid) -> Iterable[dict[str, Any]]:
    for rows, hidden_size in itertools.product(grid.rows, grid.hidden_sizes):
        if rows * hidden_size > grid.max_elements:
            continue
        sizes = {"rows": rows, "hidden_size": hidden_size}
        for operation in ("norm.rms", "norm.add_rms", "mlp.swiglu"):
            yield {"operation": operation, **sizes}
        yield {"operation": "norm.layer", "has_bias": True, **sizes}
        for approximate in ("none", "tanh"):
            yield {"operation": "mlp.geglu", "approximate": approximate, **sizes}
