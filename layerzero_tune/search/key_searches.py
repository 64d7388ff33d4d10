"""Configurations under one static key: where their search is worth its time, and where what it found is to be measured.

A search costs as much as dozens of contests, and configurations that are good at a point are so around it: few points
of a key are searched, those that stand for the most, and the others measure what was found there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.arrays import Floats
from layerzero_tune.compile.estimate import Estimate, largest_loss
from layerzero_tune.compile.judge import MINIMUM_GAIN
from layerzero_tune.measure.contest import Contest
from layerzero_tune.search.configurations.searched import Searched
from layerzero_tune.search.configurations.searches import NEAR_OCTAVES, Proposal, Searches, SearchStep
from layerzero_tune.search.configurations.trial import OWN_CHOICE
from layerzero_tune.search.key_regret import KeyRegret

# Log time that a search is expected to gain on a kernel's own choice, taken to be exponentially distributed: the mean
# over 18 searches in graph mode on an H100 (norms, SwiGLU, split-KV attention) is 0.10, the median 0.07. Searches of
# the kernel that found less lower it, for which it counts as one itself.
SEARCH_GAIN = 0.1
# Standard deviation of a proposal's log ratio: that of a screening, and what may change per octave to where it was
# searched.
SCREENED_DEVIATION = 0.02
DEVIATION_PER_OCTAVE = 0.03
# So many configurations enter at a point at once.
ENTRANTS = 4


@dataclass(frozen=True)
class Searchable:
    """A search that may come: what it is expected to gain (log ratio) where it gains most, and its worth over all
    demanded sizes, their weights included."""

    sizes: Sizes
    context: SelectionContext
    kernel_id: str
    step: SearchStep
    gain: float
    worth: float


@dataclass(frozen=True)
class Entry:
    """A contest of configurations that may come, and its expected gain (log ratio)."""

    sizes: Sizes
    contest: Contest
    gain: float


class KeySearches:
    """What searches a static key may have, given what is measured.

    Args:
        searches: of the device.
        regret: what is measured under the key.
        searched: what searches have given, under all keys.
    """

    def __init__(self, searches: Searches, regret: KeyRegret, searched: Searched) -> None:
        self._searches = searches
        self._regret = regret
        self._searched = searched
        self._contexts: dict[Sizes, SelectionContext] = {}
        self._searchable: dict[Sizes, tuple[str, ...]] = {}
        self._begun: dict[str, set[Sizes]] = {}
        self._over: dict[str, set[Sizes]] = {}
        self._entries: dict[Sizes, tuple[object, Entry | None]] = {}
        self._expected: set[Sizes] = set()

    def add(self, sizes: Sizes, context: SelectionContext) -> None:
        """There is a point at these sizes, measured or not."""
        if sizes not in self._contexts:
            self._contexts[sizes] = context
            self._searchable[sizes] = self._searches.searchable(context)
            for kernel_id in self._searchable[sizes]:
                over = self._over.setdefault(kernel_id, set())
                if self._searches.is_over(context, kernel_id, self._searched):
                    over.add(sizes)

    def begin(self, kernel_id: str, sizes: Sizes) -> None:
        """The kernel's search at these sizes is going on."""
        self._begun.setdefault(kernel_id, set()).add(sizes)

    def end(self, kernel_id: str, sizes: Sizes) -> None:
        """The search is over, or left to another run."""
        self._begun.get(kernel_id, set()).discard(sizes)
        if self._searches.is_over(self._contexts[sizes], kernel_id, self._searched):
            self._over.setdefault(kernel_id, set()).add(sizes)

    def expect(self, sizes: Sizes) -> None:
        """Ask for no entry at these sizes from here on."""
        self._expected.add(sizes)

    def searches(self) -> Iterator[Searchable]:
        """For each kernel the search that is worth most, if one is expected to gain what counts."""
        kernels = dict.fromkeys(kernel_id for found in self._searchable.values() for kernel_id in found)
        for kernel_id in kernels:
            if (found := self._best_search(kernel_id)) is not None:
                yield found

    def entries(self) -> Iterator[Entry]:
        """The measured points at which configurations that searches have found are expected to gain what counts."""
        for sizes, context in self._contexts.items():
            if not self._searchable[sizes] or sizes not in self._regret.measured or sizes in self._expected:
                continue
            known = self._known(sizes)
            if sizes not in self._entries or self._entries[sizes][0] != known:
                self._entries[sizes] = known, self._entry(sizes, context)
            entry = self._entries[sizes][1]
            if entry is not None:
                yield entry

    def _best_search(self, kernel_id: str) -> Searchable | None:
        asked = enumerate(self._regret.demand)
        found = {sizes: number for number, sizes in asked if kernel_id in self._searchable.get(sizes, ())}
        demand, numbers = list(found), list(found.values())
        if not demand:
            return None
        known = self._searches.gains(kernel_id, self._searched)
        mean = min(SEARCH_GAIN, (SEARCH_GAIN + math.fsum(known)) / (1 + len(known)))
        gains = np.array([self._search_gain(kernel_id, sizes, mean) for sizes in demand])
        weights = np.array([self._regret.demand[sizes] for sizes in demand])
        shares = self._shares[np.ix_(numbers, numbers)]
        taken = self._over[kernel_id] | self._begun.get(kernel_id, set())
        reached = np.max(shares[[sizes in taken for sizes in demand]], axis=0, initial=0.0)
        left = gains * np.maximum(0.0, shares - reached)
        worths = np.round(left @ weights, 9)
        worths[(left.max(axis=1) < math.log1p(MINIMUM_GAIN)) | [sizes in taken for sizes in demand]] = 0.0
        while worths.max() > 0.0:
            best = int(worths.argmax())
            sizes = demand[best]
            step = self._searches.step(self._contexts[sizes], kernel_id, self._searched)
            if step is not None:
                gain, worth = float(left[best].max()), float(worths[best])
                return Searchable(sizes, self._contexts[sizes], kernel_id, step, gain, worth)
            worths[best] = 0.0
        return None

    def _search_gain(self, kernel_id: str, sizes: Sizes, mean: float) -> float:
        """Expected fall of the log time at these sizes: the mean of what of an exponential gain of that mean exceeds
        the lead of what is served now over the kernel's best; where that is not measured yet, the lead at the nearest
        sizes. Before the first it is taken to be as large as the gain."""
        nearest = sizes if sizes in self._regret.measured else self._regret.nearest_measured(sizes)
        if nearest is None:
            return mean * math.exp(-1.0)
        behind = min(self._regret.behind(nearest, kernel_id).values(), default=math.inf)
        return mean * math.exp(-max(0.0, behind) / mean)

    @cached_property
    def _shares(self) -> Floats:
        """How much a search at each of the demanded sizes says of each other one: nearly all for an octave."""
        shares: Floats = np.maximum(0.0, 1.0 - (self._regret.octaves / NEAR_OCTAVES) ** 3)
        return shares

    def _known(self, sizes: Sizes) -> tuple[object, ...]:
        """What an entry at these sizes depends on."""
        over = (len(self._over.get(kernel_id, ())) for kernel_id in self._searchable[sizes])
        return (self._regret.served(sizes), len(self._regret.tried(sizes)), *over)

    def _entry(self, sizes: Sizes, context: SelectionContext) -> Entry | None:
        served, tried = self._regret.served(sizes), self._regret.tried(sizes)
        if served is None:
            return None
        gains: list[tuple[float, Proposal]] = []
        for kernel_id in self._searchable[sizes]:
            behind = self._regret.behind(sizes, kernel_id).get((kernel_id, OWN_CHOICE))
            if behind is not None:
                proposals = self._searches.proposals(context, kernel_id, self._searched)
                gains += [(_expected_gain(behind, found), found) for found in proposals if found.choice not in tried]
        gains.sort(key=lambda found: (-found[0], found[1].octaves, found[1].choice))
        entrants = gains[:ENTRANTS]
        if not entrants or entrants[0][0] < math.log1p(MINIMUM_GAIN):
            return None
        contest = self._searches.entry(context, served, (proposal for _, proposal in entrants))
        return Entry(sizes, contest, entrants[0][0])


def _expected_gain(behind: float, proposal: Proposal) -> float:
    """By how much the proposal is expected to be faster than what is served, whose lead over the kernel's own choice is
    `behind` (log ratios)."""
    deviation = math.hypot(SCREENED_DEVIATION, DEVIATION_PER_OCTAVE * proposal.octaves)
    return largest_loss(Estimate(0.0, 0.0, 0.0), [Estimate(behind + proposal.log_ratio, 0.0, deviation)])
