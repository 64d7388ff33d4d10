"""Groups of models, workloads drawn for them, and the committed ones: what evaluations measure, no tuning has seen."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operations import OPERATIONS, operation_named
from layerzero_tune.workload import serving
from layerzero_tune.workload.cuda_grids import CUDA_GRIDS
from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.lines import WorkloadLine, format_workload, parse_workload, read_workload
from layerzero_tune.workload.make import make_workload
from layerzero_tune.workload.memory import fits
from layerzero_tune.workload.model_share import divides
from layerzero_tune.workload.models import GROUPS, MODELS, ModelConfig, models_named
from layerzero_tune.workload.sample import sample_lines
from layerzero_tune.workload.serving import draw_serving
from layerzero_tune.workload.unseen import unseen_lines
from tests.tune.command import CommandsHere
from tests.tune.synthetic_results import full

ROOT = Path(__file__).parents[2]
COMMITTED = {name: ROOT / "tables" / "workloads" / f"{name}.jsonl" for name in ("tuned", "held-out")}
DEVICES = (1, 2, 4, 8)
SERVING = ("--tp", "1,2,4,8", "--mode", "eager,graph", "--dtype", "bfloat16,float16")
LONGEST = 131072


def shapes(config: ModelConfig) -> tuple[int, ...]:
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    return (*heads, config.hidden_size, config.intermediate_size)


# The groups.


def test_held_out_models_share_no_shapes_with_tuned_ones() -> None:
    tuned, held_out = GROUPS["tuned"], GROUPS["held-out"]
    assert len(MODELS) == len(tuned) + len(held_out)
    assert not {shapes(model) for model in tuned.values()} & {shapes(model) for model in held_out.values()}
    assert not {model.source for model in tuned.values()} & {model.source for model in held_out.values()}


@pytest.mark.parametrize("group", GROUPS)
def test_every_kind_of_model_is_in_both_groups(group: str) -> None:
    models = list(GROUPS[group].values())
    assert len(models) >= 15
    decoders = [model for model in models if model.decoder_layers]
    assert any(model.num_heads == model.num_kv_heads for model in decoders)
    assert any(model.num_heads > model.num_kv_heads for model in decoders)
    assert any(model.encoder_layers and not model.decoder_layers for model in models)
    assert any(model.encoder_layers and model.decoder_layers for model in models)
    assert {model.norm for model in models} == {"rms", "layer"}
    assert {model.norm_offset for model in models} == {0.0, 1.0}
    assert {model.activation for model in models} == {"swiglu", "geglu_tanh", "none"}


def test_more_than_twenty_models_are_tuned_a_multi_query_one_among_them() -> None:
    assert len(GROUPS["tuned"]) > 20
    assert any(model.num_kv_heads == 1 for model in GROUPS["tuned"].values())
    assert {64, 96, 128, 192, 256} <= {model.head_dim for model in GROUPS["tuned"].values()}


def test_held_out_models_have_heads_of_tuned_ones() -> None:
    def heads(group: str) -> set[tuple[int, int]]:
        return {(model.head_dim, model.num_heads // model.num_kv_heads) for model in GROUPS[group].values()}

    assert heads("held-out") - heads("tuned") == {(128, 2)}  # of qwen2.5-3b on eight devices


def test_presets_of_gpus_measure_no_held_out_model() -> None:
    tuned = GROUPS["tuned"].values()
    for grid in CUDA_GRIDS.values():
        assert set(grid.hidden_sizes) <= {model.hidden_size for model in tuned}
        assert set(grid.intermediate_sizes) <= {model.intermediate_size for model in tuned}
        assert set(grid.heads) <= {(model.num_heads, model.num_kv_heads, model.head_dim) for model in tuned}
        assert len({(heads // kv_heads, dim) for heads, kv_heads, dim in grid.heads}) == len(grid.heads)


def test_names_and_groups_stand_for_models_once_each() -> None:
    assert models_named(("held-out", "gpt2", "phi-3-mini")) == (*GROUPS["held-out"], "gpt2")
    assert models_named(("no-such-model",)) == ("no-such-model",)


def test_an_encoder_of_fixed_length_takes_no_other() -> None:
    lines = make_workload("vit-base", batch_sizes=(3,), lengths=(4096,))
    (attention,) = (line.context for line in lines if line.context.operation == "attention.full")
    assert (attention.seq_len_q, attention.seq_len_k) == (197, 197)
    with pytest.raises(WorkloadError, match="bert-base takes at most 512"):
        make_workload("bert-base", lengths=(4096,))


# Drawn points.


@pytest.mark.parametrize("model", MODELS)
def test_drawn_calls_are_legal_fit_into_memory_and_stay_within_the_model(model: str) -> None:
    config = MODELS[model]
    for tp in (number for number in DEVICES if divides(model, number)):
        lines = draw_serving(model, tp, "graph", "bfloat16", 3)
        assert parse_workload(format_workload(lines), model) == lines
        for context in (line.context for line in lines):
            assert fits(context, 80 * 10**9)
            assert (context.batch_size or 1) <= 256
            if context.seq_len_k is not None:
                assert context.seq_len_k in (config.encoder_length, *range(config.max_length + 1))
                assert (context.num_heads, context.head_dim) == (config.num_heads // tp, config.head_dim)
            if context.causal_alignment == "bottom_right":
                assert context.seq_len_q is not None
                assert 2 * context.seq_len_q <= (context.seq_len_k or 0)
                assert context.seq_len_q <= 8192


def test_points_that_the_memory_does_not_hold_are_drawn_again_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(memory_bytes: int) -> list[SelectionContext]:
        monkeypatch.setattr(serving, "_MEMORY_BYTES", memory_bytes)
        return [line.context for tp in DEVICES for line in draw_serving("llama-3.1-70b", tp, "graph", "bfloat16", 1)]

    few, many = drawn(4 * 10**9), drawn(80 * 10**9)
    assert all(fits(context, 4 * 10**9) for context in few)
    assert not all(fits(context, 4 * 10**9) for context in many)
    assert drawn(1) == []


def test_all_kinds_of_calls_are_drawn_as_often_as_asked() -> None:
    for model, draws in (("llama-3.1-8b", 4), ("whisper-small", 2), ("vit-base", 3)):
        config = MODELS[model]
        found = Counter(kind_of(line.context) for line in draw_serving(model, 1, "eager", "float16", draws))
        decoder = draws if config.decoder_layers else 0
        encoder = draws if config.encoder_layers else 0
        across = decoder if encoder else 0
        # A decode's and a prefill's attention to an encoder, and a chunk's; a chunk's to what lies before it.
        assert (found["prefill"], found["chunk"], found["full"]) == (decoder, decoder, encoder)
        assert found["decode"] == decoder + across
        assert found["cross"] == 2 * across + decoder
        rows = 2 * decoder + encoder
        assert found["norm.rms" if config.norm == "rms" else "norm.layer"] == rows
        assert found["mlp.swiglu"] == (rows if config.activation == "swiglu" else 0)


def kind_of(context: SelectionContext) -> str:
    if context.operation == "attention.causal":
        return "prefill" if context.seq_len_q == context.seq_len_k else "chunk"
    if context.operation == "attention.cross":
        return "decode" if context.seq_len_q == 1 else "cross"
    return "full" if context.operation == "attention.full" else context.operation


def test_equal_arguments_draw_equal_points_and_others_draw_others() -> None:
    drawn = [
        draw_serving("llama-3.1-8b", *arguments, draws=1)
        for arguments in product((1, 2), ("eager", "graph"), ("bfloat16", "float16"))
    ]
    assert drawn[0] == draw_serving("llama-3.1-8b", 1, "eager", "bfloat16", draws=1)
    lengths = [line.context.seq_len_k for lines in drawn for line in lines if kind_of(line.context) == "decode"]
    assert len(set(lengths)) == len(drawn)


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_the_numbers_of_devices_share_the_range_of_lengths_and_batches(draws: int) -> None:
    """One quarter each, so that every model has short and long sequences, few and many."""
    lengths, batches = Counter[int](), Counter[int]()
    for tp in DEVICES:
        for context in (line.context for line in draw_serving("llama-3.1-8b", tp, "graph", "bfloat16", draws)):
            if kind_of(context) == "decode":
                lengths[quarter(context.seq_len_k or 0, 128, LONGEST)] += 1
                batches[quarter(context.batch_size or 0, 1, 256)] += 1
    assert lengths == dict.fromkeys(range(4), draws)
    # The longest do not fit in every batch, and sizes are rounded.
    assert set(batches) == set(range(4))


def quarter(size: int, low: int, high: int) -> int:
    return min(3, int(4 * math.log(size / low) / math.log(high / low)))


@pytest.mark.parametrize(("draws", "reason"), [(0, "draws holds 0"), (-1, "draws holds -1")])
def test_so_many_points_cannot_be_drawn(draws: int, reason: str) -> None:
    with pytest.raises(WorkloadError, match=reason):
        draw_serving("gpt2", 1, "eager", "bfloat16", draws)


# What a tuning on another workload has not seen.


def norm(rows: int, width: int, dtype: str = "bfloat16") -> WorkloadLine:
    return WorkloadLine(SelectionContext(operation="norm.rms", dtype=dtype, rows=rows, hidden_size=width))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from(("bfloat16", "float16"))), max_size=6),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from(("bfloat16", "float16"))), max_size=6),
)
def test_unseen_lines_are_others_of_the_key_between_its_smallest_and_largest_sizes(
    lines: list[tuple[int, int, str]], tuned: list[tuple[int, int, str]]
) -> None:
    def is_unseen(rows: int, width: int, dtype: str) -> bool:
        alike = [(r, w) for r, w, d in tuned if d == dtype]
        return (
            bool(alike)
            and (rows, width) not in alike
            and all(
                min(sizes) <= size <= max(sizes)
                for size, sizes in zip((rows, width), zip(*alike, strict=True), strict=True)
            )
        )

    found = unseen_lines([norm(*line) for line in lines], [norm(*line) for line in tuned])
    assert found == tuple(norm(*line) for line in lines if is_unseen(*line))


def test_heads_of_another_batch_are_no_other_sizes_to_a_table() -> None:
    tuned = [WorkloadLine(full(12 * batch, 512, batch)) for batch in (1, 4, 8)]
    of_16_heads = [WorkloadLine(full(16 * batch, 512, batch)) for batch in (3, 5)]
    assert unseen_lines(of_16_heads, tuned) == (of_16_heads[1],)


# The command, and the committed files.


def test_the_committed_workloads_are_those_that_the_script_makes(command: CommandsHere, tmp_path: Path) -> None:
    script = (ROOT / "scripts" / "serving_workloads.sh").read_text().replace("\\\n", "")
    assert f"serving=({' '.join(SERVING)})" in script
    for variable, value in {
        '"${serving[@]}"': " ".join(SERVING),
        "$out": str(tmp_path),
        "$drawn": str(tmp_path),
    }.items():
        script = script.replace(variable, value)
    commands = [shlex.split(line) for line in script.splitlines() if line.startswith("layerzero-tune ")]
    assert len(commands) == 10
    for _, *arguments in commands:
        assert command(*arguments).status == 0
    for path in COMMITTED.values():
        made = (tmp_path / path.name).read_bytes()
        assert made == path.read_bytes(), f"{path} is old: run scripts/serving_workloads.sh"


def test_the_committed_workloads_are_small_enough_to_keep() -> None:
    assert sum(path.stat().st_size for path in COMMITTED.values()) < 2**20


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_enough_is_held_out_in_each_mode_and_type(mode: str) -> None:
    contexts = [line.context for line in read_workload(COMMITTED["held-out"]) if line.context.mode == mode]
    operations = Counter(context.operation for context in contexts)
    assert sum(number for name, number in operations.items() if name.startswith("attention")) >= 300
    assert all(number >= 100 for name, number in operations.items() if not name.startswith("attention"))
    assert set(operations) == {name for name in OPERATIONS if not name.startswith("linear")}
    assert {context.dtype for context in contexts} == {"bfloat16", "float16"}
    assert max(context.seq_len_k for context in contexts if context.seq_len_k) > 60_000


def test_what_is_held_out_lies_within_what_is_tuned_and_is_none_of_it() -> None:
    tuned = [line.context for line in read_workload(COMMITTED["tuned"])]
    held_out = [line.context for line in read_workload(COMMITTED["held-out"])]
    ranges: dict[Any, list[set[int]]] = {}
    for context in tuned:
        operation = operation_named(context.operation)
        axes = ranges.setdefault((operation.name, operation.static_key(context)), [set() for _ in operation.axes])
        for values, size in zip(axes, operation.sizes(context), strict=True):
            values.add(size)
    for context in held_out:
        operation = operation_named(context.operation)
        axes = ranges[operation.name, operation.static_key(context)]
        for values, size in zip(axes, operation.sizes(context), strict=True):
            assert min(values) <= size <= max(values), context.to_dict()
    assert not set(tuned) & set(held_out)


@pytest.mark.parametrize("at_most", [1, 7, 10_000])
def test_a_sample_keeps_so_many_lines_of_each_operation_and_mode_in_their_order(at_most: int) -> None:
    lines = read_workload(COMMITTED["tuned"])
    kept = sample_lines(lines, at_most, seed=3)
    assert kept == sample_lines(lines, at_most, seed=3)
    found = set(kept)
    assert [line for line in lines if line in found] == list(kept)
    whole, rest = (Counter((line.context.operation, line.context.mode) for line in each) for each in (lines, kept))
    assert rest == {group: min(at_most, number) for group, number in whole.items()}
    assert found <= set(sample_lines(lines, at_most + 3, seed=3))


def test_more_draws_are_the_same_points_and_others() -> None:
    for model in ("llama-3.1-8b", "whisper-large-v3"):
        once, twice = (draw_serving(model, 1, "graph", "bfloat16", draws) for draws in (1, 2))
        assert {line.context for line in once} < {line.context for line in twice}


def test_every_line_is_as_likely_in_a_sample() -> None:
    lines = [norm(rows, 64) for rows in range(1, 11)]
    times = Counter(line for seed in range(500) for line in sample_lines(lines, 5, seed))
    assert all(200 < times[line] < 300 for line in lines)


def test_a_sample_of_a_file(command: CommandsHere, tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text(format_workload([norm(rows, 64) for rows in range(1, 11)]))
    sample = ("workload", "sample", tmp_path / "all.jsonl", "--out", tmp_path / "some.jsonl", "--at-most", 4)
    assert command(*sample, "--ops", "norm").status == 0
    assert len(read_workload(tmp_path / "some.jsonl")) == 4
    refused = command(*sample, "--ops", "attention")
    assert refused.status == 1
    assert "no call of these --ops" in refused.errors


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(WorkloadError, match="a sample of 0 lines"):
        sample_lines([norm(1, 64)], 0, seed=0)


def test_models_of_a_group_that_some_numbers_of_devices_do_not_divide_have_the_others(
    command: CommandsHere, tmp_path: Path
) -> None:
    make = ("workload", "make", "--model", "gpt2,qwen2.5-0.5b", "--ops", "attention", "--batch-sizes", 1)
    out = tmp_path / "made.jsonl"
    assert command(*make, "--lengths", 64, "--tp", "2,4,8", "--out", out).status == 0
    found = {(line.context.num_heads, line.context.head_dim) for line in read_workload(out)}
    assert found == {(6, 64), (3, 64), (7, 64)}  # gpt2 by 2 and 4, qwen2.5-0.5b by 2
    refused = command(*make, "--lengths", 64, "--tp", "8,16")
    assert refused.status == 1
    assert "tp is 8, which does not divide gpt2's num_heads 12" in refused.errors.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--mode", ""), "mode is ''"),
        (("--dtype", ","), "dtype is ','"),
        (("--ops", "linear.fp8"), "no call is left"),
        (("--draws", "-2"), "draws holds -2"),
        (("--unseen-by", "nowhere.jsonl"), "there is no workload file nowhere.jsonl"),
    ],
)
def test_nothing_can_be_made_of(command: CommandsHere, options: tuple[str, ...], reason: str) -> None:
    refused = command("workload", "make", "--model", "gpt2", "--lengths", 64, *options)
    assert refused.status == 1
    assert reason in refused.errors.replace("\n", " ")


def test_a_tuning_has_seen_the_workload_that_it_measured(command: CommandsHere, tmp_path: Path) -> None:
    tuned, other = tmp_path / "tuned.jsonl", tmp_path / "other.jsonl"
    make = ("workload", "make", "--model", "gpt2", "--lengths")
    assert command(*make, "64,256", "--out", tuned).status == 0
    assert "no call is left" in command(*make, "64,256", "--unseen-by", tuned).errors
    assert command(*make, "64,128,512", "--unseen-by", tuned, "--out", other).status == 0
    causal = [line.context for line in read_workload(other) if line.context.operation == "attention.causal"]
    # The chunk of 512 is as long as the longest chunk that was measured, but its keys are more.
    assert {(context.seq_len_q, context.seq_len_k) for context in causal} == {(128, 128), (32, 128)}
