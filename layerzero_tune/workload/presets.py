"""Presets: grids over every operation, coarse to fine, for a device without a workload of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.operations import OPERATIONS
from layerzero_tune.workload.cpu_grids import CPU_GRIDS
from layerzero_tune.workload.cuda_grids import CUDA_GRIDS
from layerzero_tune.workload.draw import draw_between
from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.grid import grid_points
from layerzero_tune.workload.lines import WorkloadLine
from layerzero_tune.workload.memory import fits

PRESETS = tuple(CPU_GRIDS)
_PROBE_SEED = 1  # any fixed number
_CPU_MODES: tuple[str, ...] = ("eager",)
_CPU_DTYPES = ("float32", "bfloat16")
_CUDA_MODES: tuple[str, ...] = ("eager", "graph")
_CUDA_DTYPES = ("bfloat16", "float16")
# Of a GPU that does not say how much memory it has.
_LEAST_MEMORY_BYTES = 16 * 1024**3


def preset_workload(name: str, operations: Sequence[str], device: DeviceSpec | None = None) -> tuple[WorkloadLine, ...]:
    """The points of a preset for these operations on a device, by default a CPU.

    CPUs have float32 and bfloat16 in eager mode. CUDA devices have bfloat16 and float16 in eager and graph mode, up to
    what their memory holds.

    Raises:
        WorkloadError: the preset is unknown.
    """
    if name not in PRESETS:
        raise WorkloadError(f"preset is {name!r}, allowed: {', '.join(PRESETS)}")
    is_cpu = device is None or device.platform == "cpu"
    grid = CPU_GRIDS[name] if is_cpu else CUDA_GRIDS[name]
    modes, dtypes = (_CPU_MODES, _CPU_DTYPES) if is_cpu else (_CUDA_MODES, _CUDA_DTYPES)
    points = tuple(grid_points(grid))
    contexts = tuple(
        context
        for operation, mode, dtype in itertools.product(OPERATIONS, modes, dtypes)
        for point in points
        if point["operation"] == operation
        and _fits(context := SelectionContext(mode=mode, dtype=dtype, **point), device)
    )
    # Drawn over all operations, so that a run over some of them measures the same points. They find what a grid steps
    # over: kernels that are fast at most sizes and slow at a few.
    probes = (context for context in draw_between(contexts, grid.probes, _PROBE_SEED) if _fits(context, device))
    chosen = (context for context in (*contexts, *probes) if context.operation in operations)
    order = {operation: index for index, operation in enumerate(OPERATIONS)}
    return tuple(WorkloadLine(context) for context in sorted(chosen, key=lambda context: order[context.operation]))


def _fits(context: SelectionContext, device: DeviceSpec | None) -> bool:
    """Whether the device's memory holds what a contest at the point needs."""
    if device is None or device.platform == "cpu":
        return True
    return fits(context, device.memory_bytes or _LEAST_MEMORY_BYTES)
