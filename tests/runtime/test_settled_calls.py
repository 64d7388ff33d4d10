"""Misses that repeat: what the live selector chose for one serves all that no context tells from it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import layerzero_runtime as lz
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Kernel, KernelFunction, KernelSpec
from layerzero_runtime.operations import OPERATIONS
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.serving import routes
from layerzero_runtime.serving.seen_calls import REPEATS
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tensors import call_key
from layerzero_tune.workload.lines import read_workload
from tests.runtime.conftest import registry_in_force
from tests.runtime.public_calls import PublicCall, public_calls

SWIGLU = OPERATIONS["mlp.swiglu"]
# Outside the range of the synthetic table.
ROWS, WIDTH = 1000, 32


@pytest.fixture(autouse=True)
def no_policy() -> Iterator[None]:
    yield
    lz.record_workload(None)
    lz.set_policy(None)


@pytest.fixture
def selected(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> list[SelectionContext]:
    """The contexts that were selected by themselves."""
    contexts: list[SelectionContext] = []
    choose = Snapshot.choose

    def noted(self: Snapshot, operation: Any, context: SelectionContext, **options: Any) -> Any:
        contexts.append(context)
        return choose(self, operation, context, **options)

    monkeypatch.setattr(Snapshot, "choose", noted)
    return contexts


def gated(gate: Tensor, up: Tensor) -> None:
    torch.testing.assert_close(lz.swiglu(gate, up), torch.nn.functional.silu(gate) * up)


def attended(query: Tensor, key: Tensor, value: Tensor) -> None:
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(lz.attention(query, key, value), expected, atol=2e-5, rtol=2e-5)


def test_a_miss_that_repeats_is_selected_once_and_counted_each_time(selected: list[SelectionContext]) -> None:
    before = lz.stats()
    for _ in range(5):
        gated(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))
    assert len(selected) == 1
    after = lz.stats()
    counted = {name: after[name] - before.get(name, 0) for name in ("calls", "hits", "misses", "live_cache_hits")}
    assert counted == {"calls": 5, "hits": 0, "misses": 5, "live_cache_hits": 4}


def test_a_call_of_attention_that_repeats_is_selected_once_whatever_keeps_it(selected: list[SelectionContext]) -> None:
    """Beyond so many repeats the whole call is kept by its function: then strides count as they did."""
    for _ in range(2 * REPEATS + 4):
        attended(torch.randn(1, 2, 3, 24), torch.randn(1, 2, 900, 24), torch.randn(1, 2, 900, 24))
    assert len(selected) == 1
    swapped = torch.randn(1, 900, 2, 24).transpose(1, 2)
    for _ in range(2):
        attended(torch.randn(1, 2, 3, 24), swapped, torch.randn(1, 2, 900, 24))
    assert [context.is_contiguous for context in selected] == [True, False]
    assert lz.stats()["misses"] == 2 * REPEATS + 6


OTHERS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "rows": lambda: (torch.randn(ROWS + 1, WIDTH), torch.randn(ROWS + 1, WIDTH)),
    "dtype": lambda: (torch.randn(ROWS, WIDTH).double(), torch.randn(ROWS, WIDTH).double()),
    "strides": lambda: (torch.randn(WIDTH, ROWS).t(), torch.randn(ROWS, WIDTH)),
    "gradients": lambda: (torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(ROWS, WIDTH)),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_call_is_selected_by_itself(
    selected: list[SelectionContext], other: Callable[[], tuple[Tensor, Tensor]]
) -> None:
    gated(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))
    gated(*other())
    assert len(selected) == 2


def test_determinism_that_is_asked_for_later_counts(selected: list[SelectionContext]) -> None:
    tensors = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    gated(*tensors)
    torch.use_deterministic_algorithms(True)
    try:
        gated(*tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [context.requires_deterministic for context in selected] == [False, True]


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda tensor: tensor.clone(),
    "dtype": lambda tensor: tensor.to(torch.float16),
    "strides": lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor,
    "gradients": lambda tensor: tensor.clone().requires_grad_(tensor.is_floating_point()),
}


@given(public_calls(), st.sampled_from(sorted(CHANGES)))
def test_calls_of_one_key_have_one_context(call: PublicCall, change: str) -> None:
    changed = call.on(*(CHANGES[change](each) if isinstance(each, Tensor) else each for each in call.arguments))
    found: dict[Hashable, SelectionContext] = {}
    for each, recording, deterministic in product((call, changed), (True, False), (True, False)):
        torch.use_deterministic_algorithms(deterministic)
        try:
            with torch.set_grad_enabled(recording):
                assert found.setdefault(call_key(each.arguments), each.context) == each.context
        finally:
            torch.use_deterministic_algorithms(False)


def test_what_repeats_is_recorded_each_time(selected: list[SelectionContext], tmp_path: Path) -> None:
    lz.record_workload(str(tmp_path / "w.jsonl"))
    for _ in range(4):
        gated(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))
    lz.record_workload(None)
    assert len(selected) == 1
    assert [(line.context.rows, line.weight) for line in read_workload(tmp_path / "w.jsonl")] == [(ROWS, 4)]


def test_a_policy_that_is_put_in_force_is_asked(selected: list[SelectionContext]) -> None:
    tensors = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    for _ in range(2):
        gated(*tensors)
    lz.set_policy(Policy(denies=(Rule(kernel=lz.select(SWIGLU.describe(*tensors)).kernel_id),)))
    del selected[:]
    for _ in range(2):
        gated(*tensors)
    assert len(selected) == 1


def test_calls_that_rules_bear_on_are_settled_as_well(selected: list[SelectionContext]) -> None:
    """Whatever a rule can read, their contexts say."""
    lz.set_policy(Policy(denies=(Rule(kernel="torch.swiglu", when=(Limit("is_contiguous", "one_of", (False,)),)),)))
    for _ in range(3):
        gated(torch.randn(8, WIDTH), torch.randn(8, WIDTH))
        gated(torch.randn(WIDTH, 8).t(), torch.randn(8, WIDTH))
    assert [context.is_contiguous for context in selected] == [True, False]


def test_results_that_are_verified_are_verified_each_time(selected: list[SelectionContext]) -> None:
    lz.verify_results(1)
    try:
        before = lz.stats().get("verified", 0)
        for _ in range(3):
            gated(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))
        assert lz.stats()["verified"] == before + 3
        assert len(selected) == 3
    finally:
        lz.verify_results(None)


def test_a_kernel_that_fails_at_a_repeat_is_recovered_from(snapshot: Snapshot) -> None:
    calls = []

    def load(context: SelectionContext, configuration: Mapping[str, Any]) -> KernelFunction:
        def gate(first: Tensor, second: Tensor) -> Tensor:
            calls.append(first.shape)
            if len(calls) == 3:
                raise RuntimeError("no more")
            return torch.nn.functional.silu(first) * second

        return gate

    own = KernelSpec(kernel_id="own.swiglu", operations=("mlp.swiglu",), platforms=("cpu",), dtypes=("float32",))
    with registry_in_force(Registry((*snapshot.registry, Kernel(own, load)))):
        lz.set_policy(Policy(locks=(Rule(kernel="own.swiglu"),)))
        for _ in range(4):
            gated(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))
    # The third call fails, and tries once more or gives way.
    assert len(calls) >= 3


def test_so_many_are_remembered_and_no_more(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_SETTLED", 4)
    for rows in range(ROWS, ROWS + 11):
        gated(torch.randn(rows, WIDTH), torch.randn(rows, WIDTH))
    context = SWIGLU.describe(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))
    assert len(snapshot.route(SWIGLU, context, {})._settled) == 3
