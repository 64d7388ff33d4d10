"""EC-009 to EC-016: sizes that are no power of two, unequal lengths, mixed dtypes, odd numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as sdpa

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.operations import operation_named
from layerzero_runtime.selection.transforms import Transform
from tests.scenarios.conftest import (
    CAUSAL_KERNELS,
    FULL_KERNELS,
    assert_near,
    attention,
    beside_builtin,
    by_each_kernel,
    cpu_kernel,
    each_kernel_is_right,
    exact_attention,
    kernel,
    only,
    qkv,
    reasons,
)

pytestmark = pytest.mark.usefixtures("without_tables")

CAUSAL, FULL, CROSS = "attention.causal", "attention.full", "attention.cross"
DENSE = Transform("contiguous", "", copies=True)


@pytest.mark.parametrize(
    ("batch", "length", "width"),
    [
        pytest.param(7, 16, 16, marks=pytest.mark.scenario("EC-009")),
        pytest.param(1, 513, 16, marks=pytest.mark.scenario("EC-010")),
        pytest.param(1, 13, 96, marks=pytest.mark.scenario("EC-011")),
        pytest.param(3, 7, 5, marks=[pytest.mark.scenario("EC-009"), pytest.mark.scenario("EC-011")]),
    ],
)
def test_every_builtin_kernel_is_right_for_sizes_that_are_no_power_of_two(batch: int, length: int, width: int) -> None:
    query, key, value = qkv(batch, 2, length, width)
    each_kernel_is_right(FULL_KERNELS, query, key, value)
    exact = exact_attention(query, key, value, hidden=torch.ones(length, length, dtype=torch.bool).triu(1))
    results = by_each_kernel(CAUSAL, lambda: lz.attention(query, key, value, is_causal=True))
    assert results.keys() == CAUSAL_KERNELS
    for result in results.values():
        assert_near(result, exact)


@pytest.mark.scenario("EC-010")
def test_norms_and_activations_are_right_for_odd_rows_and_widths() -> None:
    x, up, weight = torch.randn(513, 97), torch.randn(513, 97), torch.randn(97)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert_near(lz.rms_norm(x, weight), exact)
    assert_near(lz.swiglu(x, up), functional.silu(x.double()) * up)


@pytest.mark.scenario("EC-011")
def test_a_head_dimension_that_is_no_multiple_goes_to_a_kernel_without_that_limit() -> None:
    sixty_four = kernel("mine.64", priority=300, head_dim_multiple=64)
    thirty_two = kernel("mine.32", priority=200, head_dim_multiple=32)
    with beside_builtin(sixty_four, thirty_two):
        assert lz.select(attention(head_dim=128)).kernel_id == "mine.64"
        assert lz.select(attention(head_dim=96)).kernel_id == "mine.32"
        assert reasons(attention(head_dim=96), "mine.64") == (
            "HEAD_DIM_NOT_MULTIPLE_OF: head_dim is 96, required a multiple of 64"
        )
        assert lz.select(attention(head_dim=72)).kernel_id == "torch.sdpa"


@pytest.mark.scenario("EC-012")
def test_unequal_lengths_are_cross_attention_and_right_in_every_builtin_kernel() -> None:
    query, key, value = qkv(1, 2, 512, length_k=1024)
    context = SelectionContext.from_tensors(CROSS, query, key, value)
    assert (context.seq_len_q, context.seq_len_k) == (512, 1024)
    with pytest.raises(ContextError, match=r"seq_len_q 512 and seq_len_k 1024; unequal ones are attention\.cross"):
        lz.select(replace(context, operation=FULL))
    each_kernel_is_right(FULL_KERNELS, query, key, value)
    each_kernel_is_right(FULL_KERNELS, *qkv(1, 2, 40, length_k=9))


@pytest.mark.scenario("EC-012")
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_a_causal_mask_over_unequal_lengths_lies_where_the_call_says(alignment: str) -> None:
    query, key, value = qkv(1, 2, 6, length_k=20)
    shift = 14 if alignment == "bottom_right" else 0
    exact = exact_attention(query, key, value, hidden=torch.ones(6, 20, dtype=torch.bool).triu(1 + shift))
    results = by_each_kernel(
        CAUSAL, lambda: lz.attention(query, key, value, is_causal=True, causal_alignment=alignment)
    )
    assert results.keys() == CAUSAL_KERNELS
    for result in results.values():
        assert_near(result, exact)
    # A kernel that knows square masks alone is refused both.
    with beside_builtin(cpu_kernel("mine.square", operations=(CAUSAL,))):
        context = SelectionContext.from_tensors(CAUSAL, query, key, value, causal_alignment=alignment)
        assert f"causal_mask is '{alignment}', required one of 'square'" in reasons(context, "mine.square")


@pytest.mark.scenario("EC-013")
def test_tensors_of_different_dtypes_are_refused_by_name() -> None:
    query, key, value = qkv(dtype=torch.bfloat16)
    dtypes = "dtypes differ: query float16, key bfloat16, value bfloat16; convert the tensors to one dtype"
    with pytest.raises(ContextError, match=dtypes):
        lz.attention(query.half(), key, value)
    with pytest.raises(ContextError, match=dtypes):
        SelectionContext.from_tensors(FULL, query.half(), key, value)
    x = torch.randn(4, 16)
    with pytest.raises(ContextError, match="dtypes differ: gate float32, up float16"):
        lz.swiglu(x, x.half())
    with pytest.raises(ContextError, match="dtypes differ: x float32, residual bfloat16"):
        lz.add_rms_norm(x, x.bfloat16(), torch.ones(16))


@pytest.mark.scenario("EC-013")
def test_a_call_with_different_dtypes_is_refused_behind_the_fast_path_too() -> None:
    query, key, value = qkv(dtype=torch.float16)
    lz.attention(query, key, value)
    with pytest.raises(ContextError, match="dtypes differ"):
        lz.attention(query, key.bfloat16(), value.bfloat16())


@pytest.mark.scenario("EC-014")
@pytest.mark.parametrize(("produced", "casts"), [(None, (Transform("cast", "float32", copies=True),)), ("float32", ())])
def test_an_output_dtype_of_the_callers_is_the_kernels_own_or_a_cast_in_the_plan(
    produced: str | None, casts: tuple[Transform, ...]
) -> None:
    """Executed for real: with a cast the values are the kernel's in float16, exactly; without one they are finer."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
        wide = sdpa(query.float(), key.float(), value.float())
        return wide if produced == "float32" else wide.half()

    query, key, value = qkv(dtype=torch.float16)
    context = replace(SelectionContext.from_tensors(FULL, query, key, value), output_dtype="float32")
    with only(cpu_kernel("mine.attend", attend, dtypes=("float16",), produces_dtype=produced)) as snapshot:
        plan = snapshot.select(context)
        assert (plan.kernel_id, plan.post_transforms) == ("mine.attend", casts)
        operation = operation_named(FULL)
        choice = snapshot.choose(operation, context).choice
        output = snapshot.prepare(choice, operation, context).function(query, key, value, None, 0.0, None)
        # As a call is served, with the check of what the kernel gave.
        assert torch.equal(snapshot.serve(choice, operation, context, (query, key, value, None, 0.0, None)), output)
    assert output.dtype == torch.float32
    assert torch.equal(output, output.half().float()) == bool(casts)
    assert_near(output.half(), exact_attention(query, key, value))


@pytest.mark.scenario("EC-014")
def test_a_kernel_that_produces_another_dtype_is_cast_to_what_the_call_gets_by_default() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
        return sdpa(query.float(), key.float(), value.float())

    query, key, value = qkv(dtype=torch.float16)
    with only(cpu_kernel("mine.wide", attend, produces_dtype="float32")):
        plan = lz.select(SelectionContext.from_tensors(FULL, query, key, value))
        assert plan.post_transforms == (Transform("cast", "float16", copies=True),)
        output = lz.attention(query, key, value)
    assert output.dtype == torch.float16
    assert_near(output, exact_attention(query, key, value))


@pytest.mark.scenario("EC-015")
def test_subnormal_numbers_are_not_flushed_to_zero() -> None:
    """Results that are subnormal are right to a few steps of the smallest float32, 1.4e-45."""
    smallest = 2.0**-149
    query, key, value = qkv()
    tiny = value * 1e-40
    exact = exact_attention(query, key, tiny)
    results = by_each_kernel(FULL, lambda: lz.attention(query, key, tiny))
    assert results.keys() == FULL_KERNELS
    for result in results.values():
        assert float(result.abs().max()) > 0
        assert float((result.double() - exact).abs().max()) <= 16 * smallest
    gate, up = torch.randn(4, 64), torch.randn(4, 64) * 1e-40
    for result in by_each_kernel("mlp.swiglu", lambda: lz.swiglu(gate, up)).values():
        assert float((result.double() - functional.silu(gate.double()) * up).abs().max()) <= 2 * smallest


@pytest.mark.scenario("EC-015")
def test_subnormal_scores_and_rows_do_not_disturb_the_values() -> None:
    """Scores of about 0 weigh all keys alike; a row of subnormals is divided by the root of eps alone."""
    query, key, value = qkv()
    for result in by_each_kernel(FULL, lambda: lz.attention(query * 1e-40, key, value)).values():
        assert_near(result, value.double().mean(dim=2, keepdim=True).expand_as(value))
    x, weight = torch.randn(4, 64) * 1e-40, torch.randn(64)
    for result in by_each_kernel("norm.rms", lambda: lz.rms_norm(x, weight, eps=1e-6)).values():
        assert_near(result, x.double() * 1e3 * weight)


@pytest.mark.scenario("EC-016")
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["key", "value"])
def test_every_builtin_kernel_propagates_nan_and_infinities_as_written_out(odd: float, name: str) -> None:
    """In float64 written out, NaN and infinities appear in these elements; in other heads nothing changes."""
    query, key, value = qkv()
    (key if name == "key" else value)[0, 0, 3, 5] = odd
    exact = exact_attention(query, key, value)
    assert not bool(exact[0, 0].isfinite().all())
    results = by_each_kernel(FULL, lambda: lz.attention(query, key, value))
    assert results.keys() == FULL_KERNELS
    for result in results.values():
        assert torch.equal(result.isfinite(), exact.isfinite())
        assert bool(result[0, 1:].isfinite().all())
        assert_near(result[exact.isfinite()], exact[exact.isfinite()])


@pytest.mark.scenario("EC-016")
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_an_odd_query_spoils_its_own_row_alone(odd: float) -> None:
    """torch's CPU flash kernel, which is also what SDPA runs here, answers a row of NaN scores with zeros; its calls
    give what torch gives."""
    query, key, value = qkv()
    query[0, 0, 3, 5] = odd
    exact = exact_attention(query, key, value)
    results = by_each_kernel(FULL, lambda: lz.attention(query, key, value))
    others = torch.ones_like(query, dtype=torch.bool)
    others[0, 0, 3] = False
    for kernel_id, result in results.items():
        assert_near(result[others], exact[others])
        if kernel_id in ("torch.matmul", "torch.sdpa.math"):
            assert bool(result[0, 0, 3].isnan().all())
    assert torch.equal(results["torch.sdpa"].nan_to_num(), sdpa(query, key, value).nan_to_num())


@pytest.mark.scenario("EC-016")
def test_norms_and_activations_propagate_nan_and_infinities() -> None:
    x, weight, up = torch.randn(4, 16), torch.ones(16), torch.randn(4, 16)
    x[1, 2], x[2, 3] = math.nan, math.inf
    for result in by_each_kernel("norm.rms", lambda: lz.rms_norm(x, weight)).values():
        assert bool(result[1].isnan().all())
        assert bool(result[2, 3].isnan())
        assert bool(result[[0, 3]].isfinite().all())
    for result in by_each_kernel("mlp.swiglu", lambda: lz.swiglu(x, up)).values():
        assert bool(result[1, 2].isnan())
        assert float(result[2, 3]) == math.copysign(math.inf, float(up[2, 3]))
        assert int((~result.isfinite()).sum()) == 2
