"""Operations: the key builder, sizes and the way back, contexts of tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import detect_device
from layerzero_runtime.errors import ContextError, ContextTypeError
from layerzero_runtime.operation import Operation
from layerzero_runtime.operations import OPERATIONS, operation_named

NAMES = (
    "attention.causal",
    "attention.full",
    "attention.cross",
    "norm.rms",
    "norm.add_rms",
    "norm.layer",
    "mlp.swiglu",
    "mlp.geglu",
    "linear.fp8",
    "linear.int8",
)
SIZE = st.integers(1, 2**20)


def attention(operation: str = "attention.causal", **changes: Any) -> SelectionContext:
    sizes = {"batch_size": 2, "seq_len_q": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    return SelectionContext(operation=operation, **{"dtype": "float32", **sizes, **changes})


def norm(operation: str = "norm.rms", **changes: Any) -> SelectionContext:
    return SelectionContext(operation=operation, **{"dtype": "float32", "rows": 3, "hidden_size": 16, **changes})


def linear(operation: str = "linear.fp8", **changes: Any) -> SelectionContext:
    sizes = {"rows": 3, "in_features": 16, "out_features": 8}
    dtype = "int8" if operation == "linear.int8" else "float8_e4m3fn"
    return SelectionContext(operation=operation, **{"dtype": dtype, **sizes, **changes})


@st.composite
def described_calls(draw: st.DrawFn) -> tuple[Operation, SelectionContext]:
    operation = OPERATIONS[draw(st.sampled_from(NAMES))]
    if operation.name.startswith("linear"):
        sizes = {name: draw(SIZE) for name in ("rows", "in_features", "out_features")}
        scalings = {name: draw(st.sampled_from(("tensor", "row"))) for name in ("scale_x", "scale_w")}
        return operation, linear(operation.name, has_bias=draw(st.booleans()), **sizes, **scalings)
    if not operation.name.startswith("attention"):
        return operation, norm(operation.name, rows=draw(SIZE), hidden_size=draw(SIZE))
    length_q = draw(SIZE)
    length_k = length_q if operation.name == "attention.full" or draw(st.booleans()) else draw(SIZE)
    if operation.name == "attention.cross" and length_k == length_q:
        length_k += 1
    kv_heads = draw(st.integers(1, 9))
    return operation, attention(
        operation.name,
        batch_size=draw(st.integers(1, 99)),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.integers(1, 9)),
        seq_len_q=length_q,
        seq_len_k=length_k,
        causal_alignment=draw(st.sampled_from(("top_left", "bottom_right"))),
    )


def test_the_operations_are_those_of_the_design() -> None:
    assert tuple(OPERATIONS) == NAMES


@pytest.mark.scenario("FS-030")
@pytest.mark.parametrize("name", ["attention", "attention.casual", "", None, ["norm.rms"]])
def test_an_unknown_operation_is_named_with_the_known_ones(name: Any) -> None:
    with pytest.raises(ContextError, match=r"known operations: attention.causal, ") as caught:
        operation_named(name)
    assert repr(name) in str(caught.value)


@given(described_calls())
def test_with_sizes_is_the_inverse_of_sizes(call: tuple[Operation, SelectionContext]) -> None:
    operation, context = call
    sizes = operation.sizes(context)
    assert len(sizes) == len(operation.axes)
    back = operation.with_sizes(context, sizes)
    operation.validate(back)
    assert operation.sizes(back) == sizes
    assert operation.static_key(back) == operation.static_key(context)
    assert operation.with_sizes(back, sizes) == back


@given(described_calls(), st.data())
def test_monotone_attributes_never_fall(call: tuple[Operation, SelectionContext], data: st.DataObject) -> None:
    operation, context = call
    sizes = operation.sizes(context)
    grown = tuple(size + data.draw(st.integers(0, 2**20)) for size in sizes)
    if operation.axes[-1].is_tied(context):
        grown = (*grown[:-1], grown[-2])
    larger = operation.with_sizes(context, grown)
    for name in operation.monotone:
        assert getattr(larger, name) >= getattr(operation.with_sizes(context, sizes), name)


@given(described_calls())
def test_shapes_and_cost_are_defined(call: tuple[Operation, SelectionContext]) -> None:
    operation, context = call
    assert operation.flops(context) > 0
    for tensor in operation.present_tensors(context):
        assert all(size >= 1 for size in tensor.shape(context))
    assert all(math.prod(shape) >= 1 for shape in operation.outputs(context))


def test_a_missing_size_is_named() -> None:
    for context, missing in (
        (attention(seq_len_q=None, seq_len_k=None), "seq_len_q, seq_len_k"),
        (attention(head_dim=None), "head_dim"),
        (norm(hidden_size=None), "hidden_size"),
    ):
        operation = operation_named(context.operation)
        with pytest.raises(ContextError, match=f"{operation.name} needs {missing}; required: "):
            operation.validate(context)


# Features that a plan may depend on: two contexts that differ in one of them never share a key.
UNUSUAL: tuple[tuple[SelectionContext, dict[str, Any]], ...] = (
    (attention(), {"mode": "graph"}),
    (attention(), {"dtype": "bfloat16", "weight_dtype": "bfloat16"}),
    (attention(), {"head_dim": 32, "v_head_dim": 32}),
    (attention(), {"num_heads": 2}),
    (attention(), {"v_head_dim": 32}),
    (attention(), {"layout": "bshd"}),
    (attention(), {"attn_mask": "bool"}),
    (attention(), {"attn_mask": "float"}),
    (attention(), {"dropout_p": 0.1}),
    (attention(), {"scale": 0.3}),
    (attention(), {"requires_grad": True}),
    (attention(), {"requires_deterministic": True}),
    (attention(), {"seq_len_k": 9}),
    (attention(seq_len_k=9), {"causal_alignment": "bottom_right"}),
    (norm(), {"offset": 1.0}),
    (norm(), {"weight_dtype": "bfloat16"}),
    (norm(), {"has_weight": False}),
    (norm(), {"requires_grad": True}),
    (norm("norm.add_rms"), {"weight_dtype": "bfloat16"}),
    (norm("norm.layer"), {"has_bias": True}),
    (norm("mlp.geglu"), {"approximate": "tanh"}),
    (norm("mlp.swiglu"), {"requires_deterministic": True}),
)


@pytest.mark.parametrize(("context", "change"), UNUSUAL, ids=lambda value: str(value) if type(value) is dict else "")
def test_features_are_in_the_static_key(context: SelectionContext, change: dict[str, Any]) -> None:
    operation = operation_named(context.operation)
    other = SelectionContext(**{**context.to_dict(), **change})
    assert operation.static_key(other) != operation.static_key(context)


def test_the_alignment_of_a_square_mask_is_no_feature() -> None:
    operation = OPERATIONS["attention.causal"]
    assert operation.static_key(attention(causal_alignment="bottom_right")) == operation.static_key(attention())
    assert [axis.name for axis in operation.axes_of(attention())] == ["batch_kv_heads", "seq_len_q"]
    assert len(operation.axes_of(attention(seq_len_k=9))) == 3


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


@pytest.mark.scenario("EC-012")
def test_contexts_of_attention_tensors() -> None:
    query, key, value = tensors((2, 8, 5, 16), (2, 4, 9, 16), (2, 4, 9, 12), dtype=torch.bfloat16)
    context = SelectionContext.from_tensors("attention.cross", query, key, value, None, 0.0, 0.25)
    assert context == SelectionContext(
        operation="attention.cross",
        dtype="bfloat16",
        batch_size=2,
        num_heads=8,
        num_kv_heads=4,
        seq_len_q=5,
        seq_len_k=9,
        head_dim=16,
        v_head_dim=12,
    )
    assert context.device == detect_device("cpu")
    swapped = (tensor.transpose(1, 2) for tensor in (query, key, value))
    described = SelectionContext.from_tensors("attention.cross", *swapped, layout="bshd")
    assert (described.seq_len_q, described.num_heads, described.seq_len_k, described.layout) == (5, 8, 9, "bshd")
    assert not described.is_contiguous


@pytest.mark.scenario("NO-003")
def test_contexts_of_rows() -> None:
    x, weight = tensors((2, 3, 16), (16,))
    context = SelectionContext.from_tensors("norm.rms", x, weight.bfloat16(), 1e-6, 1.0)
    assert (context.rows, context.hidden_size, context.weight_dtype, context.offset) == (6, 16, "bfloat16", 1.0)
    assert not SelectionContext.from_tensors("norm.rms", x, None).has_weight
    assert SelectionContext.from_tensors("norm.layer", x, weight, weight).has_bias
    assert SelectionContext.from_tensors("mlp.geglu", x[0, 0], x[0, 0], approximate="tanh").rows == 1


def test_strides_gradients_and_determinism_are_seen() -> None:
    x = torch.zeros(4, 16)
    assert SelectionContext.from_tensors("mlp.swiglu", x, x[:, :].T.contiguous().T).stride_last_dim == 4
    assert not SelectionContext.from_tensors("mlp.swiglu", x, torch.zeros(4, 32)[:, :16]).is_contiguous
    assert SelectionContext.from_tensors("mlp.swiglu", x, torch.zeros(4, 1)[:, :0].new_zeros(4, 16)).is_contiguous
    needing = torch.zeros(16, requires_grad=True)
    assert SelectionContext.from_tensors("norm.rms", x, needing).requires_grad
    with torch.no_grad():
        assert not SelectionContext.from_tensors("norm.rms", x, needing).requires_grad
    mask = torch.zeros(2, 2, requires_grad=True)
    four = torch.zeros(1, 1, 2, 16)
    assert SelectionContext.from_tensors("attention.full", four, four, four, mask).requires_grad
    assert SelectionContext.from_tensors("attention.full", four, four, four, mask).attn_mask == "float"
    assert SelectionContext.from_tensors("attention.full", four, four, four, mask > 0).attn_mask == "bool"


X, FOUR = torch.zeros(4, 16), torch.zeros(1, 2, 3, 16)


@pytest.mark.scenario("EC-013")
@pytest.mark.parametrize(
    ("operation", "arguments", "message"),
    [
        ("mlp.swiglu", (X, X.double()), "dtypes differ: gate float32, up float64"),
        ("mlp.swiglu", (X, X[:2]), r"shapes differ: gate \(4, 16\), up \(2, 16\)"),
        ("mlp.swiglu", (X, X.to("meta")), "different devices: gate cpu, up meta"),
        ("mlp.swiglu", (torch.tensor(1.0), torch.tensor(1.0)), "no dimension"),
        ("mlp.swiglu", (X.to(torch.complex64),) * 2, "dtype is complex64, allowed: "),
        ("mlp.swiglu", (X[:0], X[:0]), "rows is 0"),
        ("norm.rms", (X, X[0, :8]), r"weight has shape \(8,\), required \(16,\)"),
        ("norm.layer", (X, X[0], X[0].double()), "dtypes differ: weight float32, bias float64"),
        ("norm.rms", (X, X[0], 1e-6, math.nan), "offset is nan"),
        ("attention.full", (FOUR, FOUR.half(), FOUR), "dtypes differ: query float32, key float16, value float32"),
        ("attention.full", (FOUR[0], FOUR, FOUR), "query has 3 dimensions, required 4"),
        ("attention.full", (FOUR, FOUR[..., :8], FOUR), "shapes do not fit together"),
        ("attention.full", (FOUR, FOUR, FOUR[:, :, :2]), "shapes do not fit together"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(operation: str, arguments: Any, message: str) -> None:
    with pytest.raises(ContextError, match=message):
        SelectionContext.from_tensors(operation, *arguments)


@pytest.mark.parametrize("other", [None, [1.0], X.numpy(), 3])
def test_what_is_no_tensor_is_refused(other: Any) -> None:
    for operation, arguments, name in (
        ("mlp.swiglu", (X, other), "up"),
        ("norm.rms", (other, X[0]), "x"),
        ("norm.layer", (X, X[0], other if other is not None else 0), "bias"),
        ("attention.full", (FOUR, other, FOUR), "key"),
        ("attention.full", (FOUR, FOUR, FOUR, other if other is not None else 0), "attn_mask"),
    ):
        with pytest.raises(ContextTypeError, match=f"{name} must be a tensor, not "):
            SelectionContext.from_tensors(operation, *arguments)
