"""The live selector: what serves a call that no table entry answers.

All kernels of the operation are candidates. One is refused by its limits, by the policy, by its breaker, or because its
library is missing. Of those that are left, the ones that a lock of the policy covers go first, and the others only
where these have failed on this very call. Then the order is: the sum of the policy's boosts, highest first; how early
the nearest measured bucket prefers the kernel; its priority less `transform_cost_hint` for each copy that the call
needs around it, highest first; its id. Where nothing is left, kernels that only ask for dense tensors are given dense
copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from sys import intern
from typing import Any

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.errors import NoKernelAvailableError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import missing_requirement, unfit_version
from layerzero_runtime.policies.policy import Policy
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.limits import rejections
from layerzero_runtime.selection.transforms import DENSITY_FIELDS, transforms_of
from layerzero_runtime.serving.health import Breaker
from layerzero_runtime.tables.prior import Prior


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel, its configuration, and whether the call's tensors are to be made dense for it."""

    kernel: Kernel
    configuration: Mapping[str, Any]
    densify: bool = False


@dataclass(frozen=True, slots=True)
class Ranking:
    """The kernels that may serve a context, best first, and the others with their reasons.

    `unavailable` are those that may, but whose library is missing: they answer for described calls where nothing else
    does.
    """

    choices: tuple[Choice, ...]
    unavailable: tuple[Choice, ...]
    refused: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class LiveSelector:
    """What the choice depends on beside the context.

    Attributes:
        broken: breakers of the kernels that serve no call now.
    """

    registry: Registry
    policy: Policy
    broken: Mapping[str, Breaker]

    def refusals(self, kernel: Kernel, context: SelectionContext) -> tuple[str, ...]:
        """Why a kernel cannot serve the context; empty if it can."""
        reasons = [str(rejection) for rejection in rejections(kernel.spec.limits, context)]
        return (*reasons, *self._other_refusals(kernel, context))

    def rank(self, context: SelectionContext, prior: Prior) -> Ranking:
        """All kernels of the operation, judged for this context."""
        legal: list[Choice] = []
        unavailable: list[Choice] = []
        sparse: list[Choice] = []
        refused: dict[str, tuple[str, ...]] = {}
        configured = dict(reversed(prior.preferences))
        for kernel in self.registry.candidates(context.operation):
            limited = rejections(kernel.spec.limits, context)
            others = self._other_refusals(kernel, context)
            # Interned: answers are kept, and say much the same.
            reasons = tuple(intern(reason) for reason in (*map(str, limited), *others))
            choice = Choice(kernel, configured.get(kernel.kernel_id, {}))
            if not reasons:
                legal.append(choice)
                continue
            refused[kernel.kernel_id] = reasons
            if not limited and others == tuple(filter(None, (self.missing(kernel),))):
                unavailable.append(choice)
            elif not others and all(rejection.field in DENSITY_FIELDS for rejection in limited):
                sparse.append(Choice(kernel, choice.configuration, densify=True))
        order = self.order(context, prior)

        def ordered(choices: Sequence[Choice]) -> tuple[Choice, ...]:
            locked = self._locked(choices, context)
            return tuple(sorted(choices, key=lambda choice: (choice.kernel.kernel_id not in locked, *order(choice))))

        return Ranking(ordered(legal or sparse), ordered(unavailable), refused)

    @staticmethod
    def missing(kernel: Kernel) -> str | None:
        """Why the kernel's library cannot be used here, None if it can."""
        return missing_requirement(kernel.spec.requires) or unfit_version(kernel.spec.library, kernel.spec.min_version)

    def _other_refusals(self, kernel: Kernel, context: SelectionContext) -> tuple[str, ...]:
        denial = self.policy.denial(kernel.spec, context)
        breaker = self.broken.get(kernel.kernel_id)
        broken = None if breaker is None else f"BROKEN: failed {breaker.failures} times, last: {breaker.reason}"
        return tuple(filter(None, (denial, broken, self.missing(kernel))))

    def _locked(self, choices: Sequence[Choice], context: SelectionContext) -> frozenset[str]:
        """The kernels that a lock singles out: the others serve only where all of these fail on this very call."""
        for rule in self.policy.locks:
            if rule.applies(context):
                covered = frozenset(choice.kernel.kernel_id for choice in choices if rule.covers(choice.kernel.spec))
                if covered:
                    return covered
        return frozenset()

    def order(self, context: SelectionContext, prior: Prior) -> Callable[[Choice], tuple[Any, ...]]:
        """The key by which choices are sorted, best first."""
        last = len(prior.preferences)
        place = {kernel_id: index for index, (kernel_id, _) in reversed(tuple(enumerate(prior.preferences)))}

        def order(choice: Choice) -> tuple[Any, ...]:
            spec = choice.kernel.spec
            copies = transforms_of(spec, context, densify=choice.densify).copies
            return (
                -self.policy.boost(spec, context),
                place.get(spec.kernel_id, last),
                copies * spec.transform_cost_hint - spec.priority,
                spec.kernel_id,
            )

        return order


def no_kernel_error(registry: Registry, context: SelectionContext, ranking: Ranking) -> NoKernelAvailableError:
    """What to raise where nothing may serve the context: lists each kernel with its reasons."""
    if ranking.refused:
        return NoKernelAvailableError(f"no kernel accepts this call: {context.to_dict()}", ranking.refused)
    operations = sorted({name for kernel in registry for name in kernel.spec.operations})
    return NoKernelAvailableError(
        f"no kernel is registered for {context.operation!r}; operations with kernels: {', '.join(operations) or 'none'}"
    )
