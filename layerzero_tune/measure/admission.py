"""Whether a candidate may run at all."""

from __future__ import annotations

from collections.abc import Mapping

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import missing_requirement
from layerzero_runtime.selection.limits import rejections
from layerzero_tune.measure.contest import Candidate, JobOutcome


def refusal(candidate: Candidate, kernels: Mapping[str, Kernel], context: SelectionContext) -> JobOutcome | None:
    """Why the candidate cannot run, from declarations alone; None if it can."""
    kernel = kernels.get(candidate.kernel_id)
    if kernel is None:
        return JobOutcome("unavailable", f"no kernel {candidate.kernel_id!r} is registered")
    spec = kernel.spec
    if context.operation not in spec.operations:
        return JobOutcome("refused", f"computes {', '.join(spec.operations)}, not {context.operation}")
    if refused := rejections(spec.limits, context):
        return JobOutcome("refused", "; ".join(map(str, refused)))
    if missing := missing_requirement(spec.requires):
        return JobOutcome("unavailable", missing)
    return None
