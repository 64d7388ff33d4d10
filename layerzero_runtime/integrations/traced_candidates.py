"""Which kernels a snapshot offers to calls that are traced: `KeyPlan`s, and the choice for sizes that are fixed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.integrations.key_plan import Candidate, KeyPlan
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.operation import Operation
from layerzero_runtime.policies.policy import Policy
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.selection.live_selector import Choice
from layerzero_runtime.snapshot import KEY_FIELDS, Snapshot
from layerzero_runtime.tables.prior import Prior
from layerzero_runtime.tables.table import Table, TableStep


def key_plan(snapshot: Snapshot, operation: Operation, example: SelectionContext) -> KeyPlan:
    """The plan of the static key of a call whose sizes are integers."""
    assert example.device is not None
    known = KEY_FIELDS.union(operation.static, operation.plain, operation.fixed)
    table = snapshot.tables.of(example.device)
    entry = None if table is None else table.entries.get(operation.name, {}).get(operation.static_key(example))
    if entry is not None and snapshot.tables.is_damaged(entry):
        entry = None
    policy = _bearing(snapshot.policy, example, known)
    offer = _Offer(snapshot, operation, example, known)
    chains: list[tuple[Candidate, ...]] = []
    if table is not None and entry is not None:
        chains = [offer.chain(table, steps, by_name=bool(policy.rules())) for steps in entry.leaves]
    registered = map(offer.candidate, (Choice(kernel, {}) for kernel in snapshot.registry.candidates(operation.name)))
    others = tuple(candidate for candidate in registered if candidate is not None)
    return KeyPlan(
        decision=None if entry is None else entry.decide.__code__,
        chains=tuple(chains),
        unmeasured=() if policy.rules() else offer.for_all_sizes(others),
        others=others,
        policy=policy,
        decide=None if entry is None else entry.decide,
        order=lambda context: snapshot.live.order(context, Prior()),
    )


def concrete_candidate(snapshot: Snapshot, operation: Operation, context: SelectionContext) -> Candidate:
    """What serves a call whose sizes are integers: what an eager one gets, or what stands for it in a graph.

    Raises:
        NoKernelAvailableError: no kernel accepts the call.
    """
    offer = _Offer(snapshot, operation, context, None)
    without = set(snapshot.half_open)
    while True:
        choice = snapshot.choose(operation, context, without=without, to_run=True).choice
        # Not refused by its own limits: a choice may have dense copies made for it.
        candidate = offer.candidate(choice, is_legal=True)
        if candidate is not None and candidate.accepts(snapshot.policy, context):
            return candidate
        without.add(choice.kernel.kernel_id)


@dataclass(frozen=True)
class _Offer:
    """The kernels that a snapshot offers to calls like one; `known` are the fields that all of them share, None for
    all fields."""

    snapshot: Snapshot
    operation: Operation
    example: SelectionContext
    known: Collection[str] | None

    def chain(self, table: Table, steps: tuple[TableStep, ...], *, by_name: bool) -> tuple[Candidate, ...]:
        """The candidates of a leaf. Where no rule asks for the names of kernels (`by_name`), those that are one in
        graphs count as one."""
        candidates: list[Candidate] = []
        for step in steps:
            kernel = self.snapshot.usable_kernel(table, step)
            candidate = None if kernel is None else self.candidate(Choice(kernel, step.configuration), step.guards)
            if candidate is None:
                continue
            candidates.append(candidate if by_name else replace(candidate, choice=candidate.traced))
            if not candidate.guards:
                # One whose place the last takes in graphs anyway needs no guard.
                while len(candidates) > 1 and candidates[-2].traced == candidate.choice:
                    del candidates[-2]
                break
        return tuple(candidates)

    def for_all_sizes(self, candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        """The first in the live selector's order, where its limits allow every size, else none."""
        order = self.snapshot.live.order(self.example, Prior())
        first = min(candidates, key=lambda candidate: order(candidate.choice), default=None)
        if first is None or first.guards or not all(map(self._knows, first.choice.kernel.spec.limits)):
            return ()
        return (replace(first, choice=first.traced),)

    def candidate(
        self, choice: Choice, guards: tuple[Limit, ...] | None = None, *, is_legal: bool = False
    ) -> Candidate | None:
        """None for a kernel that cannot serve in a graph now. A half-open one is tried by eager calls.

        Args:
            guards: limits that a table leaves to the call, whose others it has proved; None where it says nothing.
            is_legal: the kernel's own limits are satisfied.
        """
        traced = self._traced(choice)
        if traced is None or not self._is_sound(choice.kernel) or not self._is_sound(traced.kernel):
            return None
        if guards is None:
            guards = ()
            if not is_legal and not self._satisfies(choice.kernel):
                return None
        if traced.kernel is not choice.kernel:
            if self.operation.name not in traced.kernel.spec.operations or not self._satisfies(traced.kernel):
                return None
            guards += tuple(limit for limit in traced.kernel.spec.limits if not self._knows(limit))
        return Candidate(choice, traced, guards, self.snapshot.is_ready(traced, self.operation, self.example))

    def _traced(self, choice: Choice) -> Choice | None:
        """What stands for a choice in a graph, None where that is not registered."""
        if choice.kernel.spec.traced_as is None:
            return choice
        kernel = self.snapshot.registry.get(choice.kernel.spec.traced_as)
        return None if kernel is None else Choice(kernel, {})

    def _is_sound(self, kernel: Kernel) -> bool:
        snapshot, kernel_id = self.snapshot, kernel.kernel_id
        return (
            kernel_id not in snapshot.broken
            and kernel_id not in snapshot.half_open
            and snapshot.live.missing(kernel) is None
        )

    def _knows(self, limit: Limit) -> bool:
        return self.known is None or limit.field in self.known

    def _satisfies(self, kernel: Kernel) -> bool:
        """Whether the limits on what is known let the kernel serve."""
        return all(
            limit.accepts(getattr(self.example, limit.field)) for limit in kernel.spec.limits if self._knows(limit)
        )


def _bearing(policy: Policy, example: SelectionContext, known: Collection[str]) -> Policy:
    """The rules of a policy that these fields of a call do not rule out."""
    kinds = (kind.name for kind in fields(Policy))
    return Policy(
        **{
            kind: tuple(rule for rule in getattr(policy, kind) if rule.applies_by(example, known) is not False)
            for kind in kinds
        }
    )
