"""What the runtime selects in a process that has one table alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.plan import ExecutionPlan
from layerzero_runtime.registry import Registry
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.table_files import TABLES_VARIABLE
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.form import TableForm
from layerzero_tune.compile.judge import Choice
from layerzero_tune.identity import choice_of


def plans_of(form: TableForm, contexts: Iterable[SelectionContext]) -> Mapping[SelectionContext, ExecutionPlan]:
    """By context the plan on the table's device: the table's, or on a miss the live selector's."""
    device = DeviceSpec.from_dict(form.device)
    with TemporaryDirectory() as folder, _tables_in(folder):
        emit(form).write(Path(folder))
        snapshot = Snapshot(Registry(builtin_kernels()), CounterGroup())
        return {context: snapshot.select(context.with_device(device)) for context in contexts}


@contextmanager
def _tables_in(folder: str) -> Iterator[None]:
    """Tables are looked for in this folder first."""
    before = os.environ.get(TABLES_VARIABLE)
    os.environ[TABLES_VARIABLE] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[TABLES_VARIABLE]
        else:
            os.environ[TABLES_VARIABLE] = before


def choice_in(plan: ExecutionPlan) -> Choice:
    """What results know the plan by."""
    return choice_of(plan.kernel_id, plan.configuration)
