"""Chains: a choice, or one whose guards turn calls away with what serves those calls behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from layerzero_tune.compile.arrays import Floats, Mask


@dataclass(frozen=True)
class Chains:
    """Columns of chains over columns of choices.

    Attributes:
        heads, behinds: (chains,), the columns of the first choice and of the one behind its guards; the same twice for
            a choice that takes all calls.
    """

    heads: NDArray[np.intp]
    behinds: NDArray[np.intp]

    @classmethod
    def of(cls, guarded: Sequence[bool]) -> Self:
        """Each choice that takes all calls alone, and in turn behind each of those that do not; these alone where there
        is nothing else."""
        behinds = [column for column, is_guarded in enumerate(guarded) if not is_guarded]
        found = [(column, column) for column in behinds or range(len(guarded))]
        found += [(head, behind) for head, is_guarded in enumerate(guarded) if is_guarded for behind in behinds]
        return cls(*np.array(found, dtype=np.intp).T)

    def mixed(self, values: Floats, shares: Floats) -> Floats:
        """(places, chains) of values (places, choices), where the first choice of each takes these shares of calls."""
        first, second, share = values[:, self.heads], values[:, self.behinds], shares[:, self.heads]
        between = share * first + (1.0 - share) * second
        found: Floats = np.where(share == 1.0, first, np.where(share == 0.0, second, between))
        return found

    def largest(self, values: Floats) -> Floats:
        """(places, chains) of values (places, choices), the larger one of what serves a part of the calls each."""
        found: Floats = np.maximum(values[:, self.heads], values[:, self.behinds])
        return found

    def all_of(self, holds: Mask, shares: Floats) -> Mask:
        """(places, chains), whether something holds of all that serve calls there."""
        share = shares[:, self.heads]
        found: Mask = (holds[:, self.heads] | (share == 0.0)) & (holds[:, self.behinds] | (share == 1.0))
        return found

    def serving(self, serves: NDArray[np.int64]) -> NDArray[np.int64]:
        """(places, chains), the chain that serves where the sizes of a place turn away the first choice of a chain, -1
        where nothing does; of the same for choices."""
        is_alone = self.heads == self.behinds
        # The column behind all choices' is that of -1.
        alone = np.full(serves.shape[1] + 1, -1)
        alone[self.heads[is_alone]] = np.flatnonzero(is_alone)
        first = serves[:, self.heads]
        instead = np.where(is_alone | (first == -1), first, serves[:, self.behinds])
        found: NDArray[np.int64] = np.where(first == self.heads, np.arange(len(self.heads)), alone[instead])
        return found
