"""Checking again what was right at first: a kernel may go wrong once its caches are warm, or at one call in ten."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns

from layerzero_runtime.kernel import KernelFunction
from layerzero_tune.measure.correctness import Check, judge, tolerances

# Enough in a row that one call in ten cannot slip through.
VERIFIED_CALLS = 12
# Kernels that take longer have fewer of their calls checked, but never fewer than these.
VERIFICATION_MS = 10.0
_MIN_CALLS = 2
# Errors of a right kernel vary from input to input; those of a wrong result are larger by far.
_SLACK = 2.0


def tolerances_on(check: Check, default: KernelFunction | None) -> tuple[float, ...]:
    """Per output, the error allowed on the check's inputs, from the default's own where that gives a result."""
    trial = None if default is None else check.run(default)
    allowed = tolerances(check.written_out() if trial is None or trial.fault else trial, check.context.result_dtype)
    return tuple(_SLACK * error for error in allowed)


def later_fault(check: Check, function: KernelFunction, allowed: Sequence[float]) -> str:
    """What is wrong with a result of some calls in a row, empty if nothing is; what the function raises is raised."""
    start = perf_counter_ns()
    for call in range(1, VERIFIED_CALLS + 1):
        if message := judge(check.run(function), allowed).message:
            return f"right at first, wrong later: {message}"
        if call >= _MIN_CALLS and perf_counter_ns() - start > VERIFICATION_MS * 1e6:
            break
    return ""
