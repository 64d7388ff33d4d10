"""GPUs that are described alone: their contests are measured by real workers on this machine's CPU."""

from __future__ import annotations

from dataclasses import replace

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.registry import Registry
from layerzero_tune.measure.contest import MeasurementPolicy
from layerzero_tune.search.device import LiveDevice
from layerzero_tune.worker.kernels import load_kernels
from layerzero_tune.worker.process import WorkerProcess
from tests.tune.torture_kernels import _hangs, kernel

H100 = DeviceSpec("cuda", "NVIDIA H100 80GB HBM3", compute_capability=(9, 0), index=0)
HANGS = kernel("hangs_everywhere", _hangs, platforms=("cpu", "cuda"))
KERNELS = (HANGS,)
BRIEF = MeasurementPolicy(warmup_ms=0.5, screen_ms=1.0, round_ms=1.0, rounds=3, cache_bytes=1 << 20)


def described_gpus(count: int, *kernel_ids: str) -> tuple[list[LiveDevice], list[WorkerProcess]]:
    """GPUs of one host, and the workers that measure in their place."""
    registry = Registry(kernel for name, kernel in load_kernels((__name__,)).items() if name in kernel_ids)
    workers = [WorkerProcess((__name__,), "cpu") for _ in range(count)]
    specs = [replace(H100, index=index) for index in range(count)]
    return [LiveDevice(spec, registry, BRIEF, worker) for spec, worker in zip(specs, workers, strict=True)], workers
