"""`Grid`: the axes of a preset, and its points."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from layerzero_runtime.context import ALIGNMENTS


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
        alignments: of the causal masks of chunks.
        crosses: (seq_len_q, seq_len_k) without a mask: decode (one query) and attention to an encoder.
        max_scores: attention points with more score elements are left out.
        rows, hidden_sizes: of norms and activations.
        intermediate_sizes: widths of activations where these are others than those of norms.
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
    alignments: Sequence[str] = ALIGNMENTS
    intermediate_sizes: Sequence[int] = ()


def grid_points(grid: Grid) -> Iterable[dict[str, Any]]:
    """Operation, sizes and features of every point, the points of an operation in a fixed order."""
    yield from _attention_points(grid)
    yield from _row_points(grid)


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
        for (q, k), alignment in itertools.product(grid.chunks, grid.alignments):
            yield from point("attention.causal", q, k, causal_alignment=alignment)
        for q, k in grid.crosses:
            yield from point("attention.cross", q, k)


def _row_points(grid: Grid) -> Iterable[dict[str, Any]]:
    for sizes in _row_sizes(grid, grid.hidden_sizes):
        for operation in ("norm.rms", "norm.add_rms"):
            yield {"operation": operation, **sizes}
        yield {"operation": "norm.layer", "has_bias": True, **sizes}
    for sizes in _row_sizes(grid, grid.intermediate_sizes or grid.hidden_sizes):
        yield {"operation": "mlp.swiglu", **sizes}
        for approximate in ("none", "tanh"):
            yield {"operation": "mlp.geglu", "approximate": approximate, **sizes}


def _row_sizes(grid: Grid, widths: Sequence[int]) -> Iterable[dict[str, int]]:
    for rows, width in itertools.product(grid.rows, widths):
        if rows * width <= grid.max_elements:
            yield {"rows": rows, "hidden_size": width}
