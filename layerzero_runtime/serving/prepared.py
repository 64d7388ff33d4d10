"""Prepared kernels: loaded once for the static features of a call, whatever the snapshot, and checked at first use."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import KernelExecutionError, KernelOutputError
from layerzero_runtime.kernel import Kernel, KernelFunction
from layerzero_runtime.libraries import missing_requirement
from layerzero_runtime.operation import Operation
from layerzero_runtime.selection.transforms import apply_transforms

# A static key holds whatever is unusual of a call, such as its scale: there may be more than a process should keep.
MAX_PREPARED = 4096


class PreparedKernel:
    """A loaded kernel. `function` takes and gives tensors in the form of its context; `proven` says that a call through
    `run` has given results of the right form."""

    __slots__ = ("_operation", "function", "kernel", "proven")

    def __init__(self, kernel: Kernel, function: KernelFunction, operation: Operation) -> None:
        self.kernel = kernel
        self.function = function
        self._operation = operation
        self.proven = False

    def run(self, context: SelectionContext, arguments: tuple[Any, ...]) -> Any:
        """Call the kernel; the results of its first call are checked.

        Raises:
            KernelOutputError: they have another shape or dtype than the call asks for.
        """
        result = self.function(*arguments)
        if not self.proven:
            self._check(context, arguments, result)
            self.proven = True
        return result

    def _check(self, context: SelectionContext, arguments: tuple[Any, ...], result: Any) -> None:
        from layerzero_runtime.accuracy import output_fault

        outputs = result if isinstance(result, tuple | list) else (result,)
        shapes = self._operation.outputs(context)
        if context.rows is not None:
            # The leading dimensions of rows are the input's.
            shapes = tuple((*arguments[0].shape[:-1], shape[-1]) for shape in shapes)
        # Beside a weight of another dtype torch's own functions differ in what they give.
        dtype = context.output_dtype if context.mixed_weight_dtype is None else None
        fault = output_fault(outputs, shapes, dtype)
        if fault is not None:
            raise KernelOutputError(f"{self.kernel.kernel_id} {fault}, at {context.to_dict()}")


class PreparedKernels:
    """The prepared kernels of a process, shared by its snapshots: a new policy costs no compilation."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prepared: dict[tuple[Any, ...], PreparedKernel] = {}
        self._loading: dict[tuple[Any, ...], threading.Lock] = {}

    def prepare(
        self,
        kernel: Kernel,
        configuration: Mapping[str, Any],
        operation: Operation,
        context: SelectionContext,
        *,
        densify: bool = False,
    ) -> PreparedKernel:
        """The kernel for the context's static features.

        Raises:
            KernelExecutionError: its library is missing, or loading it failed.
        """
        key = _key(kernel, configuration, operation, context, densify)
        found = self._prepared.get(key)
        if found is not None:
            return found
        with self._lock:
            loading = self._loading.setdefault(key, threading.Lock())
        # One thread loads it while others wait for that; those that want another kernel do not, nor does what the
        # loader itself calls.
        with loading:
            found = self._prepared.get(key)
            if found is not None:
                return found
            try:
                found = PreparedKernel(kernel, _load(kernel, configuration, context, densify), operation)
                with self._lock:
                    if len(self._prepared) >= MAX_PREPARED:
                        del self._prepared[next(iter(self._prepared))]
                    self._prepared[key] = found
            finally:
                with self._lock:
                    self._loading.pop(key, None)
        return found

    def is_proven(
        self,
        kernel: Kernel,
        configuration: Mapping[str, Any],
        operation: Operation,
        context: SelectionContext,
        *,
        densify: bool = False,
    ) -> bool:
        """Whether the kernel is loaded for the context's static features and has served a call."""
        found = self._prepared.get(_key(kernel, configuration, operation, context, densify))
        return found is not None and found.proven

    def forget(self, kernel: Kernel) -> None:
        """Let go of a kernel that was unregistered."""
        with self._lock:
            for key in [key for key, held in self._prepared.items() if held.kernel is kernel]:
                del self._prepared[key]


def _key(
    kernel: Kernel, configuration: Mapping[str, Any], operation: Operation, context: SelectionContext, densify: bool
) -> tuple[Any, ...]:
    # A configuration may hold lists, and 1 and True are one key; their texts are neither unhashable nor equal.
    configured = repr(sorted(configuration.items()))
    # The kernel itself counts, not its name: another may be registered under the same one later.
    return (id(kernel), configured, context.device, operation.name, operation.static_key(context), densify)


def _load(kernel: Kernel, configuration: Mapping[str, Any], context: SelectionContext, densify: bool) -> KernelFunction:
    missing = missing_requirement(kernel.spec.requires)
    if missing is not None:
        raise KernelExecutionError(f"{kernel.kernel_id} cannot be loaded: {missing}")
    try:
        return apply_transforms(kernel.load(context, configuration), kernel.spec, context, densify=densify)
    except Exception as error:
        raise KernelExecutionError(f"{kernel.kernel_id} failed to load: {type(error).__name__}: {error}") from error
