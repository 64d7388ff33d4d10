"""The kernels that a worker measures: the built-in ones and those of the modules that the user names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import SpecError
from layerzero_runtime.kernel import Configuration, Kernel, KernelFunction, Loader
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import operation_named
from layerzero_tune.evaluate.public_calls import PUBLIC_CALL
from layerzero_tune.identity import canonical_json


def load_kernels(modules: Iterable[str] = ()) -> dict[str, Kernel]:
    """Kernels by id; each of `modules` has an attribute `KERNELS: tuple[Kernel, ...]`.

    Raises:
        SpecError: a module cannot be imported or has no such attribute, or two kernels share an id.
    """
    kernels: dict[str, Kernel] = {}
    origins = [("layerzero_runtime.kernels", builtin_kernels())]
    origins += [(module, _kernels_of(module)) for module in modules]
    for origin, found in origins:
        for kernel in found:
            if kernel.kernel_id in kernels:
                raise SpecError(f"{origin} declares kernel {kernel.kernel_id!r} again; give one of the two another id")
            kernels[kernel.kernel_id] = kernel
    return kernels


def with_loads_remembered(kernels: Mapping[str, Kernel]) -> dict[str, Kernel]:
    """The same kernels, each loaded once per combination of static features: a load may compile for seconds, and relies
    on nothing else. The public call is loaded anew each time: its load prepares what serves the sizes of the context.
    """
    return {
        kernel_id: kernel if kernel_id == PUBLIC_CALL else replace(kernel, load=_remembered(kernel.load))
        for kernel_id, kernel in kernels.items()
    }


def _remembered(load: Loader) -> Loader:
    functions: dict[tuple[Any, ...], KernelFunction] = {}

    def remembered(context: SelectionContext, configuration: Configuration) -> KernelFunction:
        static_key = operation_named(context.operation).static_key(context)
        key = (context.operation, static_key, canonical_json(dict(configuration)))
        if key not in functions:
            functions[key] = load(context, configuration)
        return functions[key]

    return remembered


def _kernels_of(module: str) -> tuple[Kernel, ...]:
    if "" not in sys.path:
        sys.path.insert(0, "")  # as with `python -m`: a module in the current folder, which a console script leaves out
    try:
        found = getattr(importlib.import_module(module), "KERNELS", None)
    except Exception as error:
        raise SpecError(f"module {module!r} of kernels cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, tuple) or not all(isinstance(kernel, Kernel) for kernel in found):
        raise SpecError(f"module {module!r} has no KERNELS; required: KERNELS = (Kernel(...), ...)")
    return found
