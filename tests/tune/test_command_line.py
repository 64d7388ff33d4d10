"""The commands as a user meets them: what they print for people, and as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.libraries import library_version
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.tables.staleness import kernel_source_hash
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from tests.tune.command import CommandsHere, tune
from tests.tune.recordings import recorded_rows
from tests.tune.synthetic_results import DEVICE, Times, grid, measured, norm

NORM = ("--operation", "norm.rms", "--dtype", "float32")


def rows_of_this_machine() -> list[Measurement]:
    """Norms on which `fused` takes half the default's time, as if measured here and now."""

    def model(context: SelectionContext) -> Times:
        return {"torch.rms_norm": 2000.0, "torch.rms_norm.fused": 1000.0}

    kernels = {kernel.kernel_id: kernel for kernel in builtin_kernels()}
    return [
        replace(
            row,
            device=detect_device("cpu").to_dict(),
            versions={"torch": library_version("torch") or ""},
            source_hash=kernel_source_hash(kernels[row.kernel_id]),
        )
        for row in measured(grid(norm, (1, 8, 64), (512, 1024)), model)
    ]


@pytest.fixture
def tables(command: CommandsHere, tmp_path: Path) -> Path:
    """Tables for this machine."""
    store = ResultsStore(tmp_path / "results")
    rows = rows_of_this_machine()
    for contest_id in {row.contest_id for row in rows}:
        store.append([row for row in rows if row.contest_id == contest_id])
    assert command("compile", tmp_path / "results", "--out", tmp_path / "tables").status == 0
    return tmp_path / "tables"


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        ((), ("doctor", "kernels", "run", "compile", "evaluate", "merge", "wheel", "diff", "explain", "workload")),
        (("doctor",), ("--device", "--kernels", "--json")),
        (("kernels",), ("--ops", "--kernels", "--json")),
        (
            ("run",),
            ("--out", "--device", "--ops", "--preset", "--workload", "--budget", "--dry-run", "--kernels", "--json"),
        ),
        (("compile",), ("results", "--out", "--kernels", "--json")),
        (("evaluate",), ("tables", "--results", "--out", "--held-out", "--workload", "--gate", "--json")),
        (("merge",), ("shard", "--out", "--json", "earlier")),
        (("wheel",), ("tables", "--name", "--out", "--version", "--json")),
        (("diff",), ("old", "new", "--workload", "--kernels", "--markdown", "--json")),
        (("explain",), ("--operation", "--dtype", "--batch-size", "--tables", "--json")),
        (("workload",), ("make", "show")),
        (("workload", "make"), ("--model", "--tp", "--mode", "--out")),
        (("workload", "show"), ("file", "--json")),
    ],
)
def test_help(command: CommandsHere, words: tuple[str, ...], mentioned: tuple[str, ...]) -> None:
    shown = command(*words, "--help")
    assert shown.status == 0
    assert shown.errors == ""
    assert [word for word in mentioned if word.lower() not in shown.output.lower()] == []


def test_doctor(command: CommandsHere) -> None:
    report = command("doctor", "--device", "cpu", "--json").json
    spec = detect_device("cpu")
    assert report["device"] == spec.to_dict()
    assert report["slug"] == spec.slug
    libraries = {kernel.spec.library for kernel in builtin_kernels()}
    assert report["libraries"] == {name: library_version(name) for name in libraries}
    assert report["kernels"] == len(builtin_kernels())
    shown = command("doctor", "--device", "cpu")
    assert spec.slug in shown.output
    assert f"of {len(builtin_kernels())} kernels are available here" in shown.output


def test_doctor_says_why_a_kernel_is_not_available(command: CommandsHere) -> None:
    modules = "tests.tune.torture_kernels"
    report = command("doctor", "--device", "cpu", "--kernels", modules, "--json").json
    assert report["unavailable"]["torture.gpu_only"] == "runs on cuda, the device is cpu"
    assert "runs on cuda, the device is cpu" in command("doctor", "--device", "cpu", "--kernels", modules).output


def test_doctor_shows_the_table_that_serves(
    command: CommandsHere, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERZERO_TABLES", str(tables))
    report = command("doctor", "--device", "cpu", "--json").json
    assert report["table"]["path"] == str(tables / detect_device("cpu").slug / "__init__.py")
    assert report["table"]["measurements"] == 12
    assert "measured 2026-03-01T00:00:05+00:00" in command("doctor", "--device", "cpu").output


def test_doctor_says_which_entries_are_stale_and_what_to_run(
    command: CommandsHere, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERZERO_TABLES", str(tables))
    assert command("doctor", "--device", "cpu", "--json").json["stale"] == []
    assert "stale" not in command("doctor", "--device", "cpu").output
    module = tables / detect_device("cpu").slug / "__init__.py"
    source = module.read_text()
    (line,) = (line for line in source.splitlines() if line.startswith("    'torch.rms_norm.fused': {"))
    module.write_text(source.replace(line, re.sub("'version': '[^']*'", "'version': '1.0'", line)))
    (entry,) = command("doctor", "--device", "cpu", "--json").json["stale"]
    installed = ".".join((library_version("torch") or "").split(".")[:2])
    reason = f"measured with torch 1.0, installed is {installed}"
    assert entry == {
        "operation": "norm.rms",
        "static_key": "('eager', 'float32', 0.0, ())",
        "leaf": 0,
        "kernel_id": "torch.rms_norm.fused",
        "reason": reason,
    }
    shown = " ".join(command("doctor", "--device", "cpu").output.split())
    assert f"1 of 1 entries of {module.parent.name} are stale" in shown
    assert "layerzero-tune run --device cpu --out RESULTS && layerzero-tune compile RESULTS --out TABLES" in shown
    assert f"kernel operation why entries torch.rms_norm.fused norm.rms {reason} 1" in shown


def test_kernels(command: CommandsHere) -> None:
    listed = command("kernels", "--ops", "norm.rms,mlp", "--json").json
    assert {operation for kernel in listed for operation in kernel["operations"]} == {
        "norm.rms",
        "mlp.swiglu",
        "mlp.geglu",
    }
    (fused,) = (kernel for kernel in listed if kernel["kernel_id"] == "torch.rms_norm.fused")
    assert {"field": "offset", "kind": "one_of", "bound": [0.0]} in fused["limits"]
    shown = command("kernels", "--ops", "norm.rms")
    assert "torch.rms_norm.fused" in shown.output
    assert "offset 0.0" in shown.output
    added = command("kernels", "--kernels", "tests.tune.synthetic_kernels", "--json").json
    assert "synthetic.lean" in {kernel["kernel_id"] for kernel in added}


def test_run_shows_where_each_kernel_wins_and_which_have_no_time(
    command: CommandsHere, recorded_results: Path, tmp_path: Path
) -> None:
    shown = command("run", "--device", f"recorded:{recorded_results}", "--ops", "norm", "--out", tmp_path / "out")
    assert shown.status == 0
    assert "Where each kernel wins" in shown.output
    assert "Without a time" in shown.output
    assert "a recorded failed" in shown.output
    assert "contests to measure, 0 held already" in shown.errors
    report = command(
        "run",
        "--device",
        f"recorded:{recorded_results}",
        "--ops",
        "norm,mlp.swiglu",
        "--out",
        tmp_path / "out",
        "--json",
    ).json
    assert report["device"] == DEVICE.to_dict()
    assert report["contests_measured"] > 0
    assert report["contests_held"] > 0
    assert report["statuses"]["failed"] > 0
    assert sum(report["statuses"].values()) == len(ResultsStore(tmp_path / "out").read().rows)


def test_run_on_a_workload_takes_its_shapes_alone(
    command: CommandsHere, recorded_results: Path, tmp_path: Path
) -> None:
    workload = tmp_path / "shapes.jsonl"
    workload.write_text(
        '{"operation": "norm.rms", "dtype": "float32", "rows": 6, "hidden_size": 1024}\n'
        '{"operation": "norm.rms", "dtype": "float32", "rows": 7, "hidden_size": 1024}\n'
    )
    report = command(
        "run",
        "--device",
        f"recorded:{recorded_results}",
        "--workload",
        workload,
        "--out",
        tmp_path / "out",
        "--json",
    ).json
    assert report["contests_measured"] == 1
    assert [point["rows"] for point in report["points_without_candidates"]] == [7]


def test_compile(command: CommandsHere, recorded_results: Path, tmp_path: Path) -> None:
    report = command("compile", recorded_results, "--out", tmp_path / "tables", "--json").json
    assert report["table"] == str(tmp_path / "tables" / DEVICE.slug)
    assert report["provenance"]["measurements"] == len(recorded_rows())
    assert report["buckets"] >= report["entries"] > 10
    assert report["probes"] > report["buckets"]
    assert report["quarantined"] == []
    shown = command("compile", recorded_results, "--out", tmp_path / "tables")
    assert f"{report['entries']} static keys, {report['buckets']} buckets" in shown.output
    assert sorted(path.name for path in (tmp_path / "tables" / DEVICE.slug).iterdir()) == [
        "__init__.py",
        "evidence.json",
    ]


def test_explain(command: CommandsHere, tables: Path) -> None:
    found = command(
        "explain", "--tables", tables, "--device", "cpu", *NORM, "--rows", 8, "--hidden-size", 700, "--json"
    ).json
    assert found["plan"]["kernel_id"] == "torch.rms_norm.fused"
    assert found["plan"]["source"] == "table"
    assert found["bucket"] == {"rows": [1, 64], "hidden_size": [512, 1024]}
    assert found["evidence"]["speedup"] == pytest.approx(2.0)
    assert found["context"]["rows"] == 8
    shown = command("explain", "--tables", tables, "--device", "cpu", *NORM, "--rows", 65, "--hidden-size", 700)
    assert shown.status == 0
    assert "outside the measured range" in shown.output
    shown = command("explain", "--tables", tables, "--device", "cpu", *NORM, "--rows", 8, "--hidden-size", 700)
    assert "norm.rms: torch.rms_norm.fused" in shown.output
    assert "bucket: rows 1 to 64, hidden_size 512 to 1024" in shown.output
    assert re.search(r"2\.00x the default's speed \(95%: at least [12]\.\d\dx\) over 6 measured points", shown.output)
    assert "runner-up: torch.rms_norm, 100.0% slower" in shown.output


def test_workloads(command: CommandsHere, tmp_path: Path) -> None:
    file = tmp_path / "llama.jsonl"
    made = command(
        "workload", "make", "--model", "llama-3.1-8b,gemma-2-2b", "--tp", 4, "--ops", "attention,norm", "--out", file
    )
    assert made.status == 0
    assert made.output == ""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert f"{len(lines)} lines" in made.errors
    assert {line["operation"].split(".")[0] for line in lines} == {"attention", "norm"}
    printed = command("workload", "make", "--model", "llama-3.1-8b,gemma-2-2b", "--tp", 4, "--ops", "attention,norm")
    assert printed.output == file.read_text()
    summary = command("workload", "show", file, "--json").json
    assert sum(part["lines"] for part in summary) == len(lines)
    assert {part["operation"] for part in summary} <= OPERATIONS.keys()
    shown = command("workload", "show", file)
    assert "attention.causal" in shown.output
    assert "head_dim 128" in shown.output


def test_names_are_printed_as_they_are(command: CommandsHere, tmp_path: Path) -> None:
    """Brackets and colons are markup to the library that prints."""
    folder = tmp_path / "a [bold] :smile: [red]"
    folder.mkdir()
    (folder / "w.jsonl").write_text('{"operation": "norm.rms", "dtype": "float32", "rows": 8, "hidden_size": 64}\n')
    shown = command("workload", "show", folder / "w.jsonl")
    assert shown.status == 0
    assert "a [bold] :smile: [red]" in " ".join(shown.output.split())
    refused = command("kernels", "--ops", "[/red]")
    assert "--ops names '[/red]'" in refused.errors


def test_the_installed_command_prints_json_alone() -> None:
    done = tune("doctor", "--device", "cpu", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["slug"] == detect_device("cpu").slug
    assert tune("--help").stdout.lstrip().startswith("Usage: layerzero-tune")
