"""Rows of measurements for tests, made from numbers."""

from __future__ import annotations

import random
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_tune.identity import content_hash
from layerzero_tune.results.measurement import Measurement

DEVICE = {"platform": "cpu", "name": "Some CPU", "physical_cores": 2}
VERSIONS = {"torch": "2.13.0"}
POLICY = {"rounds": 16, "round_ms": 10.0}


def make_contest(number: int, *, candidates: int = 3, rounds: int = 16, **changes: Any) -> list[Measurement]:
    """The rows of a contest, in ascending order of job id; equal numbers give equal rows."""
    generator = random.Random(number)
    context = SelectionContext(operation="norm.rms", dtype="bfloat16", rows=1 + number, hidden_size=4096)
    second = number % 86400
    rows = [
        Measurement(
            **{
                "contest_id": content_hash(["contest", number]),
                "job_id": content_hash(["job", number, candidate]),
                "context": context,
                "kernel_id": f"torch.kernel_{candidate}",
                "configuration": {"block": 2**candidate},
                "is_default": candidate == 0,
                "status": "ok",
                "message": "",
                "relative_error": generator.uniform(1e-3, 3e-3),
                "tolerance": 1e-2,
                "screen_ns": generator.uniform(1e3, 1e6),
                "samples_ns": tuple(generator.uniform(1e3, 1e6) for _ in range(rounds)),
                "device": DEVICE,
                "versions": VERSIONS,
                "source_hash": content_hash(candidate),
                "policy": POLICY,
                "measured_at": f"2026-03-01T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}+00:00",
                **changes,
            }
        )
        for candidate in range(candidates)
    ]
    return sorted(rows, key=lambda row: row.job_id)


def rows_of(*numbers: int) -> tuple[Measurement, ...]:
    """The rows of several contests as a store returns them."""
    rows = [row for number in numbers for row in make_contest(number)]
    return tuple(sorted(rows, key=lambda row: (row.contest_id, row.job_id)))
