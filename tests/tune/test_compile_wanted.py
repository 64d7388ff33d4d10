"""What a table misses inside its range becomes the next workload, and measuring exactly that closes the holes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.coverage import unmeasured_cells
from layerzero_tune.compile.emit import leaf_at
from layerzero_tune.compile.pipeline import compile_rows
from layerzero_tune.compile.wanted import wanted_lines
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.workload.lines import WorkloadLine, format_workload, read_workload
from tests.tune.command import CommandsHere
from tests.tune.synthetic_results import (
    ALL_KERNELS,
    Times,
    compiled,
    contest_rows,
    cross,
    full,
    grid,
    measured,
    norm,
    served,
    table_of,
)

KERNEL_MODULE = "tests.tune.synthetic_kernels"


def model(context: SelectionContext) -> Times:
    """Rivals that win where lengths or rows are large."""
    operation = operation_named(context.operation)
    rival = "synthetic.lean" if context.rows is not None else "synthetic.fused"
    elements = math.prod(operation.sizes(context))
    return {operation.default_kernel: 1e4 + elements, rival: 3e4 + elements / 2}


def wanted(contexts: Sequence[SelectionContext], *workload: WorkloadLine) -> tuple[WorkloadLine, ...]:
    rows = measured(contexts, model)
    return wanted_lines(compile_rows(rows, ALL_KERNELS), rows, workload)


def contexts_of(lines: Sequence[WorkloadLine]) -> list[SelectionContext]:
    return [line.context for line in lines]


def test_a_grid_without_holes_wants_nothing() -> None:
    assert wanted(grid(cross, (4, 16, 64), (1, 8, 64), (64, 256, 1024))) == ()


def test_a_gap_between_two_lines_misses_and_the_size_in_its_middle_is_wanted() -> None:
    contexts = [norm(1), norm(64)]
    table = table_of(compiled(measured(contexts, model)))
    missed = [rows for rows in range(1, 65) if served(table, norm(rows)) is None]
    assert missed == list(range(5, 16))
    assert contexts_of(wanted(contexts)) == [norm(8)]
    closed = table_of(compiled(measured([*contexts, norm(8)], model)))
    assert all(served(closed, norm(rows)) for rows in range(1, 65))


def test_one_shape_stands_for_all_holes_that_it_vouches_for() -> None:
    operation = operation_named("attention.cross")
    contexts = [*grid(cross, (4,), (1, 4, 16), (64, 256, 1024)), cross(64, 16, 4096)]
    holes = unmeasured_cells([operation.sizes(context) for context in contexts], (0, 1, 2), None)
    shapes = [operation.sizes(context) for context in contexts_of(wanted(contexts))]
    assert len(holes) == 8
    assert shapes == [(64, 1, 4096), (64, 4, 256)]


def test_sizes_that_would_make_it_another_operation_are_moved_by_one() -> None:
    contexts = [cross(4, 16, 256), cross(4, 256, 16), cross(4, 16, 1024), cross(4, 1024, 16), cross(64, 1024, 64)]
    for context in contexts_of(wanted(contexts)):
        assert context.seq_len_q != context.seq_len_k
        operation_named("attention.cross").validate(context)


def test_where_one_size_is_fixed_another_one_is_moved() -> None:
    """The keys are 8 in all that was measured: the hole at 8 queries is asked for with 9."""
    contexts = [cross(1, 1, 8), cross(1, 64, 8)]
    assert contexts_of(wanted(contexts)) == [cross(1, 9, 8)]
    assert wanted([*contexts, cross(1, 9, 8)]) == ()


def test_nothing_beyond_the_largest_measured_product_is_wanted() -> None:
    contexts = [*grid(cross, (4,), (1, 64), (64, 1024)), *grid(cross, (64,), (1,), (64, 1024))]
    lines = wanted(contexts)
    assert lines
    assert all(math.prod(operation_named("attention.cross").sizes(line.context)) <= 4 * 64 * 1024 for line in lines)


def test_sizes_whose_measurements_all_failed_are_not_asked_for_again() -> None:
    rows = measured([norm(1), norm(64)], model)
    rows += contest_rows(norm(8), {"torch.rms_norm": "failed", "synthetic.lean": "failed"})
    assert wanted_lines(compile_rows(rows, ALL_KERNELS), rows) == ()


def test_the_shape_with_the_most_to_gain_comes_first() -> None:
    """Both keys have one hole; around that of the float32 key the default wins, in the other the winner changes."""

    def uneven(context: SelectionContext) -> Times:
        assert context.rows is not None
        gains = context.dtype == "bfloat16" and context.rows < 64
        return {"torch.rms_norm": 1000.0, "synthetic.lean": 500.0 if gains else 2000.0}

    half = [replace(context, dtype="bfloat16", weight_dtype="bfloat16") for context in (norm(1), norm(64))]
    rows = measured([norm(1), norm(64), *half], uneven)
    lines = wanted_lines(compile_rows(rows, ALL_KERNELS), rows)
    assert [line.context.dtype for line in lines] == ["bfloat16", "float32"]
    busy = [WorkloadLine(norm(9), 100.0), WorkloadLine(replace(half[0], rows=9), 1.0)]
    lines = wanted_lines(compile_rows(rows, ALL_KERNELS), rows, busy)
    assert [(line.context.dtype, line.weight) for line in lines] == [("float32", 100.0), ("bfloat16", 1.0)]


def test_a_workload_gives_each_shape_the_weight_of_the_calls_that_miss_near_it() -> None:
    contexts = [norm(1), norm(4096)]
    assert sorted(context.rows or 0 for context in contexts_of(wanted(contexts))) == [16, 256]
    asked = [
        WorkloadLine(norm(12), 2.0),
        WorkloadLine(norm(30), 3.0),
        WorkloadLine(norm(1), 50.0),  # hits
        WorkloadLine(norm(5000), 70.0),  # beyond the measured range, which these shapes do not widen
        WorkloadLine(norm(12, hidden_size=512), 90.0),
    ]
    assert wanted(contexts, *asked) == (WorkloadLine(norm(16), 5.0),)
    assert wanted(contexts, WorkloadLine(full(4, 64), 1.0)) == ()


SIZES = st.sampled_from((1, 3, 8, 20, 64, 300, 1024, 5000))


@settings(max_examples=25, deadline=None)
@given(
    st.sets(st.tuples(SIZES, SIZES, SIZES).filter(lambda sizes: sizes[1] != sizes[2]), min_size=1, max_size=7),
    st.randoms(use_true_random=False),
)
def test_measuring_what_is_wanted_leaves_no_hole(sizes: set[tuple[int, int, int]], chance: random.Random) -> None:
    contexts = [cross(*found) for found in sorted(sizes)]
    lines = wanted(contexts)
    assert len(set(contexts_of(lines)) | set(contexts)) == len(lines) + len(contexts)
    rows = measured([*contexts, *contexts_of(lines)], model)
    compilation = compile_rows(rows, ALL_KERNELS)
    assert wanted_lines(compilation, rows) == ()
    (entry,) = compilation.form.entries
    for _ in range(50):
        drawn = tuple(round(math.exp(chance.uniform(math.log(low), math.log(high)))) for low, high in entry.bounds)
        assert not entry.covers(drawn) or leaf_at(entry.tree, drawn).chain, drawn


def store_of(folder: Path, rows: Sequence[Measurement]) -> Path:
    store = ResultsStore(folder)
    for contest_id in sorted({row.contest_id for row in rows}):
        store.append([row for row in rows if row.contest_id == contest_id])
    return folder


def test_compile_run_and_compile_again_close_the_holes(command: CommandsHere, tmp_path: Path) -> None:
    """The whole way by commands, over a recorded device that holds what is asked for."""
    contexts = [*grid(cross, (4,), (1, 100), (64, 2048)), *grid(cross, (64,), (1,), (64, 2048)), cross(64, 100, 64)]
    results, tables, wanted_file = tmp_path / "results", tmp_path / "tables", tmp_path / "wanted.jsonl"
    store_of(results, measured(contexts, model))
    arguments = (
        "compile",
        results,
        "--out",
        tables,
        "--kernels",
        "tests.tune.synthetic_kernels",
        "--wanted",
        wanted_file,
    )
    said = command(*arguments)
    assert said.status == 0, said.errors
    lines = read_workload(wanted_file)
    assert f"{len(lines)} shapes would close the holes" in said.output.replace("\n", " ")
    recording = store_of(tmp_path / "recording", measured([*contexts, *contexts_of(lines)], model))
    ran = command(
        "run", "--device", f"recorded:{recording}", "--workload", wanted_file, "--out", results, "--json"
    ).json
    assert ran["contests_measured"] == len(lines)
    assert ran["points_without_candidates"] == []
    assert command(*arguments, "--json").json["wanted"] == 0
    assert wanted_file.read_bytes() == b""
    table = table_of(compiled(ResultsStore(results).read().rows))
    for sizes in product((4, 7, 16, 33, 64), (1, 3, 10, 31, 100), (64, 130, 400, 1000, 2048)):
        covered = math.prod(sizes) <= 64 * 2048 * 4
        assert not covered or served(table, cross(*sizes)) is not None, sizes


def test_the_file_that_compile_writes_is_weighed_by_a_workload(command: CommandsHere, tmp_path: Path) -> None:
    results = store_of(tmp_path / "results", measured([norm(1), norm(4096)], model))
    asked = tmp_path / "asked.jsonl"
    asked.write_text(format_workload([WorkloadLine(norm(300), 7.0)]), encoding="utf-8")
    common = ("compile", results, "--out", tmp_path / "tables", "--kernels", KERNEL_MODULE)
    done = command(*common, "--wanted", tmp_path / "wanted.jsonl", "--workload", asked, "--json")
    assert done.json["wanted"] == 1
    assert json.loads((tmp_path / "wanted.jsonl").read_text(encoding="utf-8"))["weight"] == 7
    refused = command(*common, "--workload", asked)
    assert refused.status != 0
    assert "--wanted" in refused.errors
    refused = command(*common, "--wanted", tmp_path / "none" / "wanted.jsonl")
    assert refused.status != 0
    assert "choose another file with --wanted" in refused.errors


@pytest.mark.parametrize("known", [(), ("synthetic.lean",)])
def test_without_a_rival_there_is_nothing_to_gain_but_the_hole_is_wanted(known: tuple[str, ...]) -> None:
    times: Times = {"torch.rms_norm": 1000.0, **dict.fromkeys(known, 500.0)}
    rows = measured([norm(1), norm(64)], lambda context: times)
    assert contexts_of(wanted_lines(compile_rows(rows, ALL_KERNELS), rows)) == [norm(8)]
