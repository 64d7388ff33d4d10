"""`Table`: a generated lookup module, loaded and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import LayerZeroError, TableError
from layerzero_runtime.operation import Operation, StaticKey
from layerzero_runtime.selection.limits import Kind, Limit

SCHEMA_VERSION = 1
MISS = -1


@dataclass(frozen=True, slots=True)
class TableStep:
    """One plan of a leaf and the limits that a call must satisfy to get it."""

    kernel_id: str
    configuration: Mapping[str, Any]
    guards: tuple[Limit, ...]

    def accepts(self, context: SelectionContext) -> bool:
        return all(limit.reject(context) is None for limit in self.guards)


class TableEntry:
    """What a table holds for one static key: a decision function over the sizes, and each leaf's chain of plans.

    The chains are made out of the module's literals when they are first asked for: of a table with thousands of leaves
    a process uses those of a few static keys.
    """

    __slots__ = ("_leaves", "_literals", "_place", "_plans", "decide")

    def __init__(
        self, decide: Callable[..., int], literals: tuple[Any, ...], plans: tuple[Any, ...], place: tuple[Any, ...]
    ) -> None:
        self.decide = decide
        self._literals = literals
        self._plans = plans
        self._place = place
        self._leaves: tuple[tuple[TableStep, ...], ...] | None = None

    @property
    def leaves(self) -> tuple[tuple[TableStep, ...], ...]:
        """By number, best plan first.

        Raises:
            TableError: they are not what the compiler writes.
        """
        leaves = self._leaves
        if leaves is None:
            # Threads that meet here make equal ones.
            leaves = self._leaves = self._made()
        return leaves

    def _made(self) -> tuple[tuple[TableStep, ...], ...]:
        # Most leaves share their chain with others.
        chains: dict[Any, tuple[TableStep, ...]] = {}
        try:
            for chain in self._literals:
                if chain not in chains:
                    chains[chain] = tuple(_step(self._plans, plan, guards) for plan, guards in chain)
            if not chains:
                raise ValueError("no leaves")
        except (TypeError, ValueError, LookupError, LayerZeroError) as error:
            name, operation, static_key = self._place
            raise TableError(
                f"{name}: not a generated table: {error}, in the entry of {operation} {static_key}; "
                "compile the results again"
            ) from error
        return tuple(chains[chain] for chain in self._literals)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of one device.

    Attributes:
        name: the module's name, or its folder's where it was given by path.
        path: the module's file, beside which the evidence lies; None if it has none.
        kernels: for each kernel id, what its entries were measured with: library, the version digits that matter, and a
            hash of the kernel's source.
        entries: by operation and static key.
    """

    name: str
    path: str | None
    device: DeviceSpec
    provenance: Mapping[str, Any]
    kernels: Mapping[str, Mapping[str, str]]
    entries: Mapping[str, Mapping[StaticKey, TableEntry]]

    def find(self, operation: Operation, context: SelectionContext) -> tuple[TableEntry | None, int]:
        """The entry of the context's static key and its leaf; (None, MISS) without one, leaf MISS outside its range."""
        entry = self.entries.get(operation.name, {}).get(operation.static_key(context))
        if entry is None:
            return None, MISS
        return entry, entry.decide(*operation.sizes(context))

    def check(self) -> None:
        """Make all leaves now.

        Raises:
            TableError: an entry is not what the compiler writes.
        """
        for by_key in self.entries.values():
            for entry in by_key.values():
                _ = entry.leaves


def load_table(module: ModuleType) -> Table:
    """The table that a generated module holds; the leaves of its entries are made, and checked, at first use.

    Raises:
        TableError: the module was generated for another schema, or is not a generated table.
    """
    name = getattr(module, "__file__", None) or module.__name__
    schema = getattr(module, "SCHEMA", None)
    if schema != SCHEMA_VERSION:
        raise TableError(
            f"{name}: table schema is {schema!r}, this runtime reads {SCHEMA_VERSION}; "
            "compile the results again with this version's layerzero-tune compile"
        )
    try:
        plans = module.PLANS
        entries = {
            operation: {
                key: TableEntry(decide, leaves, plans, (name, operation, key))
                for key, (decide, leaves) in by_key.items()
            }
            for operation, by_key in module.ENTRIES.items()
        }
        return Table(
            name=module.__name__,
            path=getattr(module, "__file__", None),
            device=DeviceSpec.from_dict(module.DEVICE),
            provenance=module.PROVENANCE,
            kernels={kernel_id: _identity(identity) for kernel_id, identity in module.KERNELS.items()},
            entries=entries,
        )
    except (AttributeError, TypeError, ValueError, LookupError, LayerZeroError) as error:
        raise TableError(f"{name}: not a generated table: {error}; compile the results again") from error


def _identity(identity: Mapping[str, str]) -> dict[str, str]:
    return {name: identity[name] for name in ("library", "version", "source")}


def _guard(field: str, kind: Kind, bound: Any) -> Limit:
    if not hasattr(SelectionContext, field):
        raise TableError(f"{field!r} is no field of a context")
    return Limit(field, kind, bound)


def _step(plans: tuple[Any, ...], plan: int, guards: tuple[Any, ...]) -> TableStep:
    kernel_id, configuration = plans[plan]
    return TableStep(kernel_id, configuration, tuple(_guard(*guard) for guard in guards))
