"""Which GPUs CUDA will show, and in which order: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER as pure functions.

The rules are those of the CUDA Programming Guide ("CUDA Environment Variables") and of the MIG User Guide ("Device
Enumeration"); where they are silent, what `cuDeviceGetCount` of driver 580 did on an H100.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerzero_runtime.devices.nvml import Gpu

# The driver reads an index as C's strtol does ("1gpu" is 1), and of a UUID the digits, in either case, up to the first
# other character. Old drivers name a MIG device by its GPU and two numbers: "MIG-GPU-<UUID>/<GPU instance>/<compute>".
_INDEX = re.compile(r"\s*([+-]?[0-9]+)")
_UUID = re.compile(r"(?:GPU-|MIG-(?:GPU-)?)[0-9A-Fa-f][0-9A-Fa-f-]*(?:/[0-9]+){0,2}")


def visible_gpus(gpus: Sequence[Gpu], visible: str | None, order: str | None) -> tuple[Gpu, ...]:
    """The GPUs that CUDA enumerates, "cuda:0" first.

    Args:
        gpus: all GPUs of the machine in PCI bus order.
        visible: the value of CUDA_VISIBLE_DEVICES, None where it is not set.
        order: the value of CUDA_DEVICE_ORDER, None where it is not set.

    An entry is an index, or the beginning of a GPU's or MIG device's UUID that only one of them has. The first entry
    that names no device ends the list; a device named twice leaves none. The first entry decides the kind of all.
    """
    ordered = _in_cuda_order(gpus, order)
    if visible is None:
        return _enumerable(ordered)
    if visible.startswith("GPU-"):
        return _enumerable(_by_uuid(visible, "GPU-", ordered))
    if visible.startswith("MIG-"):
        return _enumerable(_by_uuid(visible, "MIG-", [device for gpu in ordered for device in gpu.mig_devices]))
    return _enumerable(_by_index(visible, ordered))


def _in_cuda_order(gpus: Sequence[Gpu], order: str | None) -> list[Gpu]:
    """PCI bus order, or by default the fastest first.

    How CUDA ranks unlike products is not published; here the rank is multiprocessors x clock. On a machine with one
    product, which nearly all are, both orders are one.
    """
    if order == "PCI_BUS_ID":
        return list(gpus)
    return sorted(gpus, key=lambda gpu: -(gpu.multiprocessors or 0) * (gpu.max_clock_mhz or 1))


def _by_index(visible: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    chosen: list[int] = []
    for entry in visible.split(","):
        match = _INDEX.match(entry)
        index = int(match[1]) if match and len(match[1]) < 10 else -1
        if index in chosen:
            return []
        if not 0 <= index < len(gpus):
            break
        chosen.append(index)
    return [gpus[index] for index in chosen]


def _by_uuid(visible: str, prefix: str, devices: Sequence[Gpu]) -> list[Gpu]:
    chosen: list[Gpu] = []
    for entry in visible.split(","):
        match = _UUID.match(entry) if entry.startswith(prefix) else None
        named = [gpu for gpu in devices if match and gpu.uuid.lower().startswith(match[0].lower())]
        if len(named) != 1:
            break
        if named[0] in chosen:
            return []
        chosen.append(named[0])
    return chosen


def _enumerable(chosen: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """A process sees one MIG device at most, then no other GPU; a divided GPU without MIG devices is not seen."""
    for device in chosen:
        if device.uuid.startswith("MIG-"):
            return (device,)
        if device.mig_devices:
            return (device.mig_devices[0],)
    return tuple(device for device in chosen if not device.mig_enabled)
