"""What `run` measures on: the device that --device names, and who measures its contests (--executor)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_runtime.errors import ContextError, DeviceError
from layerzero_tune.command_line.options import live_device, registry_with, results_of
from layerzero_tune.measure.contest import JobOutcome, MeasurementPolicy
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.at_once import AtOnce
from layerzero_tune.search.device import LiveDevice, MeasuringDevice, torch_name
from layerzero_tune.search.executor import Executor, InTurn
from layerzero_tune.search.on_ray import LiveNode, OnRay, RecordedNode
from layerzero_tune.search.recorded_device import RecordedDevice
from layerzero_tune.worker.compilers import Compilers
from layerzero_tune.worker.process import WorkerProcess

ALL = "all"
EXECUTORS = ("local", "ray")


@contextmanager
def measuring_on(name: str, executor: str, modules: tuple[str, ...]) -> Iterator[tuple[MeasuringDevice, Executor]]:
    """The device, and who measures on it until the context ends.

    Raises:
        LayerZeroError: one of the names stands for nothing that can be measured here.
    """
    if executor not in EXECUTORS:
        raise ContextError(f"--executor is {executor!r}, allowed: {', '.join(EXECUTORS)}")
    recording = results_of(name)
    with ExitStack() as stack:
        if recording is not None:
            yield _replaying(recording, executor, stack)
        else:
            yield _measuring(_live_devices(name), executor, modules, stack)


def _replaying(recording: Path, executor: str, stack: ExitStack) -> tuple[MeasuringDevice, Executor]:
    device = RecordedDevice(ResultsStore(recording).read().rows)
    if executor == "ray":
        return device, stack.enter_context(OnRay(device.spec, RecordedNode(recording.resolve())))
    return device, InTurn(device)


def _measuring(
    specs: tuple[DeviceSpec, ...], executor: str, modules: tuple[str, ...], stack: ExitStack
) -> tuple[MeasuringDevice, Executor]:
    registry, lost = registry_with(modules), dict[str, JobOutcome]()
    # On a CPU they would take the processors from what is timed, and of several devices each from the others: there
    # the workers compile, between their contests.
    is_alone = len(specs) == 1 and executor == "local" and specs[0].platform == "cuda"
    compilers = stack.enter_context(Compilers(modules)) if is_alone else None
    devices = [
        LiveDevice(
            spec,
            registry,
            MeasurementPolicy(),
            stack.enter_context(WorkerProcess(modules, torch_name(spec))),
            compilers=compilers,
            lost=lost,
        )
        for spec in specs
    ]
    if executor == "ray":
        return devices[0], stack.enter_context(OnRay(specs[0], LiveNode(specs[0], modules)))
    return devices[0], InTurn(devices[0]) if len(devices) == 1 else stack.enter_context(AtOnce(devices))


def _live_devices(name: str) -> tuple[DeviceSpec, ...]:
    """The devices of this machine that are measured at once.

    Raises:
        ContextError: they are of different products.
        DeviceError: there are none.
    """
    if name != ALL:
        return (live_device(name),)
    found = [detect_device("cuda:0")]
    while True:
        try:
            found.append(detect_device(f"cuda:{len(found)}"))
        except DeviceError:  # that was the last one
            break
    if len(set(found)) > 1:
        shown = ", ".join(f"{torch_name(spec)} {_described(spec, found[0])}" for spec in found)
        raise ContextError(
            f"--device all needs GPUs of one product, this host has {shown}; measure each with --device cuda:N and an "
            "--out of its own"
        )
    return tuple(found)


def _described(spec: DeviceSpec, first: DeviceSpec) -> str:
    """The device's name, and what it says otherwise than a first one of that name."""
    own, other = spec.to_dict(), first.to_dict()
    names = sorted(name for name in {*own, *other} if own.get(name) != other.get(name))
    if spec.name != first.name or not names:
        return spec.name
    return f"{spec.name} ({', '.join(f'{name} {own.get(name)}' for name in names)})"
