"""The state of an NVIDIA GPU while it is measured: clock, temperature, power, and whether it is slowed down."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from time import sleep
from typing import Any, Self, TypeVar

from layerzero_runtime.devices.nvml import load_library
from layerzero_runtime.devices.throttling import POWER_CAP, slowdown_reasons

_CLOCK_SM, _CLOCK_MEMORY = 1, 2  # NVML_CLOCK_SM, NVML_CLOCK_MEM
_TEMPERATURE_GPU = 0  # NVML_TEMPERATURE_GPU
Number = TypeVar("Number", int, float)
# A contest has a dozen looks.
_SLOWER = 6
# What a slowed down GPU lacks at least, so that its samples count as disturbed although the clock has not fallen yet.
LEAST_LOSS = 0.1
# In place of the reasons where the calls that are timed hold the GPU at the limit of its power by themselves.
OWN_LOAD = "own load"


@dataclass(frozen=True)
class GpuState:
    """What NVML says at one moment; None where it does not say.

    Attributes:
        clock_mhz, max_clock_mhz: of the multiprocessors, now and at most.
        memory_clock_mhz: of the memory.
        temperature_c: of the GPU in degrees Celsius.
        power_w: of the whole board in watts, on most products the mean of the last second.
        slowed: why the clocks are held down by power or heat; empty where they are not.
    """

    clock_mhz: int | None = None
    max_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
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


@dataclass(frozen=True)
class GpuConditions:
    """The states of a GPU over one contest: medians, and the worst. None where NVML does not say.

    One state is read behind each round and the screening, all candidates of which share it; a contest's states differ
    less than those of two contests. So they are kept for the contest, and not for each sample: whoever doubts a ratio
    asks whether clocks fell or heat rose while it was taken, and the median and the worst answer that.

    Attributes:
        slowed: the reasons of all states: those that are kept although the GPU was slowed down.
        core_ns: the time of the loop by which the core is watched that makes the calls; None where it was not watched.
    """

    clock_mhz: float | None
    lowest_clock_mhz: int | None
    memory_clock_mhz: float | None
    lowest_memory_clock_mhz: int | None
    temperature_c: float | None
    highest_temperature_c: int | None
    power_w: float | None
    highest_power_w: float | None
    slowed: tuple[str, ...] = ()
    core_ns: float | None = None

    @classmethod
    def of(cls, states: Sequence[GpuState], core_ns: Sequence[float] = ()) -> Self:
        """Those of at least one state, and of the looks at the core."""
        clocks = _told(state.clock_mhz for state in states)
        memory_clocks = _told(state.memory_clock_mhz for state in states)
        temperatures = _told(state.temperature_c for state in states)
        powers = _told(state.power_w for state in states)
        return cls(
            _median(clocks),
            min(clocks, default=None),
            _median(memory_clocks),
            min(memory_clocks, default=None),
            _median(temperatures),
            max(temperatures, default=None),
            _median(powers),
            max(powers, default=None),
            tuple(dict.fromkeys(reason for state in states for reason in state.slowed)),
            _median(core_ns),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values by name."""
        return asdict(self) | {"slowed": list(self.slowed)}


def _told(values: Iterable[Number | None]) -> list[Number]:
    return [value for value in values if value is not None]


def _median(values: Sequence[float]) -> float | None:
    return float(statistics.median(values)) if values else None


class GpuWatch:
    """Reads the state of one GPU, given by its UUID as CUDA has it ("GPU-..."); NVML stays open for the process's life.

    Where NVML does not answer, every state is empty.

    Attributes:
        last: the state that was read last.
    """

    is_of_processors = False
    # The cap on an H100's power is lifted milliseconds after its load.
    look_s = 0.02

    def __init__(self, uuid: str) -> None:
        self.last = GpuState()
        self._looks = 0
        self._handle = ctypes.c_void_p()
        self._library = load_library()
        if self._library is not None and not self._opens(self._library, uuid):
            self._library = None

    def _opens(self, library: ctypes.CDLL, uuid: str) -> bool:
        found = ctypes.byref(self._handle)
        return not library.nvmlInit_v2() and not library.nvmlDeviceGetHandleByUUID(uuid.encode(), found)

    def read(self) -> GpuState:
        if self._library is None:
            return self.last
        power = self._number("nvmlDeviceGetPowerUsage")
        self.last = GpuState(
            clock_mhz=self._number("nvmlDeviceGetClockInfo", _CLOCK_SM),
            max_clock_mhz=self._number("nvmlDeviceGetMaxClockInfo", _CLOCK_SM),
            memory_clock_mhz=self._number("nvmlDeviceGetClockInfo", _CLOCK_MEMORY),
            temperature_c=self._number("nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
            power_w=None if power is None else power / 1000.0,
            slowed=slowdown_reasons(self._library, self._handle),
        )
        return self.last

    def lost(self) -> float:
        """As in `GpuState`; what changes slowly is read in every `_SLOWER` looks once, as each value takes NVML most of
        a millisecond."""
        looks, self._looks = self._looks, self._looks + 1
        if self._library is None or looks % _SLOWER == 0:
            return self.read().lost
        clock = self._number("nvmlDeviceGetClockInfo", _CLOCK_SM)
        self.last = replace(self.last, clock_mhz=clock, slowed=slowdown_reasons(self._library, self._handle))
        return self.last.lost

    def is_of_load(self) -> bool:
        return self.last.slowed == (POWER_CAP,)

    def pause(self) -> None:
        sleep(self.look_s)

    def _number(self, name: str, *arguments: int) -> int | None:
        found = ctypes.c_uint()
        function = getattr(self._library, name, None)
        if function is None:
            return None
        status = function(self._handle, *(ctypes.c_uint(argument) for argument in arguments), ctypes.byref(found))
        return found.value if status == 0 else None
