"""The live selector: what serves a call that the table does not know."""

from __future__ import annotations

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import NoKernelAvailableError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import missing_requirement
from layerzero_runtime.limits import rejections
from layerzero_runtime.registry import Registry


def refusals(kernel: Kernel, context: SelectionContext) -> tuple[str, ...]:
    """Why a kernel cannot serve the context: violated limits, then a missing library; empty if it can."""
    reasons = [str(rejection) for rejection in rejections(kernel.spec.limits, context)]
    missing = missing_requirement(kernel.spec.requires)
    return (*reasons, missing) if missing else tuple(reasons)


def select_live(registry: Registry, context: SelectionContext) -> Kernel:
    """The legal and available kernel of the highest priority.

    Where every legal kernel lacks its library, the first of them answers: the plan says that it is not available.

    Raises:
        NoKernelAvailableError: no kernel of the operation is legal; lists each with its reasons.
    """
    refused: dict[str, tuple[str, ...]] = {}
    legal: Kernel | None = None
    for kernel in registry.candidates(context.operation):
        reasons = refusals(kernel, context)
        if not reasons:
            return kernel
        refused[kernel.kernel_id] = reasons
        if legal is None and not rejections(kernel.spec.limits, context):
            legal = kernel
    if legal is not None:
        return legal
    if not refused:
        operations = sorted({name for kernel in registry for name in kernel.spec.operations})
        raise NoKernelAvailableError(
            f"no kernel is registered for {context.operation!r}; "
            f"operations with kernels: {', '.join(operations) or 'none'}"
        )
    raise NoKernelAvailableError(f"no kernel accepts this call: {context.to_dict()}", refused)
