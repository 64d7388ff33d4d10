"""The state of an NVIDIA GPU while it is measured: clock, temperature, power, and whether it is slowed down."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from layerzero_runtime.devices.nvml import load_library
from layerzero_runtime.devices.throttling import slowdown_reasons

_CLOCK_SM = 1  # NVML_CLOCK_SM
_TEMPERATURE_GPU = 0  # NVML_TEMPERATURE_GPU
# What a slowed down GPU lacks at least, so that its samples count as disturbed although the clock has not fallen yet.
LEAST_LOSS = 0.1


@dataclass(frozen=True)
class GpuState:
    """What NVML says at one moment; None where it does not say.

    Attributes:
        clock_mhz: of the multiprocessors, now and at most.
        slowed: why the clocks are held down by power or heat; empty where they are not.
    """

    clock_mhz: int | None = None
    max_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    slowed: tuple[str, ...] = ()

    @property
    def lost(self) -> float:
        """The share of the speed that is missing because the GPU is slowed down, 0 if it is not."""
        if not self.slowed:
            return 0.0
        if self.clock_mhz is None or not self.max_clock_mhz:
            return LEAST_LOSS
        return max(LEAST_LOSS, 1.0 - self.clock_mhz / self.max_clock_mhz)


class GpuWatch:
    """Reads the state of one GPU, given by its UUID as CUDA has it ("GPU-..."); NVML stays open for the process's life.

    Where NVML does not answer, every state is empty.
    """

    def __init__(self, uuid: str) -> None:
        self._handle = ctypes.c_void_p()
        self._library = load_library()
        if self._library is not None and not self._opens(self._library, uuid):
            self._library = None

    def _opens(self, library: ctypes.CDLL, uuid: str) -> bool:
        found = ctypes.byref(self._handle)
        return not library.nvmlInit_v2() and not library.nvmlDeviceGetHandleByUUID(uuid.encode(), found)

    def read(self) -> GpuState:
        if self._library is None:
            return GpuState()
        power = self._number("nvmlDeviceGetPowerUsage")
        return GpuState(
            clock_mhz=self._number("nvmlDeviceGetClockInfo", _CLOCK_SM),
            max_clock_mhz=self._number("nvmlDeviceGetMaxClockInfo", _CLOCK_SM),
            temperature_c=self._number("nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
            power_w=None if power is None else power / 1000.0,
            slowed=slowdown_reasons(self._library, self._handle),
        )

    def lost(self) -> float:
        """As in `GpuState`."""
        return self.read().lost

    def _number(self, name: str, *arguments: int) -> int | None:
        found = ctypes.c_uint()
        function = getattr(self._library, name, None)
        if function is None:
            return None
        status = function(self._handle, *(ctypes.c_uint(argument) for argument in arguments), ctypes.byref(found))
        return found.value if status == 0 else None
