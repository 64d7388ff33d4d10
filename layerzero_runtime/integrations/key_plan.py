"""`KeyPlan`: what serves the calls of a static key whose sizes a graph leaves open, by the rules of an eager call.

Sizes may be symbolic here: comparing one adds a guard to the graph that is being traced, so what is compared is what
the choice needs and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from types import CodeType
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.integrations.regions import guard_region
from layerzero_runtime.operation import Operation
from layerzero_runtime.policies.policy import Policy
from layerzero_runtime.selection.limits import Limit
from layerzero_runtime.selection.live_selector import Choice
from layerzero_runtime.snapshot import Snapshot
from layerzero_runtime.tables.table import MISS


@dataclass(frozen=True)
class Candidate:
    """A kernel that may serve.

    Attributes:
        choice: the kernel by which policies know it.
        traced: what stands for it in a graph (`KernelSpec.traced_as`), else the same.
        guards: limits that are left to the call.
        is_ready: it may serve here and now; else the default stands in for it.
    """

    choice: Choice
    traced: Choice
    guards: tuple[Limit, ...]
    is_ready: bool

    def accepts(self, policy: Policy, context: SelectionContext, limits: tuple[Limit, ...] = ()) -> bool:
        """Whether the guards, further limits and the policy let it serve the call."""
        return (
            all(limit.accepts(getattr(context, limit.field)) for limit in (*limits, *self.guards))
            and policy.denial(self.choice.kernel.spec, context) is None
            and (self.traced == self.choice or policy.denial(self.traced.kernel.spec, context) is None)
        )

    def served(self, snapshot: Snapshot, operation: Operation, example: SelectionContext) -> Choice:
        """What the graph calls; a stand-in is counted."""
        return self.traced if self.is_ready else snapshot.stand_in(self.traced, operation, example)


@dataclass(frozen=True)
class KeyPlan:
    """All that decides the calls of one static key under a snapshot: graphs hold for as long as it stays equal.

    Attributes:
        decision: the code of the table's decision function, None without an entry.
        chains: of each leaf, the candidates that can serve, up to the first without guards.
        unmeasured: the one that serves misses, where neither sizes nor rules have a say in that, else none.
        others: the candidates of calls that no measured plan serves.
        policy: the rules that may apply.
    """

    decision: CodeType | None
    chains: tuple[tuple[Candidate, ...], ...]
    unmeasured: tuple[Candidate, ...]
    others: tuple[Candidate, ...]
    policy: Policy
    decide: Callable[..., int] | None = field(compare=False)
    order: Callable[[SelectionContext], Callable[[Choice], tuple[Any, ...]]] = field(compare=False)

    def choose(self, operation: Operation, context: SelectionContext, example: SelectionContext) -> Candidate | None:
        """What serves all calls that pass the guards added here; None where each size needs an answer of its own.

        Args:
            context: the call, with symbolic sizes.
            example: the same with the sizes that it has.
        """
        if self.decide is not None and self.policy.overrules_measurement(context) is None:
            sizes = operation.sizes(context)
            measured = self._chain_of(self.decide(*operation.sizes(example)))
            for place, candidate in enumerate(measured, start=1):
                if candidate.accepts(self.policy, context):
                    guard_region(self.decide, sizes, self._leaves(measured[:place]))
                    return candidate
            guard_region(self.decide, sizes, self._leaves(measured, alone=True))
        return self._choose_unmeasured(context)

    def _chain_of(self, leaf: int) -> tuple[Candidate, ...]:
        return self.unmeasured if leaf == MISS else self.chains[leaf]

    def _leaves(self, candidates: tuple[Candidate, ...], *, alone: bool = False) -> frozenset[int]:
        """The leaves whose chains begin with these candidates, or consist of them; MISS may be one of them."""
        length = None if alone else len(candidates)
        places = (MISS, *range(len(self.chains)))
        return frozenset(leaf for leaf in places if self._chain_of(leaf)[:length] == candidates)

    def _choose_unmeasured(self, context: SelectionContext) -> Candidate | None:
        """As the live selector, without what the nearest bucket prefers: that changes with every octave of a size."""
        order = self.order(context)
        ranked = sorted(self.others, key=lambda candidate: order(candidate.choice))
        locks = (rule for rule in self.policy.locks if rule.applies(context))
        locked = [[each for each in ranked if rule.covers(each.choice.kernel.spec)] for rule in locks]
        for candidate in chain.from_iterable((*locked, ranked)):
            if candidate.accepts(self.policy, context, candidate.choice.kernel.spec.limits):
                return candidate
        return None
