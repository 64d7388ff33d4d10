"""Tuning of quantised linear layers: what is checked of a long one, and the whole way on this machine's CPU."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.operations import operation_named
from layerzero_tune.command_line.output import shape_text
from layerzero_tune.measure.inputs import RandomTensors
from layerzero_tune.measure.sampling import SAMPLED_KEY_VALUES, SAMPLED_VALUES, draw_sample
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.configurations.bound import memory_bound_ns
from layerzero_tune.workload.draw import draw_between
from tests.tune.command import tune

DTYPES = {"linear.fp8": "float8_e4m3fn", "linear.int8": "int8"}
each_operation = pytest.mark.parametrize("operation", DTYPES)


def linear(operation: str, rows: int, in_features: int, out_features: int, **fields: object) -> SelectionContext:
    return SelectionContext(
        operation=operation,
        dtype=DTYPES[operation],
        rows=rows,
        in_features=in_features,
        out_features=out_features,
        **fields,  # type: ignore[arg-type]
    )


@each_operation
@pytest.mark.parametrize("sizes", [(1, 4096, 14336), (5000, 128, 300), (3, 70000, 9), (1, 1, 1)])
def test_a_sample_has_the_first_and_the_last_rows_and_channels_and_is_bounded(
    operation: str, sizes: tuple[int, int, int]
) -> None:
    rows, in_features, out_features = sizes
    context = linear(operation, *sizes, scale_x="row", scale_w="row", has_bias=True)
    declared = operation_named(operation)
    tensors = RandomTensors("cpu", 0).draw(declared, context)
    sample = draw_sample(declared, context, tensors, random.Random(0))
    places = torch.arange(rows * out_features).view(rows, out_features)
    picked = sample.pick(places)
    assert (int(picked[0, 0]), int(picked[-1, -1])) == (0, rows * out_features - 1)
    assert picked.shape == (sample.context.rows, sample.context.out_features)
    assert sample.tensors["x"].numel() <= max(SAMPLED_VALUES, 4 * in_features)
    assert sample.tensors["weight"].numel() <= max(SAMPLED_KEY_VALUES, 4 * in_features)
    for argument in declared.present_tensors(sample.context):
        assert tuple(sample.tensors[argument.name].shape) == argument.shape(sample.context)


@each_operation
def test_random_inputs_spread_over_the_range_of_their_dtype(operation: str) -> None:
    tensors = RandomTensors("cpu", 0).draw(operation_named(operation), linear(operation, 400, 500, 3))
    values = tensors["x"].float()
    zeros = float((values == 0).float().mean())
    assert zeros < 0.04
    if operation == "linear.int8":
        assert 110 < values.abs().max() <= 128


def test_the_memory_bound_counts_a_byte_for_each_quantised_value_and_two_for_each_result() -> None:
    device = DeviceSpec(platform="cuda", name="GPU", bandwidth_bytes_per_s=10**9)
    context = linear("linear.fp8", 3, 5, 7, scale_w="row", has_bias=True).with_device(device)
    assert memory_bound_ns(context) == 3 * 5 + 7 * 5 + 4 + 7 * 4 + 7 * 2 + 3 * 7 * 2


def test_shapes_drawn_between_measured_ones_are_as_wide_as_layers_are() -> None:
    measured = [linear("linear.int8", *sizes) for sizes in ((1, 1024, 4096), (64, 4096, 14336), (8, 2048, 8192))]
    for context in draw_between(measured, 20, 0):
        assert (context.in_features or 1) % 64 == (context.out_features or 1) % 64 == 0
        assert shape_text(context) == f"{context.rows}x{context.in_features}x{context.out_features}"


@pytest.mark.slow
@pytest.mark.alone
def test_run_compile_evaluate(tmp_path: Path) -> None:
    lines = [
        {"operation": name, "dtype": dtype, "rows": rows, "in_features": 256, "out_features": 128, "scale_x": "row"}
        for name, dtype in DTYPES.items()
        for rows in (2, 24)
    ]
    (tmp_path / "w.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results, tables = tmp_path / "results", tmp_path / "tables"
    done = tune("run", "--device", "cpu", "--workload", tmp_path / "w.jsonl", "--out", results, "--json")
    assert done.returncode == 0, done.stderr
    rows = ResultsStore(results).read().rows
    assert {(row.kernel_id, row.status) for row in rows} == {
        ("torch.scaled_mm", "ok"),
        ("torch.linear_fp8.widened", "ok"),
        ("torch.int_mm", "ok"),
        ("torch.linear_int8.widened", "ok"),
    }
    done = tune("compile", results, "--out", tables)
    assert done.returncode == 0, done.stderr
    held_out = ("--out", tmp_path / "held-out", "--held-out", "2", "--json")
    done = tune("evaluate", tables, "--results", results, *held_out)
    assert done.returncode == 0, done.stderr
    *parts, _ = json.loads(done.stdout)["summaries"]
    for figures in parts:
        assert figures["operation"] in DTYPES
        assert figures["hit_rate"] == 1.0
        assert figures["speedup_end_to_end_geomean"] > 0.0
