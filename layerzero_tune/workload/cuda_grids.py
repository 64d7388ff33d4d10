"""The presets of CUDA devices: the calls of a server that prefills, prefills in chunks, and decodes in batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from layerzero_tune.workload.grid import Grid
from layerzero_tune.workload.models import GROUPS

# Never the held-out ones.
_MODELS = GROUPS["tuned"]


def _heads(names: Sequence[str]) -> tuple[tuple[int, int, int], ...]:
    """(num_heads, num_kv_heads, head_dim) of these models, once for each group of heads and head_dim: batches make up
    for other numbers of heads."""
    found: dict[tuple[int, int], tuple[int, int, int]] = {}
    for model in (_MODELS[name] for name in names):
        group = model.num_heads // model.num_kv_heads
        found.setdefault((group, model.head_dim), (model.num_heads, model.num_kv_heads, model.head_dim))
    return tuple(found.values())


def _widths(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The widths of these models' norms and activations, ascending."""
    models = [_MODELS[name] for name in names]
    return {
        "hidden_sizes": tuple(sorted({model.hidden_size for model in models})),
        "intermediate_sizes": tuple(sorted({model.intermediate_size for model in models})),
    }


def _chunks(queries: Sequence[int], keys: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((q, k) for q, k in itertools.product(queries, keys) if q < k)


_LLAMAS = ("llama-3.2-1b", "llama-3.1-8b")
_SERVED = (*_LLAMAS, "llama-3.1-70b", "qwen2.5-7b", "falcon3-1b", "gpt-neox-20b", "gpt2")
# Serving engines chunk a prefill with the mask aligned at the end of the keys; torch's own, at their beginning, is left
# to CPUs. Lengths go to 8K, 32K and 128K, rows to as many tokens.
CUDA_GRIDS = {
    "quick": Grid(
        heads=_heads(_LLAMAS),
        batches=(1, 8, 64),
        lengths=(64, 250, 1001, 2500, 8192),
        chunks=_chunks((64, 250, 1024), (512, 2049, 8192)),
        crosses=(*itertools.product((1, 4, 16, 100, 700), (128, 701, 2500, 8192)),),
        max_scores=2**34,
        rows=(1, 8, 37, 256, 1500, 8192),
        hidden_sizes=(2048, 4096),
        intermediate_sizes=(8192, 14336),
        max_elements=2**27,
        probes=200,
        alignments=("bottom_right",),
    ),
    "standard": Grid(
        heads=_heads(_SERVED),
        batches=(1, 8, 64),
        lengths=(64, 200, 513, 1500, 4096, 12001, 32768),
        chunks=_chunks((64, 300, 1024, 2048), (256, 1501, 6000, 32768)),
        crosses=(*itertools.product((1, 5, 24, 128, 700), (64, 401, 2048, 8001, 32768)),),
        max_scores=2**36,
        rows=(1, 4, 16, 61, 256, 1001, 4096, 12000, 32768),
        **_widths(_SERVED),
        max_elements=2**29,
        probes=500,
        alignments=("bottom_right",),
    ),
    "full": Grid(
        heads=_heads(tuple(_MODELS)),
        batches=(1, 4, 16, 64, 256),
        lengths=(32, 100, 256, 777, 2048, 5001, 12000, 32769, 131072),
        chunks=_chunks((16, 61, 256, 700, 2048, 8192), (128, 777, 3000, 12000, 50001, 131072)),
        crosses=(*itertools.product((1, 4, 16, 61, 300, 1500), (64, 250, 1001, 4096, 12000, 32768, 131072)),),
        max_scores=2**38,
        rows=(1, 2, 5, 16, 37, 128, 401, 1500, 4096, 12001, 32768, 131072),
        **_widths(tuple(_MODELS)),
        max_elements=2**31,
        probes=1500,
        alignments=("bottom_right",),
    ),
}
