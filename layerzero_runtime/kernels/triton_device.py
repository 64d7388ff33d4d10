"""What a multiprocessor holds, by which the spaces of the Triton kernels are restricted."""

from __future__ import annotations

from collections.abc import Mapping

from layerzero_runtime.context import SelectionContext

# By compute capability, warps of a multiprocessor and KiB of shared memory of one program (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability"); what is not listed is taken for the least.
_RESIDENT_WARPS: Mapping[tuple[int, int], int] = {(8, 0): 64, (9, 0): 64, (10, 0): 64, (10, 3): 64}
_LEAST_RESIDENT_WARPS = 48
_SHARED_KIB: Mapping[tuple[int, int], int] = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_LEAST_SHARED_KIB = 99

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


def multiprocessors(context: SelectionContext) -> int:
    """Those of the context's device, asked of the driver where it does not say."""
    if context.device is not None and context.device.multiprocessors is not None:
        return context.device.multiprocessors
    import torch

    index = None if context.device is None else context.device.index
    count: int = torch.cuda.get_device_properties(index).multi_processor_count
    return count


def resident_warps(context: SelectionContext) -> int:
    """Warps that a multiprocessor holds at a time."""
    return _LEAST_RESIDENT_WARPS if context.sm is None else _RESIDENT_WARPS.get(context.sm, _LEAST_RESIDENT_WARPS)


def shared_bytes(context: SelectionContext) -> int:
    """Shared memory that a program may have, which is that of a multiprocessor but for 1 KiB per program."""
    kib = _LEAST_SHARED_KIB if context.sm is None else _SHARED_KIB.get(context.sm, _LEAST_SHARED_KIB)
    return 1024 * kib


def stay_resident(context: SelectionContext, programs: int, warps: int, bytes_in_flight: int) -> bool:
    """Whether a multiprocessor holds so many programs at once.

    Programs that take more than one tile each have to be there together: one that waits comes last, alone.
    """
    held = max(1, programs)
    return held * warps <= resident_warps(context) and held * bytes_in_flight <= shared_bytes(context)
