"""NVIDIA GPUs by NVML, through ctypes: no CUDA context is made, and nothing but the driver needs to be installed.

Function names, structures and units are those of NVIDIA's NVML API reference (docs.nvidia.com/deploy/nvml-api).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

LIBRARIES = ("libnvidia-ml.so.1", "libnvidia-ml.so", "nvml.dll")

_NAME_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE
_UUID_BYTES = 96  # NVML_DEVICE_UUID_V2_BUFFER_SIZE
_CLOCK_SM, _CLOCK_MEMORY = 1, 2  # NVML_CLOCK_SM, NVML_CLOCK_MEM
_TRANSFERS_PER_CLOCK = 2  # memory moves data on both edges of the clock that NVML reports

# CUDA cores per multiprocessor by compute capability (CUDA Samples, helper_cuda.h). NVML counts multiprocessors of MIG
# devices only; of a whole GPU it counts cores.
_CORES_PER_MULTIPROCESSOR: Mapping[tuple[int, int], int] = {
    (6, 0): 64, (6, 1): 128, (6, 2): 128,
    (7, 0): 64, (7, 2): 64, (7, 5): 64,
    (8, 0): 64, (8, 6): 128, (8, 7): 128, (8, 9): 128,
    (9, 0): 128,
    (10, 0): 128, (10, 3): 128,
    (11, 0): 128,
    (12, 0): 128, (12, 1): 128,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, or one MIG device of a GPU, as NVML describes it. What NVML would not say is None.

    Attributes:
        uuid: "GPU-..." or "MIG-...".
        memory_bytes: bytes of device memory.
        bandwidth_bytes_per_s: of the memory, at its highest clock; of a MIG device unknown.
        max_clock_mhz: highest clock of the multiprocessors.
        mig_enabled: the GPU is divided; it then computes only through `mig_devices`.
    """

    name: str
    uuid: str
    memory_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    multiprocessors: int | None = None
    bandwidth_bytes_per_s: float | None = None
    max_clock_mhz: int | None = None
    mig_enabled: bool = False
    mig_devices: tuple[Gpu, ...] = ()


@dataclass(frozen=True, slots=True)
class Inventory:
    """The GPUs of the machine in PCI bus order and, where there is none, why."""

    gpus: tuple[Gpu, ...]
    problem: str = ""


class _Memory(ctypes.Structure):  # nvmlMemory_t
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _PciInfo(ctypes.Structure):  # nvmlPciInfo_t
    _fields_ = (
        ("bus_id_legacy", ctypes.c_char * 16),
        *((name, ctypes.c_uint) for name in ("domain", "bus", "device", "pci_device_id", "pci_subsystem_id")),
        ("bus_id", ctypes.c_char * 32),
    )


class _Attributes(ctypes.Structure):  # nvmlDeviceAttributes_t
    _fields_ = (
        ("multiprocessors", ctypes.c_uint),
        ("engines_and_slices", ctypes.c_uint * 7),
        ("memory_mib", ctypes.c_ulonglong),
    )


_Handle = ctypes.c_void_p


def load_library() -> ctypes.CDLL | None:
    """NVML as the NVIDIA driver installs it; None without a driver."""
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def read_inventory(library: ctypes.CDLL | None) -> Inventory:
    """Ask NVML for every GPU. A library that is missing or does not answer gives an empty inventory and the reason."""
    if library is None:
        return Inventory((), f"no NVIDIA driver: none of {', '.join(LIBRARIES)} can be loaded")
    if status := _call(library, "nvmlInit_v2"):
        return Inventory((), f"nvmlInit_v2 failed: {_describe(library, status)}")
    try:
        count = ctypes.c_uint()
        if status := _call(library, "nvmlDeviceGetCount_v2", ctypes.byref(count)):
            return Inventory((), f"nvmlDeviceGetCount_v2 failed: {_describe(library, status)}")
        found: list[tuple[tuple[int, ...], Gpu]] = []
        problem = "the NVIDIA driver finds no GPU"
        for index in range(count.value):
            handle = _Handle()
            if status := _call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle)):
                problem = f"GPU {index} does not answer: {_describe(library, status)}"
                continue
            found.append((_bus_address(library, handle), _read_gpu(library, handle)))
        # The order of NVML's own indices is not promised; CUDA and nvidia-smi count by PCI bus address.
        found.sort(key=lambda pair: pair[0])
        return Inventory(tuple(gpu for _, gpu in found), "" if found else problem)
    finally:
        _call(library, "nvmlShutdown")


def with_gpus(library: ctypes.CDLL) -> Iterator[tuple[int, ctypes.c_void_p]]:
    """NVML's index and handle of each GPU that answers, while a session of NVML is open."""
    if _call(library, "nvmlInit_v2"):
        return
    try:
        count = ctypes.c_uint()
        if _call(library, "nvmlDeviceGetCount_v2", ctypes.byref(count)):
            return
        for index in range(count.value):
            handle = _Handle()
            if not _call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle)):
                yield index, handle
    finally:
        _call(library, "nvmlShutdown")


def _call(library: ctypes.CDLL, function: str, *arguments: object) -> int:
    """NVML's status, 0 for success. A function that an older driver lacks counts as not supported."""
    try:
        entry = getattr(library, function)
    except AttributeError:
        return 13  # NVML_ERROR_FUNCTION_NOT_FOUND
    return int(entry(*arguments))


def _describe(library: ctypes.CDLL, status: int) -> str:
    try:
        entry = library.nvmlErrorString
    except AttributeError:
        return f"NVML status {status}"
    entry.restype = ctypes.c_char_p
    return f"{(entry(status) or b'').decode(errors='replace')} (NVML status {status})"


def _text(library: ctypes.CDLL, function: str, handle: _Handle, size: int) -> str:
    buffer = ctypes.create_string_buffer(size)
    failed = _call(library, function, handle, buffer, ctypes.c_uint(size))
    return "" if failed else buffer.value.decode(errors="replace").strip()


def _unsigned(library: ctypes.CDLL, function: str, handle: _Handle, *arguments: object) -> int | None:
    value = ctypes.c_uint()
    return None if _call(library, function, handle, *arguments, ctypes.byref(value)) else value.value


def _bus_address(library: ctypes.CDLL, handle: _Handle) -> tuple[int, ...]:
    pci = _PciInfo()
    failed = _call(library, "nvmlDeviceGetPciInfo_v3", handle, ctypes.byref(pci))
    return () if failed else (pci.domain, pci.bus, pci.device)


def _read_gpu(library: ctypes.CDLL, handle: _Handle) -> Gpu:
    capability = _compute_capability(library, handle)
    memory = _Memory()
    memory_failed = _call(library, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    cores = _unsigned(library, "nvmlDeviceGetNumGpuCores", handle)
    per_multiprocessor = None if capability is None else _CORES_PER_MULTIPROCESSOR.get(capability)
    bus_bits = _unsigned(library, "nvmlDeviceGetMemoryBusWidth", handle)
    memory_mhz = _unsigned(library, "nvmlDeviceGetMaxClockInfo", handle, ctypes.c_uint(_CLOCK_MEMORY))
    mig_enabled = _mig_enabled(library, handle)
    return Gpu(
        name=_text(library, "nvmlDeviceGetName", handle, _NAME_BYTES),
        uuid=_text(library, "nvmlDeviceGetUUID", handle, _UUID_BYTES),
        memory_bytes=None if memory_failed else memory.total,
        compute_capability=capability,
        multiprocessors=cores // per_multiprocessor if cores and per_multiprocessor else None,
        bandwidth_bytes_per_s=(
            memory_mhz * 1e6 * _TRANSFERS_PER_CLOCK * bus_bits / 8 if memory_mhz and bus_bits else None
        ),
        max_clock_mhz=_unsigned(library, "nvmlDeviceGetMaxClockInfo", handle, ctypes.c_uint(_CLOCK_SM)),
        mig_enabled=mig_enabled,
        mig_devices=_read_mig_devices(library, handle, capability) if mig_enabled else (),
    )


def _compute_capability(library: ctypes.CDLL, handle: _Handle) -> tuple[int, int] | None:
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = _call(library, "nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
    return None if failed else (major.value, minor.value)


def _mig_enabled(library: ctypes.CDLL, handle: _Handle) -> bool:
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    failed = _call(library, "nvmlDeviceGetMigMode", handle, ctypes.byref(current), ctypes.byref(pending))
    return not failed and current.value == 1


def _read_mig_devices(library: ctypes.CDLL, parent: _Handle, capability: tuple[int, int] | None) -> tuple[Gpu, ...]:
    found: list[Gpu] = []
    for index in range(_unsigned(library, "nvmlDeviceGetMaxMigDeviceCount", parent) or 0):
        handle, attributes = _Handle(), _Attributes()
        if _call(library, "nvmlDeviceGetMigDeviceHandleByIndex", parent, ctypes.c_uint(index), ctypes.byref(handle)):
            continue  # a slot without a device
        unknown = _call(library, "nvmlDeviceGetAttributes_v2", handle, ctypes.byref(attributes))
        found.append(
            Gpu(
                name=_text(library, "nvmlDeviceGetName", handle, _NAME_BYTES),
                uuid=_text(library, "nvmlDeviceGetUUID", handle, _UUID_BYTES),
                memory_bytes=None if unknown else attributes.memory_mib << 20,
                compute_capability=capability,
                multiprocessors=None if unknown else attributes.multiprocessors,
            )
        )
    return tuple(found)
