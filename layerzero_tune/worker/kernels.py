"""The kernels that a worker measures: the built-in ones and those of the modules that the user names."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from layerzero_runtime.errors import SpecError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.kernels import builtin_kernels


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


def _kernels_of(module: str) -> tuple[Kernel, ...]:
    try:
        found = getattr(importlib.import_module(module), "KERNELS", None)
    except Exception as error:
        raise SpecError(f"module {module!r} of kernels cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, tuple) or not all(isinstance(kernel, Kernel) for kernel in found):
        raise SpecError(f"module {module!r} has no KERNELS; required: KERNELS = (Kernel(...), ...)")
    return found
