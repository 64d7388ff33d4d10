"""`layerzero-tune diff`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from layerzero_tune.command_line.options import JsonOption, KernelsOption, split_list
from layerzero_tune.command_line.output import console, notes, print_json, print_table
from layerzero_tune.diff.comparison import compare
from layerzero_tune.diff.document import Section, devices_section, document_of
from layerzero_tune.diff.markdown import markdown_of
from layerzero_tune.diff.reading import paired, read_sides
from layerzero_tune.diff.record import record_of
from layerzero_tune.diff.shapes import measured_shapes, shapes_of_workload
from layerzero_tune.worker.kernels import load_kernels
from layerzero_tune.workload.lines import read_workload


def diff_command(
    old: Annotated[Path, typer.Argument(help="Results, the folder of a device's table, or a folder of such folders.")],
    new: Annotated[Path, typer.Argument(help="The same, of what is to take its place.")],
    workload: Annotated[
        Path | None,
        typer.Option("--workload", help="Calls and weights that count; else each measured shape does, once."),
    ] = None,
    kernels: KernelsOption = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    json: JsonOption = False,
) -> None:
    """Say what changed between two tables, or between the tables of two results, and how much faster or slower the new
    one is predicted to be."""
    if markdown and json:
        raise typer.BadParameter("--markdown and --json exclude each other")
    weighted = None if workload is None else shapes_of_workload(read_workload(workload))
    known = load_kernels(split_list(kernels))
    with notes.status("reading and judging both sides"):
        pairs = paired(read_sides(old, known), read_sides(new, known))
        comparisons = [
            compare(*sides, measured_shapes(sides) if weighted is None else weighted) for sides in pairs.compared
        ]
    if json:
        print_json(
            {
                "compared": [record_of(comparison) for comparison in comparisons],
                "removed": [side.device.to_dict() for side in pairs.removed],
                "added": [side.device.to_dict() for side in pairs.added],
            }
        )
        return
    weighing = "each measured shape counts once" if workload is None else f"of {workload}, with its weights"
    sections = [*devices_section(pairs), *(part for found in comparisons for part in document_of(found, weighing))]
    if markdown:
        print(markdown_of(sections), end="")
    else:
        _print(sections)


def _print(sections: Sequence[Section]) -> None:
    for section in sections:
        console.print(section.title, style="bold")
        for paragraph in section.text:
            console.print(paragraph)
        if section.rows:
            print_table("", section.columns, section.rows)
        for group in section.groups:
            console.print(group.title, style="cyan", soft_wrap=True)
            for line in group.lines:
                console.print(f"  {line}", soft_wrap=True)
        if not section.rows:
            console.print()
