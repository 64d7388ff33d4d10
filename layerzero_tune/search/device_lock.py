"""One run at a time measures on a device of this machine."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep

from layerzero_runtime.device import DeviceSpec
from layerzero_tune.results.leases import Leases

_LOOK_S = 0.25
_logger = logging.getLogger(__name__)


@contextmanager
def alone_on(device: DeviceSpec) -> Iterator[None]:
    """Have the device to oneself, of all runs of this user; waits for it, and says so.

    A run that dies, however that happens, releases it.
    """
    name = "cpu" if device.platform == "cpu" else f"{device.platform}-{device.index or 0}"
    locks, has_said_so = Leases(_runtime_folder()), False
    while True:
        with locks.take(name) as is_ours:
            if is_ours:
                yield
                return
        if not has_said_so:
            _logger.warning("another run measures on %s: waiting until it has finished with a shape", device.name)
            has_said_so = True
        sleep(_LOOK_S)


def _runtime_folder() -> Path:
    """The user's folder for what lives no longer than a session (XDG Base Directory Specification)."""
    folder = os.environ.get("XDG_RUNTIME_DIR")
    return Path(folder) / "layerzero" if folder else Path(tempfile.gettempdir()) / f"layerzero-{os.getuid()}"
