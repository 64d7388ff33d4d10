"""What the commands print: tables and progress for people, JSON for machines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from layerzero_runtime.errors import ResultsError
from layerzero_tune.results.atomic import write_atomically
from layerzero_tune.workload.lines import WorkloadLine, format_workload

# Wide enough for the widest table, where no terminal says how wide it is (a pipe, a log of CI).
_LOG_COLUMNS = 132


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _LOG_COLUMNS
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


# Names and messages are printed as they are: brackets and colons in them are no markup.
console = _console(stderr=False)
# Progress and notes go beside the output, so that --json can be piped.
notes = _console(stderr=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose columns of numbers, all but the first, are right-aligned where every cell begins like a number."""
    cells = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(row[index].lstrip("+-")[:1].isdigit() or row[index] in ("", "-") for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console.print(table)
    console.print()


def progress_bar() -> Progress:
    """Progress on standard error: what is under way, how many of how many, time spent and left."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=notes,
        refresh_per_second=2,  # drawing takes processor time from what is measured
    )


def write_workload(lines: Sequence[WorkloadLine], path: Path, option: str) -> None:
    """Write a workload file; `option` is how the command line named it.

    Raises:
        ResultsError: the file cannot be written.
    """
    try:
        write_atomically(path, format_workload(lines).encode())
    except OSError as error:
        reason = error.strerror or error
        raise ResultsError(f"cannot write {path}: {reason}; choose another file with {option}") from error


def duration_text(seconds: float) -> str:
    """A time as `--budget` takes it: 45s, 9m30s, 1h05m."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"


def shape_text(context: Any) -> str:
    """The sizes of a context in a few words."""
    if context.out_features is not None:
        return f"{context.rows}x{context.in_features}x{context.out_features}"
    if context.rows is not None:
        return f"{context.rows}x{context.hidden_size}"
    heads = f"{context.num_heads}/{context.num_kv_heads}x{context.head_dim}"
    return f"b{context.batch_size} h{heads} q{context.seq_len_q} k{context.seq_len_k}"
