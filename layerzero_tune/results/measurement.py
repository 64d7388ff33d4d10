"""`Measurement`, one row of the results: what one job gave in one contest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from layerzero_runtime.context import SelectionContext
from layerzero_tune.measure.contention import MAX_SHARE
from layerzero_tune.measure.gpu_state import OWN_LOAD

# Times keep 20 significant bits, a relative step of 1e-6. The least noise of any clock here is 5e-4, so nothing is
# lost, and a million rows of 16 samples take half the space that the random low bits of a division would.
TIME_BITS = 20
_SPLITTER = float(2 ** (53 - TIME_BITS) + 1)

Status = Literal[
    "ok",
    "refused",
    "unavailable",
    "compile_failed",
    "failed",
    "wrong",
    "wrote_to_inputs",
    "flaky",
    "out_of_memory",
    "timeout",
    "died",
    "device_error",
]
STATUSES: tuple[Status, ...] = get_args(Status)
# Those that may have cost the process that measured.
LOSSES: tuple[Status, ...] = ("out_of_memory", "timeout", "died", "device_error")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One job in one contest, as it is stored: `screen_ns` and `samples_ns` are rounded to `TIME_BITS` when it is made.

    Attributes:
        contest_id: content hash of the contest; only times within one contest are compared.
        job_id: content hash of point, candidate, kernel source, device, versions that matter and measurement policy.
        context: the point (a context with its mode), without a device.
        status: "ok", or why there is no time: refused by limits, an unavailable library, an exception while it was
            loaded or compiled or (failed) when it ran, a wrong result, inputs that it wrote to, results that were right
            at first and wrong later (flaky), no memory or memory that it keeps, a step over its time limit, the death
            of its process, or an error that leaves the device unusable to the process.
        message: one line on a status other than "ok", else empty.
        is_default: whether the kernel is the operation's default.
        relative_error: relative L2 error against the float64 reference, None if not checked.
        tolerance: the largest error allowed, None if not checked.
        screen_ns: median time of one call in the screening round in ns, None without a time.
        samples_ns: medians of the final rounds in ns per call; index i of every job of a contest is the same round.
            Empty for a job that the screening ruled out.
        device: `DeviceSpec.to_dict()` of the device.
        versions: full version by distribution name.
        source_hash: hash of the kernel's source.
        policy: `MeasurementPolicy.to_dict()`.
        measured_at: UTC time at which the contest ended, ISO 8601 with seconds.
        contention: share of the machine's processor time that other processes took while the contest was timed, those
            of the same run beyond the cores that were free, or of its speed, or that of the core that makes a GPU's
            calls, that was missing before or after, other than by the power that the timed calls draw.
        gpu: `GpuConditions.to_dict()` of the contest, None for a CPU.
    """

    contest_id: str
    job_id: str
    context: SelectionContext
    kernel_id: str
    configuration: Mapping[str, Any]
    is_default: bool
    status: Status
    message: str
    relative_error: float | None
    tolerance: float | None
    screen_ns: float | None
    samples_ns: tuple[float, ...]
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    source_hash: str
    policy: Mapping[str, Any]
    measured_at: str
    contention: float = 0.0
    gpu: Mapping[str, Any] | None = None

    @property
    def is_contended(self) -> bool:
        """Whether other processes took more of the machine than a contest bears, although it was timed again."""
        return self.contention > MAX_SHARE

    @property
    def is_slowed(self) -> bool:
        """Whether the GPU was held down by power or heat while the contest was timed, although it waited, and by more
        than the calls that were timed."""
        return self.gpu is not None and any(reason != OWN_LOAD for reason in self.gpu.get("slowed", ()))

    @property
    def is_search(self) -> bool:
        """Whether it is of a contest that searches a kernel's configurations, as `Contest.is_search` says."""
        return self.policy.get("rounds") == 0

    @classmethod
    def of_stored(cls, columns: Sequence[str], values: Sequence[Any]) -> Self:
        """A row of a results file from all its columns. Its times were rounded when it was written; to do so again
        would take longer than all the rest of reading."""
        row = object.__new__(cls)
        for name, value in zip(columns, values, strict=True):
            object.__setattr__(row, name, value)
        return row

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples_ns", tuple(map(rounded_time, self.samples_ns)))
        if self.screen_ns is not None:
            object.__setattr__(self, "screen_ns", rounded_time(self.screen_ns))


def rounded_time(ns: float) -> float:
    """The time to the nearest float with `TIME_BITS` significant bits (Veltkamp's splitting; exact, idempotent)."""
    scaled = ns * _SPLITTER
    return scaled - (scaled - ns)
