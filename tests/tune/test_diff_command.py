"""`layerzero-tune diff` as a user meets it."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_tune.compile.emit import EVIDENCE_FILE, MODULE_FILE
from layerzero_tune.diff.document import LARGEST
from layerzero_tune.results.store import ResultsStore
from tests.tune.command import CommandsHere, Ended
from tests.tune.diff_sides import FUSED, OTHER_DEVICE, rows_with, write_results, write_table
from tests.tune.recordings import BOTH_DTYPES, recorded_rows
from tests.tune.synthetic_results import DEVICE, Times, cross, full, grid, measured, norm

Sides = tuple[Path, Path]


@pytest.fixture
def results(tmp_path: Path) -> Sides:
    """At 8 rows fused was twice as fast as the default; now that its code has changed it is four times as slow."""
    return (
        write_results(tmp_path / "old", rows_with(500, 500, 2000)),
        write_results(tmp_path / "new", rows_with(500, 4000, 2000, source_hash="another")),
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """Tables of one recording, and of it with a default that takes half as long again: they differ at many shapes."""
    folder = tmp_path_factory.mktemp("recorded")
    rows = recorded_rows(BOTH_DTYPES)
    slower = [
        replace(row, samples_ns=tuple(1.5 * time for time in row.samples_ns)) if row.is_default else row for row in rows
    ]
    return write_table(folder / "old", rows), write_table(folder / "new", slower)


def text_of(ended: Ended) -> str:
    """What was printed, without its line breaks."""
    assert ended.status == 0, ended.errors
    assert ended.errors == ""
    return " ".join(ended.output.split())


def test_it_says_what_changed_and_by_how_much(command: CommandsHere, results: Sides) -> None:
    text = text_of(command("diff", *results))
    assert text.startswith("Synthetic CPU: other results")
    for part in (
        "Static keys (operation, mode, dtype, features): 0 added, 0 removed, 1 changed, 0 as they were.",
        "of 3 shapes (each measured shape counts once) the old table serves 3, the new one 3; 0 gained, 0 lost.",
        "Plans: another one at 1 of the 3 shapes that both serve.",
        "Predicted speed: 1.587x the old table's, -37.0% time per call (geometric mean); 1.00x at worst, 4.00x at best",
        "Where plans differ: 1 ratio from contests that timed both plans at that shape.",
        "Predicted faster: 1 change norm.rms, eager, float32, offset 0.0 4.00x rows 3 to 22: ",
        " rows 3 to 22: torch.rms_norm.fused -> torch.rms_norm (1 shape)",
        "torch.rms_norm.fused 2 1 its code has changed",
    ):
        assert part in text
    assert "slower" not in text


def test_tables_results_and_a_folder_of_tables_can_be_compared_with_each_other(
    command: CommandsHere, results: Sides, tmp_path: Path
) -> None:
    for name, folder in zip(("old", "new"), results, strict=True):
        assert command("compile", folder, "--out", tmp_path / f"{name}_tables").status == 0
    tables = [tmp_path / f"{name}_tables" for name in ("old", "new")]
    change = "rows 3 to 22: torch.rms_norm.fused -> torch.rms_norm (1 shape)"
    for old in (results[0], tables[0], tables[0] / DEVICE.slug):
        for new in (results[1], tables[1], tables[1] / DEVICE.slug):
            assert change in text_of(command("diff", old, new))
    # A table's evidence has the mean of 4x at 8 rows and 2x at 64, which share a bucket.
    assert "1 estimate from what was measured nearby" in text_of(command("diff", *tables))
    assert f"2.83x {change}" in text_of(command("diff", *tables))
    # With the results beside it, the contests count.
    shutil.copytree(results[1], tables[1] / DEVICE.slug / "results")
    assert f"4.00x {change}" in text_of(command("diff", *tables))
    # Other results than those that it was compiled from say nothing of a table.
    shutil.rmtree(tables[1] / DEVICE.slug / "results")
    shutil.copytree(results[0], tables[1] / DEVICE.slug / "results")
    assert "1 estimate from" in text_of(command("diff", *tables))


def test_a_workload_gives_the_shapes_and_their_weights(command: CommandsHere, results: Sides, tmp_path: Path) -> None:
    workload = tmp_path / "w.jsonl"
    workload.write_text(
        '{"operation": "norm.rms", "dtype": "float32", "rows": 8, "hidden_size": 1024, "weight": 3}\n'
        '{"operation": "norm.rms", "dtype": "float32", "rows": 1, "hidden_size": 1024}\n'
        '{"operation": "norm.rms", "dtype": "float32", "rows": 65, "hidden_size": 1024}\n'
    )
    text = text_of(command("diff", *results, "--workload", workload))
    assert f"of 3 shapes (of {workload}, with its weights) the old table serves 2, the new one 2" in text
    assert f"Predicted speed: {4**0.75:.3f}x" in text


def test_without_a_difference_there_is_little_to_say(command: CommandsHere, results: Sides) -> None:
    text = text_of(command("diff", results[0], results[0]))
    assert text.startswith("Synthetic CPU: the same results, compiled again")
    assert "Static keys (operation, mode, dtype, features): 0 added, 0 removed, 0 changed, 1 as they were." in text
    assert "Plans: another one at 0 of the 3 shapes" in text
    assert not re.search("Predicted|Kernels|Another plan|with another range", text)


def test_contests_that_other_processes_disturbed_are_counted(command: CommandsHere, tmp_path: Path) -> None:
    quiet = write_results(tmp_path / "quiet", rows_with(500, 500, 500))
    noisy = write_results(
        tmp_path / "noisy", [*rows_with(500, 500, contention=0.9, rows=(1, 8)), *rows_with(500, rows=(64,))]
    )
    assert "disturbed 0 of 3 contests 2 of 3 contests" in text_of(command("diff", quiet, noisy))
    table = write_table(tmp_path / "tables", rows_with(500, 500, 500))
    assert "disturbed - 2 of 3 contests" in text_of(command("diff", table, noisy))


def test_coverage_says_what_is_served_now_and_what_no_longer(command: CommandsHere, tmp_path: Path) -> None:
    def default(context: SelectionContext) -> Times:
        return {"torch.rms_norm" if context.operation == "norm.rms" else "torch.sdpa": 1000.0}

    lines = (1, 32, 1024), (64, 2048, 65536)
    whole = grid(norm, *lines)
    holed = [context for context in whole if (context.rows, context.hidden_size) != (32, 2048)]
    low = [context for context in grid(full, (4, 8), (64, 128)) if context.seq_len_q == 64 or context.num_heads == 4]
    old = write_table(tmp_path / "old", measured([*whole, *grid(full, (4, 8), (64, 128))], default))
    new = write_table(tmp_path / "new", measured([*holed, *low, *grid(cross, (4,), (1, 8), (64,))], default))
    text = text_of(command("diff", old, new))
    for part in (
        "Static keys (operation, mode, dtype, features): 1 added, 0 removed, 2 changed, 0 as they were.",
        "of 15 shapes (each measured shape counts once) the old table serves 13, the new one 13; 2 gained, 2 lost.",
        "Coverage: 3 static keys with another range",
        "attention.full, eager, float32, head_dim 64, gqa_group 1 "
        "before: batch_kv_heads 4 to 8, seq_len_q 64 to 128 "
        "now: batch_kv_heads 4 to 8, seq_len_q 64 to 128, batch_kv_heads * seq_len_q at most 512 "
        "0 shapes gained, 1 lost",
        "norm.rms, eager, float32, offset 0.0 inside that range: 0 regions served now, 6 regions no longer "
        "0 shapes gained, 1 lost",
        "attention.cross, eager, float32, head_dim 64, gqa_group 1 "
        "added: batch_kv_heads 4 to 4, seq_len_q 1 to 8, seq_len_k 64 to 64 2 shapes gained, 0 lost",
    ):
        assert part in text
    back = text_of(command("diff", new, old))
    assert "removed: batch_kv_heads 4 to 4, seq_len_q 1 to 8, seq_len_k 64 to 64 0 shapes gained, 2 lost" in back


def test_different_devices_are_the_first_thing_that_it_says(command: CommandsHere, tmp_path: Path) -> None:
    old = write_table(tmp_path / "old", rows_with(500, 500, 500))
    new = write_table(tmp_path / "new", rows_with(2000, 2000, 2000, device=OTHER_DEVICE.to_dict()))
    for arguments in ((), ("--markdown",)):
        text = text_of(command("diff", old.parent, new.parent, *arguments)).removeprefix("### ")
        assert text.startswith("Different devices: Synthetic CPU and Another CPU What follows says which plans differ")
    assert command("diff", old, new, "--json").json["compared"][0]["same_device"] is False


def test_of_several_devices_each_is_compared_with_itself(command: CommandsHere, tmp_path: Path) -> None:
    third = replace(OTHER_DEVICE, name="Third CPU")
    for tables, devices in (("old", (DEVICE, OTHER_DEVICE)), ("new", (third, DEVICE))):
        for device in devices:
            write_table(tmp_path / tables, rows_with(500, 500, 500, device=device.to_dict()))
    text = text_of(command("diff", tmp_path / "old", tmp_path / "new"))
    assert text.startswith("Devices Removed: Another CPU (instruction set avx2, physical cores 4, threads 4)")
    assert "Added: Third CPU" in text
    assert text.count("Summary") == 1
    found = command("diff", tmp_path / "old", tmp_path / "new", "--json").json
    assert [device["name"] for device in found["removed"]] == ["Another CPU"]
    assert [device["name"] for device in found["added"]] == ["Third CPU"]
    assert [pair["new"]["device"] for pair in found["compared"]] == [DEVICE.to_dict()]


def test_of_many_changes_the_largest_are_listed_and_the_others_counted(command: CommandsHere, recorded: Sides) -> None:
    found = command("diff", *recorded, "--json").json["compared"][0]
    (faster,) = ([change for change in found["changes"] if change["effect"] == "faster"],)
    assert len(faster) > LARGEST
    shown = command("diff", *recorded)
    listed = re.search(
        rf"Predicted faster: {len(faster)} changes\n"
        rf"The {LARGEST} largest by speed and how much they cover; {len(faster) - LARGEST} more are not listed.\n"
        r"(.*?)\n\n",
        shown.output,
        re.DOTALL,
    )
    assert listed is not None
    lines = [line for line in listed[1].splitlines() if line.startswith("  ")]
    assert len(lines) == LARGEST
    assert len(shown.output.splitlines()) < 180
    first = max(faster, key=lambda change: change["weight"] * math.log(change["speed"]))
    assert f"{first['speed']:.2f}x" in lines[0]
    # Every change has one effect, and each effect is counted once.
    counts = [int(number) for number in re.findall(r"^[A-Z][^\n]*: (\d+) changes?$", shown.output, re.MULTILINE)]
    assert sum(counts) == len(found["changes"])


def test_markdown_has_the_same_words(command: CommandsHere, recorded: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recorded[0].parents[1])  # paths that are too long for a line are broken
    sides = "old", "new"
    shown, markdown = command("diff", *sides), command("diff", *sides, "--markdown")
    assert markdown.output.startswith("### Synthetic CPU: ")
    plain = re.sub(r"[*|#\\]|^\s*-(?= )|-{3}", " ", markdown.output, flags=re.MULTILINE)
    assert set(re.split(r"[\s*]+", shown.output)) - set(plain.split()) - {""} <= {"-"}
    rows = [line for line in markdown.output.splitlines() if line.startswith("|")]
    assert {line.count(" | ") + 2 for line in rows} == {4, 5, 10}, "every row has as many cells as its heading"


def test_markdown_shows_names_as_they_are(command: CommandsHere, results: Sides, tmp_path: Path) -> None:
    odd = tmp_path / "a|b <i> `c` *d* _e_ f_g"
    shutil.copytree(results[0], odd)
    assert "a\\|b \\<i> \\`c\\` \\*d\\* \\_e\\_ f_g" in command("diff", odd, results[1], "--markdown").output


def test_json_holds_everything(command: CommandsHere, results: Sides) -> None:
    (found,) = command("diff", *results, "--json").json["compared"]
    assert found["old"]["provenance"]["measurements"] == 6
    assert found["new"]["device"] == DEVICE.to_dict()
    assert found["static_keys"] == {
        "added": [],
        "removed": [],
        "changed": [{"operation": "norm.rms", "mode": "eager", "dtype": "float32", "features": [0.0, []]}],
        "unchanged": 0,
    }
    (change,) = found["changes"]
    assert change["effect"] == "faster"
    assert change["speed"] == pytest.approx(4.0, rel=1e-6)
    assert (change["shapes"], change["weight"]) == (1, 1.0)
    assert [step["kernel_id"] for step in change["old"]] == [FUSED]
    assert change["ranges"]["hidden_size"] == [1024, 1024]
    assert [summary["operation"] for summary in found["summaries"]] == ["norm.rms", "all"]
    assert found["coverage"] == []
    assert [kernel["kernel_id"] for kernel in found["kernels"]] == ["torch.rms_norm", FUSED]


def test_what_cannot_be_compared_is_refused(command: CommandsHere, results: Sides, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    table = write_table(tmp_path / "tables", rows_with(500, 500, 2000))
    other = write_table(tmp_path / "other", rows_with(500, 4000, 2000))
    without = tmp_path / "without" / table.name
    shutil.copytree(table, without)
    (without / EVIDENCE_FILE).unlink()
    mixed = tmp_path / "mixed" / table.name
    shutil.copytree(table, mixed)
    shutil.copy(other / EVIDENCE_FILE, mixed / EVIDENCE_FILE)
    spoilt = tmp_path / "spoilt" / table.name
    shutil.copytree(table, spoilt)
    (spoilt / MODULE_FILE).write_text(f"{(table / MODULE_FILE).read_text()}\nimport os\n")
    old_kernels = [
        replace(row, kernel_id="torch.gone") if row.kernel_id == FUSED else row for row in rows_with(1, 1, 1)
    ]
    unknown = write_results(tmp_path / "unknown", old_kernels)
    for path, message in (
        (tmp_path / "nowhere", "nowhere holds nothing to compare; name a folder of results"),
        (tmp_path / "empty", "empty holds nothing to compare"),
        (without, "evidence.json beside it does not say which sizes bucket 0 serves; compile the results again"),
        (mixed, "evidence.json is of another table: the module answers"),
        (spoilt, r"__init__.py:\d+: the statement Import is not allowed"),
        (unknown, "kernels that are not registered: torch.gone; name their module with --kernels"),
    ):
        for pair in ((path, results[0]), (results[0], path)):
            ended = command("diff", *pair)
            assert (ended.status, ended.output) == (1, "")
            assert re.search(message, " ".join(ended.errors.split())), ended.errors
    both = command("diff", *results, "--json", "--markdown")
    assert (both.status, both.output) == (2, "")
    assert "exclude each other" in both.errors


def test_nothing_is_written(command: CommandsHere, results: Sides) -> None:
    before = {path: path.read_bytes() for folder in results for path in folder.rglob("*") if path.is_file()}
    json.loads(command("diff", *results, "--json").output)
    assert {path: path.read_bytes() for folder in results for path in folder.rglob("*") if path.is_file()} == before
    assert len(ResultsStore(results[0]).contest_ids()) == 3
