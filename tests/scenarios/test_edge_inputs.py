"""EC-001 to EC-008: empty, tiny and largest inputs, alignment and strides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as sdpa

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextError
from layerzero_runtime.selection.transforms import Transform
from tests.scenarios.conftest import (
    CAUSAL_KERNELS,
    FULL_KERNELS,
    Attend,
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


@pytest.mark.scenario("EC-001")
@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (lambda: lz.attention(*(torch.empty(0, 4, 8, 16),) * 3), [(0, 4, 8, 16)]),
        (lambda: lz.attention(*(torch.empty(2, 4, 0, 16),) * 3), [(2, 4, 0, 16)]),
        (
            lambda: lz.attention(torch.empty(2, 0, 4, 16), *(torch.randn(2, 8, 4, 16),) * 2, layout="bshd"),
            [(2, 0, 4, 16)],
        ),
        (lambda: lz.attention(torch.empty(2, 4, 0, 16), *qkv()[1:], is_causal=True), [(2, 4, 0, 16)]),
        (lambda: lz.rms_norm(torch.empty(0, 16), torch.ones(16)), [(0, 16)]),
        (lambda: lz.add_rms_norm(torch.empty(2, 0, 16), torch.empty(2, 0, 16), torch.ones(16)), [(2, 0, 16)] * 2),
        (lambda: lz.layer_norm(torch.empty(0, 16), torch.ones(16), torch.ones(16)), [(0, 16)]),
        (lambda: lz.swiglu(torch.empty(0, 16), torch.empty(0, 16)), [(0, 16)]),
        (lambda: lz.geglu(torch.empty(4, 0), torch.empty(4, 0)), [(4, 0)]),
    ],
)
def test_an_empty_call_gives_empty_outputs_without_selection_or_kernel(
    call: Callable[[], Tensor | tuple[Tensor, ...]], shapes: list[tuple[int, ...]]
) -> None:
    """The registry is empty, so that a selection or a kernel would be an error."""
    with only() as snapshot:
        before = lz.stats()["empty"]
        result = call()
        assert lz.stats()["empty"] == before + 1
        assert (snapshot.live_cache.computed.value, lz.stats()["calls"]) == (0, 0)
    outputs = result if isinstance(result, tuple) else (result,)
    assert [tuple(output.shape) for output in outputs] == shapes


@pytest.mark.scenario("EC-001")
def test_queries_without_keys_give_what_torch_gives() -> None:
    query, empty = torch.randn(2, 4, 3, 16), torch.empty(2, 4, 0, 16)
    assert torch.equal(lz.attention(query, empty, empty), sdpa(query, empty, empty))


@pytest.mark.scenario("EC-001")
@pytest.mark.parametrize("size", ["batch_size", "seq_len_q", "num_heads", "head_dim"])
def test_a_described_call_has_no_size_of_zero(size: str) -> None:
    with pytest.raises(ContextError, match=f"{size} is 0, a size must be at least 1"):
        attention(**{size: 0})


@pytest.mark.scenario("EC-002")
def test_a_single_token_attends_to_itself() -> None:
    query, key, value = qkv(1, 1, 1, 16)
    for operation, kernels in ((FULL, FULL_KERNELS), (CAUSAL, CAUSAL_KERNELS)):
        results = by_each_kernel(operation, partial(lz.attention, query, key, value, is_causal=operation == CAUSAL))
        assert results.keys() == kernels
        for result in results.values():
            assert torch.equal(result, value)


@pytest.mark.scenario("EC-002")
def test_a_single_element_is_normalised_and_gated() -> None:
    x, weight = torch.tensor([[-3.0]]), torch.tensor([2.0])
    assert_near(lz.rms_norm(x, weight, eps=0.0), torch.tensor([[-2.0]]))
    assert_near(lz.swiglu(x, weight[None]), functional.silu(x.double()) * 2.0)


@pytest.mark.parametrize(
    ("bound", "field", "at", "operation"),
    [
        pytest.param("max_batch_size", "batch_size", 64, FULL, marks=pytest.mark.scenario("EC-003")),
        pytest.param("max_seq_len", "seq_len_q", 4096, FULL, marks=pytest.mark.scenario("EC-004")),
        pytest.param("max_seq_len", "seq_len_k", 4096, CROSS, marks=pytest.mark.scenario("EC-004")),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_bound_takes_its_own_value_and_refuses_the_next(
    bound: str, field: str, at: int, operation: str, reverse: bool
) -> None:
    """In either order, so that no answer of the cache serves on the other side of the bound."""
    limit: dict[str, Any] = {bound: at}
    with beside_builtin(kernel("mine.bounded", priority=200, **limit)):
        for size in sorted((at - 1, at, at + 1), reverse=reverse):
            context = attention(operation=operation, **{field: size})
            expected = "mine.bounded" if size <= at else "torch.sdpa"
            assert lz.select(context).kernel_id == expected
        refusal = f"{field.upper()}_NOT_AT_MOST: {field} is {at + 1}, required <= {at}"
        assert refusal in reasons(attention(operation=operation, **{field: at + 1}), "mine.bounded")


@pytest.mark.scenario("EC-003")
@pytest.mark.scenario("EC-004")
def test_a_kernel_runs_at_its_capacity_and_another_beyond_it() -> None:
    attend = Attend()
    with beside_builtin(cpu_kernel("mine.bounded", attend, max_batch_size=3, max_seq_len=9)):
        for batch, length in ((3, 9), (4, 9), (3, 10)):
            query, key, value = qkv(batch, 2, length)
            assert_near(lz.attention(query, key, value), exact_attention(query, key, value))
    assert [tuple(query.shape) for query, _, _ in attend.given] == [(3, 2, 9, 16)]


def misaligned(tensor: Tensor) -> Tensor:
    """A dense copy whose data begins one element behind an aligned address."""
    shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    shifted.copy_(tensor)
    assert shifted.is_contiguous()
    assert shifted.data_ptr() % 16 == tensor.element_size()
    return shifted


@pytest.mark.scenario("EC-005")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_builtin_kernel_reads_misaligned_tensors_right(dtype: torch.dtype) -> None:
    query, key, value = (misaligned(part) for part in qkv(2, 3, 17, 24, dtype=dtype))
    each_kernel_is_right(FULL_KERNELS, query, key, value)
    x, weight = misaligned(torch.randn(5, 33).to(dtype)), misaligned(torch.randn(33).to(dtype))
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    for result in by_each_kernel("norm.rms", lambda: lz.rms_norm(x, weight)).values():
        assert_near(result, exact)
    for result in by_each_kernel("mlp.swiglu", lambda: lz.swiglu(x, x)).values():
        assert_near(result, functional.silu(x.double()) * x)


@pytest.mark.scenario("EC-006")
def test_a_kernel_for_dense_tensors_is_left_out_of_calls_on_views() -> None:
    attend = Attend()
    query, key, value = (part[:, :, ::2] for part in qkv(length=16))
    with beside_builtin(cpu_kernel("mine.dense", attend, requires_contiguous=True)):
        output = lz.attention(query, key, value)
        assert not attend.given
        context = SelectionContext.from_tensors(FULL, query, key, value)
        assert reasons(context, "mine.dense") == "IS_CONTIGUOUS_NOT_ONE_OF: is_contiguous is False, required True"
        assert lz.select(context).kernel_id == "torch.sdpa"
        lz.attention(query.contiguous(), key.contiguous(), value.contiguous())
        assert len(attend.given) == 1
    assert_near(output, exact_attention(query, key, value))


@pytest.mark.scenario("EC-006")
def test_every_builtin_kernel_reads_views_right() -> None:
    each_kernel_is_right(FULL_KERNELS, *(part[:, :, ::2] for part in qkv(length=16)))
    # One tensor that holds queries, keys and values side by side, as a projection gives them.
    together = torch.randn(2, 9, 3, 4, 16)
    query, key, value = (together[:, :, index].transpose(1, 2) for index in range(3))
    each_kernel_is_right(FULL_KERNELS, query, key, value)


@pytest.mark.scenario("EC-007")
def test_a_kernel_that_needs_stride_1_is_left_out_where_the_last_dimension_has_another() -> None:
    attend = Attend()
    query, key, value = (part.transpose(2, 3) for part in qkv(1, 2, 16, 8))
    with beside_builtin(cpu_kernel("mine.stride1", attend, requires_last_dim_stride1=True)):
        output = lz.attention(query, key, value)
        assert not attend.given
        context = SelectionContext.from_tensors(FULL, query, key, value)
        assert context.stride_last_dim == 8
        refusal = "STRIDE_LAST_DIM_NOT_ONE_OF: stride_last_dim is 8, required 1"
        assert reasons(context, "mine.stride1") == reasons(context, "torch.sdpa.flash_cpu") == refusal
        assert_near(output, exact_attention(query, key, value))
        # Views whose last dimension is dense are no matter.
        query, key, value = (part[:, :, ::2] for part in qkv(length=16))
        lz.attention(query, key, value)
        assert len(attend.given) == 1


@pytest.mark.scenario("EC-007")
def test_one_tensor_with_another_stride_is_enough() -> None:
    """Query and key are dense, the value alone is transposed; what reads it as dense would read other elements."""
    query, key, _ = qkv(1, 2, 8, 16)
    value = torch.randn(1, 2, 16, 8).transpose(2, 3)
    each_kernel_is_right(FULL_KERNELS, query, key, value)


@pytest.mark.scenario("EC-008")
def test_a_sparse_view_is_made_dense_for_the_only_kernel_there_is() -> None:
    """Every element 64 others apart; the copy is named in the plan and really made."""
    attend = Attend()
    query, key, value = (part[..., ::64] for part in qkv(1, 2, 8, 16 * 64))
    with only(cpu_kernel("mine.dense", attend, requires_contiguous=True, requires_last_dim_stride1=True)):
        plan = lz.select(SelectionContext.from_tensors(FULL, query, key, value))
        assert (plan.pre_transforms, plan.post_transforms) == ((DENSE,), ())
        for _ in range(2):
            assert_near(lz.attention(query, key, value), exact_attention(query, key, value))
    for given in attend.given:
        for part, own in zip(given, (query, key, value), strict=True):
            assert part.is_contiguous()
            assert torch.equal(part, own)
    assert query.stride(-1) == 64


@pytest.mark.scenario("EC-008")
def test_the_copy_is_no_way_around_other_limits() -> None:
    with beside_builtin(cpu_kernel("mine.dense", requires_contiguous=True, max_seq_len=4)):
        query, key, value = (part[:, :, ::2] for part in qkv(length=16))
        plan = lz.select(SelectionContext.from_tensors(FULL, query, key, value))
        assert (plan.kernel_id, plan.pre_transforms) == ("torch.sdpa", ())
