"""`Snapshot.select` agrees with a brute-force oracle, and its cache tells apart what it must."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layerzero_runtime import libraries
from layerzero_runtime.context import SelectionContext
from layerzero_runtime.counters import CounterGroup
from layerzero_runtime.device import detect_device
from layerzero_runtime.errors import NoKernelAvailableError
from layerzero_runtime.kernel import FunctionLoader, Kernel, KernelSpec
from layerzero_runtime.kernels import builtin_kernels
from layerzero_runtime.operations import operation_named
from layerzero_runtime.policies.policy import EMPTY, Policy, Rule
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.classes import ContextClasses
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.serving.health import Health
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.table_set import TableSet
from layerzero_tune.compile.form import TableForm
from tests.runtime.conftest import tables_in_force
from tests.runtime.selection_oracle import Expected, expect, expect_with_table
from tests.runtime.selection_strategies import ABSENT, ATTENTION, FAMILIES, SIZES, contexts, limits, policies, specs
from tests.runtime.test_soundness import context_of, legal_sizes
from tests.scenarios.conftest import unreachable

Tables = tuple[Path, TableForm]
SIZE_FIELDS = ("rows", "hidden_size", "batch_size", "head_dim", "seq_len_q", "seq_len_k")


@pytest.fixture(autouse=True)
def absent_library() -> Iterator[None]:
    """A requirement that is not met."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(libraries._PROBES, ABSENT, lambda: "it is absent: install it")
        yield
    libraries.missing_requirement.cache_clear()


def kernels_of(declared: Collection[KernelSpec]) -> list[Kernel]:
    return [Kernel(spec, FunctionLoader(unreachable)) for spec in declared]


def selected(snapshot: Snapshot, context: SelectionContext) -> Expected:
    try:
        plan = snapshot.select(context)
    except NoKernelAvailableError as error:
        return Expected(None, refused=frozenset(error.rejections))
    made_dense = any(step.kind == "contiguous" for step in plan.pre_transforms)
    return Expected(plan.kernel_id, plan.source, plan.available, made_dense)


def without_turned(found: Expected, spec: KernelSpec | None, context: SelectionContext) -> Expected:
    """A transposed view is made dense as well where the kernel wants that; the oracle counts it among the copies."""
    if spec is None or not (context.operation in ATTENTION and context.layout not in spec.layouts):
        return found
    return replace(found, made_dense=False) if spec.requires_contiguous and context.is_contiguous else found


def broken_health(ids: Collection[str]) -> Health:
    health = Health(lambda: None)
    for kernel_id in ids:
        health.failed(kernel_id, "broke")
    return health


def test_select_agrees_with_the_oracle() -> None:
    """Several calls a snapshot, each twice: what the cache keeps for one call serves no other wrongly."""
    seen: Counter[str] = Counter()

    @settings(max_examples=300, deadline=None)
    @given(policy=policies(), family=st.sampled_from(FAMILIES), data=st.data())
    def check(policy: Policy, family: tuple[str, ...], data: st.DataObject) -> None:
        declared = data.draw(specs(family))
        calls = data.draw(st.lists(contexts(family), min_size=1, max_size=8))
        by_id = {spec.kernel_id: spec for spec in declared}
        broken = data.draw(st.sets(st.sampled_from(sorted(by_id)), max_size=1)) if by_id else set()
        health = broken_health(broken)
        try:
            snapshot = Snapshot(
                Registry(kernels_of(declared)), CounterGroup(), policy=policy, tables=tables, health=health
            )
            for context in (*calls, *calls):
                expected = expect(declared, policy, broken, context)
                found = selected(snapshot, context)
                spec = by_id.get(found.kernel_id or "")
                assert without_turned(found, spec, context) == without_turned(expected, spec, context)
                count(seen, declared, policy, broken, context, expected)
            # The answers of the second round were all there already.
            assert snapshot.live_cache.computed.value <= len(calls)
        finally:
            health.reset()

    with tables_in_force(None):
        tables = TableSet(CounterGroup())
        check_until(check, seen, ("served", "refused", "none", "dense", "unavailable", "policy"), 10)


def check_until(check: Callable[[], None], seen: Counter[str], kinds: Collection[str], least: int) -> None:
    """Draw again, a few times at most, until what was checked was not one kind of answer alone: seldom one round of
    draws has almost none of a kind."""
    for _ in range(4):
        check()
        if all(seen[kind] >= least for kind in kinds):
            return
    raise AssertionError(f"too few of a kind were checked: {seen}")


def count(
    seen: Counter[str],
    declared: Collection[KernelSpec],
    policy: Policy,
    broken: Collection[str],
    context: SelectionContext,
    expected: Expected,
) -> None:
    kind = "served" if expected.kernel_id else "refused" if expected.refused else "none"
    seen[kind] += 1
    seen["dense"] += expected.made_dense
    seen["unavailable"] += not expected.available
    seen["policy"] += expect(declared, EMPTY, broken, context) != expected


@st.composite
def measured_calls(draw: st.DrawFn, form: TableForm) -> SelectionContext:
    """Calls at the corners of the table's buckets, some of them with a size or a feature beside what was measured."""
    entry = draw(st.sampled_from(form.entries))
    leaf = draw(st.sampled_from([leaf for leaf in entry.leaves() if legal_sizes(entry, leaf)]))
    operation = operation_named(entry.operation)
    context = operation.with_sizes(context_of(entry), draw(st.sampled_from(legal_sizes(entry, leaf))))
    changes: list[dict[str, Any]] = [{"is_contiguous": False}, {"stride_last_dim": 2}, {"requires_grad": True}]
    if entry.operation not in ATTENTION:
        changes += [{"rows": 5000}, {"hidden_size": 48}]
    else:
        changes += [{"batch_size": 640, "num_kv_heads": 1}, {"layout": "bshd"}, {"dropout_p": 0.5}]
    change = draw(st.sampled_from([{}, {}, {}, *changes]))
    if "batch_size" in change:
        change |= {"num_heads": context.gqa_group}
    return replace(context, device=detect_device("cpu"), **change)


def second_plans(form: TableForm) -> list[tuple[SelectionContext, str]]:
    """A call of every leaf that has a second plan, with the kernel of the first."""
    device = detect_device("cpu")
    return [
        (
            operation_named(entry.operation).with_sizes(replace(context_of(entry), device=device), sizes[0]),
            leaf.chain[0].choice[0],
        )
        for entry in form.entries
        for leaf in entry.leaves()
        if len(leaf.chain) > 1 and (sizes := legal_sizes(entry, leaf))
    ]


def test_select_agrees_with_the_oracle_where_a_table_answers(synthetic_tables: Tables) -> None:
    """The built-in kernels with some of the user's beside them, under rules about those that the table prefers."""
    folder, form = synthetic_tables
    builtin = builtin_kernels()
    ids = sorted({step.choice[0] for entry in form.entries for leaf in entry.leaves() for step in leaf.chain})
    globs = (*ids, "torch.*", "*.k1", "torch.sdpa*", "*.in_place", "gone.*", "*.k?", "torch.inductor.*")
    seen: Counter[str] = Counter()

    @settings(max_examples=300, deadline=None)
    @given(
        declared=st.sampled_from(FAMILIES).flatmap(lambda family: specs(family, largest=2)),
        policy=policies(*globs),
        calls=st.lists(measured_calls(form), min_size=1, max_size=6),
        removed=st.sets(st.sampled_from(ids), max_size=2),
        broken=st.sets(st.sampled_from(ids), max_size=2),
    )
    def check(
        declared: list[KernelSpec],
        policy: Policy,
        calls: list[SelectionContext],
        removed: set[str],
        broken: set[str],
    ) -> None:
        registered = [*(kernel for kernel in builtin if kernel.kernel_id not in removed), *kernels_of(declared)]
        known = [kernel.spec for kernel in registered]
        health = broken_health(broken)
        try:
            snapshot = Snapshot(Registry(registered), CounterGroup(), policy=policy, tables=tables, health=health)
            for context in calls:
                operation = operation_named(context.operation)
                assert context.device is not None
                table = tables.of(context.device)
                assert table is not None
                entry, leaf = table.find(operation, context)
                steps = entry.leaves[leaf] if entry is not None and leaf >= 0 else ()
                chain = [(step.kernel_id, step.guards) for step in steps]
                preferences = [kernel_id for kernel_id, _ in snapshot.prior_of(context).preferences]
                expected = expect_with_table(known, policy, broken, context, chain, preferences)
                spec = next((spec for spec in known if spec.kernel_id == expected.kernel_id), None)
                found = selected(snapshot, context)
                assert without_turned(found, spec, context) == without_turned(expected, spec, context)
                by_table = expect_with_table(known, EMPTY, (), context, chain, preferences)
                seen["hit"] += expected.source == "table"
                seen["hit, overruled"] += by_table.source == "table" and by_table != expected
                seen["hit, another plan"] += expected.source == "table" and expected.kernel_id != chain[0][0]
                seen["miss"] += not steps
                seen["refused"] += expected.kernel_id is None
        finally:
            health.reset()

    # Random draws seldom leave a second plan to serve: each that there is serves here once for each cause.
    behind = second_plans(form)
    for context, first in behind:
        denied = Policy(denies=(Rule(kernel=first),))
        for policy, removed, broken in ((EMPTY, {first}, set()), (EMPTY, set(), {first}), (denied, set(), set())):
            check = example(declared=[], policy=policy, calls=[context], removed=removed, broken=broken)(check)
    with tables_in_force(folder):
        tables = TableSet(CounterGroup())
        check_until(check, seen, ("hit", "hit, overruled", "miss", "refused"), 10)
    assert seen["hit, another plan"] >= 3 * len(behind) > 0, seen


def test_a_class_has_one_answer_of_every_limit() -> None:
    """Of limits as kernels and as rules read them. Pairs differ in a field or two, so that many are of one class."""
    seen: Counter[str] = Counter()

    @settings(max_examples=600, deadline=None)
    @given(st.lists(limits(), min_size=1, max_size=6), st.sampled_from(FAMILIES).flatmap(contexts), st.data())
    def check(declared: list[Limit], context: SelectionContext, data: st.DataObject) -> None:
        classes = ContextClasses(declared)
        # Mostly of what some limit reads.
        read = [limit.field for limit in declared if limit.field in SIZE_FIELDS]
        sizes = [name for name in (*SIZE_FIELDS, *read * 4) if getattr(context, name) is not None]
        names = data.draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=2, unique=True))
        changed: dict[str, Any] = {name: data.draw(st.sampled_from((*SIZES, 127, 4096))) for name in names}
        other = replace(context, **changed)
        if data.draw(st.integers(0, 3)) == 0:
            other = replace(other, requires_grad=not other.requires_grad, dtype="float32", output_dtype="float32")
        if other == context:
            return
        is_one_class = classes.of(context) == classes.of(other)
        answers = [
            [(limit.reject(call) is None, Rule(when=(limit,)).applies(call)) for limit in declared]
            for call in (context, other)
        ]
        if is_one_class:
            assert answers[0] == answers[1]
        seen["one class" if is_one_class else "two classes"] += 1
        seen["two answers"] += answers[0] != answers[1]

    check_until(check, seen, ("one class", "two classes", "two answers"), 20)


def test_a_decode_loop_stays_in_few_classes() -> None:
    """Sound classes that tell every length apart would be of no use: the cache would miss at each step."""
    classes = ContextClasses(
        limit for kernel in Registry(builtin_kernels()).candidates("attention.cross") for limit in kernel.spec.limits
    )
    loop = [
        SelectionContext(
            operation="attention.cross",
            dtype="bfloat16",
            batch_size=1,
            seq_len_q=1,
            seq_len_k=length,
            num_heads=8,
            head_dim=64,
            device=detect_device("cpu"),
        )
        for length in range(2, 2002)
    ]
    assert len({classes.of(context) for context in loop}) <= 8
