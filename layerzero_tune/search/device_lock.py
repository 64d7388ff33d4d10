"""One run at a time measures on a device of this machine."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from time import sleep

from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.devices.nvml import load_library, read_inventory
from layerzero_runtime.devices.visible_devices import visible_gpus
from layerzero_tune.results.leases import Leases

_LOOK_S = 0.25
_logger = logging.getLogger(__name__)


@contextmanager
def alone_on(device: DeviceSpec, check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Have the device to oneself, of all runs of this user; waits for it, and says so. `check` is called at every look
    and may raise.

    A run that dies, however that happens, releases it.
    """
    locks, name, has_said_so = Leases(_runtime_folder()), lock_name(device), False
    while True:
        with locks.take(name) as is_ours:
            if is_ours:
                yield
                return
        if not has_said_so:
            _logger.warning("another run measures on %s: waiting until it has finished with a shape", device.name)
            has_said_so = True
        check()
        sleep(_LOOK_S)


def lock_name(device: DeviceSpec) -> str:
    """What tells this device from all others of the machine: of GPUs not their number, which is another one under
    another CUDA_VISIBLE_DEVICES."""
    if device.platform == "cpu":
        return "cpu"
    uuids = _visible_uuids(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER"))
    index = device.index or 0
    return uuids[index] if index < len(uuids) else f"{device.platform}-{index}"


@lru_cache(maxsize=8)
def _visible_uuids(visible: str | None, order: str | None) -> tuple[str, ...]:
    return tuple(gpu.uuid for gpu in visible_gpus(read_inventory(load_library()).gpus, visible, order))


def _runtime_folder() -> Path:
    """The user's folder for what lives no longer than a session (XDG Base Directory Specification)."""
    folder = os.environ.get("XDG_RUNTIME_DIR")
    return Path(folder) / "layerzero" if folder else Path(tempfile.gettempdir()) / f"layerzero-{os.getuid()}"
