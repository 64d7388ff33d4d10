"""What the commands print: tables and progress for people, JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False)
# Progress and notes go beside the output, so that --json can be piped.
notes = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose columns of numbers, all but the first, are right-aligned where every cell begins like a number."""
    cells = [list(row) for row in rows]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(row[index][:1].isdigit() or row[index] in ("", "-") for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console.print(table)
    console.print()


def progress_bar() -> Progress:
    """Progress on standard error: what is under way, how many of how many, time spent and left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=notes,
    )


def shape_text(context: Any) -> str:
    """The sizes of a context in a few words."""
    if context.rows is not None:
        return f"{context.rows}x{context.hidden_size}"
    heads = f"{context.num_heads}/{context.num_kv_heads}x{context.head_dim}"
    return f"b{context.batch_size} h{heads} q{context.seq_len_q} k{context.seq_len_k}"
