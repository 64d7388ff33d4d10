"""`layerzero-tune merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerzero_runtime.errors import ResultsError
from layerzero_tune.command_line.options import JsonOption
from layerzero_tune.command_line.output import notes, print_json, print_table, shape_text
from layerzero_tune.results.merge import Conflict, MergedResults, merge_shards, write_merged
from layerzero_tune.results.store import Results, ResultsStore

MAX_SHOWN = 20


def merge_command(
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Folders of results of one device.")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the union; what it holds already counts as a further shard.")
    ],
    json: JsonOption = False,
) -> None:
    """Join results of one device that several machines or days measured.

    What several shards hold alike is kept once. Where they hold one contest with different times, the version that
    other processes disturbed less is kept (less than 5% of the processor time counts as undisturbed), then the earlier,
    always whole; the order of the shards changes nothing. Held-out measurements of evaluate stay out.
    """
    read = {str(shard): ResultsStore(shard).read() for shard in _each_once(shards)}
    held = ResultsStore(out).read() if out.exists() else Results((), ())
    own = next((str(shard) for shard in shards if shard.resolve() == out.resolve()), str(out))
    if held.rows:
        read.setdefault(own, held)
    merged = merge_shards({name: results.rows for name, results in read.items()})
    if merged.held_out.get(own):
        raise ResultsError(f"{out} holds held-out measurements of evaluate; choose another folder with --out")
    write_merged(merged.contests, out)
    if json:
        print_json(
            {
                "out": str(out),
                "device": merged.device.to_dict(),
                "shards": {
                    name: {"measurements": len(results.rows), "held_out_contests": merged.held_out[name]}
                    for name, results in read.items()
                },
                "contests": len(merged.contests),
                "measurements": merged.measurements,
                "shared_contests": merged.shared,
                "conflicts": [_conflict(conflict) for conflict in merged.conflicts],
                "quarantined": [str(path) for results in (*read.values(), held) for path in results.quarantined],
            }
        )
        return
    _print(merged, len(read), out)


def _each_once(shards: list[Path]) -> list[Path]:
    """The shards by the names that were given first."""
    folders: dict[Path, Path] = {}
    for shard in shards:
        folders.setdefault(shard.resolve(), shard)
    return list(folders.values())


def _print(merged: MergedResults, shards: int, out: Path) -> None:
    notes.print(
        f"{out}: {merged.measurements} measurements in {len(merged.contests)} contests of {merged.device.name} from "
        f"{shards} shards; next: layerzero-tune compile {out} --out TABLES",
        soft_wrap=True,
    )
    if merged.shared:
        notes.print(f"{merged.shared} contests are held by several shards alike, and kept once", soft_wrap=True)
    if held_out := sum(merged.held_out.values()):
        notes.print(f"{held_out} held-out contests of evaluate were left out", soft_wrap=True)
    if merged.conflicts:
        shown = merged.conflicts[:MAX_SHOWN]
        rest = len(merged.conflicts) - len(shown)
        print_table(
            f"{len(merged.conflicts)} contests with different times" + (f", {rest} not shown" if rest else ""),
            ("operation", "shape", "kept from", "left out from"),
            [
                (
                    conflict.contest[0].context.operation,
                    shape_text(conflict.contest[0].context),
                    conflict.kept,
                    ", ".join(conflict.dropped),
                )
                for conflict in shown
            ],
        )


def _conflict(conflict: Conflict) -> dict[str, object]:
    first = conflict.contest[0]
    return {
        "contest_id": first.contest_id,
        "context": first.context.to_dict(),
        "kept": conflict.kept,
        "dropped": conflict.dropped,
    }
