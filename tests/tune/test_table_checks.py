"""`scripts/check_table.py`: each of its conditions holds where it should, and fails where its figure falls short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.tables.staleness import kernel_source_hash
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.store import ResultsStore
from tests.tune.synthetic_results import grid, measured, norm

SCRIPTS = Path(__file__).parents[2] / "scripts"
HEADS: dict[str, Any] = {"dtype": "bfloat16", "batch_size": 1, "num_heads": 8, "head_dim": 128}
CALLS: dict[str, dict[str, Any]] = {
    "prefill": HEADS | {"operation": "attention.causal", "seq_len_q": 64, "seq_len_k": 64},
    "bottom-right": HEADS
    | {"operation": "attention.causal", "causal_alignment": "bottom_right", "seq_len_q": 64, "seq_len_k": 128},
    "decode": HEADS | {"operation": "attention.cross", "seq_len_q": 1, "seq_len_k": 64},
    "chunks": HEADS | {"operation": "attention.cross", "seq_len_q": 2, "seq_len_k": 64},
    "full": HEADS | {"operation": "attention.full", "seq_len_q": 64},
} | {
    operation: {"operation": operation, "dtype": "bfloat16", "rows": 4, "hidden_size": 64}
    for operation in ("norm.rms", "norm.add_rms", "norm.layer", "mlp.swiglu", "mlp.geglu")
}


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def checks(name: str) -> Any:
    return import_module(f"table_checks.{name}")


def failing(conditions: Iterable[Any]) -> list[str]:
    return [condition.text for condition in conditions if not condition.holds]


def evaluation(change: Callable[[str, str, int], dict[str, Any]] = lambda kind, mode, number: {}) -> dict[str, Any]:
    """Of 60 shapes per kind and mode, all of which are as good as is asked for; `change` is told kind, mode, number."""
    good = {"hit": True, "efficiency": 1.0, "speedup": 3.0, "end_to_end": 1.1}
    shapes = [
        {"context": {**call, "mode": mode}, **good, **change(kind, mode, number)}
        for kind, call in CALLS.items()
        for mode in ("graph", "eager")
        for number in range(60)
    ]
    summaries = [{"mode": mode, "slower_than_default": 0} for mode in ("graph", "eager")]
    return {"shapes": shapes, "summaries": summaries, "unscored": []}


def test_an_evaluation_that_is_good_everywhere_passes() -> None:
    assert failing(checks("held_out").held_out_conditions(evaluation())) == []


@pytest.mark.parametrize(
    ("kind", "mode", "change", "failed"),
    [
        ("decode", "graph", {"speedup": 0.08}, ["graph, prefill, decode, chunks, full in equal parts: speedup"]),
        ("bottom-right", "graph", {"speedup": 2.9}, ["graph, bottom-right chunks: speedup"]),
        ("bottom-right", "eager", {"speedup": 0.5, "end_to_end": 0.5}, []),
        ("norm.rms", "graph", {"efficiency": 0.97}, ["graph, norm.rms: efficiency"]),
        ("norm.layer", "eager", {"efficiency": 0.96}, ["eager, norm.layer: efficiency"]),
        ("mlp.geglu", "eager", {"hit": False}, ["eager, mlp.geglu: hit rate"]),
        ("full", "eager", {"hit": False}, ["eager, attention: hit rate"]),
        ("chunks", "eager", {"end_to_end": 0.5}, ["eager, the same through lz.attention, all shapes"]),
    ],
)
def test_a_figure_that_falls_short_is_named(kind: str, mode: str, change: dict[str, Any], failed: list[str]) -> None:
    found = evaluation(lambda *place: change if place[:2] == (kind, mode) else {})
    texts = failing(checks("held_out").held_out_conditions(found))
    assert [text.rpartition(", at least")[0].rpartition(" ")[0] for text in texts] == failed


def test_one_shape_alone_is_found_by_the_least_efficiency() -> None:
    found = evaluation(
        lambda kind, mode, number: {"efficiency": 0.8} if (kind, mode, number) == ("full", "graph", 7) else {}
    )
    assert failing(checks("held_out").held_out_conditions(found)) == [
        "graph, attention: least efficiency 0.8, at least 0.85"
    ]


def test_a_shape_slower_than_the_default_and_too_few_shapes_are_found() -> None:
    found = evaluation()
    found["summaries"][1]["slower_than_default"] = 1
    found["unscored"] = [{"context": {}, "reason": "died"}]
    found["shapes"] = [shape for shape in found["shapes"] if shape["context"]["operation"] != "norm.layer"] + [
        shape for shape in found["shapes"] if shape["context"]["operation"] == "norm.layer"
    ][30:]
    assert failing(checks("held_out").held_out_conditions(found)) == [
        "held-out shapes of norm.layer 90, at least 100",
        "shapes slower than the default 1, at most 0",
        "shapes without a time 1, at most 0",
    ]


def stored(folder: Path, rows: Iterable[Measurement]) -> Path:
    kernels = {kernel.kernel_id: kernel for kernel in builtin_kernels()}
    store = ResultsStore(folder)
    store.append([replace(row, source_hash=kernel_source_hash(kernels[row.kernel_id])) for row in rows])
    return folder


def test_our_kernels_have_to_come_near_the_copy(tmp_path: Path) -> None:
    """64 MiB read and as much written, and the weight, at 2.5 TB/s; the winner is someone else's."""
    context = SelectionContext(operation="norm.rms", dtype="bfloat16", mode="graph", rows=32768, hidden_size=1024)
    moved = 2 * (2 * 32768 * 1024 + 1024)
    times = {"torch.rms_norm": 1e5, "triton.rms_norm": moved / 2.5e12 * 1e9, "quack.rms_norm": 4e4}
    results = stored(tmp_path, measured([context], lambda _: times))

    def found(copied: float) -> Iterator[Any]:
        ceilings = {"copy_bytes_per_s": copied, "matmul_flops_per_s": 7e14, "device": "a GPU", "measured_at": "today"}
        return checks("ceilings").ceiling_conditions(ceilings, results)  # type: ignore[no-any-return]

    # The machine drifts by a tenth.
    assert failing(found(2.2e12)) == []
    (text,) = failing(found(3.5e12))
    assert text.startswith("norm.rms bfloat16 32768x1024: triton.rms_norm's share of the copy 0.7")


def test_kernels_that_win_nowhere_are_listed_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    def times(context: SelectionContext) -> dict[str, float]:
        return {"torch.rms_norm": 1e6, "triton.rms_norm": 5e5, "liger.rms_norm": 5e5 + (context.rows or 0) * 1e3}

    rows = measured([replace(norm(size), mode="graph") for size in (50, 100)], times)
    found = list(checks("losers").loser_conditions(rows, {"quack": "no wheel"}))
    lines = capsys.readouterr().out.splitlines()
    assert (
        "  wins nowhere: liger.rms_norm, nearest 1.100 times the best's time (norm.rms graph float32 50x1024)" in lines
    )
    assert not any("triton.rms_norm" in line for line in lines)
    assert "  not run: quack: no wheel" in lines
    # What measured nothing has to be accounted for.
    assert {condition.text for condition in found} == {
        "flashinfer.rms_norm has no time; flashinfer-python is listed",
        "quack.rms_norm has no time; quack-kernels is listed",
        "torch.rms_norm.fused_cuda has no time; torch is listed",
    }


def test_a_kernel_that_a_screening_alone_puts_first_has_not_won(capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured([replace(norm(50), mode="graph")], lambda _: {"torch.rms_norm": 1e6, "liger.rms_norm": 5e5})
    lucky = [replace(row, samples_ns=()) if row.kernel_id == "liger.rms_norm" else row for row in rows]
    list(checks("losers").loser_conditions(lucky, {}))
    assert "wins nowhere: liger.rms_norm, nearest 0.500 times" in capsys.readouterr().out


def beside(name: str, picks: Iterable[dict[str, Any]], chosen: str = "torch.rms_norm.fused") -> dict[str, Any]:
    """An evaluation of norms of 1, 2, ... rows, all served and as fast as can be, with another table's picks beside."""
    good = {"hit": True, "chosen": chosen, "efficiency": 1.0}
    shapes = [
        {"context": norm(rows).to_dict(), **good, "beside": [good | pick]} for rows, pick in enumerate(picks, start=1)
    ]
    return {"shapes": shapes, "beside": [{"name": name}]}


@pytest.mark.parametrize(
    ("lost", "failed"), [(0.94, []), (0.92, ["live selector in removed buckets: efficiency 0.92"])]
)
def test_the_live_selector_is_judged_by_what_it_picks_in_removed_buckets(lost: float, failed: list[str]) -> None:
    found = beside("without_buckets_0", [{"efficiency": 0.5}, {"hit": False, "efficiency": lost}])
    texts = failing(checks("live").live_conditions(found))
    assert [text.partition(", at least")[0] for text in texts] == failed


def test_a_live_selector_that_was_not_evaluated_is_not_judged() -> None:
    (text,) = failing(checks("live").live_conditions(beside("second", [{"hit": False}])))
    assert text == "held-out shapes in removed buckets 0, at least 1"


def test_a_second_tuning_that_picks_otherwise_is_found() -> None:
    contexts = grid(norm, (1, 4, 16, 64, 256, 1024), (512, 1024, 2048))
    kernels = {kernel.kernel_id: kernel for kernel in builtin_kernels()}

    def tuned(fused: float) -> list[Measurement]:
        rows = measured(contexts, lambda _: {"torch.rms_norm": 1000.0, "torch.rms_norm.fused": fused})
        return [replace(row, source_hash=kernel_source_hash(kernels[row.kernel_id])) for row in rows]

    conditions = checks("second_tuning").second_tuning_conditions
    same = beside("second", [{}] * 20)
    assert failing(conditions(same, tuned(500.0), tuned(501.0))) == []
    other = beside("second", [{"chosen": "torch.rms_norm", "efficiency": 0.5}] * 20)
    assert failing(conditions(other, tuned(500.0), tuned(2000.0))) == [
        "second tuning: the same plan or a tied one 0, at least 0.98",
        "second tuning: difference of the two 0.5, at most 0.005",
    ]
    tied = beside("second", [{"chosen": "torch.rms_norm"}] * 20)
    assert failing(conditions(tied, tuned(995.0), tuned(1005.0))) == []
    assert failing(conditions(beside("first", [{}]), tuned(500.0), tuned(500.0))) == [
        "second tuning: tables evaluated beside the first 0, at least 1"
    ]
