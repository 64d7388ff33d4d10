"""Small contests for tests: brief policies, contexts of a few microseconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_tune.identity import content_hash
from layerzero_tune.measure.contest import Candidate, Contest, MeasurementPolicy

BRIEF = MeasurementPolicy(warmup_ms=0.2, screen_ms=0.5, round_ms=0.2, rounds=4, cache_bytes=1 << 18)
RMS = SelectionContext(operation="norm.rms", dtype="float32", rows=32, hidden_size=64)
ATTENTION = SelectionContext(
    operation="attention.full",
    dtype="float32",
    batch_size=2,
    seq_len_q=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


def contest(
    *kernel_ids: str, context: SelectionContext = RMS, policy: MeasurementPolicy = BRIEF, **flags: Any
) -> Contest:
    """The named kernels, the first being the default."""
    candidates = tuple(Candidate(kernel_id, is_default=index == 0) for index, kernel_id in enumerate(kernel_ids))
    job_ids = tuple(content_hash([context.to_dict(), kernel_id, policy.to_dict()]) for kernel_id in kernel_ids)
    return replace(Contest(context, candidates, job_ids, policy), **flags)
