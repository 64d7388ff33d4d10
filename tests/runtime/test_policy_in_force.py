"""A policy in force: what it does to measured choices, to the calls of the public functions and to explanations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import silu

import layerzero_runtime as lz
from layerzero_runtime import dispatch
from layerzero_runtime.errors import NoKernelAvailableError
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.snapshot import Snapshot
from tests.runtime.test_dispatch import DEFAULT, IN_PLACE, INDUCTOR, LARGE, MIDDLE, SMALL, changes, swiglu_context
from tests.scenarios.conftest import spec


@pytest.fixture(autouse=True)
def no_policy_is_left() -> Iterator[None]:
    yield
    dispatch.set_policy(None)


def test_a_denied_winner_gives_way_to_the_runner_up(snapshot: Snapshot) -> None:
    """Measured best is what works in place, then the default: the policy has the say in both."""
    assert lz.select(swiglu_context(*SMALL)).kernel_id == IN_PLACE
    lz.set_policy(Policy(denies=(Rule(kernel=IN_PLACE),)))
    plan = lz.select(swiglu_context(*SMALL))
    assert plan.kernel_id == DEFAULT
    assert plan.source == "live"
    # Cells where another kernel won are hits as before.
    assert lz.select(swiglu_context(*LARGE)).source == "table"
    lz.set_policy(None)
    assert lz.select(swiglu_context(*SMALL)).source == "table"


def test_locks_and_boosts_go_before_measurements_where_they_apply(snapshot: Snapshot) -> None:
    short = (Limit("rows", "at_most", SMALL[0]),)
    for policy in (
        Policy(locks=(Rule(operation="mlp.*", kernel=DEFAULT, when=short, origin="p.yaml:4"),)),
        Policy(boosts=(Rule(operation="mlp.*", kernel=DEFAULT, when=short, origin="p.yaml:4", boost=1),)),
    ):
        lz.set_policy(policy)
        plan = lz.select(swiglu_context(*SMALL))
        assert (plan.kernel_id, plan.source) == (DEFAULT, "live")
        assert "p.yaml:4" in str(plan.miss_reason)
        assert lz.select(swiglu_context(SMALL[0] + 1, SMALL[1])).source == "table"


@pytest.mark.scenario("EC-034")
def test_an_ignored_lock_leaves_the_measured_choice(snapshot: Snapshot) -> None:
    before = {sizes: lz.select(swiglu_context(*sizes)).kernel_id for sizes in (SMALL, MIDDLE, LARGE)}
    lz.set_policy(Policy(locks=(Rule(kernel="gone.kernel"), Rule(kernel="torch.sdpa"))))
    assert {sizes: lz.select(swiglu_context(*sizes)).kernel_id for sizes in (SMALL, MIDDLE, LARGE)} == before


def test_calls_obey_the_policy(snapshot: Snapshot) -> None:
    """The public function runs what the policy leaves, under rules that the route's key decides and under others."""
    ran: list[str] = []

    def mine(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ran.append("mine")
        return silu(gate) * up

    declared = spec("mine.swiglu", operations=("mlp.swiglu",), platforms=("cpu",), dtypes=("float32",), priority=1)
    lz.register_kernel(declared, mine)
    try:
        gate, up = torch.randn(2, *SMALL)
        fixed = Rule(operation="mlp.swiglu", backend="mine")
        per_call = Rule(operation="mlp.swiglu", backend="mine", when=(Limit("rows", "at_least", SMALL[0]),))
        elsewhere = Rule(operation="mlp.swiglu", backend="mine", when=(Limit("rows", "at_least", SMALL[0] + 1),))
        for rule, runs in ((fixed, 2), (per_call, 2), (elsewhere, 0)):
            ran.clear()
            lz.set_policy(Policy(locks=(rule,)))
            before = lz.stats()
            for _ in range(2):
                torch.testing.assert_close(lz.swiglu(gate, up), silu(gate) * up)
            assert len(ran) == runs
            # Calls that a rule decides are no hits; where it does not apply, the table answers.
            assert changes(before)["calls"] == 2
            assert changes(before).get("hits", 0) == 2 - runs
        lz.set_policy(Policy(denies=(Rule(kernel=IN_PLACE), Rule(kernel=INDUCTOR), Rule(kernel=DEFAULT))))
        ran.clear()
        torch.testing.assert_close(lz.swiglu(gate, up), silu(gate) * up)
        assert ran == ["mine"]
    finally:
        lz.unregister_kernel("mine.swiglu")


def test_a_policy_that_leaves_nothing_is_said_so_at_the_call(snapshot: Snapshot) -> None:
    lz.set_policy(Policy(denies=(Rule(operation="mlp.swiglu", origin="p.yaml:9"),)))
    with pytest.raises(NoKernelAvailableError, match=r"POLICY_DENIED: by operation mlp\.swiglu \(p\.yaml:9\)"):
        lz.swiglu(torch.ones(2, 4), torch.ones(2, 4))


def test_a_selection_under_way_keeps_its_snapshot(snapshot: Snapshot) -> None:
    """A snapshot taken before the policy changed answers by the policy that it was built with."""
    before = dispatch.current_snapshot()
    lz.set_policy(Policy(denies=(Rule(kernel=IN_PLACE),)))
    assert before.select(swiglu_context(*SMALL)).kernel_id == IN_PLACE
    assert lz.select(swiglu_context(*SMALL)).kernel_id == DEFAULT


def test_explain_names_the_rules_that_apply(snapshot: Snapshot) -> None:
    applying = Rule(operation="mlp.*", kernel=IN_PLACE, origin="p.yaml:2")
    other = Rule(operation="norm.*", kernel="torch.*", origin="p.yaml:6")
    lz.set_policy(Policy(denies=(applying, other)))
    context = swiglu_context(*SMALL)
    explanation = lz.explain(context)
    assert explanation.policy == (f"denies operation mlp.*, kernel {IN_PLACE} (p.yaml:2)",)
    assert "POLICY_DENIED" in explanation.refused[IN_PLACE][0]
    assert "p.yaml:6" not in str(explanation)
