"""Whether the GPUs run below their clocks for want of power or cooling, as NVML says it now."""

from __future__ import annotations

import ctypes

from layerzero_runtime.devices.nvml import load_library, with_gpus

POWER_CAP = "power cap"
# Bits of nvmlDeviceGetCurrentClocksEventReasons (before driver 535: ...ThrottleReasons) that mean a limit of power or
# heat; idle clocks and clocks that somebody has set are none.
REASONS = {
    0x04: POWER_CAP,
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_FUNCTIONS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")


def throttled_gpus(library: ctypes.CDLL | None = None) -> dict[int, tuple[str, ...]]:
    """By NVML's index the reasons of each GPU that is slowed down at this moment; empty where NVML does not answer."""
    library = library or load_library()
    if library is None:
        return {}
    found = {index: slowdown_reasons(library, handle) for index, handle in with_gpus(library)}
    return {index: reasons for index, reasons in found.items() if reasons}


def slowdown_reasons(library: ctypes.CDLL, handle: ctypes.c_void_p) -> tuple[str, ...]:
    """Why the GPU of that handle is slowed down, while a session of NVML is open; empty where it does not say."""
    bits = ctypes.c_ulonglong()
    for name in _FUNCTIONS:
        function = getattr(library, name, None)
        if function is not None and function(handle, ctypes.byref(bits)) == 0:
            return tuple(reason for bit, reason in REASONS.items() if bits.value & bit)
    return ()
