"""Whether a snapshot allows a plan: written from the documentation, apart from the selector."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import KernelSpec
from layerzero_runtime.policies.policy import Rule
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.snapshot import Snapshot


def holds(limit: Limit, actual: Any, of_rule: bool) -> bool:
    """Whether a value satisfies a condition, as the documentation of `Limit` and `Rule` says."""
    if limit.kind == "one_of":
        return actual in limit.bound
    if actual is None:
        return not of_rule
    outcomes: dict[str, Callable[[], bool]] = {
        "at_least": lambda: actual >= limit.bound,
        "at_most": lambda: actual <= limit.bound,
        "multiple_of": lambda: actual % limit.bound == 0,
    }
    return outcomes[limit.kind]()


def applies(rule: Rule, context: SelectionContext) -> bool:
    return fnmatchcase(context.operation, rule.operation) and all(
        holds(limit, getattr(context, limit.field), of_rule=True) for limit in rule.when
    )


def covers(rule: Rule, spec: KernelSpec) -> bool:
    return fnmatchcase(spec.kernel_id, rule.kernel) and fnmatchcase(spec.library, rule.backend)


def why_forbidden(snapshot: Snapshot, kernel_id: str, context: SelectionContext) -> str | None:
    """Why the snapshot does not let the kernel serve the call, None if it does."""
    kernel = snapshot.registry.get(kernel_id)
    if kernel is None:
        return "is not registered"
    if context.operation not in kernel.spec.operations:
        return f"does not compute {context.operation}"
    if kernel_id in snapshot.broken:
        return "is broken"
    for limit in kernel.spec.limits:
        if not holds(limit, getattr(context, limit.field), of_rule=False):
            return f"has a limit: {limit}"
    for rule in snapshot.policy.denies:
        if covers(rule, kernel.spec) and applies(rule, context):
            return f"is denied: {rule}"
    allows = [rule for rule in snapshot.policy.allows if applies(rule, context)]
    if allows and not any(covers(rule, kernel.spec) for rule in allows):
        return "is not allowed"
    return None


def why_wrong(snapshot: Snapshot, kernel_id: str | None, context: SelectionContext) -> str | None:
    """The same for a plan, locks included; for None, which kernel could have served."""
    legal = [kernel for kernel in snapshot.registry if why_forbidden(snapshot, kernel.kernel_id, context) is None]
    if kernel_id is None:
        return f"nothing was selected, legal are {[kernel.kernel_id for kernel in legal]}" if legal else None
    forbidden = why_forbidden(snapshot, kernel_id, context)
    if forbidden is not None:
        return f"{kernel_id} was selected, it {forbidden}"
    for rule in snapshot.policy.locks:
        if applies(rule, context):
            covered = {kernel.kernel_id for kernel in legal if covers(rule, kernel.spec)}
            if covered:
                return None if kernel_id in covered else f"{kernel_id} was selected, {rule} locks {sorted(covered)}"
    return None
