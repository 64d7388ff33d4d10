"""A shard of a run: one of n parts of its points, measured apart and merged afterwards."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.cell import cell_of
from layerzero_tune.identity import content_hash
from layerzero_tune.measure.contest import MeasurementPolicy
from layerzero_tune.search.contest_time import GUESSED_FINALISTS, contest_s, guessed_call_times
from layerzero_tune.workload.lines import WorkloadLine

_SHARD = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")
_POLICY = MeasurementPolicy()


@dataclass(frozen=True)
class Shard:
    """The `index`-th of `count` parts, from 1 on."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that "2/3" names.

        Raises:
            ContextError: the text names none.
        """
        found = _SHARD.fullmatch(text.strip())
        index, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= index <= count:
            allowed = f"1/{count} to {count}/{count}" if count else "1/n to n/n"
            raise ContextError(f"--shard is {text!r}, allowed: {allowed}, such as 1/4 for the first of four parts")
        return cls(index, count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def part(self, lines: Sequence[WorkloadLine]) -> tuple[WorkloadLine, ...]:
        """This shard's lines, in their order. Every line is in one of the `count` parts.

        Points of equal sizes under one static key stay together: whether they are measured again is decided over all of
        them. The parts follow from the points alone, not from their order, nor from what a machine has installed; the
        dearest cells go first, each to the part that has least so far.
        """
        cells: dict[object, list[WorkloadLine]] = {}
        for line in lines:
            cells.setdefault(cell_of(line.context), []).append(line)
        dearest_first = sorted(cells.values(), key=lambda cell: (-_seconds(cell), _name(cell)))
        loads = [0.0] * self.count
        chosen: set[SelectionContext] = set()
        for cell in dearest_first:
            least = loads.index(min(loads))
            loads[least] += _seconds(cell)
            if least == self.index - 1:
                chosen.update(line.context for line in cell)
        return tuple(line for line in lines if line.context in chosen)


def _seconds(cell: Sequence[WorkloadLine]) -> float:
    """What contests at these points may take, as far as their work says; the same parts on every machine."""
    return math.fsum(
        contest_s(guessed_call_times(operation_named(context.operation), context, GUESSED_FINALISTS, "cpu"), _POLICY)
        for context in {line.context for line in cell}
    )


def _name(cell: Sequence[WorkloadLine]) -> str:
    return min(content_hash(line.context.to_dict()) for line in cell)
