"""Calls of libraries that compile a kernel when a size first comes, and that launch on the current device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import log_warning
from layerzero_runtime.kernel import KernelFunction
from layerzero_runtime.serving.execution import is_capturing

if TYPE_CHECKING:
    from torch import Tensor

# Bytes that one instruction moves at most, and that addresses have to be a multiple of for it.
VECTOR_BYTES = 16

_warned = False


def guarded(
    kernel_id: str, call: KernelFunction, form: Callable[..., Hashable], context: SelectionContext
) -> KernelFunction:
    """A library's function as one for all sizes and for every device of the context's product.

    What it has not compiled yet it compiles in the call, except under capture of a CUDA graph: there such a call goes
    to the operation's default, counted as `not_compiled_in_capture` and logged once.

    Args:
        call: takes the operation's arguments, of which the first is a tensor.
        form: of the same arguments, what the library compiles a kernel for.
    """
    import torch

    default = _default_function(context)
    compiled: set[tuple[int, Hashable]] = set()

    def run(*arguments: Any) -> Any:
        index = arguments[0].get_device()
        key = (index, form(*arguments))
        if key not in compiled:
            if is_capturing():
                _warn_of_capture(kernel_id, context)
                return default(*arguments)
            result = launch(index, arguments)
            compiled.add(key)
            return result
        return launch(index, arguments)

    def launch(index: int, arguments: tuple[Any, ...]) -> Any:
        if index < 0 or index == torch._C._cuda_getDevice():
            return call(*arguments)
        with torch.cuda.device(index):
            return call(*arguments)

    return run


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its address is no multiple of `VECTOR_BYTES`."""
    return tensor.clone() if tensor.data_ptr() % VECTOR_BYTES else tensor


def is_aligned(*tensors: Tensor | None) -> bool:
    """Whether all addresses are multiples of `VECTOR_BYTES`, of which Triton's compiler makes use."""
    return not any(tensor.data_ptr() % VECTOR_BYTES for tensor in tensors if tensor is not None)


def _default_function(context: SelectionContext) -> KernelFunction:
    from layerzero_runtime.kernels import builtin_kernels
    from layerzero_runtime.operations import operation_named

    wanted = operation_named(context.operation).default_kernel
    (default,) = (kernel for kernel in builtin_kernels() if kernel.kernel_id == wanted)
    return default.load(context, {})


def _warn_of_capture(kernel_id: str, context: SelectionContext) -> None:
    global _warned
    from layerzero_runtime.dispatch import count

    count("not_compiled_in_capture")
    if not _warned:
        _warned = True
        log_warning(
            f"{kernel_id} has compiled nothing yet for a call that is captured into a CUDA graph, so the default of "
            f"{context.operation} was captured; give warmup a context with the call's sizes before the capture"
        )
