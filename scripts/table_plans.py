"""What the runtime selects in a process that has one table alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.plan import ExecutionPlan
from layerzero_runtime.tables.table_files import load_table_file
from layerzero_tune.compile.emit import emit
from layerzero_tune.compile.form import TableForm
from layerzero_tune.compile.judge import Choice
from layerzero_tune.evaluate.one_table import snapshot_of
from layerzero_tune.identity import choice_of


def plans_of(form: TableForm, contexts: Iterable[SelectionContext]) -> Mapping[SelectionContext, ExecutionPlan]:
    """By context the plan on the table's device: the table's, or on a miss the live selector's."""
    device = DeviceSpec.from_dict(form.device)
    with TemporaryDirectory() as folder:
        path = emit(form).write(Path(folder))
        snapshot = snapshot_of(load_table_file(path / "__init__.py"))
        return {context: snapshot.select(context.with_device(device)) for context in contexts}


def choice_in(plan: ExecutionPlan) -> Choice:
    """What results know the plan by."""
    return choice_of(plan.kernel_id, plan.configuration)
