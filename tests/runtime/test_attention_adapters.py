"""Adapters of attention kernels that need a GPU, over stand-ins of their libraries on the CPU: what they refuse, and
what they hand over. tests/gpu/test_attention_adapters.py has the real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import layerzero_runtime as lz
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.kernels import flash_attention_4, flashinfer_attention, plain_calls
from layerzero_runtime.operations import OPERATIONS
from tests.runtime import attention_stand_ins as stand_ins
from tests.runtime.attention_adapters import (
    ADAPTERS,
    H100,
    PAIRS,
    attention_call,
    loaded,
    on_h100,
    quant_format,
)
from tests.runtime.kernel_calls import Call, calls, relative_error
from tests.runtime.test_kernels import FIXED, named

each_pair = pytest.mark.parametrize(("kernel", "operation"), named(PAIRS))


@pytest.fixture
def notes() -> stand_ins.Notes:
    return []


@pytest.fixture
def flash_attention(notes: stand_ins.Notes) -> stand_ins.FlashAttention4:
    return stand_ins.FlashAttention4(notes)


@pytest.fixture
def flashinfer(notes: stand_ins.Notes) -> stand_ins.FlashInfer:
    return stand_ins.FlashInfer(notes)


@pytest.fixture(autouse=True)
def _libraries(
    notes: stand_ins.Notes,
    flash_attention: stand_ins.FlashAttention4,
    flashinfer: stand_ins.FlashInfer,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    bindings = stand_ins.Bindings(notes)
    monkeypatch.setattr(torch, "_scaled_dot_product_flash_attention", bindings.flash)
    monkeypatch.setattr(torch, "_scaled_dot_product_cudnn_attention", bindings.cudnn)
    monkeypatch.setattr(torch, "_scaled_dot_product_efficient_attention", bindings.efficient)
    forward = SimpleNamespace(default=bindings.efficient_forward)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", forward)
    monkeypatch.setattr(flash_attention_4, "library_version", lambda name: "4.0.0b36")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a process without a GPU compiles for another
    monkeypatch.setattr(plain_calls, "_warned", set())
    with stand_ins.modules(
        flash_attn__cute={"flash_attn_func": flash_attention.flash_attn_func},
        flash_attn__cute__interface={"_flash_attn_fwd": flash_attention},
        flash_attn__flash_attn_interface={"flash_attn_func": stand_ins.flash_attn_func(notes, gives_tuple=False)},
        flash_attn_interface={"flash_attn_func": stand_ins.flash_attn_func(notes, gives_tuple=True)},
        flashinfer__prefill={
            "get_single_prefill_module": flashinfer.get_single_prefill_module,
            "single_prefill_with_kv_cache": flashinfer.single_prefill_with_kv_cache,
        },
        flashinfer__utils={"MaskMode": stand_ins.MaskMode, "TensorLayout": stand_ins.TensorLayout},
        xformers__ops__fmha__common={"Inputs": stand_ins.Inputs},
        xformers__ops__fmha__triton_splitk={"FwOp": stand_ins.split_k_operator(notes)},
        sageattention={"sageattn": stand_ins.sage_attention(notes)},
    ):
        yield


def assert_right(kernel: Kernel, call: Call) -> None:
    before = [argument.clone() for argument in call.arguments[:3]]
    output = loaded(kernel, call.context)(*call.arguments)
    assert output.shape == OPERATIONS[call.context.operation].outputs(call.context)[0]
    assert output.dtype == call.arguments[0].dtype
    # The stand-ins compute in float64: what is left is the rounding of the output, and of Sage's smoothed keys.
    allowed = 2e-2 if quant_format(kernel) else 4e-3
    assert relative_error((output,), call.reference()) < allowed
    assert all(torch.equal(now, then) for now, then in zip(call.arguments[:3], before, strict=True))


# Of random calls hardly one has the lengths that Sage's kernel without a mask takes.
@pytest.mark.parametrize(
    ("kernel", "operation"), named([pair for pair in PAIRS if pair[0].kernel_id != "sageattention.full"])
)
def test_accepted_calls_reach_the_library_in_its_own_form(kernel: Kernel, operation: str) -> None:
    @settings(FIXED, max_examples=10)
    @given(
        calls(operation, "bfloat16")
        .map(lambda call: on_h100(call, quant_format=quant_format(kernel)))
        .filter(lambda call: call.accepts(kernel))
    )
    def agrees(call: Call) -> None:
        assert_right(kernel, call)

    agrees()


@each_pair
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_both_layouts_give_the_layout_of_the_query(kernel: Kernel, operation: str, layout: str) -> None:
    length_k = 128 if operation == "attention.cross" else 64
    call = attention_call(operation, (1, 6, 2, 64, length_k, 64), layout=layout, quant_format=quant_format(kernel))
    assert call.accepts(kernel)
    assert_right(kernel, call)


@pytest.mark.parametrize(
    "kernel_id", [k for k, kernel in ADAPTERS.items() if "bottom_right" in kernel.spec.causal_geometries]
)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(("length_q", "length_k"), [(1, 64), (24, 64), (64, 24), (64, 1)])
def test_bottom_right_masks_are_the_librarys_own_and_rows_without_a_key_zero(
    kernel_id: str, layout: str, length_q: int, length_k: int
) -> None:
    call = attention_call("attention.causal", (1, 6, 2, length_q, length_k, 64), layout=layout)
    assert call.accepts(ADAPTERS[kernel_id])
    assert_right(ADAPTERS[kernel_id], call)


@pytest.mark.parametrize("kernel_id", ["torch.sdpa.efficient", "torch.sdpa.cudnn"])
@pytest.mark.parametrize(("length_q", "length_k"), [(1, 64), (24, 64), (64, 24)])
def test_top_left_masks_over_other_numbers_of_keys_are_torchs(kernel_id: str, length_q: int, length_k: int) -> None:
    for heads in (2, 6):
        call = attention_call("attention.causal", (2, heads, 2, length_q, length_k, 64), causal_alignment="top_left")
        assert call.accepts(ADAPTERS[kernel_id])
        assert_right(ADAPTERS[kernel_id], call)


@pytest.mark.parametrize("kernel_id", ["torch.sdpa.cudnn", "flashinfer.single_fa2"])
def test_keys_further_apart_than_32_bits_count_are_copied(kernel_id: str) -> None:
    call = attention_call("attention.cross", (1, 2, 2, 1, 9, 64))
    query, key, *rest = call.arguments
    # Of memory that is never touched but for these rows.
    room = torch.empty(9, 2**28, dtype=torch.float16)
    far = room[None, :, :128].view(1, 9, 2, 64).transpose(1, 2)
    far.copy_(key)
    assert_right(ADAPTERS[kernel_id], Call(call.context, (query, far, *rest)))


@each_pair
def test_an_unusual_scale_is_handed_over(kernel: Kernel, operation: str) -> None:
    length_k = 128 if operation == "attention.cross" else 64
    call = attention_call(operation, (1, 4, 2, 64, length_k, 64), quant_format=quant_format(kernel))
    scaled = Call(replace(call.context, scale=0.4), (*call.arguments[:5], 0.4))
    assert scaled.accepts(kernel)
    assert_right(kernel, scaled)


@each_pair
@pytest.mark.parametrize("change", ["address", "stride", "expanded"])
def test_tensors_that_cannot_be_loaded_in_vectors_are_copied(kernel: Kernel, operation: str, change: str) -> None:
    length_k = 128 if operation == "attention.cross" else 64
    call = attention_call(operation, (1, 4, 2, 64, length_k, 64), quant_format=quant_format(kernel))
    key = call.arguments[1]
    if change == "address":
        odd = torch.empty(key.numel() + 1, dtype=key.dtype)[1:].view(key.shape).copy_(key)
    elif change == "stride":
        odd = torch.empty(*key.shape[:3], 67, dtype=key.dtype)[..., :64].copy_(key)
    else:
        odd = key[:, :1].expand(key.shape)
    arguments = (call.arguments[0], odd, *call.arguments[2:])
    assert_right(kernel, Call(call.context, arguments))


# Launches past the public functions.


def test_a_last_block_of_keys_that_is_not_full_is_wrong_in_sage_attention() -> None:
    """Why its limit is there."""
    kernel = ADAPTERS["sageattention.full"]
    call = attention_call("attention.cross", (1, 2, 2, 64, 80, 64), quant_format="int8")
    assert not call.accepts(kernel)
    output = loaded(kernel, call.context)(*call.arguments)
    assert relative_error((output,), call.reference()) > 0.1


def stats_of(name: str, load: Callable[[], Any]) -> int:
    before = lz.stats().get(name, 0)
    load()
    return lz.stats().get(name, 0) - before


def test_flash_attention_4_compiles_when_loaded_and_then_starts_what_was_compiled(
    notes: stand_ins.Notes, flash_attention: stand_ins.FlashAttention4
) -> None:
    call = attention_call("attention.causal", (2, 8, 2, 100, 200, 64))
    cache = flash_attention.compile_cache
    function = ADAPTERS["flash_attn_4.forward"].load(call.context, {})
    assert flash_attention.compile_cache is cache
    assert len(flash_attention.compiled) == 1
    notes.clear()
    for _ in range(2):
        output = function(*call.arguments)
        assert relative_error((output,), call.reference()) < 1e-3
        assert output.is_contiguous(), "as the query is"
    assert notes == ["compiled", "compiled"]
    assert len(flash_attention.compiled) == 1


def test_flash_attention_4_that_was_compiled_before_is_found_again(
    notes: stand_ins.Notes, flash_attention: stand_ins.FlashAttention4
) -> None:
    call = attention_call("attention.full", (1, 4, 2, 64, 64, 64))
    for _ in range(2):
        function = ADAPTERS["flash_attn_4.forward"].load(call.context, {})
    assert len(flash_attention.compiled) == 1
    notes.clear()
    function(*call.arguments)
    assert notes == ["compiled"]


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_flash_attention_4_compiles_nothing_more_for_odd_tensors(
    layout: str, notes: stand_ins.Notes, flash_attention: stand_ins.FlashAttention4
) -> None:
    """Whatever comes, in serving or under capture."""
    call = attention_call("attention.full", (1, 4, 4, 64, 64, 64), layout=layout)
    query, key, *rest = call.arguments
    function = ADAPTERS["flash_attn_4.forward"].load(call.context, {})
    notes.clear()
    for odd in (key[:, :1].expand(key.shape), torch.empty(key.numel() + 1).half()[1:].view(key.shape).copy_(key)):
        odd_call = Call(call.context, (query, odd, *rest))
        assert relative_error((function(*odd_call.arguments),), odd_call.reference()) < 1e-3
    assert notes == ["compiled", "compiled"]
    assert len(flash_attention.compiled) == 1


def test_parameters_reach_flash_attention_4_without_their_gradients() -> None:
    for layout in ("bhsd", "bshd"):
        call = attention_call("attention.full", (1, 4, 2, 64, 64, 64), layout=layout)
        leaves = tuple(argument.requires_grad_() for argument in call.arguments[:3])
        with torch.no_grad():
            loaded(ADAPTERS["flash_attn_4.forward"], call.context)(*leaves, None, 0.0, None)


@pytest.mark.parametrize("unknown", ["version", "arguments", "two starts", "no cache"])
def test_an_unknown_flash_attention_4_is_called_by_its_public_function_and_counted(
    unknown: str,
    notes: stand_ins.Notes,
    flash_attention: stand_ins.FlashAttention4,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if unknown == "version":
        monkeypatch.setattr(flash_attention_4, "library_version", lambda name: "4.1.0")
    elif unknown == "arguments":
        flash_attention.further = (7,)
    else:
        public = flash_attention.flash_attn_func
        from flash_attn import cute

        def twice(*arguments: Any, **options: Any) -> Any:
            if unknown == "two starts":
                public(*arguments, **options)
            else:
                flash_attention.notes.append("public")
                return stand_ins.in_bshd(*arguments), None
            return public(*arguments, **options)

        monkeypatch.setattr(cute, "flash_attn_func", twice)
    call = attention_call("attention.full", (1, 4, 2, 64, 64, 64))
    kernel = ADAPTERS["flash_attn_4.forward"]
    with caplog.at_level("WARNING", logger="layerzero"):
        assert stats_of("flash_attn_4_plain_calls", lambda: [kernel.load(call.context, {}) for _ in range(2)]) == 2
    assert len(caplog.records) == 1
    assert "flash-attn-4 4.0.0" in caplog.text
    function = kernel.load(call.context, {})
    notes.clear()
    output = function(*call.arguments)
    assert "public" in notes
    assert relative_error((output,), call.reference()) < 1e-3


def test_flash_attention_4_starts_nothing_itself_where_its_choice_depends_on_sizes(notes: stand_ins.Notes) -> None:
    call = attention_call("attention.full", (1, 4, 2, 64, 64, 64))
    context = replace(call.context, device=replace(H100, compute_capability=(10, 0)))
    function = ADAPTERS["flash_attn_4.forward"].load(context, {})
    notes.clear()
    function(*call.arguments)
    assert notes == ["public", "compiled"]


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_flashinfer_compiles_when_loaded_and_then_starts_what_was_compiled(
    backend: str, notes: stand_ins.Notes, flashinfer: stand_ins.FlashInfer
) -> None:
    call = attention_call("attention.causal", (1, 8, 2, 100, 200, 64))
    function = ADAPTERS[f"flashinfer.single_{backend}"].load(call.context, {})
    dtypes = (torch.float16,) * 3
    assert flashinfer.built == [(backend, *dtypes, 64, 64, 0, False, False, False)]
    function(*call.arguments)
    function(*call.arguments)
    assert notes == [f"{backend} compiled"] * 2


def test_an_unknown_flashinfer_is_called_by_its_public_function_and_counted(
    notes: stand_ins.Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashinfer_attention, "_RUN_PARAMETERS", ("q", "k"))
    call = attention_call("attention.causal", (1, 8, 2, 100, 200, 64))
    kernel = ADAPTERS["flashinfer.single_fa2"]
    assert stats_of("flashinfer_plain_calls", lambda: kernel.load(call.context, {})) == 1
    assert_right(kernel, call)
    assert notes == ["fa2 public"]


def test_groups_are_further_dimensions_in_xformers(notes: stand_ins.Notes) -> None:
    kernel = ADAPTERS["xformers.split_k"]
    for heads in (2, 6):
        assert_right(kernel, attention_call("attention.cross", (2, heads, 2, 5, 64, 64)))
    assert notes == ["4 dimensions", "5 dimensions"]


def test_keys_are_smoothed_once_and_not_in_place_for_sage_attention(notes: stand_ins.Notes) -> None:
    for layout in ("bhsd", "bshd"):
        assert_right(
            ADAPTERS["sageattention.causal"],
            attention_call("attention.causal", (1, 4, 2, 64, 64, 64), layout=layout, quant_format="int8"),
        )
    assert notes == ["HND", "NHD"]


@settings(FIXED)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_memory_efficient_attention_copies_no_keys_where_batch_and_heads_are_one_in_memory(
    batch: int, kv_heads: int, group: int, is_dense: bool
) -> None:
    shapes = ((batch, kv_heads * group, 3, 16), (batch, kv_heads, 5, 16))
    query, key = (torch.randn(shape).half() for shape in shapes)
    if not is_dense:
        query, key = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key))
    seen: list[torch.Tensor] = []

    def binding(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **others: Any) -> Any:
        seen.append(key)
        return (stand_ins.attention(query, key, value),)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_scaled_dot_product_efficient_attention", binding)
        context = replace(OPERATIONS["attention.cross"].describe(query, key, key), device=H100)
        output = ADAPTERS["torch.sdpa.efficient"].load(context, {})(query, key, key, None, 0.0, None)
    torch.testing.assert_close(output, stand_ins.attention(query, key, key), rtol=1e-2, atol=1e-2)
    [handed] = seen
    if is_dense or group == 1:
        assert handed.data_ptr() == key.data_ptr()
    assert group == 1 or handed.stride(1) == 0
