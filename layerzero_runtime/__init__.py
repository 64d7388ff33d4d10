"""LayerZero's runtime: which kernel, with which configuration, for this call.

Importing this package imports nothing; each public name is loaded when it is first used. `attention`, `rms_norm` and
the other operations import torch; `select`, `explain` and `stats` do not.
"""

from __future__ import annotations

from importlib import import_module

# Not typing's constant: importing typing costs more than the rest of this module. Type checkers know the name.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from layerzero_runtime.calls.attention import attention
    from layerzero_runtime.calls.bound import bind
    from layerzero_runtime.calls.linear import linear_fp8, linear_int8
    from layerzero_runtime.calls.mlp import geglu, swiglu
    from layerzero_runtime.calls.norm import add_rms_norm, layer_norm, rms_norm
    from layerzero_runtime.context import SelectionContext
    from layerzero_runtime.device import DeviceSpec
    from layerzero_runtime.dispatch import (
        record_workload,
        register_kernel,
        register_kernels,
        select,
        select_batch,
        set_policy,
        stats,
        unregister_kernel,
        verify_results,
    )
    from layerzero_runtime.errors import (
        KernelExecutionError,
        LayerZeroError,
        NoKernelAvailableError,
        PolicyLoadError,
        QueueFullError,
        RanksDifferError,
        ResultsError,
        TableError,
    )
    from layerzero_runtime.explanation import explain
    from layerzero_runtime.kernel import KernelSpec
    from layerzero_runtime.plan import ExecutionPlan
    from layerzero_runtime.policies.policy import Policy
    from layerzero_runtime.selection.selection_queue import select_async
    from layerzero_runtime.serving.execution import execution_mode, preparation
    from layerzero_runtime.serving.warmup import warmup
    from layerzero_runtime.snapshot import Snapshot

__version__ = "0.1.0"

_MODULES = {
    "attention": "calls.attention",
    "bind": "calls.bound",
    "linear_fp8": "calls.linear",
    "linear_int8": "calls.linear",
    "geglu": "calls.mlp",
    "swiglu": "calls.mlp",
    "add_rms_norm": "calls.norm",
    "layer_norm": "calls.norm",
    "rms_norm": "calls.norm",
    "SelectionContext": "context",
    "DeviceSpec": "device",
    "record_workload": "dispatch",
    "register_kernel": "dispatch",
    "register_kernels": "dispatch",
    "select": "dispatch",
    "select_batch": "dispatch",
    "set_policy": "dispatch",
    "stats": "dispatch",
    "unregister_kernel": "dispatch",
    "verify_results": "dispatch",
    "KernelExecutionError": "errors",
    "LayerZeroError": "errors",
    "NoKernelAvailableError": "errors",
    "PolicyLoadError": "errors",
    "QueueFullError": "errors",
    "RanksDifferError": "errors",
    "ResultsError": "errors",
    "TableError": "errors",
    "execution_mode": "serving.execution",
    "preparation": "serving.execution",
    "explain": "explanation",
    "KernelSpec": "kernel",
    "ExecutionPlan": "plan",
    "Policy": "policies.policy",
    "select_async": "selection.selection_queue",
    "Snapshot": "snapshot",
    "warmup": "serving.warmup",
}

__all__ = [
    "DeviceSpec",
    "ExecutionPlan",
    "KernelExecutionError",
    "KernelSpec",
    "LayerZeroError",
    "NoKernelAvailableError",
    "Policy",
    "PolicyLoadError",
    "QueueFullError",
    "RanksDifferError",
    "ResultsError",
    "SelectionContext",
    "Snapshot",
    "TableError",
    "add_rms_norm",
    "attention",
    "bind",
    "execution_mode",
    "explain",
    "geglu",
    "layer_norm",
    "linear_fp8",
    "linear_int8",
    "preparation",
    "record_workload",
    "register_kernel",
    "register_kernels",
    "rms_norm",
    "select",
    "select_async",
    "select_batch",
    "set_policy",
    "stats",
    "swiglu",
    "unregister_kernel",
    "verify_results",
    "warmup",
]


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
