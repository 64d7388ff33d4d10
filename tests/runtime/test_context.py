"""Contexts: what is refused, what is filled in, and the way to and from dictionaries."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerzero_runtime.context import ALIGNMENTS, APPROXIMATIONS, DTYPES, FIELD_NAMES, LAYOUTS, MASKS, MODES
from layerzero_runtime.context import SelectionContext as Context
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import ContextError, ContextTypeError, LayerZeroError

SIZES = (
    "batch_size",
    "seq_len_q",
    "seq_len_k",
    "head_dim",
    "v_head_dim",
    "num_heads",
    "num_kv_heads",
    "rows",
    "hidden_size",
)
ATTENTION: dict[str, Any] = {
    "operation": "attention.causal",
    "dtype": "bfloat16",
    "batch_size": 2,
    "seq_len_q": 5,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
}


@given(st.dictionaries(st.sampled_from(("batch_size", "seq_len_q", "seq_len_k", "num_heads")), st.integers(1, 10**6)))
def test_a_resized_call_is_that_call_described_with_other_sizes(sizes: dict[str, int]) -> None:
    device = DeviceSpec("cpu", "Some CPU")
    fields_given = ATTENTION | {"scale": 0.3, "is_contiguous": False, "device": device}
    call = Context(**fields_given)
    try:
        changes: dict[str, Any] = {**sizes}
        expected = replace(call, **changes)
    except ContextError as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            call.resized(sizes)
    else:
        assert call.resized(sizes) == expected
        assert call.resized(sizes).device is device


@pytest.mark.parametrize(("size", "kind"), [(0, ContextError), (-3, ContextError), (1.5, ContextTypeError)])
def test_a_size_that_no_call_has_is_refused(size: Any, kind: type[LayerZeroError]) -> None:
    with pytest.raises(kind, match=f"seq_len_k .*{size}"):
        Context(**ATTENTION).resized({"seq_len_k": size})


def attention(**changes: Any) -> Context:
    return Context(**{**ATTENTION, **changes})


@pytest.mark.scenario("FS-031")
@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("size", [-1, 0, -(2**70)])
def test_sizes_below_one_are_refused_at_once(field: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"{field} is {size}, .*at least 1") as caught:
        attention(**{field: size})
    assert isinstance(caught.value, LayerZeroError)


@pytest.mark.scenario("FS-032")
@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("size", ["4", 4.0, True, [4], math.nan])
def test_sizes_that_are_no_integers_are_refused(field: str, size: object) -> None:
    with pytest.raises(TypeError, match=f"{field} must be an integer, not ") as caught:
        attention(**{field: size})
    assert repr(size) in str(caught.value)


@pytest.mark.parametrize(
    "field", ["dtype", "mode", "layout", "causal_alignment", "attn_mask", "approximate", "weight_dtype"]
)
def test_names_are_checked_and_the_allowed_ones_listed(field: str) -> None:
    with pytest.raises(ContextError, match=f"{field} is 'fp8', allowed: ") as caught:
        attention(**{field: "fp8"})
    assert {"dtype": "bfloat16", "mode": "graph", "layout": "bshd"}.get(field, "") in str(caught.value)
    with pytest.raises(ContextTypeError, match=f"{field} must be a string"):
        attention(**{field: 4})


@pytest.mark.parametrize(
    "field", ["requires_grad", "requires_deterministic", "is_contiguous", "has_weight", "has_bias"]
)
def test_flags_take_true_and_false_alone(field: str) -> None:
    for value in (0, 1, "yes", None):
        with pytest.raises(ContextTypeError, match=f"{field} must be true or false"):
            attention(**{field: value})


@pytest.mark.parametrize("field", ["dropout_p", "scale", "offset"])
def test_numbers_are_checked(field: str) -> None:
    for wrong in ("0.1", True, [0.1]):
        with pytest.raises(ContextTypeError, match=f"{field} must be a number"):
            attention(**{field: wrong})
    for value in (math.nan, math.inf, -math.inf, 10**400):
        with pytest.raises(ContextError, match=f"{field} is .*, required a finite number"):
            attention(**{field: value})
    assert isinstance(getattr(attention(**{field: 1}), field), float)


def test_other_wrong_values() -> None:
    for dropout in (-0.1, 1.5):
        with pytest.raises(ContextError, match=f"dropout_p is {dropout}, allowed is 0 to 1"):
            attention(dropout_p=dropout)
    for stride in (1.0, "1", True):
        with pytest.raises(ContextTypeError, match="stride_last_dim must be an integer"):
            attention(stride_last_dim=stride)
    with pytest.raises(ContextTypeError, match="operation must be a string"):
        attention(operation=None)
    with pytest.raises(ContextTypeError, match="device must be a DeviceSpec, not 'cpu'"):
        attention(device="cpu")
    with pytest.raises(ContextError, match="num_heads is 8, which is not a multiple of num_kv_heads 3"):
        attention(num_kv_heads=3)


def test_defaults_follow_from_what_is_given() -> None:
    context = Context(operation="attention.full", dtype="float16", batch_size=3, seq_len_q=7, num_heads=4, head_dim=32)
    assert (context.num_kv_heads, context.seq_len_k, context.v_head_dim, context.weight_dtype) == (4, 7, 32, "float16")
    assert (context.mode, context.layout, context.causal_alignment, context.scale) == (
        "eager",
        "bhsd",
        "top_left",
        None,
    )
    norm = Context(operation="norm.rms", dtype="float32", rows=2, hidden_size=8)
    assert (norm.batch_kv_heads, norm.gqa_group, norm.score_elements, norm.causal_mask) == (None, None, None, None)


def test_derived_features() -> None:
    context = attention(seq_len_k=9, causal_alignment="bottom_right", v_head_dim=32)
    assert (context.gqa_group, context.batch_kv_heads, context.score_elements) == (4, 4, 2 * 8 * 5 * 9)
    assert (context.causal_mask, context.other_v_head_dim, context.mixed_weight_dtype) == ("bottom_right", 32, None)
    assert attention(causal_alignment="bottom_right").causal_mask == "square"
    assert attention(operation="attention.full").causal_mask is None
    assert Context(operation="norm.rms", dtype="bfloat16", weight_dtype="float32").mixed_weight_dtype == "float32"


@pytest.mark.scenario("EC-024")
@pytest.mark.parametrize("head_dim", [1, 33, 64, 96, 128, 256])
def test_the_usual_scale_is_no_feature(head_dim: int) -> None:
    for scale in (1 / math.sqrt(head_dim), head_dim**-0.5):
        context = attention(head_dim=head_dim, scale=scale)
        assert context.scale is None
        assert context == attention(head_dim=head_dim)
    other = attention(head_dim=head_dim, scale=1.001 / math.sqrt(head_dim))
    assert other.scale is not None
    assert not other.scale_is_usual


def test_a_device_is_no_part_of_equality() -> None:
    context = attention()
    placed = context.with_device(DeviceSpec("cpu", "Some CPU"))
    assert placed == context
    assert hash(placed) == hash(context)
    assert (context.platform, placed.platform) == (None, "cpu")
    assert placed.to_dict() == context.to_dict()


@st.composite
def contexts(draw: st.DrawFn) -> Context:
    """Any context that may be made, whatever its operation needs."""
    sizes: dict[str, Any] = {}
    for name in SIZES:
        if draw(st.booleans()):
            sizes[name] = draw(st.integers(1, 2**40))
    if "num_kv_heads" in sizes and "num_heads" in sizes:
        sizes["num_heads"] *= sizes["num_kv_heads"]
    number = st.floats(-1e9, 1e9)
    values: dict[str, st.SearchStrategy[Any]] = {
        "dtype": st.sampled_from(DTYPES),
        "weight_dtype": st.sampled_from(("", *DTYPES)),
        "mode": st.sampled_from(MODES),
        "layout": st.sampled_from(LAYOUTS),
        "causal_alignment": st.sampled_from(ALIGNMENTS),
        "attn_mask": st.sampled_from(MASKS),
        "approximate": st.sampled_from(APPROXIMATIONS),
        "dropout_p": st.floats(0, 1) | st.integers(0, 1),
        "scale": st.none() | number,
        "offset": number | st.integers(-3, 3),
        **{name: st.booleans() for name in ("requires_grad", "requires_deterministic", "is_contiguous", "has_weight")},
        "has_bias": st.booleans(),
        "stride_last_dim": st.integers(-4, 4),
    }
    chosen: dict[str, Any] = {name: draw(strategy) for name, strategy in values.items()}
    return Context(operation=draw(st.sampled_from(("attention.causal", "norm.layer", "x"))), **sizes, **chosen)


@given(contexts())
def test_a_dictionary_leads_back_to_the_same_context(context: Context) -> None:
    written = context.to_dict()
    assert set(written) <= set(FIELD_NAMES)
    assert Context(**written) == context
    again = Context(**json.loads(json.dumps(written)))
    assert again == context
    assert json.dumps(again.to_dict()) == json.dumps(written)


@given(contexts())
def test_equal_contexts_are_written_alike(context: Context) -> None:
    """Ids are hashes of what is written: 1 and 1.0, or a default given and left out, must not make two jobs of one."""
    explicit = Context(**{f.name: getattr(context, f.name) for f in fields(context)})
    assert explicit == context
    assert json.dumps(explicit.to_dict()) == json.dumps(context.to_dict())
    assert replace(context) == context


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert attention(seq_len_k=5, v_head_dim=64, offset=0, scale=0.125).to_dict() == {**ATTENTION, "mode": "eager"}
    assert list(attention().to_dict()) == [name for name in FIELD_NAMES if name in attention().to_dict()]
