"""Workloads: files and summaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import LayerZeroError
from layerzero_runtime.operations import OPERATIONS
from layerzero_tune.workload.describe import describe_workload
from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.fields import fields_of
from layerzero_tune.workload.lines import (
    WorkloadLine,
    format_workload,
    merge_workloads,
    parse_workload,
    read_workload,
)

NORM = '{"operation": "norm.rms", "dtype": "bfloat16", "mode": "eager", "rows": 4096, "hidden_size": 4096}'
CANONICAL = NORM.replace(" ", "") + "\n"
ATTENTION = {"batch_size": 1, "seq_len_q": 8, "num_heads": 4, "head_dim": 64}


def line(operation: str = "norm.rms", dtype: str = "float32", **fields: object) -> str:
    sizes: dict[str, object] = dict(ATTENTION) if operation.startswith("attention") else {"rows": 2, "hidden_size": 8}
    return json.dumps({"operation": operation, "dtype": dtype, **sizes, **fields})


def norm(rows: int, weight: float = 1.0) -> WorkloadLine:
    return WorkloadLine(SelectionContext(operation="norm.rms", dtype="float32", rows=rows, hidden_size=8), weight)


sizes = st.integers(1, 2**40)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
    "weight_dtype": st.sampled_from(["float32", "bfloat16"]),
    "output_dtype": st.sampled_from(["float32", "bfloat16"]),
    "quant_format": st.sampled_from(["int8", "fp8"]),
    "workspace_limit": st.integers(0, 2**40),
    "mode": st.sampled_from(["eager", "graph"]),
    "layout": st.sampled_from(["bhsd", "bshd"]),
    "causal_alignment": st.sampled_from(["top_left", "bottom_right"]),
    "attn_mask": st.sampled_from(["none", "bool", "float"]),
    "approximate": st.sampled_from(["none", "tanh"]),
    "scale_x": st.sampled_from(["tensor", "row"]),
    "scale_w": st.sampled_from(["tensor", "row"]),
    "dropout_p": st.floats(0.0, 1.0),
    "scale": st.floats(allow_nan=False, allow_infinity=False),
    "offset": st.floats(allow_nan=False, allow_infinity=False),
    "stride_last_dim": st.integers(-4, 4),
}
FLAGS = ("has_weight", "has_bias", "requires_grad", "requires_deterministic", "is_contiguous")


@st.composite
def contexts(draw: st.DrawFn) -> SelectionContext:
    operation = OPERATIONS[draw(st.sampled_from(sorted(OPERATIONS)))]
    given_fields: dict[str, Any] = {"operation": operation.name}
    for name in fields_of(operation):
        if name in operation.required or name == "dtype" or (name != "operation" and draw(st.booleans())):
            strategy = st.booleans() if name in FLAGS else VALUES.get(name, sizes)
            given_fields[name] = draw(strategy)
    if "num_heads" in given_fields:
        given_fields["num_heads"] = given_fields["num_kv_heads"] * draw(st.integers(1, 16))
    if operation.name == "attention.full":
        given_fields["seq_len_k"] = given_fields["seq_len_q"]
    assume(operation.name != "attention.cross" or given_fields["seq_len_q"] != given_fields["seq_len_k"])
    return SelectionContext(**given_fields)


workloads = st.lists(
    st.builds(WorkloadLine, contexts(), st.floats(1e-300, 1e300) | st.integers(1, 10**6)),
    min_size=1,
    max_size=8,
    unique_by=lambda item: item.context,
).map(tuple)


class TestFiles:
    @given(workloads)
    def test_round_trip(self, lines: tuple[WorkloadLine, ...]) -> None:
        text = format_workload(lines)
        assert parse_workload(text, "text") == lines
        assert format_workload(parse_workload(text, "text")) == text

    def test_example_of_the_documentation(self) -> None:
        text = (
            '{"operation": "attention.causal", "dtype": "bfloat16", "mode": "graph", "batch_size": 4, '
            '"seq_len_q": 512, "seq_len_k": 512, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "weight": 1}\n'
            f"{NORM}\n"
        )
        first, second = parse_workload(text, "text")
        assert (first.weight, second.weight) == (1.0, 1.0)
        assert first.context.gqa_group == 4
        assert second.context.rows == 4096

    def test_canonical_form(self) -> None:
        text = '{"hidden_size":4096,"weight":1,"rows":4096,"dtype":"bfloat16","offset":0,"operation":"norm.rms"}'
        assert format_workload(parse_workload(text, "text")) == CANONICAL

    def test_comments_blank_lines_and_line_endings(self) -> None:
        text = f"# made by hand\r\n\r\n   \n{NORM}\r\n  # more\n"
        assert format_workload(parse_workload(text, "text")) == CANONICAL

    def test_duplicates_add_their_weights(self) -> None:
        text = "\n".join([line(weight=0.5), line(rows=3), line(mode="eager", weight=2), line()])
        assert [(item.context.rows, item.weight) for item in parse_workload(text, "text")] == [(2, 3.5), (3, 1.0)]

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("{", "not valid JSON"),
            (NORM + NORM, "not valid JSON: Extra data at column"),
            ("[1, 2]", "not a JSON object"),
            ("null", "not a JSON object"),
            ('{"rows": 1, "rows": 2}', "'rows' is given twice"),
            ("[" * 100_000, "not valid JSON"),
            (line().replace("2", "9" * 5000), "not valid JSON"),
            (line(offset=float("nan")), "NaN is no JSON number"),
            (line(offset=float("-inf")), "-Infinity is no JSON number"),
            (line(offset=0.5).replace("0.5", "1e999"), "offset is not a finite number"),
            ('{"dtype": "float32", "rows": 1, "hidden_size": 1}', "'operation' is missing"),
            ('{"operation": "norm.rms", "rows": 1, "hidden_size": 1}', "'dtype' is missing"),
            (
                line("norm.rsm"),
                r"operation is 'norm.rsm', known operations: attention.causal.*did you mean 'norm.rms'\?",
            ),
            (line().replace('"norm.rms"', "3"), "operation is 3, known operations"),
            (line().replace('"norm.rms"', '["norm.rms"]'), "operation is .*known operations"),
            (
                line(hiden_size=8),
                r"unknown field 'hiden_size' \(did you mean 'hidden_size'\?\), norm.rms has: operation",
            ),
            (line(qqqqq=8), "unknown field 'qqqqq', norm.rms has: .*hidden_size"),
            (line(device="cpu"), "unknown field 'device'"),
            (line(head_dim=64), "norm.rms has no field 'head_dim', it has: .*hidden_size"),
            (line("norm.add_rms", offset=1.0), "norm.add_rms has no field 'offset'"),
            (line("mlp.swiglu", approximate="tanh"), "mlp.swiglu has no field 'approximate'"),
            (line("attention.full", causal_alignment="top_left"), "has no field 'causal_alignment'"),
            ('{"operation": "norm.rms", "dtype": "float32", "rows": 2}', "norm.rms needs hidden_size"),
            (line("attention.causal").replace('"head_dim": 64', '"layout": "bhsd"'), "attention.causal needs head_dim"),
            (line(rows=0), "rows is 0, a size must be at least 1"),
            (line(rows=-4), "rows is -4"),
            (line(rows=4.0), "rows must be an integer, not 4.0"),
            (line(rows="4"), "rows must be an integer, not '4'"),
            (line(rows=True), "rows must be an integer"),
            (line(rows=None), "rows is null; leave the field out"),
            (line(dtype="fp32"), "dtype is 'fp32', allowed: float64, float32"),
            (line(mode="jit"), "mode is 'jit', allowed: eager, graph"),
            (line("attention.full", num_kv_heads=3), "num_heads is 4, which is not a multiple of num_kv_heads 3"),
            (line("attention.full", seq_len_k=9), "attention.full has equal lengths, not seq_len_q 8 and seq_len_k 9"),
            (line("attention.cross", seq_len_k=8), "attention.cross has unequal lengths"),
            (line("attention.cross"), "attention.cross has unequal lengths"),
            (line(weight=0), "weight is 0, required a finite number above 0"),
            (line(weight=-1.5), "weight is -1.5"),
            (line(weight="2"), "weight must be a number, not '2'"),
            (line(weight=True), "weight must be a number, not True"),
            (line(weight=None), "weight must be a number, not None"),
            (line(weight=0.5).replace("0.5", "1e999"), "weight is inf"),
            (line(weight=10**400), "weight is 1000"),
        ],
    )
    def test_malformed_line_is_named(self, text: str, reason: str) -> None:
        with pytest.raises(WorkloadError, match=rf"^a\.jsonl:3: (?s:.*){reason}"):
            parse_workload(f"# comment\n{NORM}\n{text}\n{NORM}", "a.jsonl")

    def test_all_malformed_lines_are_reported_at_once_up_to_ten(self) -> None:
        text = "\n".join([NORM, *(line(rows=-number) for number in range(1, 14)), NORM])
        with pytest.raises(WorkloadError) as raised:
            parse_workload(text, "a.jsonl")
        reported = str(raised.value).splitlines()
        assert [entry.split(": ")[0] for entry in reported[:10]] == [f"a.jsonl:{number}" for number in range(2, 12)]
        assert reported[10:] == ["and 3 more malformed lines"]

    @pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n"])
    def test_empty_workload(self, text: str) -> None:
        with pytest.raises(WorkloadError, match=r"a\.jsonl has no workload lines"):
            parse_workload(text, "a.jsonl")

    def test_files(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("\ufeff" + NORM + "\n", encoding="utf-8")
        assert format_workload(read_workload(path)) == CANONICAL
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(WorkloadError, match=r"a\.jsonl is not a text file in UTF-8"):
            read_workload(path)
        with pytest.raises(WorkloadError, match=r"no workload file .*missing\.jsonl.*workload make"):
            read_workload(tmp_path / "missing.jsonl")
        with pytest.raises(WorkloadError, match=f"cannot read the workload file {tmp_path}"):
            read_workload(tmp_path)

    def test_error_is_of_both_families(self) -> None:
        assert issubclass(WorkloadError, LayerZeroError)
        assert issubclass(WorkloadError, ValueError)


class TestMerge:
    def test_order_of_first_occurrence_and_sums(self) -> None:
        assert merge_workloads([norm(1), norm(2, 3.0)], [norm(3), norm(1, 0.25)]) == (
            norm(1, 1.25),
            norm(2, 3.0),
            norm(3),
        )

    def test_nothing(self) -> None:
        assert merge_workloads() == ()

    def test_weights_that_overflow(self) -> None:
        with pytest.raises(WorkloadError, match="weight is inf"):
            merge_workloads([norm(1, 1.7e308), norm(1, 1.7e308)])


class TestFields:
    def test_every_field_that_changes_the_key_or_a_tensor_is_allowed(self) -> None:
        assert fields_of(OPERATIONS["mlp.geglu"]) == (
            "operation",
            "dtype",
            "mode",
            "rows",
            "hidden_size",
            "output_dtype",
            "quant_format",
            "approximate",
            "requires_grad",
            "requires_deterministic",
            "is_contiguous",
            "stride_last_dim",
            "workspace_limit",
        )
        assert set(fields_of(OPERATIONS["norm.layer"])) >= {"rows", "hidden_size", "weight_dtype", "has_bias"}
        assert set(fields_of(OPERATIONS["attention.causal"])) >= {
            *("batch_size", "seq_len_q", "seq_len_k", "num_heads", "num_kv_heads", "head_dim", "v_head_dim"),
            *("causal_alignment", "layout", "attn_mask", "dropout_p", "scale", "requires_grad"),
        }


class TestSummary:
    def test_groups_by_static_key(self) -> None:
        text = "\n".join(
            [
                line("attention.causal", batch_size=2, weight=2),
                line("attention.causal", batch_size=3, seq_len_q=100),
                line("attention.causal", seq_len_q=4, seq_len_k=16, causal_alignment="bottom_right"),
                line("attention.causal", dropout_p=0.5),
                line(offset=1.0),
            ]
        )
        square, chunk, dropout, rms = describe_workload(parse_workload(text, "text"))
        assert square.to_dict() == {
            "operation": "attention.causal",
            "mode": "eager",
            "dtype": "float32",
            "features": {"head_dim": 64, "gqa_group": 1, "causal_geometry": "square"},
            "lines": 2,
            "weight": 3.0,
            "ranges": {"batch_kv_heads": [8, 12], "seq_len_q": [8, 100]},
        }
        assert dict(chunk.features)["causal_geometry"] == "bottom_right"
        assert chunk.ranges == (("batch_kv_heads", 4, 4), ("seq_len_q", 4, 4), ("seq_len_k", 16, 16))
        assert dict(dropout.features)["dropout_p"] == 0.5
        assert rms.features == (("offset", 1.0),)

    @given(workloads)
    def test_nothing_is_lost(self, lines: tuple[WorkloadLine, ...]) -> None:
        summaries = describe_workload(lines)
        assert sum(summary.lines for summary in summaries) == len(lines)
        assert sum(summary.weight for summary in summaries) == pytest.approx(sum(item.weight for item in lines))
        json.dumps([summary.to_dict() for summary in summaries])
