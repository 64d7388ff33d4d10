"""Selection as the documentation has it, by brute force: what `Snapshot.select` must agree with.

Written from the docstrings of `KernelSpec`, `Policy`, `live_selector` and `transforms` alone; shares no code with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import KernelSpec
from layerzero_runtime.libraries import missing_requirement
from layerzero_runtime.policies.policy import Policy, Rule
from layerzero_runtime.selection.limits import Limit

TOO_NEW = "999"  # the oldest version of a library that no machine has
DENSE = {"bhsd", "bshd"}


@dataclass(frozen=True)
class Expected:
    """`kernel_id` is None where no kernel may serve; then `refused` has the ids of all that were considered."""

    kernel_id: str | None
    source: str = "live"
    available: bool = True
    made_dense: bool = False
    refused: frozenset[str] = frozenset()


def violations(spec: KernelSpec, context: SelectionContext) -> set[str]:
    """Fields of the context by which the declaration refuses the call."""
    found: set[str] = set()

    def need(field: str, holds: bool) -> None:
        if not holds:
            found.add(field)

    def within(field: str, low: Any, high: Any, multiple: int = 1) -> None:
        value = getattr(context, field)
        if value is not None:
            need(field, (low is None or low <= value) and (high is None or value <= high))
            need(field, multiple == 1 or value % multiple == 0)

    device = context.device
    assert device is not None
    need("platform", device.platform in spec.platforms)
    need("dtype", context.dtype in spec.dtypes)
    within("sm", spec.min_sm, spec.max_sm)
    known_set = device.instruction_set
    need("instruction_set", not known_set or not spec.instruction_sets or known_set in spec.instruction_sets)
    need("mode", spec.is_cuda_graph_safe or context.mode == "eager")
    need("quant_format", context.quant_format in spec.quant_formats)
    need("workspace_limit", context.workspace_limit is None or context.workspace_limit >= spec.workspace_bytes)
    within("head_dim", spec.min_head_dim, spec.max_head_dim, spec.head_dim_multiple)
    within("seq_len_q", spec.min_seq_len, spec.max_seq_len)
    within("seq_len_k", spec.min_seq_len, spec.max_seq_len)
    within("batch_size", None, spec.max_batch_size)
    within("hidden_size", None, spec.max_hidden_size, spec.hidden_size_multiple)
    if context.operation.startswith("attention."):
        q, k = context.seq_len_q or 0, context.seq_len_k or 0
        elements = (context.batch_size or 0) * (context.num_heads or 0) * q * k
        need("score_elements", spec.max_score_elements is None or elements <= spec.max_score_elements)
        need("layout", context.layout in spec.layouts or (context.layout in DENSE and bool(DENSE & {*spec.layouts})))
        need("gqa_group", spec.supports_gqa or context.num_heads == context.num_kv_heads)
        need("attn_mask", spec.supports_attn_mask or context.attn_mask == "none")
        need("dropout_p", spec.supports_dropout or context.dropout_p == 0)
        need("scale", spec.supports_scale or context.scale is None)
        need("v_head_dim", spec.supports_v_head_dim or context.v_head_dim == context.head_dim)
        if context.operation == "attention.causal":
            need("causal_mask", ("square" if q == k else context.causal_alignment) in spec.causal_geometries)
    if context.operation.startswith("norm."):
        need("offset", spec.supports_offset or context.offset == 0)
        need("weight_dtype", spec.supports_mixed_weight_dtype or context.weight_dtype == context.dtype)
    need("is_contiguous", context.is_contiguous or not spec.requires_contiguous)
    need("stride_last_dim", context.stride_last_dim == 1 or not spec.requires_last_dim_stride1)
    need("requires_deterministic", spec.deterministic or not context.requires_deterministic)
    need("requires_grad", spec.supports_backward or not context.requires_grad)
    for limit in spec.extra_limits:
        need(limit.field, holds(limit, context, of_nothing=True))
    return found


def holds(limit: Limit, context: SelectionContext, of_nothing: bool) -> bool:
    """A condition; `of_nothing` says what a bound or a divisor makes of a field that the call does not have."""
    value = getattr(context, limit.field)
    if limit.kind == "one_of":
        return value in limit.bound
    if value is None:
        return of_nothing
    if limit.kind == "multiple_of":
        return bool(value % limit.bound == 0)
    return bool(value >= limit.bound if limit.kind == "at_least" else value <= limit.bound)


def applies(rule: Rule, context: SelectionContext) -> bool:
    in_question = fnmatchcase(context.operation, rule.operation)
    return in_question and all(holds(limit, context, of_nothing=False) for limit in rule.when)


def covers(rule: Rule, spec: KernelSpec) -> bool:
    return fnmatchcase(spec.kernel_id, rule.kernel) and fnmatchcase(spec.library, rule.backend)


def permits(policy: Policy, spec: KernelSpec, context: SelectionContext) -> bool:
    if any(applies(rule, context) and covers(rule, spec) for rule in policy.denies):
        return False
    allowing = [rule for rule in policy.allows if applies(rule, context)]
    return not allowing or any(covers(rule, spec) for rule in allowing)


def is_missing(spec: KernelSpec) -> bool:
    return missing_requirement(spec.requires) is not None or (spec.library == "torch" and spec.min_version == TOO_NEW)


def copies(spec: KernelSpec, context: SelectionContext, made_dense: bool) -> int:
    """Passes over the data around the kernel: dense copies before it, a cast behind it; transposes are views."""
    turned = context.operation.startswith("attention.") and context.layout not in spec.layouts
    produced = spec.produces_dtype or context.dtype
    return (made_dense or (turned and spec.requires_contiguous)) + (produced != context.output_dtype)


def expect(
    specs: Iterable[KernelSpec],
    policy: Policy,
    broken: Collection[str],
    context: SelectionContext,
    preferences: Sequence[str] = (),
) -> Expected:
    """What serves a call that no table entry answers; `preferences` is the order of the nearest bucket."""
    legal, sparse, unavailable = [], [], []
    candidates = [spec for spec in specs if context.operation in spec.operations]
    for spec in candidates:
        wrong = violations(spec, context)
        if not permits(policy, spec, context) or spec.kernel_id in broken:
            continue
        if is_missing(spec):
            unavailable += [] if wrong else [spec]
        elif not wrong:
            legal.append(spec)
        elif wrong <= {"is_contiguous", "stride_last_dim"}:
            sparse.append(spec)
    able = legal or sparse
    made_dense = bool(sparse) and not legal

    def order(spec: KernelSpec) -> tuple[Any, ...]:
        boost = sum(rule.boost for rule in policy.boosts if applies(rule, context) and covers(rule, spec))
        place = preferences.index(spec.kernel_id) if spec.kernel_id in preferences else len(preferences)
        price = spec.transform_cost_hint * copies(spec, context, made_dense)
        return (-boost, place, price - spec.priority, spec.kernel_id)

    def unlocked(specs: list[KernelSpec]) -> list[KernelSpec]:
        for rule in policy.locks:
            locked = [spec for spec in specs if covers(rule, spec)] if applies(rule, context) else []
            if locked:
                return locked
        return specs

    if able:
        return Expected(min(unlocked(able), key=order).kernel_id, made_dense=made_dense)
    if unavailable:
        return Expected(min(unlocked(unavailable), key=order).kernel_id, available=False)
    return Expected(None, refused=frozenset(spec.kernel_id for spec in candidates))


def expect_with_table(
    specs: Sequence[KernelSpec],
    policy: Policy,
    broken: Collection[str],
    context: SelectionContext,
    chain: Sequence[tuple[str, Sequence[Limit]]],
    preferences: Sequence[str],
) -> Expected:
    """The same where a table has a bucket for the call: `chain` has its kernels, each with its guards.

    A lock or a boost that applies takes the decision from the table. Else the first kernel of the chain serves that is
    registered, works, is allowed, and whose guards take the call; where there is none, the call is a miss.
    """
    by_id = {spec.kernel_id: spec for spec in specs}
    if not any(applies(rule, context) for rule in (*policy.locks, *policy.boosts)):
        for kernel_id, guards in chain:
            spec = by_id.get(kernel_id)
            if spec is None or kernel_id in broken or not permits(policy, spec, context):
                continue
            if all(holds(guard, context, of_nothing=True) for guard in guards):
                return Expected(kernel_id, source="table", available=not is_missing(spec))
    return expect(specs, policy, broken, context, preferences)
