"""The presets of CPUs."""

from __future__ import annotations

import itertools

from layerzero_tune.workload.grid import Grid

# Llama-3.2-1B's heads (32 over 8 of 64) stand for grouped queries, GPT-2's (12 of 64) for ungrouped ones.
CPU_GRIDS = {
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
