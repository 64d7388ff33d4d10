"""The bench of a contest: a device of this machine, the clock for a mode, and the watch over its speed."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache

from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.errors import ContextError
from layerzero_tune.measure.clock import Clock, WallClock
from layerzero_tune.measure.contention import ProcessorTime
from layerzero_tune.measure.core_speed import CoreSpeed, serial_loop
from layerzero_tune.measure.cuda_clock import EagerClock, GraphClock
from layerzero_tune.measure.full_speed import Patience, Speed
from layerzero_tune.measure.gpu_state import GpuWatch
from layerzero_tune.measure.processor_speed import ProcessorSpeed, parallel_loop

# Of a GPU's memory: a contest of the longest calls takes about half.
_KEPT_SHARE = 0.25


@dataclass(frozen=True)
class Bench:
    """Where and by what a contest is timed.

    Attributes:
        name: torch's name of the device.
        is_shared: whether other processes that use this machine's processors slow a contest down; the device time of a
            graph does not ask what they do.
        tuner: the process that has others beside this one measure, where they may have the cores that a contest leaves
            free: the host's part of a GPU's calls takes one core, kernels of a CPU take all.
        gpu: the watch over the state of a GPU, None for a CPU.
        patience: how long a contest waits for the speed; that of a CPU remembers what waiting was worth.
        core: the speed of the core that makes the calls, where a GPU's calls are timed with the host's part of them.
    """

    name: str
    spec: DeviceSpec
    clock: Clock
    speed: Speed
    is_shared: bool = True
    tuner: int | None = None
    gpu: GpuWatch | None = None
    patience: Patience = field(default_factory=Patience)
    core: CoreSpeed | None = None

    @classmethod
    def of(cls, device: str, mode: str, tuner: int | None = None) -> Bench:
        """The bench for a device ("cpu", "cuda:N") and an execution mode; `tuner` is the process that has others beside
        this one measure, if there is one.

        Raises:
            ContextError: the device has no such mode.
            DeviceError: there is no such device.
        """
        spec = detect_device(device)
        if spec.platform == "cuda":
            index = spec.index or 0
            name, watch = f"cuda:{index}", _gpu_watch(index)
            if mode == "graph":
                return cls(name, spec, GraphClock(index), watch, is_shared=False, gpu=watch)
            return cls(name, spec, EagerClock(index), watch, tuner=tuner, gpu=watch, core=_core_speed())
        if mode != "eager":
            raise ContextError(f"mode is {mode!r}: CPUs have 'eager' only; measure graphs on a CUDA device")
        return cls("cpu", spec, WallClock(), _parallel_speed(), patience=_patience_with_cores())

    def now(self) -> ProcessorTime:
        """The processor time until now."""
        return ProcessorTime.now(self.tuner)

    def give_back_memory(self) -> None:
        """Free what torch keeps of a GPU's memory for later, where that is much: inside a capture it cannot."""
        import torch

        if self.spec.platform == "cpu":
            return
        kept = torch.cuda.memory_reserved(self.name) - torch.cuda.memory_allocated(self.name)
        if kept > _KEPT_SHARE * (self.spec.memory_bytes or 0):
            gc.collect()
            torch.cuda.empty_cache()

    def current(self) -> AbstractContextManager[object]:
        """Makes the device the current one."""
        import torch

        return nullcontext() if self.spec.platform == "cpu" else torch.cuda.device(self.name)


@cache
def _parallel_speed() -> ProcessorSpeed:
    return ProcessorSpeed(parallel_loop())


@cache
def _patience_with_cores() -> Patience:
    return Patience()


@cache
def _core_speed() -> CoreSpeed:
    return CoreSpeed(serial_loop())


@cache
def _gpu_watch(index: int) -> GpuWatch:
    import torch

    return GpuWatch(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
