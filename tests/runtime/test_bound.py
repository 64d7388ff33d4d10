"""Bound functions: right results for every size, what the table says for each, and in step with the snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import layerzero_runtime as lz
from layerzero_runtime.errors import ContextError, ContextTypeError
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.test_dispatch import FAR, IN_PLACE, LARGE, MIDDLE, SMALL, changes, kernels_in_force
from tests.runtime.test_preparation import compiling

HEADS: dict[str, Any] = {"dtype": "float32", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


@pytest.fixture(autouse=True)
def with_table(snapshot: Snapshot) -> Iterator[None]:
    yield
    lz.set_policy(None)


def qkv(length_q: int, length_k: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(batch, 4, length_q, 16),
        torch.randn(batch, 2, length_k, 16),
        torch.randn(batch, 2, length_k, 16),
    )


def test_bound_rows_agree_with_torch_at_every_size_and_width() -> None:
    rms = lz.bind("norm.rms", device="cpu", dtype="float32", hidden_size=128, eps=1e-3)
    wide = lz.bind("norm.rms", device="cpu", dtype="float32")
    add = lz.bind("norm.add_rms", device="cpu", dtype="float32", hidden_size=128)
    layer = lz.bind("norm.layer", device="cpu", dtype="float32", hidden_size=128)
    geglu = lz.bind("mlp.geglu", device="cpu", dtype="float32", hidden_size=128, approximate="tanh")

    @settings(max_examples=60, deadline=None)
    @given(leading=st.lists(st.integers(0, 9), max_size=3), times=st.integers(1, 2))
    def check(leading: list[int], times: int) -> None:
        x, other = torch.randn(*leading, 128), torch.randn(*leading, 128)
        weight, bias = torch.rand(128), torch.rand(128)
        for _ in range(times):
            torch.testing.assert_close(rms(x, weight), functional.rms_norm(x, (128,), weight, 1e-3))
            torch.testing.assert_close(wide(x, weight), functional.rms_norm(x, (128,), weight, 1e-6))
            total = x + other
            for found, right in zip(
                add(x, other, weight), (functional.rms_norm(total, (128,), weight, 1e-6), total), strict=True
            ):
                torch.testing.assert_close(found, right)
            torch.testing.assert_close(layer(x, weight, bias), functional.layer_norm(x, (128,), weight, bias))
            torch.testing.assert_close(geglu(x, other), functional.gelu(x, approximate="tanh") * other)

    check()


@pytest.mark.parametrize("operation", ["attention.full", "attention.cross", "attention.causal"])
def test_bound_attention_agrees_with_torch(operation: str) -> None:
    causal = operation == "attention.causal"
    bound = lz.bind(operation, device="cpu", **HEADS)

    @settings(max_examples=60, deadline=None)
    @given(length_q=st.integers(1, 40), length_k=st.integers(1, 40), batch=st.integers(1, 3))
    def check(length_q: int, length_k: int, batch: int) -> None:
        if operation == "attention.full":
            length_k = length_q
        elif operation == "attention.cross" and length_k == length_q:
            length_k += 1
        tensors = qkv(length_q, length_k, batch)
        right = functional.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=True)
        for _ in range(2):
            torch.testing.assert_close(bound(*tensors), right, rtol=1e-4, atol=1e-5)

    check()


def test_bottom_right_alignment_and_equal_lengths_are_promises_that_are_kept() -> None:
    chunk = lz.bind("attention.causal", device="cpu", causal_alignment="bottom_right", **HEADS)
    square = lz.bind("attention.causal", device="cpu", equal_lengths=True, **HEADS)
    tensors = qkv(6, 32)
    mask = torch.ones(6, 32).tril(26).bool()
    right = functional.scaled_dot_product_attention(*tensors, mask, enable_gqa=True)
    torch.testing.assert_close(chunk(*tensors), right, rtol=1e-4, atol=1e-5)
    tensors = qkv(16, 16)
    right = functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    for bound in (chunk, square):
        torch.testing.assert_close(bound(*tensors), right, rtol=1e-4, atol=1e-5)


def test_calls_are_counted_and_the_table_decides_by_the_sizes() -> None:
    swiglu = lz.bind("mlp.swiglu", device="cpu", dtype="float32")
    before = lz.stats()
    for sizes in (SMALL, SMALL, MIDDLE, LARGE, SMALL):
        gate = torch.randn(*sizes)
        torch.testing.assert_close(swiglu(gate, gate), functional.silu(gate) * gate)
    assert changes(before) == {"calls": 5, "hits": 5}
    swiglu(torch.randn(1000, 32), torch.randn(1000, 32))
    assert changes(before) == {"calls": 6, "hits": 5, "misses": 1}


def test_a_kernel_is_found_from_integers_alone() -> None:
    bound: Any = lz.bind("mlp.swiglu", device="cpu", dtype="float32")
    gate = torch.randn(*SMALL)
    for _ in range(2):
        torch.testing.assert_close(bound.kernel(*SMALL)(gate, gate), functional.silu(gate) * gate)
    assert bound.kernel(*SMALL) is bound.kernel(*SMALL)
    assert bound.kernel(*SMALL) is not bound.kernel(*LARGE)
    lz.set_policy(Policy(denies=(Rule(kernel=IN_PLACE),)))
    torch.testing.assert_close(bound.kernel(*SMALL)(gate, gate), functional.silu(gate) * gate)


def test_a_bound_function_follows_the_snapshot() -> None:
    ran: list[str] = []

    def mine(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ran.append("mine")
        return functional.silu(gate) * up

    swiglu = lz.bind("mlp.swiglu", device="cpu", dtype="float32", hidden_size=32)
    gate = torch.randn(*FAR)
    swiglu(gate, gate)
    spec = lz.KernelSpec(
        kernel_id="test.mine",
        operations=("mlp.swiglu",),
        platforms=("cpu",),
        dtypes=("float32",),
        library="test",
        requires=(),
        priority=500,
    )
    lz.register_kernel(spec, mine)
    try:
        for _ in range(2):
            swiglu(gate, gate)
        assert ran == ["mine"] * 2
    finally:
        lz.unregister_kernel("test.mine")
    swiglu(gate, gate)
    assert ran == ["mine"] * 2


def test_a_kernel_that_fails_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, failing = compiling()
    with kernels_in_force(kernel):
        swiglu = lz.bind("mlp.swiglu", device="cpu", dtype="float32", hidden_size=32)
        gate = torch.randn(*FAR)
        for _ in range(3):
            torch.testing.assert_close(swiglu(gate, gate), functional.silu(gate) * gate)
        assert failing.attempts == 1
        assert lz.stats().broken == ("test.compiling",)


def test_graph_mode_holds_for_bound_functions_too() -> None:
    swiglu = lz.bind("mlp.swiglu", device="cpu", dtype="float32", hidden_size=32)
    gate = torch.randn(*SMALL)
    for _ in range(2):
        swiglu(gate, gate)
    before = lz.stats()
    with lz.execution_mode("graph"):
        swiglu(gate, gate)
    swiglu(gate, gate)
    assert changes(before) == {"calls": 2, "hits": 1, "misses": 1}


def test_what_cannot_be_bound_is_refused() -> None:
    with pytest.raises(ContextError, match=r"operation is 'mlp\.gelu'"):
        lz.bind("mlp.gelu", dtype="float32")
    with pytest.raises(ContextError, match="needs num_heads"):
        lz.bind("attention.full", device="cpu", dtype="float32", head_dim=16)
    with pytest.raises(ContextError, match=r"equal_lengths is for attention\.causal"):
        lz.bind("attention.full", device="cpu", equal_lengths=True, **HEADS)
    with pytest.raises(ContextError, match="layout is 'bshd'"):
        lz.bind("attention.full", device="cpu", layout="bshd", **HEADS)
    with pytest.raises(ContextTypeError, match="no context has 'colour'"):
        lz.bind("norm.rms", device="cpu", dtype="float32", colour="red")
