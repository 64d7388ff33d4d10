"""Workloads made from model configurations."""

from __future__ import annotations

from typing import Any

import pytest

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_tune.workload.errors import WorkloadError
from layerzero_tune.workload.lines import WorkloadLine, format_workload, parse_workload
from layerzero_tune.workload.make import make_workload
from layerzero_tune.workload.models import MODELS


@pytest.mark.parametrize("model", MODELS)
def test_lines_are_a_legal_workload(model: str) -> None:
    lines = make_workload(model, lengths=(1, 2, 7, 128, 400))
    assert parse_workload(format_workload(lines), model) == lines


@pytest.mark.parametrize("model", MODELS)
def test_configuration_is_consistent(model: str) -> None:
    config = MODELS[model]
    assert config.num_heads % config.num_kv_heads == 0
    assert config.encoder_layers or config.decoder_layers
    # The projections of these are square; the others choose their head dimension freely.
    if not model.startswith(("gemma", "gpt-oss", "qwen3")):
        assert config.num_heads * config.head_dim == config.hidden_size


def test_llama_with_tensor_parallelism() -> None:
    lines = make_workload("llama-3.1-8b", 4, "graph", "bfloat16", batch_sizes=(2,), lengths=(1024,))
    common: dict[str, Any] = {"dtype": "bfloat16", "mode": "graph"}
    heads = {**common, "batch_size": 2, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128}
    assert {item.context: item.weight for item in lines if item.context.operation.startswith("attention")} == {
        SelectionContext(operation="attention.causal", seq_len_q=1024, **heads): 32,
        SelectionContext(operation="attention.cross", seq_len_q=1, seq_len_k=1024, **heads): 32,
        SelectionContext(
            operation="attention.causal",
            seq_len_q=256,
            seq_len_k=1024,
            causal_alignment="bottom_right",
            **heads,
        ): 32,
        SelectionContext(operation="attention.cross", seq_len_q=256, seq_len_k=768, **heads): 32,
    }
    for rows in (2048, 2, 512):
        norms = {**common, "rows": rows, "hidden_size": 4096}
        assert WorkloadLine(SelectionContext(operation="norm.rms", **norms), 65) in lines
        assert WorkloadLine(SelectionContext(operation="norm.add_rms", **norms), 64) in lines
        swiglu = SelectionContext(operation="mlp.swiglu", **{**norms, "hidden_size": 3584})
        assert WorkloadLine(swiglu, 32) in lines
    assert len(lines) == 4 + 9


def test_gemma_has_offset_norms_and_tanh_geglu() -> None:
    lines = make_workload("gemma-2-2b", batch_sizes=(1,), lengths=(64,))
    contexts = [item.context for item in lines]
    assert {(c.operation, c.offset) for c in contexts if c.operation.startswith("norm")} == {("norm.rms", 1.0)}
    assert {c.approximate for c in contexts if c.operation == "mlp.geglu"} == {"tanh"}
    assert {item.weight for item in lines if item.context.operation == "norm.rms"} == {4 * 26 + 1}


def test_bert_is_an_encoder() -> None:
    lines = make_workload("bert-base", batch_sizes=(1,), lengths=(128,))
    assert [(item.context.operation, item.weight) for item in lines] == [("attention.full", 12), ("norm.layer", 25)]
    assert lines[1].context.has_bias


def test_whisper_attends_from_decoder_to_encoder() -> None:
    lines = make_workload("whisper-small", batch_sizes=(1,), lengths=(128,))
    lengths = {
        (item.context.operation, item.context.seq_len_q, item.context.seq_len_k)
        for item in lines
        if item.context.operation.startswith("attention")
    }
    assert lengths == {
        ("attention.full", 1500, 1500),
        ("attention.causal", 128, 128),
        ("attention.causal", 32, 128),
        ("attention.cross", 1, 128),
        ("attention.cross", 32, 96),
        *(("attention.cross", tokens, 1500) for tokens in (128, 1, 32)),
    }


def test_key_value_heads_are_repeated_over_many_devices() -> None:
    lines = make_workload("llama-3.1-70b", 16, batch_sizes=(1,), lengths=(64,))
    assert {(item.context.num_heads, item.context.num_kv_heads) for item in lines if item.context.head_dim} == {(4, 1)}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"model": "llama-3.1-8"}, r"model is 'llama-3.1-8', known models: .*did you mean 'llama-3.1-8b'\?"),
        ({"model": "qwen2.5-0.5b", "tp": 4}, "tp is 4, which does not divide .*num_heads 14; allowed: 1, 2$"),
        ({"model": "gpt2", "tp": 0}, "tp holds 0"),
        ({"model": "gpt2", "lengths": (2048,)}, "lengths are 2048, but gpt2 takes at most 1024"),
        ({"model": "gpt2", "lengths": ()}, "lengths is empty"),
        ({"model": "gpt2", "lengths": (0,)}, "lengths holds 0"),
        ({"model": "gpt2", "batch_sizes": (1.5,)}, "batch_sizes holds 1.5"),
    ],
)
def test_what_cannot_be_made(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(WorkloadError, match=reason):
        make_workload(**arguments)


def test_too_long_lengths_are_left_out() -> None:
    assert make_workload("gpt2", lengths=(64, 2048)) == make_workload("gpt2", lengths=(64,))


def test_unknown_dtype() -> None:
    with pytest.raises(ContextError, match="dtype is 'half'"):
        make_workload("gpt2", dtype="half")
