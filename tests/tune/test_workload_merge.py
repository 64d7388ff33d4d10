"""`layerzero-tune workload merge`: what several processes recorded, as one file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.serving.workload_recorder import WorkloadRecorder
from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.lines import WorkloadLine, format_workload, parse_workload, read_workload
from layerzero_tune.workload.merge import merge_sorted
from tests.tune.command import CommandsHere
from tests.tune.test_workload import workloads

USAGE = 2


def norm(rows: int, weight: float = 1.0, dtype: str = "float32") -> WorkloadLine:
    return WorkloadLine(SelectionContext(operation="norm.rms", dtype=dtype, rows=rows, hidden_size=8), weight)


class TestMergeSorted:
    def test_equal_calls_become_one_line_in_order_of_their_fields(self) -> None:
        swiglu = WorkloadLine(SelectionContext(operation="mlp.swiglu", dtype="float32", rows=5, hidden_size=8), 9)
        merged = merge_sorted([[norm(10, 2), norm(9), norm(9, 1, "bfloat16")], [norm(9, 3), swiglu], []])
        assert merged == (swiglu, norm(9, 1, "bfloat16"), norm(9, 4), norm(10, 2))

    def test_nothing(self) -> None:
        assert merge_sorted([]) == ()

    def test_the_order_of_the_files_changes_no_bit(self) -> None:
        parts = [[norm(1, 0.1)], [norm(1, 0.2), norm(2)], [norm(1, 0.3)]]
        texts = {format_workload(merge_sorted(order)) for order in itertools.permutations(parts)}
        assert len(texts) == 1

    def test_weights_that_overflow(self) -> None:
        with pytest.raises(WorkloadError, match="weight is inf"):
            merge_sorted([[norm(1, 1.7e308)], [norm(1, 1.7e308)]])

    @given(st.lists(workloads, max_size=4))
    def test_any_workloads_keep_their_calls_and_merge_to_the_same_again(
        self, parts: list[tuple[WorkloadLine, ...]]
    ) -> None:
        merged = merge_sorted(parts)
        assert {line.context for line in merged} == {line.context for part in parts for line in part}
        assert len({line.context for line in merged}) == len(merged)
        assert sum(line.weight for line in merged) == pytest.approx(sum(line.weight for part in parts for line in part))
        assert merge_sorted([merged]) == merged
        assert merge_sorted(reversed(parts)) == merged
        if merged:
            assert parse_workload(format_workload(merged), "text") == merged


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(f"# recorded by rank 0\n{format_workload([norm(20, 5), norm(3)])}")
    second.write_text(format_workload([norm(3, 6), norm(1, 0.5)]))
    return first, second


def test_files_are_joined(command: CommandsHere, files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    ended = command("workload", "merge", *files, "--out", out)
    assert ended.status == 0
    assert ended.output == ""
    assert "3 lines" in ended.errors
    expected = (norm(1, 0.5), norm(3, 7), norm(20, 5))
    assert read_workload(out) == expected
    assert [json.loads(line).get("weight", 1) for line in out.read_text().splitlines()] == [0.5, 7, 5]
    other_order = command("workload", "merge", *reversed(files))
    assert other_order.output == out.read_text()
    # A file may grow by what is merged into it.
    assert command("workload", "merge", files[0], files[1], "--out", files[0]).status == 0
    assert read_workload(files[0]) == expected


def test_what_processes_recorded_is_joined(command: CommandsHere, tmp_path: Path) -> None:
    for name, rows in (("a", (1, 2, 2)), ("b", (2, 3))):
        recorder = WorkloadRecorder(tmp_path / name, counters=CounterGroup())
        for number in rows:
            recorder.record(norm(number).context)
        recorder.close()
    assert command("workload", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c").status == 0
    assert read_workload(tmp_path / "c") == (norm(1, 1), norm(2, 3), norm(3, 1))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"operation": "norm.rms"', "b.jsonl:3: not valid JSON"),
        (
            '{"operation": "norm.rms", "dtype": "float32", "rows": 0, "hidden_size": 8}',
            "b.jsonl:3: rows is 0, a size must be at least 1",
        ),
        (
            '{"operation": "norm.rms", "dtype": "float32", "rows": 1, "hidden_size": 8, "weight": -1}',
            "b.jsonl:3: weight is -1",
        ),
    ],
)
def test_a_malformed_line_is_named_and_nothing_is_written(
    bad: str, message: str, command: CommandsHere, files: tuple[Path, Path], tmp_path: Path
) -> None:
    files[1].write_text(f"{files[1].read_text()}{bad}\n")
    out = tmp_path / "out.jsonl"
    out.write_text("as before")
    ended = command("workload", "merge", *files, "--out", out)
    assert ended.status == 1
    assert ended.output == ""
    assert message in ended.errors.replace("\n", "")
    assert out.read_text() == "as before"


def test_files_that_are_not_there_and_places_that_cannot_be_written(
    command: CommandsHere, files: tuple[Path, Path], tmp_path: Path
) -> None:
    ended = command("workload", "merge", files[0], tmp_path / "missing.jsonl")
    assert ended.status == 1
    assert "there is no workload file" in ended.errors
    ended = command("workload", "merge", *files, "--out", tmp_path / "missing" / "out.jsonl")
    assert ended.status == 1
    assert "cannot write" in ended.errors
    assert command("workload", "merge").status == USAGE
