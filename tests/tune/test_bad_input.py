"""Bad input gets one clear message, no traceback and nothing on standard output, and loses nothing."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from layerzero_runtime.device import DeviceSpec, detect_device
from layerzero_tune.compile.emit import emit
from layerzero_tune.results.store import ResultsStore
from tests.tune.command import CommandsHere, tune
from tests.tune.recordings import recorded_rows
from tests.tune.synthetic_results import DEVICE, compiled, contest_rows, norm

USAGE = 2
NORM = ("explain", "--device", "cpu", "--operation", "norm.rms", "--dtype", "float32")
FULL = (
    "explain",
    "--device",
    "cpu",
    "--operation",
    "attention.full",
    "--dtype",
    "float32",
    "--num-heads",
    "8",
    "--head-dim",
    "64",
)
MAKE = ("workload", "make", "--model", "llama-3.1-8b")


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    """Three good lines, two bad ones among them."""
    path = tmp_path / "w.jsonl"
    good = '{"operation": "norm.rms", "dtype": "float32", "rows": 8, "hidden_size": 64}\n'
    path.write_text(f"{good}# a comment\n{good[:-3]}\n{good}{good.replace('8', '-8')}{good}")
    return path


def check_refused(command: CommandsHere, arguments: tuple[object, ...], message: str, status: int = 1) -> None:
    ended = command(*arguments)
    assert ended.status == status
    assert ended.output == ""
    assert "Traceback" not in ended.errors
    assert re.search(message, " ".join(ended.errors.split())), ended.errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("kernels", "--ops", "attention,norm.rsm"),
            r"'norm\.rsm', known operations: attention\.causal, .* families: attention, linear, mlp, norm",
        ),
        (("run", "--out", "out", "--ops", "conv"), r"'conv', known operations"),
        ((*NORM[:4], "norm.rsm", *NORM[5:]), r"operation is 'norm\.rsm', known operations: attention\.causal"),
        (
            ("kernels", "--kernels", "no.such.module"),
            r"module 'no\.such\.module' of kernels cannot be imported: ModuleNotFoundError",
        ),
        (("run", "--out", "out", "--kernels", "json"), r"module 'json' has no KERNELS; required: KERNELS = \(Kernel"),
        (("doctor", "--kernels", "layerzero_runtime.kernels.torch_norm"), "declares kernel 'torch.rms_norm' again"),
        ((*NORM[:6], "float31", "--rows", 8, "--hidden-size", 64), r"dtype is 'float31', allowed: float64, float32"),
        ((*MAKE, "--dtype", "fp8"), r"dtype is 'fp8', allowed"),
        ((*MAKE, "--mode", "lazy"), r"mode is 'lazy', allowed: eager, graph"),
        (("run", "--out", "out", "--device", "tpu"), r"device is 'tpu', allowed: auto, cpu, cuda, cuda:N"),
        (("doctor", "--device", "cuda:99"), r"no device cuda:99: .*; use"),
        (("run", "--out", "out", "--preset", "huge"), r"preset is 'huge', allowed: quick, standard, full"),
        (("run", "--out", "out", "--device", "recorded:nowhere"), r"no results at nowhere: no such directory"),
        (
            ("run", "--out", "out", "--shard", "3/2"),
            r"--shard is '3/2', allowed: 1/2 to 2/2, such as 1/4 for the first",
        ),
        (("run", "--out", "out", "--shard", "0/2"), r"--shard is '0/2', allowed: 1/2 to 2/2"),
        (("run", "--out", "out", "--shard", "half"), r"--shard is 'half', allowed: 1/n to n/n, such as 1/4"),
        (("compile", "nowhere", "--out", "tables"), r"no results at nowhere: no such directory; measure some with"),
        ((*MAKE[:-1], "llama-9"), r"model is 'llama-9', known models: .*did you mean"),
        ((*MAKE, "--tp", 3), r"tp is 3, which does not divide llama-3\.1-8b's .*; allowed: 1, 2, 4"),
        ((*MAKE, "--tp", 0), r"tp holds 0, required integers of at least 1"),
        ((*MAKE, "--lengths", "128,-1"), r"lengths holds -1, required integers"),
        ((*MAKE, "--lengths", "128,1.5"), r"--lengths is '128,1\.5', required whole numbers separated by commas"),
        ((*MAKE, "--batch-sizes", ""), r"batch_sizes is empty"),
        ((*NORM, "--rows", -4, "--hidden-size", 64), r"rows is -4, a size must be at least 1"),
        ((*NORM, "--rows", 4, "--hidden-size", 0), r"hidden_size is 0, a size must be at least 1"),
        ((*NORM, "--rows", 4), r"norm\.rms needs hidden_size; required: rows, hidden_size"),
        (
            (*FULL, "--batch-size", 1, "--seq-len-q", 8, "--seq-len-k", 9),
            r"attention\.full has equal lengths, not seq_len_q 8",
        ),
        (
            (*FULL, "--batch-size", 1, "--seq-len-q", 8, "--num-kv-heads", 3),
            r"num_heads is 8, which is not a multiple of num_kv_heads 3",
        ),
        (
            ("evaluate", "t", "--results", "r", "--out", "o", "--gate", "speed>1"),
            r"--gate 'speed>1' names 'speed', allowed: n, hit_rate",
        ),
    ],
)
def test_bad_values(
    command: CommandsHere, arguments: tuple[object, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(command, arguments, message)
    assert [path.name for path in tmp_path.iterdir()] == [], "nothing is begun"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("launch",), "No such command 'launch'"),
        (("run",), "Missing option '--out'"),
        (("run", "--out", "x", "--speed", "9"), "No such option: --speed"),
        ((*NORM, "--rows", "1.5"), "Invalid value for '--rows'"),
        ((*NORM, "--rows", "many"), "Invalid value for '--rows'"),
        ((*MAKE, "--tp", "two"), "Invalid value for '--tp'"),
        (("evaluate", "t", "--results", "r", "--out", "o", "--held-out", "0"), "Invalid value for '--held-out'"),
    ],
)
def test_usage(command: CommandsHere, arguments: tuple[object, ...], message: str) -> None:
    check_refused(command, arguments, re.escape(message), USAGE)


@pytest.mark.parametrize("words", [("run", "--device", "cpu", "--out", "out", "--workload"), ("workload", "show")])
def test_every_malformed_workload_line_is_named(
    command: CommandsHere, workload: Path, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(command, (*words, workload), rf"{workload}:3: not valid JSON: .*{workload}:5: rows is -8")
    check_refused(command, (*words, tmp_path / "none.jsonl"), r"there is no workload file .*none\.jsonl")
    (tmp_path / "empty.jsonl").write_text("# nothing\n")
    check_refused(
        command, (*words, tmp_path / "empty.jsonl"), r"empty\.jsonl has no workload lines; give one JSON object"
    )
    assert not (tmp_path / "out").exists()


def test_a_truncated_results_file_is_named_and_set_aside_and_the_rest_used(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "results")
    paths = [
        store.append(contest_rows(norm(rows), {"torch.rms_norm": 2.0, "torch.rms_norm.fused": 1.0}))
        for rows in (1, 8, 64)
    ]
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    done = tune("compile", tmp_path / "results", "--out", tmp_path / "tables", "--json")
    assert done.returncode == 0
    assert f"{paths[1]} is damaged" in done.stderr
    moved = tmp_path / "results" / "quarantine" / paths[1].name
    assert moved.exists()
    assert f'"{moved}"' in done.stdout
    assert '"measurements": 4' in done.stdout


@pytest.mark.parametrize("below", [False, True])
def test_an_output_folder_that_cannot_be_written(
    command: CommandsHere, recorded_results: Path, tmp_path: Path, below: bool
) -> None:
    """A file lies in its place, or in that of a folder above it."""
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "folder" if below else tmp_path / "file"
    check_refused(
        command,
        ("run", "--device", f"recorded:{recorded_results}", "--out", out),
        f"cannot write to {out}: .*choose another --out",
    )
    check_refused(command, ("run", "--device", "cpu", "--out", out, "--ops", "norm.rms"), f"cannot write to {out}")
    check_refused(
        command, ("compile", recorded_results, "--out", out), f"cannot write a table to {out}/.*choose another --out"
    )
    if below:
        check_refused(command, (*MAKE, "--out", out), f"cannot write {out}: .*choose another file with --out")
    assert (tmp_path / "file").read_text() == "kept"


def test_results_in_place_of_a_file_and_the_reverse(command: CommandsHere, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    check_refused(
        command, ("compile", tmp_path / "file", "--out", tmp_path / "t"), r"file is a file; results are a directory"
    )
    check_refused(
        command,
        ("compile", tmp_path / "empty", "--out", tmp_path / "t"),
        r"hold no measurement; run layerzero-tune run",
    )
    check_refused(command, ("workload", "show", tmp_path), r"cannot read the workload file")


def test_results_of_two_devices_are_refused(command: CommandsHere, tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    store.append(contest_rows(norm(1), {"torch.rms_norm": 2.0}))
    store.append(
        [
            replace(row, device=DeviceSpec("cpu", "Other").to_dict())
            for row in contest_rows(norm(2), {"torch.rms_norm": 2.0})
        ]
    )
    check_refused(
        command, ("compile", tmp_path, "--out", tmp_path / "t"), r"come from 2 devices, required one: .*Other"
    )
    check_refused(command, ("run", "--device", f"recorded:{tmp_path}", "--out", tmp_path / "o"), r"these hold 2")


def test_results_of_unknown_kernels_name_the_option(command: CommandsHere, tmp_path: Path) -> None:
    ResultsStore(tmp_path / "r").append(contest_rows(norm(1), {"torch.rms_norm": 2.0, "synthetic.lean": 1.0}))
    check_refused(
        command,
        ("compile", tmp_path / "r", "--out", tmp_path / "t"),
        r"not registered: synthetic\.lean; name their module with --kernels",
    )
    assert not (tmp_path / "t").exists()
    done = command("compile", tmp_path / "r", "--out", tmp_path / "t", "--kernels", "tests.tune.synthetic_kernels")
    assert done.status == 0


# Tables that this process must not use.


def tables_with(tmp_path: Path, change: tuple[str, str] | None) -> Path:
    """A folder with this machine's table, changed."""
    slug = detect_device("cpu").slug
    rows = [replace(row, device=detect_device("cpu").to_dict()) for row in recorded_rows()]
    folder = emit(compiled(rows)).write(tmp_path / "tables")
    assert folder.name == slug
    if change is not None:
        module = folder / "__init__.py"
        text = module.read_text()
        assert change[0] in text
        module.write_text(text.replace(*change))
    return tmp_path / "tables"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("SCHEMA = 1", "SCHEMA = 2"), r"table schema is 2, this runtime reads 1; compile the results again"),
        (("'physical_cores'", "'cores'"), r"device has unknown fields cores"),
        (("SCHEMA = 1", "import os"), r"__init__\.py:7: the statement Import is not allowed"),
        (("PLANS = (", "PLANS = (("), r"__init__\.py:\d+: .*compile the results again"),
        (("'threads': ", "'threads': 1"), r"was compiled for .*, this device is .*compile results of this device"),
    ],
)
def test_a_table_that_is_damaged_or_not_for_this_device_is_refused(
    command: CommandsHere, recorded_results: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    tables = tables_with(tmp_path, change)
    check_refused(command, (*NORM, "--rows", 8, "--hidden-size", 1024, "--tables", tables), message)
    evaluate = ("evaluate", tables, "--results", recorded_results, "--out", tmp_path / "held-out", "--json")
    check_refused(command, evaluate, message)
    assert not (tmp_path / "held-out").exists()


def test_a_folder_without_a_table_for_this_device_says_which_it_has(
    command: CommandsHere, recorded_results: Path, tmp_path: Path
) -> None:
    emit(compiled(recorded_rows())).write(tmp_path / "tables")
    slug = detect_device("cpu").slug
    message = rf"tables holds no table for {slug}, it has: {DEVICE.slug}; compile results of this device with --out"
    check_refused(command, (*NORM, "--rows", 8, "--hidden-size", 1024, "--tables", tmp_path / "tables"), message)
    shutil.rmtree(tmp_path / "tables")
    evaluate = ("evaluate", tmp_path / "tables", "--results", recorded_results, "--out", tmp_path / "held-out")
    check_refused(command, evaluate, rf"no table for {slug}, it has: none")


def test_held_out_shapes_that_were_all_measured_are_refused(
    command: CommandsHere, recorded_results: Path, tmp_path: Path
) -> None:
    shapes = tmp_path / "shapes.jsonl"
    shapes.write_text('{"operation": "norm.rms", "dtype": "float32", "rows": 6, "hidden_size": 1024}\n')
    evaluate = ("evaluate", tmp_path, "--results", recorded_results, "--out", tmp_path / "out", "--workload", shapes)
    check_refused(command, evaluate, r"shapes\.jsonl holds no shape that the tuning did not measure; name other shapes")


def test_results_without_a_measurement_cannot_say_what_is_held_out(command: CommandsHere, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    evaluate = ("evaluate", tmp_path, "--results", tmp_path / "results", "--out", tmp_path / "out")
    check_refused(command, evaluate, r"results holds no measurement; --results takes what layerzero-tune run measured")
