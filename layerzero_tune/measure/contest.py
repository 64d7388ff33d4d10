"""Contests as frozen, picklable values: what is measured together, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_tune.identity import content_hash
from layerzero_tune.measure.gpu_state import GpuConditions
from layerzero_tune.results.measurement import Status

# Names of the steps of a candidate that may compile code.
LOAD, COMPILING_CALL = "load", "first call, which compiles"


@dataclass(frozen=True)
class MeasurementPolicy:
    """How long and how often to measure; part of every job's identity.

    Attributes:
        warmup_ms: time spent calling before the count begins.
        screen_ms: time per candidate in the screening round.
        round_ms: time per candidate in one final round.
        rounds: final rounds; at most 16 are kept per job.
        screen_margin: candidates within max(this, 3 sigma) of the best screening time reach the final rounds.
        max_call_ms: a candidate whose single call takes longer is recorded with its screening time alone.
        cache_bytes: inputs rotate through buffers of at least this size together, to outgrow the last-level cache.
        allocator: what the worker process does with memory that is freed; "retained": it keeps it.
    """

    warmup_ms: float = 5.0
    screen_ms: float = 10.0
    round_ms: float = 6.0
    rounds: int = 10
    screen_margin: float = 0.03
    max_call_ms: float = 2000.0
    cache_bytes: int = 64 * 1024 * 1024
    allocator: str = "retained"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Candidate:
    """A kernel with a configuration. An anchor, like the default, reaches the final rounds without screening."""

    kernel_id: str
    configuration: Mapping[str, Any] = field(default_factory=dict)
    is_default: bool = False
    is_anchor: bool = False


@dataclass(frozen=True)
class Contest:
    """One process on one device measures one point's candidates in interleaved rounds.

    `job_ids` lies beside `candidates`. `seed` fixes inputs and the order of the rounds. `repeat` tells apart contests
    that measure the same jobs again.
    """

    context: SelectionContext
    candidates: tuple[Candidate, ...]
    job_ids: tuple[str, ...]
    policy: MeasurementPolicy
    repeat: int = 0

    @cached_property
    def contest_id(self) -> str:
        return content_hash([sorted(self.job_ids), self.repeat])

    @property
    def is_search(self) -> bool:
        """Whether it ends with the screening, as those do in which a kernel's configurations are searched."""
        return self.policy.rounds == 0

    @property
    def seed(self) -> int:
        return int(self.contest_id[:8], 16)


@dataclass(frozen=True)
class JobOutcome:
    """What one candidate gave; times in ns per call, as in `Measurement`.

    `hung_compiling`: it took longer than compiling may, which it would do again at every point.
    """

    status: Status
    message: str = ""
    relative_error: float | None = None
    tolerance: float | None = None
    screen_ns: float | None = None
    samples_ns: tuple[float, ...] = ()
    hung_compiling: bool = False


@dataclass(frozen=True)
class ContestOutcome:
    """What a contest gave.

    Attributes:
        outcomes: beside the contest's candidates.
        measured_at: UTC time at which it ended, ISO 8601.
        preparation_s: seconds that loading, compiling and checking its kernels took before the clock began.
        contention: as in `Measurement`.
        gpu: the state of the GPU while its times were taken, None for a CPU.
    """

    outcomes: tuple[JobOutcome, ...]
    measured_at: str
    preparation_s: float = 0.0
    contention: float = 0.0
    gpu: GpuConditions | None = None
