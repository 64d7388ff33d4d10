"""Jobs and contests of a point: which candidates compete, under which ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import missing_requirement
from layerzero_runtime.operations import operation_named
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.limits import rejections
from layerzero_runtime.tables.staleness import kernel_source_hash, version_that_matters
from layerzero_tune.identity import content_hash
from layerzero_tune.measure.contest import Candidate, Contest, MeasurementPolicy


@dataclass(frozen=True)
class JobIdentity:
    """What makes the same candidate on the same point the same job: source, device, versions that matter, policy."""

    device: DeviceSpec
    policy: MeasurementPolicy

    def of(self, context: SelectionContext, kernel: Kernel, candidate: Candidate) -> str:
        return content_hash(
            {
                "context": context.to_dict(),
                "kernel": candidate.kernel_id,
                "configuration": dict(candidate.configuration),
                "source": kernel_source_hash(kernel),
                "version": version_that_matters(kernel),
                "device": self.device.to_dict(),
                "policy": self.policy.to_dict(),
            }
        )


def legal_candidates(registry: Registry, context: SelectionContext) -> tuple[Candidate, ...]:
    """The operation's kernels whose limits and libraries allow the point, the default first.

    `context` must name its device. Kernels that are refused here are listed by `doctor` and `kernels`, with the reason.
    """
    default = operation_named(context.operation).default_kernel
    legal = [
        Candidate(kernel.kernel_id, is_default=kernel.kernel_id == default)
        for kernel in registry.candidates(context.operation)
        if not rejections(kernel.spec.limits, context) and missing_requirement(kernel.spec.requires) is None
    ]
    return tuple(sorted(legal, key=lambda candidate: (not candidate.is_default, candidate.kernel_id)))


def contest_of(
    context: SelectionContext,
    candidates: Iterable[Candidate],
    kernels: Mapping[str, Kernel],
    identity: JobIdentity,
) -> Contest:
    """The contest of these candidates at the point."""
    entered = tuple(candidates)
    job_ids = tuple(identity.of(context, kernels[candidate.kernel_id], candidate) for candidate in entered)
    return Contest(context, entered, job_ids, identity.policy)
