"""Jobs and contests of a point: which candidates compete, under which ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.errors import ResultsError
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import missing_requirement
from layerzero_runtime.operations import operation_named
from layerzero_runtime.registry import Registry
from layerzero_runtime.selection.limits import rejections
from layerzero_runtime.tables.staleness import kernel_source_hash, version_that_matters
from layerzero_tune.compile.judge import Choice, judge
from layerzero_tune.identity import choice_of, content_hash
from layerzero_tune.measure.contest import Candidate, Contest, MeasurementPolicy
from layerzero_tune.results.measurement import Measurement


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

    def gives(self, row: Measurement, kernels: Mapping[str, Kernel]) -> bool:
        """Whether the row is of a job that these kernels would have again: same source, device, versions and policy."""
        kernel = kernels.get(row.kernel_id)
        if kernel is None:
            return False
        return row.job_id == self.of(row.context, kernel, Candidate(row.kernel_id, row.configuration))


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


# More repeats of one contest than any tuning makes.
MAX_REPEATS = 64


def entering(
    context: SelectionContext,
    served: Choice | None,
    entrants: Iterable[Candidate],
    legal: Sequence[Candidate],
    kernels: Mapping[str, Kernel],
    identity: JobIdentity,
) -> Contest:
    """The contest in which candidates that come later meet the default, if it is legal at the point, and what is best
    so far there, which both reach the final rounds whatever the screening says."""
    first = [candidate for candidate in legal if candidate.is_default]
    known = {choice_of(found.kernel_id, found.configuration) for found in first}
    if served is not None and served not in known:
        first.append(Candidate(served[0], json.loads(served[1]), is_anchor=True))
        known.add(served)
    others = [found for found in entrants if choice_of(found.kernel_id, found.configuration) not in known]
    return contest_of(context, [*first, *others], kernels, identity)


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


def best_choice(rows: Iterable[Measurement]) -> Choice | None:
    """The fastest choice that an entry may give at a point, by all of its rows; None where nothing has a time."""
    found = [verdict for verdicts in judge(rows).values() for verdict in verdicts]
    return found[0].served if found else None


def contest_of_rows(rows: Sequence[Measurement]) -> Contest:
    """The contest that gave these rows; its id is a hash, so the number of its repeat is found by trying. Those that
    had final rounds are its anchors: a repeat is about them.

    Raises:
        ResultsError: its measurement policy is unknown, or no repeat gives the recorded id.
    """
    candidates = tuple(
        Candidate(row.kernel_id, row.configuration, row.is_default, bool(row.samples_ns)) for row in rows
    )
    job_ids = tuple(row.job_id for row in rows)
    try:
        policy = MeasurementPolicy(**rows[0].policy)
    except TypeError as error:
        raise ResultsError(
            f"contest {rows[0].contest_id} has a measurement policy that this release does not know ({error}); "
            "measure this point again"
        ) from error
    for repeat in range(MAX_REPEATS):
        contest = Contest(rows[0].context, candidates, job_ids, policy, repeat)
        if contest.contest_id == rows[0].contest_id:
            return contest
    raise ResultsError(f"contest {rows[0].contest_id} does not follow from its jobs; measure this point again")
