"""The searches of kernels' configurations: where one may begin, its next contest, and what they propose elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.kernel import Configuration, Kernel
from layerzero_runtime.operations import operation_named
from layerzero_runtime.registry import Registry
from layerzero_tune.compile.judge import Choice
from layerzero_tune.identity import choice_of
from layerzero_tune.measure.contest import Candidate, Contest
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.search.configurations.bound import memory_bound_ns
from layerzero_tune.search.configurations.proposals import best_trials, finalists, left_to_measure, next_batch
from layerzero_tune.search.configurations.search_policy import SearchPolicy
from layerzero_tune.search.configurations.searched import Searched
from layerzero_tune.search.configurations.trial import Trial, text_of, trials_of
from layerzero_tune.search.configurations.valid import valid_configurations
from layerzero_tune.search.jobs import JobIdentity, contest_of, entering, legal_candidates

# Of so many points around one the best configurations begin its search, so many of each.
NEIGHBOURS = 3
SEEDS_EACH = 4
# Points whose sizes differ by less are near: grids of a workload step by up to four in several sizes at once.
NEAR_OCTAVES = 3.0


@dataclass(frozen=True)
class SearchStep:
    """The next contest of a search, and how many are left with it at most."""

    contest: Contest
    left: int


@dataclass(frozen=True)
class Proposal:
    """A configuration that a search has found.

    Attributes:
        log_ratio: log(its time / the time of the kernel's own choice) where it was searched, by screening.
        octaves: how far away that is.
    """

    kernel_id: str
    configuration: Configuration
    log_ratio: float
    octaves: float

    @property
    def choice(self) -> Choice:
        return choice_of(self.kernel_id, self.configuration)


class Searches:
    """What a live device knows of its kernels' configurations. What searches have given so far comes with each call."""

    def __init__(self, registry: Registry, identity: JobIdentity, policy: SearchPolicy) -> None:
        self._registry = registry
        self._kernels: Mapping[str, Kernel] = {kernel.kernel_id: kernel for kernel in registry}
        self._identity = identity
        self._screening = replace(identity, policy=replace(identity.policy, rounds=0))
        self._policy = policy
        self._trials: dict[tuple[str, SelectionContext], tuple[int, tuple[Trial, ...], bool]] = {}
        self._valid: dict[tuple[str, SelectionContext], Mapping[str, Configuration]] = {}

    def searchable(self, context: SelectionContext) -> tuple[str, ...]:
        """The kernels that are legal at the point and have configurations to choose from."""
        legal = legal_candidates(self._registry, context.with_device(self._identity.device))
        return tuple(found.kernel_id for found in legal if self._kernels[found.kernel_id].space is not None)

    def step(self, context: SelectionContext, kernel_id: str, searched: Searched) -> SearchStep | None:
        """What a kernel's search at the point measures next; None once it is over.

        A contest of configurations holds the kernel's own choice, to which their times are compared, and ends with the
        screening: it tells a search where to look, and a table nothing. Where the own choice has no time, there is
        nothing to compare with, and the search is over.
        """
        trials, is_comparable = self._trials_at(context, kernel_id, searched.rows(kernel_id, context))
        seeds, policy = self._beginning(kernel_id, context, searched)
        valid, bound = self._valid_at(kernel_id, context), self._bound_ns(context)
        left = left_to_measure(valid, trials, policy, bound) if is_comparable else 0
        if left == 0:
            return None
        batch = next_batch(valid, trials, seeds, policy, bound)
        is_default = kernel_id == operation_named(context.operation).default_kernel
        entered = (Candidate(kernel_id, is_default=is_default), *(Candidate(kernel_id, found) for found in batch))
        contest = contest_of(context, entered, self._kernels, self._screening)
        return SearchStep(contest, -(-left // policy.batch))

    def is_over(self, context: SelectionContext, kernel_id: str, searched: Searched) -> bool:
        """Whether the kernel was searched at the point, and the search has come to its end."""
        rows = searched.rows(kernel_id, context)
        if not rows:
            return False
        trials, is_comparable = self._trials_at(context, kernel_id, rows)
        if not trials or not is_comparable:
            return not is_comparable
        _, policy = self._beginning(kernel_id, context, searched)
        return not left_to_measure(self._valid_at(kernel_id, context), trials, policy, self._bound_ns(context))

    def gains(self, kernel_id: str, searched: Searched) -> tuple[float, ...]:
        """By how much, in log time, each search of the kernel that is over has beaten the kernel's own choice."""
        found = []
        for context, rows in searched.points(kernel_id):
            if self.is_over(context, kernel_id, searched):
                trials, _ = self._trials_at(context, kernel_id, rows)
                found.append(max((-t.log_ratio for t in trials if t.log_ratio is not None), default=0.0))
        return tuple(max(0.0, gain) for gain in found)

    def proposals(self, context: SelectionContext, kernel_id: str, searched: Searched) -> tuple[Proposal, ...]:
        """What to measure beside other kernels at a point: of the kernel's own search there, if it is over, the
        finalists; else those of the nearest searches around, as far as they are near and allowed here."""
        if self.is_over(context, kernel_id, searched):
            found = [(0.0, context, searched.rows(kernel_id, context))]
        else:
            found = [
                (octaves, rows[0].context, rows)
                for octaves, rows in searched.around(kernel_id, context)
                if octaves <= NEAR_OCTAVES and self.is_over(rows[0].context, kernel_id, searched)
            ][:NEIGHBOURS]
        space, described = self._kernels[kernel_id].space, context.with_device(self._identity.device)
        assert space is not None
        proposed: dict[str, Proposal] = {}
        for octaves, point, rows in found:
            trials, _ = self._trials_at(point, kernel_id, rows)
            ratios = {text_of(trial.configuration): trial.log_ratio for trial in trials}
            for configuration in finalists(trials, self._policy):
                ratio = ratios[text_of(configuration)]
                if ratio is not None and space.is_valid(configuration, described):
                    proposal = Proposal(kernel_id, configuration, ratio, octaves)
                    proposed.setdefault(text_of(configuration), proposal)
        return tuple(proposed.values())

    def entry(self, context: SelectionContext, served: Choice, entrants: Iterable[Proposal]) -> Contest:
        """The contest in which configurations meet what is best at the point so far, and the default."""
        legal = legal_candidates(self._registry, context.with_device(self._identity.device))
        entered = (Candidate(found.kernel_id, found.configuration) for found in entrants)
        return entering(context, served, entered, legal, self._kernels, self._identity)

    def _beginning(
        self, kernel_id: str, context: SelectionContext, searched: Searched
    ) -> tuple[tuple[Configuration, ...], SearchPolicy]:
        """The best configurations of the points around, in turn: the nearest point's best, the next one's best, ...;
        and how much the search may measure, which is less where one of these points is near."""
        around = (
            (octaves, best)
            for octaves, rows in searched.around(kernel_id, context)
            if (best := best_trials(self._trials_at(rows[0].context, kernel_id, rows)[0], SEEDS_EACH))
        )
        found = tuple(islice(around, NEIGHBOURS))
        seeds = tuple(best[rank] for rank in range(SEEDS_EACH) for _, best in found if rank < len(best))
        if any(octaves <= NEAR_OCTAVES for octaves, _ in found):
            return seeds, replace(self._policy, measurements=self._policy.near_measurements)
        return seeds, self._policy

    def _trials_at(
        self, context: SelectionContext, kernel_id: str, rows: Sequence[Measurement]
    ) -> tuple[tuple[Trial, ...], bool]:
        """The trials in a kernel's rows at a point that its source, version, device and policy would give again, and
        whether its own choice has a time to compare with, as far as is known."""
        known = self._trials.get((kernel_id, context))
        if known is None or known[0] != len(rows):
            current = [row for row in rows if self._screening.gives(row, self._kernels)]
            own = [row.status for row in current if not row.configuration]
            known = len(rows), trials_of(current), not own or "ok" in own
            self._trials[kernel_id, context] = known
        return known[1], known[2]

    def _valid_at(self, kernel_id: str, context: SelectionContext) -> Mapping[str, Configuration]:
        """Kept: a search asks for them at each step."""
        if (kernel_id, context) not in self._valid:
            space = self._kernels[kernel_id].space
            assert space is not None
            found = valid_configurations(space, context.with_device(self._identity.device))
            self._valid[kernel_id, context] = found
        return self._valid[kernel_id, context]

    def _bound_ns(self, context: SelectionContext) -> float | None:
        return memory_bound_ns(context.with_device(self._identity.device))
