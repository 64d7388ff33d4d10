"""Measuring devices: what a run needs of one, and those of this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from time import perf_counter
from types import MappingProxyType
from typing import Protocol

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.device import DeviceSpec
from layerzero_runtime.kernel import Kernel
from layerzero_runtime.libraries import library_version
from layerzero_runtime.registry import Registry
from layerzero_runtime.tables.staleness import kernel_source_hash
from layerzero_tune.identity import choice_of
from layerzero_tune.measure.contest import Candidate, Contest, ContestOutcome, JobOutcome, MeasurementPolicy
from layerzero_tune.results.measurement import LOSSES, Measurement
from layerzero_tune.search.configurations.search_policy import DEFAULT_POLICY, SearchPolicy
from layerzero_tune.search.configurations.searches import Searches
from layerzero_tune.search.device_lock import alone_on
from layerzero_tune.search.jobs import JobIdentity, best_choice, contest_of, contest_of_rows, entering, legal_candidates
from layerzero_tune.worker.compile_job import CompileJob, compile_jobs
from layerzero_tune.worker.compilers import Compilers
from layerzero_tune.worker.process import WorkerProcess

# How often a contest is measured that leaves a doubt each time: on a machine that is never quiet a run takes so many
# times as long.
MAX_TAKES = 3
# So many contests ahead kernels are compiled: new code takes seconds, the contest that needs it one.
COMING = 8
_logger = logging.getLogger(__name__)


# By contest, the rows that are known of a point.
Held = Mapping[str, Sequence[Measurement]]


class MeasuringDevice(Protocol):
    """What a run needs of a device."""

    @property
    def spec(self) -> DeviceSpec:
        """The device that the measurements are of."""

    @property
    def searches(self) -> Searches | None:
        """The searches of its kernels' configurations; None for a device that has no other contests than it offers."""

    def contests(self, context: SelectionContext, held: Held = MappingProxyType({})) -> tuple[Contest, ...]:
        """The contests that the device offers for a point, of which some may be held; empty if it has no candidate
        there. Those of configurations come on top, as they are found.

        Args:
            held: by contest the rows that are known of the point.
        """

    def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
        """The rows of a finished contest, and its outcome."""

    def again(self, contest: Contest) -> Contest | None:
        """The contest once more, for one that leaves a doubt; None if that is of no use."""

    def current(self, rows: Sequence[Measurement]) -> Sequence[Measurement]:
        """Those of the rows that the device would measure again: of the same sources and versions."""

    def recalled(self, rows: Sequence[Measurement]) -> Contest | None:
        """The contest that gave these rows, all of them current; None for a device that repeats none."""

    def expect(self, contests: Iterable[Contest]) -> None:
        """Contests that are likely to follow the next one; a device that prepares none does not look at them."""

    def is_compiling(self, contest: Contest) -> bool:
        """Whether something that the contest needs is not compiled yet, which is begun now; false for a device that
        compiles nothing ahead."""


class LiveDevice:
    """A device of this machine, measured in a worker process.

    Args:
        spec, registry, policy, worker, search_policy: what is measured, where and how.
        compilers: with them the kernels of a contest are compiled at once before it begins, and meanwhile those of
            contests that are expected, unless these would take processor time from what is timed.
        lost: by job, outcomes of those that cost processes; devices that share it repeat none of another's.
    """

    def __init__(
        self,
        spec: DeviceSpec,
        registry: Registry,
        policy: MeasurementPolicy,
        worker: WorkerProcess,
        search_policy: SearchPolicy = DEFAULT_POLICY,
        compilers: Compilers | None = None,
        lost: dict[str, JobOutcome] | None = None,
    ) -> None:
        self.spec = spec
        self._registry = registry
        self._kernels: Mapping[str, Kernel] = {kernel.kernel_id: kernel for kernel in registry}
        self._identity = JobIdentity(spec, policy)
        self._worker = worker
        self.searches: Searches | None = Searches(registry, self._identity, search_policy)
        self._compilers = compilers
        self._expected: Iterable[Contest] = ()
        self._lost: dict[str, JobOutcome] = {} if lost is None else lost
        self._hanging: dict[tuple[str, str], JobOutcome] = {}

    def contests(self, context: SelectionContext, held: Held = MappingProxyType({})) -> tuple[Contest, ...]:
        """All kernels in the configurations that they choose themselves; those that came later than what is held, in a
        contest of their own with the default and what is best so far."""
        candidates = self.candidates(context)
        whole = self.contest(context, candidates)
        known = {row.job_id for rows in held.values() for row in rows}
        entrants = [found for found, job_id in zip(candidates, whole.job_ids, strict=True) if job_id not in known]
        if len(entrants) == len(candidates):
            return (whole,) if candidates else ()
        found = [contest_of_rows(rows) for rows in held.values() if any(row.job_id in whole.job_ids for row in rows)]
        before = tuple(contest for contest in found if contest.repeat == 0) or tuple(found)
        if not entrants:
            return before
        served = best_choice(row for rows in held.values() for row in rows)
        return (*before, entering(context, served, entrants, candidates, self._kernels, self._identity))

    def candidates(self, context: SelectionContext) -> tuple[Candidate, ...]:
        return legal_candidates(self._registry, context.with_device(self.spec))

    def contest(self, context: SelectionContext, candidates: Iterable[Candidate]) -> Contest:
        return contest_of(context, candidates, self._kernels, self._identity)

    def measure(self, contest: Contest) -> tuple[tuple[Measurement, ...], ContestOutcome]:
        """The rows of a finished contest, and its outcome; waits while another run measures on the device.

        A job that cost processes before keeps the outcome that it got then: to repeat it would cost as many again. So
        does a kernel with a configuration whose compilation hung, at all points.
        """
        start = perf_counter()
        if self._compilers is not None:
            self._compile(self._compilers, contest)
        compiled_s = perf_counter() - start
        _logger.debug("%.1f s of waiting for what %s compiles", compiled_s, contest.context.operation)
        # Where the time of a call has the host's in it, nothing else may take the processors.
        is_paused = self._compilers is not None and contest.context.mode != "graph"
        paused = self._compilers.paused() if self._compilers and is_paused else nullcontext()
        with alone_on(self.spec, self._worker.check), paused:
            outcome = self._worker.run(contest, known=self._known(contest))
        for job_id, candidate, job in zip(contest.job_ids, contest.candidates, outcome.outcomes, strict=True):
            if job.status in LOSSES:
                self._lost[job_id] = job
            if job.hung_compiling:
                self._hanging.setdefault(choice_of(candidate.kernel_id, candidate.configuration), job)
        outcome = replace(outcome, preparation_s=outcome.preparation_s + compiled_s)
        return rows_of(contest, outcome, self._kernels, self.spec), outcome

    def expect(self, contests: Iterable[Contest]) -> None:
        self._expected = contests

    def is_compiling(self, contest: Contest) -> bool:
        if self._compilers is None:
            return False
        jobs = self._jobs(contest)
        self._compilers.expect(jobs)
        return not self._compilers.have(jobs)

    def _known(self, contest: Contest) -> dict[int, JobOutcome]:
        """Outcomes that a contest's candidates have already, by index."""
        found = (
            self._lost.get(job_id) or self._hanging.get(choice_of(candidate.kernel_id, candidate.configuration))
            for job_id, candidate in zip(contest.job_ids, contest.candidates, strict=True)
        )
        return {index: outcome for index, outcome in enumerate(found) if outcome is not None}

    def _compile(self, compilers: Compilers, contest: Contest) -> None:
        """What the contest needs; then what others will need is begun."""
        jobs = self._jobs(contest)
        hanging = compilers.finish(jobs)
        for job in jobs:
            if job.key in hanging:
                self._hanging.setdefault(choice_of(job.kernel_id, job.configuration), hanging[job.key])
        for following in self._expected:
            compilers.expect(self._jobs(following))
        self._expected = ()

    def _jobs(self, contest: Contest) -> list[CompileJob]:
        known = self._known(contest)
        jobs = compile_jobs(contest, self._kernels, self.spec)
        return [job for index, job in jobs.items() if index not in known]

    def give_up(self) -> None:
        """From another thread: end what is being measured, which raises `GivenUpError` there."""
        self._worker.give_up()

    def current(self, rows: Sequence[Measurement]) -> Sequence[Measurement]:
        return [row for row in rows if self._identity.gives(row, self._kernels)]

    def recalled(self, rows: Sequence[Measurement]) -> Contest | None:
        return contest_of_rows(rows)

    def measures(self, contest: Contest) -> bool:
        """Whether the contest's jobs are what this process would measure: the same device, sources and versions."""
        if not all(candidate.kernel_id in self._kernels for candidate in contest.candidates):
            return False
        own = contest_of(contest.context, contest.candidates, self._kernels, JobIdentity(self.spec, contest.policy))
        return own.job_ids == contest.job_ids

    def again(self, contest: Contest) -> Contest | None:
        following = contest.repeat + 1
        return replace(contest, repeat=following) if following < MAX_TAKES else None


def torch_name(spec: DeviceSpec) -> str:
    """What torch calls a device of this machine."""
    return "cpu" if spec.platform == "cpu" else f"{spec.platform}:{spec.index or 0}"


def rows_of(
    contest: Contest, outcome: ContestOutcome, kernels: Mapping[str, Kernel], device: DeviceSpec
) -> tuple[Measurement, ...]:
    """One row per candidate."""
    libraries = sorted({kernels[candidate.kernel_id].spec.library for candidate in contest.candidates})
    gpu = None if outcome.gpu is None else outcome.gpu.to_dict()
    versions = {name: version for name in libraries if (version := library_version(name)) is not None}
    return tuple(
        Measurement(
            contest_id=contest.contest_id,
            job_id=job_id,
            context=contest.context,
            kernel_id=candidate.kernel_id,
            configuration=candidate.configuration,
            is_default=candidate.is_default,
            status=job.status,
            message=job.message,
            relative_error=job.relative_error,
            tolerance=job.tolerance,
            screen_ns=job.screen_ns,
            samples_ns=job.samples_ns,
            device=device.to_dict(),
            versions=versions,
            source_hash=kernel_source_hash(kernels[candidate.kernel_id]),
            policy=contest.policy.to_dict(),
            measured_at=outcome.measured_at,
            contention=outcome.contention,
            gpu=gpu,
        )
        for candidate, job_id, job in zip(contest.candidates, contest.job_ids, outcome.outcomes, strict=True)
    )
