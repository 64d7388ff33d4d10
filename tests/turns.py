"""Turns on the machine: a test marked `alone` runs while no other one does, in whichever process of the run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Turns:
    """Two locks of the system, each on a file: whoever waits for the machine holds the door, so that nobody else comes
    in before; whoever runs holds the room, alone or with others."""

    def __init__(self, door: Path, room: Path) -> None:
        self._door, self._room = (os.open(path, os.O_RDONLY) for path in (door, room))

    @contextmanager
    def turn(self, alone: bool) -> Iterator[None]:
        """Inside, no other test runs, or none that has to be alone."""
        with _held(self._door, fcntl.LOCK_EX):
            fcntl.flock(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(self._room, fcntl.LOCK_UN)


@contextmanager
def _held(lock: int, operation: int) -> Iterator[None]:
    fcntl.flock(lock, operation)
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


# Any two files do that all processes of a checkout agree on.
TURNS = Turns(Path(__file__), Path(__file__).with_name("conftest.py"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with TURNS.turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)
