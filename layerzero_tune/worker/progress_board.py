"""Where a worker is, in memory that it shares with the tuner.

Shared memory and not messages: a message would wake the tuner at the beginning of every timed sample, and reading it
would take the processor from the sample.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from dataclasses import dataclass

from layerzero_tune.measure.contest import COMPILING_CALL, LOAD

_LAYOUT = struct.Struct("<QQ48s")  # steps begun, candidate + 1 (0: none), name of the step


@dataclass(frozen=True)
class Step:
    """The `number`-th step since the worker began, of a candidate or (None) of the contest as a whole."""

    number: int
    candidate: int | None
    name: str

    @property
    def may_compile(self) -> bool:
        """Whether the step may compile code, which takes longer than any call."""
        return self.name in (LOAD, COMPILING_CALL)


class ProgressBoard:
    """One writer, the worker; the tuner reads when it wonders what is going on, or after the worker's death."""

    def __init__(self, descriptor: int) -> None:
        """Map the file behind `descriptor`, which the board owns from now on."""
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _LAYOUT.size)
        self._steps = 0

    @classmethod
    def create(cls) -> ProgressBoard:
        with tempfile.TemporaryFile() as file:
            file.truncate(_LAYOUT.size)
            return cls(os.dup(file.fileno()))

    def report(self, candidate: int | None, name: str) -> None:
        self._steps += 1
        _LAYOUT.pack_into(self._memory, 0, self._steps, 0 if candidate is None else candidate + 1, name.encode()[:48])

    def read(self) -> Step:
        number, candidate, name = _LAYOUT.unpack_from(self._memory)
        return Step(number, candidate - 1 if candidate else None, name.rstrip(b"\0").decode(errors="replace"))

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)
