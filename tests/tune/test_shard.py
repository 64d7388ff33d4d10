"""`run --shard`: the parts of a run are disjoint, hold all points, and merge to what one run gives."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.operations import OPERATIONS
from layerzero_tune.compile.cell import cell_of
from layerzero_tune.results.store import ResultsStore
from layerzero_tune.search.shard import Shard, _seconds
from layerzero_tune.workload.lines import WorkloadLine
from layerzero_tune.workload.presets import preset_workload
from tests.tune.command import CommandsHere
from tests.tune.recordings import recorded_rows
from tests.tune.synthetic_results import full, norm

POINTS = [
    *(norm(rows, width) for rows in (1, 7, 64, 4000) for width in (512, 4096)),
    *(full(heads, length, batch) for heads in (8, 32) for length in (32, 500) for batch in (1, 2, 8)),
]


def parts(lines: list[WorkloadLine], count: int) -> list[tuple[WorkloadLine, ...]]:
    return [Shard(index, count).part(lines) for index in range(1, count + 1)]


@given(st.permutations(POINTS), st.integers(1, 40))
def test_every_point_is_in_one_part_whatever_the_order(points: list[object], count: int) -> None:
    ordered = [WorkloadLine(context) for context in POINTS]
    shuffled = [WorkloadLine(context) for context in points]  # type: ignore[arg-type]
    found = parts(ordered, count)
    assert sorted(repr(line) for part in found for line in part) == sorted(map(repr, ordered))
    assert [set(part) for part in parts(shuffled, count)] == [set(part) for part in found]
    for part in parts(shuffled, count):
        assert list(part) == [line for line in shuffled if line in part]


@given(st.integers(1, 40))
def test_points_of_equal_sizes_are_in_one_part(count: int) -> None:
    found = parts([WorkloadLine(context) for context in POINTS], count)
    cells = [{cell_of(line.context) for line in part} for part in found]
    assert sum(map(len, cells)) == len(set().union(*cells))


@pytest.mark.parametrize("count", [2, 3, 8])
def test_parts_take_about_the_same_time(count: int) -> None:
    lines = list(preset_workload("standard", tuple(OPERATIONS)))
    found = [_seconds(part) for part in parts(lines, count)]
    dearest = max(_seconds([line]) for line in lines)
    assert max(found) - min(found) <= dearest
    assert math.isclose(sum(found), _seconds(lines))


def test_the_merged_shards_compile_to_the_bytes_of_one_run(
    command: CommandsHere, recorded_results: Path, tmp_path: Path
) -> None:
    device = ("--device", f"recorded:{recorded_results}")
    assert command("run", *device, "--out", tmp_path / "whole").status == 0
    shards = [tmp_path / f"shard-{index}" for index in (1, 2, 3)]
    for index, out in enumerate(shards, 1):
        assert command("run", *device, "--shard", f"{index}/3", "--out", out).status == 0
    counts = [len(ResultsStore(out).contest_ids()) for out in shards]
    assert min(counts) > 0
    assert sum(counts) == len({row.contest_id for row in recorded_rows()})
    assert command("merge", *shards, "--out", tmp_path / "merged").status == 0
    compiled = []
    for results in ("whole", "merged"):
        tables = tmp_path / f"tables-{results}"
        assert command("compile", tmp_path / results, "--out", tables).status == 0
        compiled.append({path.relative_to(tables): path.read_bytes() for path in tables.rglob("*.*")})
    assert compiled[0] == compiled[1]
    assert len(compiled[0]) == 2


def test_a_dry_run_shows_the_part(command: CommandsHere, recorded_results: Path, tmp_path: Path) -> None:
    words = ("run", "--device", f"recorded:{recorded_results}", "--out", tmp_path / "out", "--dry-run", "--json")
    ended = [command(*words, "--shard", f"{index}/3") for index in (1, 2, 3)]
    planned = [json.loads(shown.output)["contests"] for shown in ended]
    points = len({row.context for row in recorded_rows()})
    assert sum(planned) == len({row.contest_id for row in recorded_rows()})
    assert f"shard 2/3: {planned[1]} of {points} points; layerzero-tune merge joins the 3 shards" in ended[1].errors
