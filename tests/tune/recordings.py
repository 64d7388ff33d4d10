"""A recorded run of the built-in kernels: some hundred contests with plausible times, ties, failures and noise."""

from __future__ import annotations

import math
from functools import cache
from itertools import groupby
from pathlib import Path

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import OPERATIONS, operation_named
from layerzero_runtime.selection.limits import rejections
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.workload.presets import preset_workload
from tests.tune.synthetic_results import DEVICE, Times, measured

BOTH_DTYPES = ("float32", "bfloat16")


@cache
def recorded_rows(dtypes: tuple[str, ...] = ("float32",)) -> tuple[Measurement, ...]:
    """The contests of the quick preset in these types: 2% noise, a screening, and now and then a kernel that fails."""
    lines = preset_workload("quick", tuple(OPERATIONS))
    contexts = [line.context for line in lines if line.context.dtype in dtypes]
    return tuple(
        sorted(measured(contexts, _times, noise=0.02, screen=1.5), key=lambda row: (row.contest_id, row.job_id))
    )


def _times(context: SelectionContext) -> Times:
    """Every kernel has a cost per call and a cost per element: the later its turn, the dearer and the faster."""
    operation = operation_named(context.operation)
    elements = math.prod(operation.sizes(context))
    described = context.with_device(DEVICE)
    legal = [
        kernel.kernel_id
        for kernel in builtin_kernels()
        if operation.name in kernel.spec.operations and not rejections(kernel.spec.limits, described)
    ]
    legal.sort(key=lambda kernel_id: (kernel_id != operation.default_kernel, kernel_id))
    times: dict[str, float] = {
        kernel_id: 2000.0 * 2**turn + elements * 0.5 / 2**turn for turn, kernel_id in enumerate(legal)
    }
    return times | ({legal[2]: "failed"} if len(legal) > 2 and elements % 7 == 1 else {})


def recorded_contests() -> list[list[Measurement]]:
    """The rows of each contest."""
    return [list(rows) for _, rows in groupby(recorded_rows(), key=lambda row: row.contest_id)]


def record(directory: Path) -> None:
    """Write the recorded run into a results folder."""
    ResultsStore(directory).absorb(recorded_contests())
