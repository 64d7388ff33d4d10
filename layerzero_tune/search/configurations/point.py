"""The next contest of a point at which kernels may have configurations to choose from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel
from layerzero_tune.measure.contest import Candidate, Contest
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.search.configurations.bound import memory_bound_ns
from layerzero_tune.search.configurations.proposals import best_trials, finalists, next_batch
from layerzero_tune.search.configurations.search_policy import SearchPolicy
from layerzero_tune.search.configurations.searched import Searched
from layerzero_tune.search.configurations.trial import trials_of
from layerzero_tune.search.configurations.valid import valid_configurations
from layerzero_tune.search.jobs import JobIdentity, contest_of

# Of so many points around one the best configurations begin its search, so many of each.
NEIGHBOURS = 3
SEEDS_EACH = 4
# Points whose sizes differ by less are near: grids of a workload step by up to four in several sizes at once.
NEAR_OCTAVES = 3.0


def contest_at(
    context: SelectionContext,
    candidates: Sequence[Candidate],
    kernels: Mapping[str, Kernel],
    identity: JobIdentity,
    searched: Searched,
    policy: SearchPolicy,
) -> Contest:
    """What to measure next at the point: for the first kernel whose search goes on a contest of configurations, and
    once none does the contest of all kernels, in which the best configurations take part.

    A contest of configurations holds the kernel's own choice, to which their times are compared, and ends with the
    screening: it tells a search where to look, and a table nothing. Where the own choice has no time, there is nothing
    to compare with, and the search is over.
    """
    screening = replace(identity, policy=replace(identity.policy, rounds=0))
    described = context.with_device(identity.device)
    bound = memory_bound_ns(described)
    entered = list(candidates)
    for candidate in candidates:
        kernel = kernels[candidate.kernel_id]
        if kernel.space is None:
            continue
        rows = _current(searched.rows(kernel.kernel_id, context), kernel, screening)
        trials = trials_of(rows)
        valid = valid_configurations(kernel.space, described)
        seeds, are_near = _seeds(kernel, context, searched, screening)
        limited = replace(policy, measurements=policy.near_measurements) if are_near else policy
        batch = next_batch(valid, trials, seeds, limited, bound) if _is_comparable(rows) else ()
        if batch:
            return contest_of(context, (candidate, *_configured(kernel, batch)), kernels, screening)
        entered += _configured(kernel, finalists(trials, policy))
    return contest_of(context, entered, kernels, identity)


def _configured(kernel: Kernel, configurations: Iterable[Configuration]) -> list[Candidate]:
    return [Candidate(kernel.kernel_id, configuration) for configuration in configurations]


def _seeds(
    kernel: Kernel, context: SelectionContext, searched: Searched, screening: JobIdentity
) -> tuple[tuple[Configuration, ...], bool]:
    """The best configurations of the points around, in turn: the nearest point's best, the next one's best, ...; and
    whether any of these points is near."""
    around = (
        (octaves, best)
        for octaves, rows in searched.around(kernel.kernel_id, context)
        if (best := best_trials(trials_of(_current(rows, kernel, screening)), SEEDS_EACH))
    )
    found = tuple(islice(around, NEIGHBOURS))
    seeds = tuple(best[rank] for rank in range(SEEDS_EACH) for _, best in found if rank < len(best))
    return seeds, any(octaves <= NEAR_OCTAVES for octaves, _ in found)


def _current(rows: Iterable[Measurement], kernel: Kernel, screening: JobIdentity) -> list[Measurement]:
    """Those rows that this source, version, device and policy would give again."""
    return [
        row
        for row in rows
        if row.job_id == screening.of(row.context, kernel, Candidate(kernel.kernel_id, row.configuration))
    ]


def _is_comparable(rows: Sequence[Measurement]) -> bool:
    own = [row.status for row in rows if not row.configuration]
    return not own or "ok" in own
