"""Leases: which contest is being measured by which run, where several fill one folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

LEASES = "leases"
# On another host nothing but time tells a run that was killed from one that still measures: no contest takes so long.
LEASE_S = 3600.0
_logger = logging.getLogger(__name__)


class Leases:
    """The leases in one results folder.

    A lease is a locked file (flock(2)), so that one whose process has died, however that ended, is free at once; where
    another host wrote it, whose lock may not be seen over a network's file system, it is free after `LEASE_S`. Hosts of
    one name, or containers on one running kernel, are one host: there the lock tells.
    """

    def __init__(self, results: Path) -> None:
        self._folder = results / LEASES
        self._has_warned = False

    @contextmanager
    def take(self, contest_id: str) -> Iterator[bool]:
        """Whether the contest is this run's to measure until the context ends; if not, another run measures it."""
        path = self._folder / contest_id
        try:
            descriptor = self._locked(path)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                _logger.warning(
                    "%s cannot be locked (%s): another run into this folder may measure the same contests",
                    self._folder, error.strerror or error
                )  # fmt: skip
            yield True
            return
        if descriptor is None:
            yield False
            return
        try:
            is_ours = not _is_of_another_host(descriptor)
            if is_ours:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps({"host": _host(), "process": os.getpid()}).encode(), 0)
            yield is_ours
            if is_ours:
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        """Remove what dead runs have left, and the folder where nothing is in flight."""
        for path in self._folder.glob("*"):
            with self.take(path.name):
                pass
        with contextlib.suppress(OSError):  # another run is at work, or there is none
            self._folder.rmdir()

    def _locked(self, path: Path) -> int | None:
        """A descriptor of the locked file; None where another process has it locked."""
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # another run has just removed the folder
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except FileNotFoundError:  # its holder has just removed it
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def _is_of_another_host(descriptor: int) -> bool:
    """Whether a run on another host holds the lease, as far as time tells."""
    text = os.pread(descriptor, 4096, 0)
    if time.time() - os.fstat(descriptor).st_mtime > LEASE_S:
        return False
    try:
        name, boot = json.loads(text)["host"]
    except (ValueError, KeyError, TypeError):  # killed before it wrote
        return False
    own_name, own_boot = _host()
    return bool(name != own_name and (boot != own_boot or not boot))


@cache
def _host() -> tuple[str, str]:
    """The host's name, and what tells this start of its kernel from all others (random(4), boot_id; empty: unknown)."""
    try:
        return socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname(), ""
