"""Calls of no kind (masks, dropout, layout "bshd", gradients) that repeat: they are described once, and kept whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import ContextTypeError, NoKernelAvailableError
from layerzero_runtime.kernel import Kernel, KernelFunction, KernelSpec
from layerzero_runtime.operation import Operation
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.registry import Registry
from layerzero_runtime.serving import seen_calls
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.conftest import capture_in_force, registry_in_force


@contextmanager
def described() -> Iterator[list[SelectionContext]]:
    """The contexts of the calls that are described meanwhile."""
    contexts: list[SelectionContext] = []
    route = Snapshot.route

    def noted(self: Snapshot, operation: Operation, context: SelectionContext, features: Mapping[str, Any]) -> Any:
        contexts.append(context)
        return route(self, operation, context, features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Snapshot, "route", noted)
        yield contexts


def part(*shape: int) -> Tensor:
    return torch.randn(shape or (1, 2, 5, 16))


def masked() -> None:
    query, key, value, mask = part(), part(), part(), torch.rand(5, 5) < 0.9
    expected = functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(lz.attention(query, key, value, mask), expected, equal_nan=True)


def heads_last(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's attention of tensors in layout "bshd"."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def swapped() -> None:
    query, key, value = part(1, 5, 2, 16), part(1, 5, 2, 16), part(1, 5, 2, 16)
    torch.testing.assert_close(lz.attention(query, key, value, layout="bshd"), heads_last(query, key, value))


def dropped() -> None:
    assert lz.attention(part(), part(), part(), dropout_p=0.5).shape == (1, 2, 5, 16)


def recorded() -> None:
    x = torch.randn(3, 32, requires_grad=True)
    output = lz.rms_norm(x, None)
    torch.testing.assert_close(output, functional.rms_norm(x, (32,), None, 1e-6))
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert gradient.shape == x.shape


CALLS: dict[str, Callable[[], None]] = {"mask": masked, "bshd": swapped, "dropout": dropped, "gradients": recorded}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_of_no_kind_is_described_once_and_counted_each_time(
    snapshot: Snapshot, call: Callable[[], None]
) -> None:
    before = lz.stats()
    with described() as contexts:
        for _ in range(5):
            call()
    assert len(contexts) == 1
    after = lz.stats()
    counted = {name: after[name] - before.get(name, 0) for name in ("calls", "hits", "misses")}
    assert counted["calls"] == 5
    assert counted["hits"] + counted["misses"] == 5


def test_another_call_on_the_same_tensors_is_described_by_itself(snapshot: Snapshot) -> None:
    """As many heads as tokens: shapes do not tell the layouts apart."""
    query, key, value = part(1, 4, 4, 16), part(1, 4, 4, 16), part(1, 4, 4, 16)
    mask = torch.zeros(4, 4)
    calls: list[Callable[[], Tensor]] = [
        lambda: lz.attention(query, key, value, layout="bshd"),
        lambda: lz.attention(query, key, value, mask),
        lambda: lz.attention(query, key, value, is_causal=True, layout="bshd"),
        lambda: lz.attention(query, key, value, is_causal=True, layout="bshd", causal_alignment="bottom_right"),
        lambda: lz.attention(query, key, value, mask, scale=0.5),
        lambda: lz.attention(query, key, value, mask > -1),
    ]
    with described() as contexts:
        once = [call() for call in calls]
        again = [call() for call in calls]
    assert len(contexts) == len(calls)
    for first, second in zip(once, again, strict=True):
        torch.testing.assert_close(first, second)
    torch.testing.assert_close(once[0], heads_last(query, key, value))
    torch.testing.assert_close(once[1], functional.scaled_dot_product_attention(query, key, value))


def test_what_torch_is_told_meanwhile_counts(snapshot: Snapshot) -> None:
    query, key, value, mask = part(), part(), part(), torch.zeros(5, 5)
    with described() as contexts:
        for deterministic in (False, True, False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                lz.attention(query, key, value, mask)
            finally:
                torch.use_deterministic_algorithms(False)
        query.requires_grad_()
        lz.attention(query, key, value, mask)
        with torch.no_grad():
            lz.attention(query, key, value, mask)
    facts = [(context.requires_deterministic, context.requires_grad) for context in contexts]
    assert facts == [(False, False), (True, False), (False, True), (False, False)]


def test_nothing_is_kept_whole_while_a_graph_is_captured(snapshot: Snapshot) -> None:
    with described() as contexts:
        with capture_in_force():
            for _ in range(2):
                masked()
        assert not snapshot.seen.whole
        masked()
    assert [context.mode for context in contexts] == ["graph", "graph", "eager"]


def test_an_argument_of_a_wrong_type_is_named_as_ever(snapshot: Snapshot) -> None:
    weight: Any = [1.0] * 32
    with pytest.raises(ContextTypeError, match="weight must be a tensor, not list"):
        lz.rms_norm(torch.randn(3, 32), weight)


def test_a_policy_that_is_put_in_force_is_asked(snapshot: Snapshot) -> None:
    for _ in range(2):
        masked()
    lz.set_policy(Policy(denies=(Rule(kernel="torch.sdpa"),)))
    try:
        with pytest.raises(NoKernelAvailableError, match=r"by kernel torch\.sdpa"):
            masked()
    finally:
        lz.set_policy(None)


def test_a_kernel_that_fails_at_a_repeat_is_recovered_from(snapshot: Snapshot) -> None:
    calls: list[int] = []

    def load(context: SelectionContext, configuration: Mapping[str, Any]) -> KernelFunction:
        def normed(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
            calls.append(len(calls))
            if len(calls) == 3:
                raise RuntimeError("no more")
            return functional.rms_norm(x, x.shape[-1:], weight, eps)

        return normed

    own = KernelSpec(
        kernel_id="own.rms_norm",
        operations=("norm.rms",),
        platforms=("cpu",),
        dtypes=("float32",),
        supports_backward=True,
    )
    with registry_in_force(Registry((*snapshot.registry, Kernel(own, load)))):
        lz.set_policy(Policy(locks=(Rule(kernel="own.rms_norm"),)))
        try:
            for _ in range(4):
                recorded()
        finally:
            lz.set_policy(None)
    assert len(calls) >= 3


def test_so_many_are_kept_whole_and_no_more(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_calls, "MAX_WHOLE", 4)
    for rows in range(1, 12):
        lz.rms_norm(torch.randn(rows, 32, requires_grad=True), None)
    assert len(snapshot.seen.whole) == 3
