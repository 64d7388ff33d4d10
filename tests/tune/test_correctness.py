"""A right kernel passes and a wrong one does not, over layouts, GQA, both causal alignments and odd sizes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerzero_runtime.accuracy import error_floor
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.operations import OPERATIONS, operation_named
from layerzero_tune.measure.correctness import Check, Trial, judge, tolerances
from layerzero_tune.measure.inputs import RandomTensors
from layerzero_tune.measure.sampling import SAMPLED_VALUES, draw_sample

DTYPES = ("float32", "bfloat16", "float16")


@st.composite
def contexts(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPES) -> SelectionContext:
    operation = draw(st.sampled_from(sorted(OPERATIONS)))
    fields: dict[str, Any] = {"operation": operation, "dtype": draw(st.sampled_from(dtypes))}
    if operation.startswith("attention."):
        kv_heads = draw(st.integers(1, 3))
        length = draw(st.integers(1, 40))
        fields |= {
            "batch_size": draw(st.integers(1, 3)),
            "num_kv_heads": kv_heads,
            "num_heads": kv_heads * draw(st.integers(1, 4)),
            "seq_len_q": length,
            "seq_len_k": length if operation == "attention.full" else draw(st.integers(1, 40)),
            "head_dim": draw(st.sampled_from([8, 16, 24])),
            "layout": draw(st.sampled_from(["bhsd", "bshd"])),
            "causal_alignment": draw(st.sampled_from(["top_left", "bottom_right"])),
            "scale": draw(st.sampled_from([None, 0.3])),
        }
    elif operation.startswith("linear."):
        fields |= {
            "dtype": "int8" if operation == "linear.int8" else "float8_e4m3fn",
            "rows": draw(st.integers(1, 40)),
            "in_features": draw(st.integers(1, 70)),
            "out_features": draw(st.integers(1, 70)),
            "scale_x": draw(st.sampled_from(["tensor", "row"])),
            "scale_w": draw(st.sampled_from(["tensor", "row"])),
            "has_bias": draw(st.booleans()),
        }
    else:
        fields |= {
            "rows": draw(st.integers(1, 40)),
            "hidden_size": draw(st.integers(1, 70)),
            "has_bias": operation == "norm.layer" and draw(st.booleans()),
            "approximate": draw(st.sampled_from(["none", "tanh"])),
        }
    return SelectionContext(**fields)


def whole_reference(context: SelectionContext) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The reference over the whole call, in float64 and rounded: the best result there is."""
    operation = operation_named(context.operation)

    def function(*arguments: Any) -> tuple[torch.Tensor, ...]:
        exact = [value.double() if isinstance(value, torch.Tensor) else value for value in arguments]
        return tuple(output.to(getattr(torch, context.result_dtype)) for output in operation.reference(context, *exact))

    return function


def prepare(context: SelectionContext, seed: int = 0) -> Check:
    return Check.prepare(operation_named(context.operation), context, RandomTensors("cpu", seed), seed)


@given(contexts(), st.integers(0, 1000))
@settings(max_examples=120, deadline=None)
def test_the_rounded_reference_passes_with_no_help_of_a_default(context: SelectionContext, seed: int) -> None:
    """So the sample and its mask are those of the whole call, and one rounding is below the floor."""
    check = prepare(context, seed)
    trial = check.run(whole_reference(context))
    assert trial.fault == ""
    floors = [error_floor(context.result_dtype)] * len(trial.errors)
    verdict = judge(trial, floors)
    assert verdict.message == ""
    assert verdict.relative_error is not None


@given(contexts(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_wrong_row_at_the_end_is_found(context: SelectionContext, data: st.DataObject) -> None:
    right = whole_reference(context)

    def wrong(*arguments: Any) -> tuple[torch.Tensor, ...]:
        outputs = right(*arguments)
        last = outputs[0].select(2 if context.layout == "bhsd" else 1, -1) if context.num_heads else outputs[0][-1]
        last.add_(1.0 + last.abs())
        return outputs

    check = prepare(context)
    trial = check.run(wrong)
    assert judge(trial, tolerances(check.written_out(), context.result_dtype)).message


CAUSAL = SelectionContext(
    operation="attention.causal",
    dtype="float32",
    batch_size=2,
    seq_len_q=20,
    seq_len_k=33,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("lengths", [(20, 33), (33, 20), (300, 600)])
def test_the_other_alignment_is_wrong(alignment: str, lengths: tuple[int, int]) -> None:
    context = replace(CAUSAL, causal_alignment=alignment, seq_len_q=lengths[0], seq_len_k=lengths[1])
    other = replace(context, causal_alignment={"top_left": "bottom_right", "bottom_right": "top_left"}[alignment])
    check = prepare(context)
    assert len(check.sample.tensors["query"][0, 0]) < lengths[0] or lengths[0] < 300
    assert not judge(check.run(whole_reference(context)), [error_floor("float32")]).message
    assert judge(check.run(whole_reference(other)), [1e-3]).message


def test_queries_without_keys_give_zeros() -> None:
    """With more queries than keys and the mask at the bottom right, the first rows have no keys."""
    context = replace(CAUSAL, causal_alignment="bottom_right", seq_len_q=33, seq_len_k=20)
    check = prepare(context)
    right = whole_reference(context)
    assert judge(check.run(right), [error_floor("float32")]).message == ""
    for value, found in ((float("nan"), "NaN or infinite"), (1.0, "relative error")):

        def wrong(*arguments: Any, value: float = value) -> torch.Tensor:
            (output,) = right(*arguments)
            output[:, :, 0] = value
            return output

        assert found in judge(check.run(wrong), [1e-2]).message


def test_swapped_key_heads_are_wrong() -> None:
    context = replace(CAUSAL, operation="attention.full", seq_len_q=33)
    reference = whole_reference(context)
    trial = prepare(context).run(lambda q, k, v, *rest: reference(q, k.flip(1), v.flip(1), *rest))
    assert judge(trial, [1e-2]).message


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_of_ordinary_accuracy_pass(dtype: str) -> None:
    """PyTorch's own ways of one computation, each beside the other as the default."""
    context = replace(CAUSAL, operation="attention.full", seq_len_q=256, seq_len_k=256, head_dim=64, dtype=dtype)
    check = prepare(context)

    def fused(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def written(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return torch.softmax(q @ k.transpose(-1, -2) * 0.125, dim=-1) @ v

    def quantised(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        step = k.abs().amax() / 127
        return fused(q, (k / step).round() * step, v)

    trials = {function.__name__: check.run(function) for function in (fused, written, quantised)}
    for default, other in (("fused", "written"), ("written", "fused")):
        verdict = judge(trials[other], tolerances(trials[default], dtype))
        assert verdict.message == "", f"{other} beside {default}"
    assert judge(trials["quantised"], tolerances(trials["fused"], dtype)).message


@pytest.mark.parametrize("rows", [3, 700])
def test_unwritten_outputs_do_not_inherit_a_right_answer(rows: int) -> None:
    """The memory of the right result is free again when the next kernel allocates its own."""
    context = SelectionContext(operation="norm.rms", dtype="float32", rows=rows, hidden_size=40)
    check = prepare(context)
    right = whole_reference(context)
    for _ in range(50):
        assert judge(check.run(right), [error_floor("float32")]).message == ""
        assert judge(check.run(lambda x, *rest: torch.empty_like(x)), [error_floor("float32")]).message


def test_written_inputs_are_found_and_restored() -> None:
    context = SelectionContext(operation="norm.add_rms", dtype="bfloat16", rows=8, hidden_size=32)
    check = prepare(context)
    right = whole_reference(context)

    def in_place(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> Any:
        outputs = right(x, residual, *rest)
        return outputs[0], residual.copy_(outputs[1])

    assert check.run(in_place) == Trial(fault="writes to its input residual", status="wrote_to_inputs")
    assert check.run(right).fault == ""


def test_a_result_that_is_an_input_does_no_harm() -> None:
    context = SelectionContext(operation="norm.add_rms", dtype="bfloat16", rows=8, hidden_size=32)
    check = prepare(context)
    assert judge(check.run(lambda x, residual, *rest: (x, residual)), (1e-2, 1e-2)).message
    assert check.run(whole_reference(context)).fault == ""


def test_every_output_has_its_own_tolerance() -> None:
    context = SelectionContext(operation="norm.add_rms", dtype="float32", rows=8, hidden_size=32)
    right = whole_reference(context)

    def second_wrong(*arguments: Any) -> Any:
        normed, total = right(*arguments)
        return normed, total * 1.001

    check = prepare(context)
    default = check.run(right)
    verdict = judge(check.run(second_wrong), tolerances(default, "float32"))
    assert "relative error 1.00e-03" in verdict.message
    assert judge(Trial((5e-3, 3e-3)), (1e-2, 2e-3)).relative_error == 3e-3


def test_a_dtype_without_a_floor_is_refused() -> None:
    with pytest.raises(ContextError, match="dtype is 'int8', correctness is defined for: float64"):
        error_floor("int8")


@pytest.mark.parametrize(
    "context",
    [
        replace(CAUSAL, batch_size=1, seq_len_q=4096, seq_len_k=4096, head_dim=64),
        replace(CAUSAL, operation="attention.cross", batch_size=3, seq_len_q=1, seq_len_k=30000, head_dim=64),
        SelectionContext(operation="norm.rms", dtype="float32", rows=3000, hidden_size=1024),
    ],
)
def test_long_calls_are_sampled_at_both_ends_and_between(context: SelectionContext) -> None:
    operation = operation_named(context.operation)
    tensors = RandomTensors("cpu", 0).draw(operation, context)
    sample = draw_sample(operation, context, tensors, random.Random(0))
    (shape,) = operation.outputs(context)
    places = torch.arange(shape[-2]).unsqueeze(1).expand(shape)
    picked = sample.pick(places)
    assert picked.shape == operation.outputs(sample.context)[0]
    assert int(picked.min()) == 0
    assert int(picked.max()) == shape[-2] - 1
    evaluated = picked[..., 0].numel() * (context.seq_len_k or context.hidden_size or 0)
    assert evaluated <= 2 * SAMPLED_VALUES
    assert len(torch.unique(picked)) >= min(shape[-2], 8)


def test_checking_costs_little() -> None:
    """The time is printed and the work asserted; the aim is 30 ms at 8 heads x 512 x 512 x 64."""
    context = replace(CAUSAL, batch_size=1, num_heads=8, num_kv_heads=8, seq_len_q=512, seq_len_k=512, head_dim=64)
    prepare(context)
    start = time.perf_counter()
    check = prepare(context)
    check.run(lambda q, k, v, *rest: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    print(f"reference and one check: {(time.perf_counter() - start) * 1e3:.1f} ms")
    assert check.sample.tensors["query"].shape[2] * 8 * 512 <= 2 * SAMPLED_VALUES
