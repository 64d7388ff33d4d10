"""How long a step of a contest may take before its worker counts as hanging."""

from __future__ import annotations

from dataclasses import dataclass

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import operation_named
from layerzero_tune.measure.work import WIDEST_BYTES, call_elements
from layerzero_tune.worker.progress_board import Step

# A device slower than any that is tuned for: one core without vector instructions, with memory over a network.
SLOWEST_BYTES_PER_S = 1e9
SLOWEST_FLOPS_PER_S = 1e9
# A step makes one or two calls that take long (many only of short ones), and compares their results.
_MARGIN = 10.0


@dataclass(frozen=True)
class TimeLimits:
    """Seconds that one step may take.

    Attributes:
        shortest_s: of a step in which a kernel runs, however little it has to do. Where other processes have the cores,
            each parallel loop may wait a time slice of some 10 ms for its last thread, and a step makes hundreds of
            short calls.
        longest_s: however much it has to do; also of steps in which no kernel runs.
        compile_s: of one that may compile code.
    """

    shortest_s: float = 30.0
    longest_s: float = 600.0
    compile_s: float = 600.0

    def of(self, step: Step, context: SelectionContext) -> float:
        """The limit of a step at this point."""
        if step.candidate is None:
            return self.longest_s
        if step.may_compile:
            return self.compile_s
        return min(self.longest_s, max(self.shortest_s, _MARGIN * slowest_call_s(context)))


def slowest_call_s(context: SelectionContext) -> float:
    """Seconds of a call by its roofline on the slowest device: all tensors moved once, at the width of the widest
    element, or all operations done."""
    moved = call_elements(context) * WIDEST_BYTES / SLOWEST_BYTES_PER_S
    return max(moved, operation_named(context.operation).flops(context) / SLOWEST_FLOPS_PER_S)
