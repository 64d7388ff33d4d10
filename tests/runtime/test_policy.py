"""What the rules of a policy mean, by themselves and for a selection with tables and without."""

from __future__ import annotations

from typing import Any

import pytest

from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.errors import NoKernelAvailableError, PolicyLoadError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.policies.policy import CONDITION_FIELDS, EMPTY, Policy, Rule
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.limits import Kind, Limit
from layerzero_runtime.serving.health import Health
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.table_set import TableSet
from tests.runtime.test_dispatch import IN_PLACE
from tests.scenarios.conftest import attention, kernel, norm, spec

FAST, SLOW, OTHER = "alpha.fast", "beta.slow", "beta.other"
TABLES = TableSet(CounterGroup())


def kernels() -> tuple[Kernel, ...]:
    """Three kernels that take any attention call on the described H100, in the order of their priorities."""
    priorities = {FAST: 80, SLOW: 60, OTHER: 40}
    return tuple(
        kernel(kernel_id, priority=priority, supports_gqa=True, supports_backward=True)
        for kernel_id, priority in priorities.items()
    )


def snapshot_with(policy: Policy, *registered: Kernel, health: Health | None = None) -> Snapshot:
    registry = Registry(registered or kernels())
    return Snapshot(registry, CounterGroup(), policy=policy, tables=TABLES, health=health)


def chosen(policy: Policy, *registered: Kernel, **features: Any) -> str:
    return snapshot_with(policy, *registered).select(attention(**features)).kernel_id


def when(field: str, kind: Kind, bound: Any) -> tuple[Limit, ...]:
    return (Limit(field, kind, bound),)


@pytest.mark.parametrize(
    ("globs", "covered"),
    [
        ({}, {FAST, SLOW, OTHER}),
        ({"kernel": "beta.*"}, {SLOW, OTHER}),
        ({"kernel": "*.s?ow"}, {SLOW}),
        ({"kernel": "beta.[a-o]*"}, {OTHER}),
        ({"kernel": "BETA.*"}, set()),
        ({"kernel": "beta"}, set()),
        ({"backend": "alpha"}, {FAST}),
        ({"backend": "*a", "kernel": "*.other"}, {OTHER}),
        ({"backend": "alpha", "kernel": "beta.*"}, set()),
    ],
)
def test_globs_say_which_kernels_a_rule_covers(globs: dict[str, Any], covered: set[str]) -> None:
    rule = Rule(**globs)
    assert {found.kernel_id for found in kernels() if rule.covers(found.spec)} == covered


def test_the_backend_of_a_rule_is_the_library_and_not_the_first_word_of_the_id() -> None:
    declared = spec("mine.kernel", library="flash_attn")
    assert Rule(backend="flash_*").covers(declared)
    assert not Rule(backend="mine").covers(declared)


@pytest.mark.parametrize(
    ("glob", "applies"),
    [("*", True), ("attention.*", True), ("attention.full", True), ("*.causal", False), ("norm.*", False)],
)
def test_the_operation_of_a_rule_is_a_glob(glob: str, applies: bool) -> None:
    assert Rule(operation=glob).applies(attention()) is applies
    assert Rule(operation=glob).applies_by(attention(), ("operation",)) is applies


@pytest.mark.parametrize(
    ("condition", "features", "holds"),
    [
        (Limit("seq_len_q", "at_least", 512), {}, True),
        (Limit("seq_len_q", "at_least", 513), {}, False),
        (Limit("seq_len_q", "at_most", 511), {}, False),
        (Limit("head_dim", "multiple_of", 64), {}, True),
        (Limit("head_dim", "multiple_of", 64), {"head_dim": 96}, False),
        (Limit("dtype", "one_of", ("bfloat16", "float16")), {}, True),
        (Limit("dtype", "one_of", ("bfloat16",)), {}, False),
        (Limit("requires_grad", "one_of", (True,)), {"requires_grad": True}, True),
        (Limit("sm", "at_least", (9, 0)), {}, True),
        (Limit("sm", "at_least", (10, 0)), {}, False),
        (Limit("platform", "one_of", ("cuda",)), {}, True),
        (Limit("gqa_group", "at_least", 2), {"num_kv_heads": 4}, True),
        # What the call does not have satisfies no bound and no divisor, unlike a kernel's limit.
        (Limit("rows", "at_least", 1), {}, False),
        (Limit("rows", "at_most", 2**40), {}, False),
        (Limit("hidden_size", "multiple_of", 1), {}, False),
        (Limit("workspace_limit", "at_most", 0), {}, False),
        (Limit("quant_format", "one_of", ("int8",)), {}, False),
        (Limit("quant_format", "one_of", ("int8", None)), {}, True),
    ],
)
def test_a_condition_reads_the_context(condition: Limit, features: dict[str, Any], holds: bool) -> None:
    rule = Rule(kernel=FAST, when=(condition,))
    context = attention(**features)
    assert rule.applies(context) is holds
    assert chosen(Policy(denies=(rule,)), **features) == (SLOW if holds else FAST)


def test_all_conditions_of_a_rule_must_hold() -> None:
    rule = Rule(when=(Limit("seq_len_q", "at_least", 512), Limit("dtype", "one_of", ("bfloat16",))))
    assert not rule.applies(attention())
    assert not rule.applies(attention(dtype="bfloat16", seq_len_q=256))
    assert rule.applies(attention(dtype="bfloat16"))


def test_a_condition_on_what_no_context_has_is_refused() -> None:
    with pytest.raises(PolicyLoadError) as caught:
        Rule(kernel="a.b", when=when("seq_len", "at_least", 1), origin="mine.yaml:7")
    text = str(caught.value)
    assert text.startswith("mine.yaml:7: 'seq_len' in when is no field of a context; allowed: ")
    assert "seq_len_q" in text
    # The device itself is read through what follows from it.
    assert {"platform", "sm", "gqa_group", "dtype"} <= set(CONDITION_FIELDS)
    assert "device" not in CONDITION_FIELDS


@pytest.mark.scenario("EC-033")
def test_the_empty_policy_changes_nothing() -> None:
    assert EMPTY.rules() == ()
    declared = kernels()[0].spec
    assert EMPTY.denial(declared, attention()) is None
    assert EMPTY.boost(declared, attention()) == 0
    assert EMPTY.overrules_measurement(attention()) is None
    assert EMPTY.relevance(attention(), ()) == "none"
    assert chosen(Policy()) == FAST


@pytest.mark.scenario("EC-035")
def test_a_deny_goes_before_an_allow() -> None:
    policy = Policy(allows=(Rule(kernel=FAST), Rule(kernel=SLOW)), denies=(Rule(kernel=FAST, origin="p.yaml:3"),))
    assert chosen(policy) == SLOW
    refused = snapshot_with(policy).live.refusals(kernels()[0], attention())
    assert refused == ("POLICY_DENIED: by kernel alpha.fast (p.yaml:3)",)


def test_where_allows_apply_nothing_else_serves() -> None:
    policy = Policy(
        allows=(Rule(operation="attention.*", kernel="*.other"), Rule(operation="attention.*", kernel=SLOW))
    )
    assert chosen(policy) == SLOW
    # No allow is about other operations, so that nothing is taken from them.
    free = kernel("gamma.norm", operations=("norm.rms",))
    assert snapshot_with(policy, free).select(norm()).kernel_id == "gamma.norm"
    conditional = Policy(allows=(Rule(kernel=OTHER, when=when("seq_len_q", "at_most", 128)),))
    assert chosen(conditional) == FAST
    assert chosen(conditional, seq_len_q=128) == OTHER


def test_what_the_policy_refuses_is_listed_with_the_rule() -> None:
    policy = Policy(
        denies=(Rule(backend="beta", origin="p.yaml:2"),), allows=(Rule(kernel="gamma.*", origin="p.yaml:5"),)
    )
    with pytest.raises(NoKernelAvailableError) as caught:
        snapshot_with(policy).select(attention())
    assert caught.value.rejections == {
        FAST: ("POLICY_NOT_ALLOWED: covered by none of kernel gamma.* (p.yaml:5)",),
        SLOW: ("POLICY_DENIED: by backend beta (p.yaml:2)",),
        OTHER: ("POLICY_DENIED: by backend beta (p.yaml:2)",),
    }


def test_a_lock_selects_among_what_it_covers() -> None:
    assert chosen(Policy(locks=(Rule(kernel=OTHER),))) == OTHER
    # Of several that it covers the usual order decides.
    assert chosen(Policy(locks=(Rule(backend="beta"),))) == SLOW
    assert chosen(Policy(locks=(Rule(kernel=OTHER, when=when("seq_len_q", "at_least", 1024)),))) == FAST


def test_the_first_lock_that_can_hold_does() -> None:
    locks = (Rule(kernel="gone.*"), Rule(operation="norm.*", kernel=FAST), Rule(kernel=OTHER), Rule(kernel=SLOW))
    assert chosen(Policy(locks=locks)) == OTHER


@pytest.mark.scenario("EC-034")
def test_a_lock_on_what_is_not_registered_is_ignored() -> None:
    assert chosen(Policy(locks=(Rule(kernel="gone.kernel"),))) == FAST


@pytest.mark.parametrize(
    "changes_of_the_locked",
    [
        {"dtypes": ("bfloat16",)},
        {"max_seq_len": 511},
        {"platforms": ("cpu",)},
        {"min_version": "999", "library": "torch"},
    ],
    ids=["dtype", "length", "platform", "library"],
)
def test_a_lock_never_selects_what_cannot_serve(changes_of_the_locked: dict[str, Any]) -> None:
    locked = kernel("gamma.locked", priority=99, **changes_of_the_locked)
    assert chosen(Policy(locks=(Rule(kernel="gamma.locked"),)), locked, *kernels()) == FAST
    # And the next lock still holds.
    assert chosen(Policy(locks=(Rule(kernel="gamma.locked"), Rule(kernel=OTHER))), locked, *kernels()) == OTHER


def test_a_lock_on_what_is_denied_or_broken_is_ignored() -> None:
    assert chosen(Policy(locks=(Rule(kernel=SLOW),), denies=(Rule(kernel=SLOW),))) == FAST
    health = Health(lambda: None)
    health.failed(SLOW, "no reason")
    try:
        snapshot = snapshot_with(Policy(locks=(Rule(kernel=SLOW),)), health=health)
        assert snapshot.select(attention()).kernel_id == FAST
    finally:
        health.reset()


def test_boosts_add_up_and_go_before_priority() -> None:
    assert chosen(Policy(boosts=(Rule(kernel=OTHER, boost=0.5),))) == OTHER
    assert chosen(Policy(boosts=(Rule(kernel=FAST, boost=-1),))) == SLOW
    several = Policy(
        boosts=(Rule(backend="beta", boost=2), Rule(kernel=OTHER, boost=1), Rule(kernel=FAST, boost=2.5)),
    )
    assert several.boost(kernels()[2].spec, attention()) == 3
    assert chosen(several) == OTHER
    # Equal boosts leave the order as it is.
    assert chosen(Policy(boosts=(Rule(boost=5),))) == FAST
    conditional = Policy(boosts=(Rule(kernel=SLOW, boost=1, when=when("batch_size", "at_most", 4)),))
    assert (chosen(conditional), chosen(conditional, batch_size=5)) == (SLOW, FAST)


@pytest.mark.parametrize(
    ("rule", "known", "expected"),
    [
        (Rule(kernel="a.b"), (), "fixed"),
        (Rule(operation="norm.*"), ("dtype",), "none"),
        (Rule(when=when("dtype", "one_of", ("float16",))), ("dtype",), "fixed"),
        (Rule(when=when("dtype", "one_of", ("float32",))), ("dtype",), "none"),
        (Rule(when=when("seq_len_q", "at_least", 2)), ("dtype",), "per_call"),
        # What is known decides against the rule, whatever the rest is.
        (Rule(when=(Limit("dtype", "one_of", ("int8",)), Limit("seq_len_q", "at_least", 2))), ("dtype",), "none"),
        (
            Rule(when=(Limit("dtype", "one_of", ("float16",)), Limit("seq_len_q", "at_least", 2))),
            ("dtype",),
            "per_call",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["locks", "allows", "denies", "boosts"])
def test_relevance(kind: str, rule: Rule, known: tuple[str, ...], expected: str) -> None:
    policy = Policy(**{kind: (rule,)})
    assert policy.relevance(attention(), known) == expected
    # Beside another rule, the one that decides least decides.
    both = Policy(**{kind: (rule, Rule(when=when("batch_size", "at_least", 1)))})
    assert both.relevance(attention(), known) == "per_call"


def test_the_policy_is_part_of_the_digest() -> None:
    registry = Registry(builtin_kernels())
    digests = {
        Snapshot(registry, CounterGroup(), policy=policy, tables=TABLES).digest
        for policy in (EMPTY, Policy(denies=(Rule(kernel=IN_PLACE),)), Policy(locks=(Rule(kernel=IN_PLACE),)))
    }
    assert len(digests) == 3
