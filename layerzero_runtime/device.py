"""`DeviceSpec`: the product that a table was measured on or a call runs on, and how two of them match."""

from __future__ import annotations

import keyword
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from layerzero_runtime.devices.cpu import detect_processor, intra_op_threads
from layerzero_runtime.errors import ContextError, ContextTypeError, DeviceError

if TYPE_CHECKING:
    from layerzero_runtime.devices.nvml import Gpu, Inventory

PLATFORMS = ("cpu", "cuda", "rocm", "hpu", "mps")

# Names under which one and the same product reports itself; each with its reason.
ALIASES: Mapping[str, str] = {
    # Drivers before R470 left out the maker's name.
    "A100-SXM4-40GB": "NVIDIA A100-SXM4-40GB",
    "A100-SXM4-80GB": "NVIDIA A100-SXM4-80GB",
    "A100-PCIE-40GB": "NVIDIA A100-PCIE-40GB",
    # PCI device 10DE:20B0, that of the A100-SXM4-40GB, on another board.
    "NVIDIA A100-PG509-200": "NVIDIA A100-SXM4-40GB",
    # A virtual function that passes the whole card through.
    "AMD Instinct MI300X VF": "AMD Instinct MI300X",
}

_COUNTS = ("physical_cores", "threads", "multiprocessors", "memory_bytes", "l2_bytes")
# What ranks approximate matches: sizes that decide where one kernel overtakes another.
_RANKED = ("multiprocessors", "bandwidth_bytes_per_s", "l2_bytes", "physical_cores", "threads")
_UNKNOWN = math.log(2)
_MAX_NAME = 160

Match = Literal["exact", "approximate"]


@dataclass(frozen=True)
class DeviceSpec:
    """A device, described by what decides timings. What is unknown stays None.

    Attributes:
        platform: one of `PLATFORMS`.
        name: the product's name as its driver (a CPU's: its operating system) reports it.
        instruction_set: of a CPU, a name of `layerzero_runtime.devices.cpu.INSTRUCTION_SETS`.
        physical_cores, threads: of a CPU, cores that the process may use and threads within one operation.
        compute_capability: of a GPU, (major, minor); the major number is the architecture.
        multiprocessors: streaming multiprocessors or compute units.
        memory_bytes, l2_bytes: bytes.
        bandwidth_bytes_per_s: peak of the device memory.
        index: which of several; no part of the product, so neither compared nor written out.

    Raises:
        ContextError: a value is not allowed.
        ContextTypeError: a value has the wrong type.
    """

    platform: str
    name: str
    instruction_set: str = ""
    physical_cores: int | None = None
    threads: int | None = None
    compute_capability: tuple[int, int] | None = None
    multiprocessors: int | None = None
    memory_bytes: int | None = None
    bandwidth_bytes_per_s: float | None = None
    l2_bytes: int | None = None
    index: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("platform", "name", "instruction_set"):
            if not isinstance(getattr(self, name), str):
                raise ContextTypeError(f"device {name} must be a string, not {getattr(self, name)!r}")
        if self.platform not in PLATFORMS:
            raise ContextError(f"device platform is {self.platform!r}, allowed: {', '.join(PLATFORMS)}")
        if len(self.name) > _MAX_NAME or not re.search("[A-Za-z0-9]", self.name):
            raise ContextError(f"device name is {self.name!r}, required: letters or digits, {_MAX_NAME} at most")
        for name in _COUNTS:
            _check_count(name, getattr(self, name), at_least=1)
        _check_count("index", self.index, at_least=0)
        _check_bandwidth(self.bandwidth_bytes_per_s)
        object.__setattr__(self, "compute_capability", _capability(self.compute_capability))
        # Selection looks devices up by hash, on every call.
        compared = tuple(getattr(self, f.name) for f in fields(self) if f.compare)
        object.__setattr__(self, "_hash", hash(compared))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        # Through the constructor: the hashes of strings differ between processes.
        return DeviceSpec, tuple(getattr(self, f.name) for f in fields(self))

    @property
    def product(self) -> str:
        """The name, or the one that it is an alias of."""
        return ALIASES.get(self.name, self.name)

    @property
    def slug(self) -> str:
        """The product as the name of a Python module: "cpu_amd_epyc_avx512_bf16_2c_2t", "nvidia_h100_80gb_hbm3"."""
        words = [self.product]
        if self.platform == "cpu":
            words = ["cpu", self.product, self.instruction_set]
            words += [f"{count}{unit}" for count, unit in ((self.physical_cores, "c"), (self.threads, "t")) if count]
        slug = re.sub("[^a-z0-9]+", "_", " ".join(words).lower()).strip("_")
        return f"{self.platform}_{slug}" if slug[0].isdecimal() or keyword.iskeyword(slug) else slug

    def matches(self, other: DeviceSpec) -> Match | None:
        """How far what was measured on one device holds on the other; the same in both directions.

        "exact": one product (of CPUs also one instruction set, number of cores and of threads). "approximate": one
        architecture or instruction set, good for a guess only. None: nothing carries over.
        """
        if self.platform != other.platform:
            return None
        exact = self.product == other.product
        if self.platform == "cpu":
            same_instructions = self.instruction_set == other.instruction_set
            same_cores = (self.physical_cores, self.threads) == (other.physical_cores, other.threads)
            if exact and same_instructions and same_cores:
                return "exact"
            return "approximate" if same_instructions and self.instruction_set else None
        if exact:
            return "exact"
        if self.compute_capability is None or other.compute_capability is None:
            return None
        return "approximate" if self.compute_capability[0] == other.compute_capability[0] else None

    def distance(self, other: DeviceSpec) -> float:
        """How unlike `other` is in size, to rank approximate matches: 0 for equal sizes, log 2 for each factor of two.

        The sum over multiprocessors, bandwidth and L2 (of CPUs: cores and threads) of |log ratio|. What this device
        does not know of itself cannot rank others; what another does not tell counts as a factor of two.
        """
        total = 0.0
        for name in _RANKED:
            own, others = getattr(self, name), getattr(other, name)
            if own is not None:
                total += _UNKNOWN if others is None else abs(math.log(own / others))
        return total

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, fit for JSON: equal products give equal dictionaries."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        values = {name: value for name, value in values.items() if value not in (None, "")}
        if self.compute_capability is not None:
            values["compute_capability"] = list(self.compute_capability)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeviceSpec:
        """The device that `to_dict` wrote.

        Raises:
            ContextError: a key is unknown, the platform or the name is missing, or a value is not allowed.
            ContextTypeError: a value has the wrong type.
        """
        allowed = [f.name for f in fields(cls) if f.compare]
        if unknown := sorted(set(values) - set(allowed)):
            raise ContextError(f"device has unknown fields {', '.join(unknown)}; allowed: {', '.join(allowed)}")
        if missing := [name for name in ("platform", "name") if name not in values]:
            raise ContextError(f"device lacks {' and '.join(missing)}; both are required")
        return cls(**values)


def detect_device(name: str = "auto") -> DeviceSpec:
    """The device of this machine with torch's name for it: "cpu", "cuda" (the first) or "cuda:N".

    "auto" is the first CUDA device, without one the CPU. GPUs are asked for once and, as in CUDA itself, later changes
    of CUDA_VISIBLE_DEVICES do nothing (`forget_devices` asks anew). The number of threads is read at each call.

    Raises:
        ContextError: the name is none of these (ContextTypeError: it is no string).
        DeviceError: there is no such CUDA device.
    """
    if name == "cpu":
        return _detect_cpu()
    if name == "auto":
        return _cuda_devices()[0] if _cuda_devices() else _detect_cpu()
    if not isinstance(name, str):
        raise ContextTypeError(f"device must be a string, not {name!r}; allowed: auto, cpu, cuda, cuda:N")
    return _cuda_device(name)


def uses_cuda() -> bool:
    """Whether this process has found CUDA devices; asks for none itself."""
    return bool(_cuda_devices.cache_info().currsize and _cuda_devices())


def forget_devices() -> None:
    """Detect anew at the next call, after a change of CUDA_VISIBLE_DEVICES or of the process's CPU affinity."""
    for cached in (_cuda_device, _cuda_devices, _inventory, _physical_cpu, _cpu_with_threads):
        cached.cache_clear()


def _detect_cpu() -> DeviceSpec:
    return _cpu_with_threads(intra_op_threads(_physical_cpu().physical_cores or 1))


@lru_cache(maxsize=64)
def _cpu_with_threads(threads: int) -> DeviceSpec:
    return replace(_physical_cpu(), threads=threads)


@lru_cache(maxsize=1)
def _physical_cpu() -> DeviceSpec:
    found = detect_processor()
    return DeviceSpec("cpu", found.name[:_MAX_NAME], found.instruction_set, found.physical_cores)


@lru_cache(maxsize=1)
def _inventory() -> Inventory:
    from layerzero_runtime.devices.nvml import load_library, read_inventory

    return read_inventory(load_library())


@lru_cache(maxsize=1)
def _cuda_devices() -> tuple[DeviceSpec, ...]:
    gpus = _inventory().gpus
    if not gpus:
        return ()
    from layerzero_runtime.devices.visible_devices import visible_gpus

    visible, order = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER")
    return tuple(_describe(gpu, index) for index, gpu in enumerate(visible_gpus(gpus, visible, order)))


def _describe(gpu: Gpu, index: int) -> DeviceSpec:
    return DeviceSpec(
        platform="cuda",
        name=gpu.name or "unknown NVIDIA GPU",
        compute_capability=gpu.compute_capability,
        multiprocessors=gpu.multiprocessors,
        memory_bytes=gpu.memory_bytes,
        bandwidth_bytes_per_s=gpu.bandwidth_bytes_per_s,
        index=index,
    )


@lru_cache(maxsize=64)
def _cuda_device(name: str) -> DeviceSpec:
    match = re.fullmatch("cuda(?::([0-9]{1,4}))?", name)
    if match is None:
        raise ContextError(f"device is {name!r}, allowed: auto, cpu, cuda, cuda:N")
    index, devices = int(match[1] or 0), _cuda_devices()
    if index < len(devices):
        return devices[index]
    raise DeviceError(_missing_cuda_device(name, len(devices)))


def _missing_cuda_device(name: str, count: int) -> str:
    inventory = _inventory()
    if not inventory.gpus:
        return f"there is no device {name}: {inventory.problem}; use device cpu, or check the driver with nvidia-smi"
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    reason = "" if variable is None else f" under CUDA_VISIBLE_DEVICES={variable!r}"
    visible = f"CUDA shows {count} of this machine's {len(inventory.gpus)} GPUs{reason}"
    advice = f"use cuda:N with N below {count}" if count else "change CUDA_VISIBLE_DEVICES or use device cpu"
    return f"there is no device {name}: {visible}; {advice}"


def _check_count(name: str, value: object, at_least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ContextTypeError(f"device {name} must be an integer, not {value!r}")
    if value < at_least:
        raise ContextError(f"device {name} is {value}, required at least {at_least}")


def _check_bandwidth(value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ContextTypeError(f"device bandwidth_bytes_per_s must be a number, not {value!r}")
    if not 0 < value < math.inf:
        raise ContextError(f"device bandwidth_bytes_per_s is {value}, required a positive finite number")


def _capability(value: object) -> tuple[int, int] | None:
    """(major, minor) from a pair, which JSON gives as a list."""
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, list | tuple) else ()
    if len(pair) != 2 or any(isinstance(part, bool) or not isinstance(part, int) for part in pair):
        raise ContextTypeError(f"device compute_capability must be two integers (major, minor), not {value!r}")
    if min(pair) < 0:
        raise ContextError(f"device compute_capability is {value!r}, required numbers from 0 on")
    return pair
