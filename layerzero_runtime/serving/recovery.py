"""After a kernel has raised: whether another one may serve the call, and what becomes of the one that failed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from layerzero_runtime import ranks
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import log_warning
from layerzero_runtime.errors import (
    ContextError,
    ContextTypeError,
    KernelExecutionError,
    LayerZeroError,
    NoKernelAvailableError,
)
from layerzero_runtime.selection.live_selector import Choice
from layerzero_runtime.serving.execution import is_capturing

if TYPE_CHECKING:
    from layerzero_runtime.operation import Operation
    from layerzero_runtime.snapshot import Snapshot

# What CUDA reports when the context of the process is lost: nothing runs on that device any more, whatever one calls.
_STICKY = (
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "illegal address",
    "misaligned address",
    "unspecified launch failure",
    "ecc uncorrectable",
    "uncorrectable ecc",
    "uncorrectable nvlink",
    "context is destroyed",
    "invalid program counter",
    "global/shared address space",
    "hardware stack error",
    "launch timed out",
    "gpu has fallen off",
    "unknown error",
)
# What the allocators of GPUs and CPUs say.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
# Errors about the arguments of the call: no kernel is at fault.
_OF_THE_CALLER = (ContextError, ContextTypeError, NoKernelAvailableError)


class FailedInstead(Exception):  # noqa: N818 - never reaches a caller
    """A kernel raised that served in place of a half-open one. `without` are those that are not to be tried now."""

    def __init__(self, choice: Choice, without: Collection[str], error: Exception) -> None:
        super().__init__(choice, without, error)
        self.choice = choice
        self.without = without
        self.error = error


def is_sticky(error: BaseException) -> bool:
    """Whether a CUDA error has voided the process's context on its device."""
    text = str(error).lower()
    return "cuda" in text and any(words in text for words in _STICKY)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator had nothing left."""
    return isinstance(error, MemoryError) or says_out_of_memory(str(error))


def says_out_of_memory(text: str) -> bool:
    """Whether these are an allocator's words for that."""
    return any(words in text.lower() for words in _OUT_OF_MEMORY)


def recover(
    snapshot: Snapshot,
    operation: Operation,
    arguments: tuple[Any, ...],
    features: Mapping[str, Any],
    error: Exception,
) -> Any:
    """Serve the call by the next best kernel and trip the breaker of the one that raised; or raise.

    One retry: where the second kernel raises as well, the fault lies with the call or the machine, its error is the
    caller's and no breaker trips. The default's own error is the caller's at once, unless memory ran out: other kernels
    check less of what they are given.

    Raises:
        KernelExecutionError: the error is sticky, or ranks are attached, so that none may switch alone.
        Exception: `error` itself under capture of a CUDA graph, where it is the caller's own, or where no other kernel
            may serve; or what the second kernel raised.
    """
    instead = error if isinstance(error, FailedInstead) else None
    if instead is not None:
        error = instead.error
    if isinstance(error, _OF_THE_CALLER):
        raise error
    context = operation.describe(*arguments, **features)
    failed = _kernel_of(snapshot, operation, context) if instead is None else instead.choice
    without = {failed.kernel.kernel_id, *(() if instead is None else instead.without)}
    if is_sticky(error):
        raise KernelExecutionError(
            f"{failed.kernel.kernel_id} or a kernel before it left the device unusable ({_brief(error)}) "
            f"at {context.to_dict()}, device {context.device}; no retry is possible in this process: restart it"
        ) from error
    is_default = failed.kernel.kernel_id == operation.default_kernel
    if is_default and not _is_of_the_machine(error):
        raise error
    if ranks.attached():
        raise KernelExecutionError(
            f"{failed.kernel.kernel_id} failed ({_brief(error)}) at {context.to_dict()}; ranks are attached, so it is "
            "not replaced on this one alone: deny the kernel in the policy of every rank, or fix it"
        ) from error
    if is_capturing():
        raise error
    try:
        second = snapshot.choose(operation, context, without=without, to_run=True).choice
    except NoKernelAvailableError:
        raise error from None
    try:
        result = snapshot.serve(second, operation, context, arguments, without)
    except (LayerZeroError, FailedInstead):
        raise error from None
    except Exception as second_error:  # noqa: BLE001 - one of both is raised
        raise (error if is_default else second_error) from None
    snapshot.counters.raise_by_one("fallbacks")
    log_warning(
        f"{failed.kernel.kernel_id} failed at {context.to_dict()}: {_brief(error)}; {second.kernel.kernel_id} serves, "
        "the failed kernel is tried again later"
    )
    snapshot.health.failed(failed.kernel.kernel_id, _brief(error))
    return result


def _kernel_of(snapshot: Snapshot, operation: Operation, context: SelectionContext) -> Choice:
    """The kernel that the snapshot selects for the call: the one that raised."""
    return snapshot.choose(operation, context, to_run=True).choice


def _is_of_the_machine(error: Exception) -> bool:
    """Whether an error has nothing to do with what the call asks for: no memory, a library missing or broken."""
    return isinstance(error, ImportError | KernelExecutionError) or is_out_of_memory(error)


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
