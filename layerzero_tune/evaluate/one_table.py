"""What the runtime selects where a table is alone: others that are installed would lend it their buckets on a miss."""

from __future__ import annotations

from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.registry import Registry
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.table import Table
from layerzero_runtime.tables.table_set import TableSet


class OneTable(TableSet):
    """The tables of a process that has this one, for the device that it is of."""

    def __init__(self, counters: CounterGroup, table: Table) -> None:
        super().__init__(counters)
        self._table = table

    def of(self, device: DeviceSpec) -> Table | None:
        return self._table

    def alike(self, device: DeviceSpec) -> tuple[Table, ...]:
        return (self._table,)


def snapshot_of(table: Table) -> Snapshot:
    """A snapshot of the built-in kernels and the table."""
    counters = CounterGroup()
    return Snapshot(Registry(builtin_kernels()), counters, tables=OneTable(counters, table))
