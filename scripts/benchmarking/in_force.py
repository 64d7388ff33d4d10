"""What is put in force while a benchmark runs: the shipped table, other kernels, kernels that do nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from layerzero_runtime import dispatch
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import FunctionLoader, Kernel
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.registry import Registry
from layerzero_runtime.tables.table import Table, load_table
from layerzero_runtime.tables.table_set import TableSet


class _StandIn(TableSet):
    """A table as if it had been measured on this machine, so that there are hits to time."""

    def __init__(self, table: Table) -> None:
        super().__init__(dispatch._counters)
        self._table = table

    def of(self, device: DeviceSpec) -> Table | None:
        return self._table if device.platform == self._table.device.platform else None

    def alike(self, device: DeviceSpec) -> tuple[Table, ...]:
        return ()

    def current_kernel(self, table: Table, kernel_id: str, registry: Registry) -> Kernel | None:
        return registry.get(kernel_id)


def shipped_table() -> Table:
    """The first of the tables in this repository, by name."""
    package = import_module("layerzero_tables")
    name = min(module.name for module in iter_modules(package.__path__) if module.ispkg)
    return load_table(import_module(f"layerzero_tables.{name}"))


def put_in_force(table: Table) -> None:
    """From now on this table answers for the CPU, whichever it is."""
    dispatch._publish(lambda sources: replace(sources, tables=_StandIn(table)))


@contextmanager
def in_force(*kernels: Kernel, builtin: bool = True) -> Iterator[None]:
    """These kernels registered, beside the built-in ones or in place of them."""
    registered = (*builtin_kernels(), *kernels) if builtin else kernels
    dispatch._publish(lambda sources: replace(sources, registry=Registry(registered)))
    try:
        yield
    finally:
        dispatch._publish(lambda sources: replace(sources, registry=Registry(builtin_kernels())))


def _attention(query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, scale: float | None) -> Any:
    return query


def _rms(x: Any, weight: Any, eps: float, offset: float) -> Any:
    return x


def _add_rms(x: Any, residual: Any, weight: Any, eps: float) -> Any:
    return x, residual


def _layer(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return x


def _gated(gate: Any, up: Any) -> Any:
    return gate


# For each operation whose dispatch is timed a kernel that gives its arguments back.
IDLE_KERNELS: dict[str, Callable[..., Any]] = {
    "attention.causal": _attention,
    "attention.full": _attention,
    "attention.cross": _attention,
    "norm.rms": _rms,
    "norm.add_rms": _add_rms,
    "norm.layer": _layer,
    "mlp.swiglu": _gated,
    "mlp.geglu": _gated,
}


@contextmanager
def without_kernels(left_out: Collection[str] = ()) -> Iterator[None]:
    """Each built-in kernel of these operations, under its name and with its limits, gives its first arguments back:
    what is left of a call is its dispatch. Where a kernel is left out, its entries give way to the next plan."""
    idle = (
        Kernel(
            replace(kernel.spec, compiles=False, requires=()), FunctionLoader(IDLE_KERNELS[kernel.spec.operations[0]])
        )
        for kernel in builtin_kernels()
        if kernel.kernel_id not in left_out and kernel.spec.operations[0] in IDLE_KERNELS
    )
    with in_force(*idle, builtin=False):
        yield
