"""The tables of a process: found and loaded once for each device, and what is known of their staleness."""

from __future__ import annotations

import threading

from layerzero_runtime.counters import CounterGroup, log_warning
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import TableError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.registry import Registry
from layerzero_runtime.tables.prior import NearestBuckets
from layerzero_runtime.tables.staleness import stale_message, stale_reason
from layerzero_runtime.tables.table import Table, TableEntry
from layerzero_runtime.tables.table_files import find_alike, find_table


class TableSet:
    """Tables by device. What threads find out together is counted and logged once."""

    def __init__(self, counters: CounterGroup) -> None:
        self._counters = counters
        self._lock = threading.Lock()
        self._tables: dict[DeviceSpec, Table | None] = {}
        self._alike: dict[DeviceSpec, tuple[Table, ...]] = {}
        self._nearest: dict[str, NearestBuckets] = {}
        self._damaged: set[TableEntry] = set()
        # By table and kernel id, why entries are stale, None if they are not. The kernel that was judged stands beside
        # it: another may be registered under its id later.
        self._judged: dict[tuple[str, str], tuple[Kernel | None, str | None]] = {}

    def of(self, device: DeviceSpec) -> Table | None:
        """The table of the device, None without one; tables that cannot be used are counted and logged."""
        if device not in self._tables:
            with self._lock:
                if device not in self._tables:
                    table, skipped = find_table(device)
                    for error in skipped:
                        self._counters.raise_by_one("tables_skipped")
                        log_warning(f"a table was skipped: {error}")
                    self._tables[device] = table
        return self._tables[device]

    def alike(self, device: DeviceSpec) -> tuple[Table, ...]:
        """The table that serves the device, then others of it, then approximately matching ones, nearest first."""
        if device not in self._alike:
            own = self.of(device)
            with self._lock:
                if device not in self._alike:
                    others = (table for table in find_alike(device) if own is None or table.path != own.path)
                    self._alike[device] = (*(() if own is None else (own,)), *others)
        return self._alike[device]

    def nearest(self, table: Table) -> NearestBuckets:
        found = self._nearest.get(table.name)
        return self._nearest.setdefault(table.name, NearestBuckets(table)) if found is None else found

    def is_damaged(self, entry: TableEntry) -> bool:
        """Whether an entry cannot be read, so that its calls are misses; found out at its first use."""
        if entry in self._damaged:
            return True
        try:
            _ = entry.leaves
            return False
        except TableError as error:
            with self._lock:
                if entry not in self._damaged:
                    self._damaged.add(entry)
                    self._counters.raise_by_one("entries_damaged")
                    log_warning(f"a table's entry is not used: {error}")
            return True

    def current_kernel(self, table: Table, kernel_id: str, registry: Registry) -> Kernel | None:
        """The kernel that is registered under an id, None where a table's entries of it are stale."""
        kernel = registry.get(kernel_id)
        judged = self._judged.get((table.name, kernel_id))
        if judged is None or judged[0] is not kernel:
            with self._lock:
                judged = self._judge(table, kernel_id, registry)
        return kernel if judged[1] is None else None

    def _judge(self, table: Table, kernel_id: str, registry: Registry) -> tuple[Kernel | None, str | None]:
        """Judge a kernel, and if it is stale all others of the table, so that one line tells of all stale entries."""
        stale: dict[str, str] = {}
        for name in (kernel_id, *table.kernels):
            kernel = registry.get(name)
            judged = self._judged.get((table.name, name))
            if judged is None or judged[0] is not kernel:
                reason = stale_reason(table, name, kernel)
                self._judged[(table.name, name)] = (kernel, reason)
                if reason is not None:
                    stale[name] = reason
            if not stale:
                break
        for _ in stale:
            self._counters.raise_by_one("stale_kernels")
        if stale:
            log_warning(stale_message(table, stale))
        return self._judged[(table.name, kernel_id)]
