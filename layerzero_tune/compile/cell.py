"""A point of the tree, and what each choice costs there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.judge import Choice, Verdict

MISS: Choice = ("", "")
# Cost, in log time, of a choice without a time at a cell, and of answering where nothing was measured.
_UNKNOWN_COST = 2.0
# Added where a choice is not acceptable, so that splits prefer pure sides over small differences in regret.
_UNACCEPTABLE_COST = 0.01


@dataclass(frozen=True)
class Cell:
    """A point of the tree: measured sizes with their verdict, or unmeasured ones (None), which must miss."""

    sizes: Sizes
    verdict: Verdict | None

    @property
    def acceptable(self) -> frozenset[Choice]:
        return frozenset({MISS}) if self.verdict is None else self.verdict.acceptable

    def without_doubt(self, default: Choice) -> Cell:
        """The cell with the default alone acceptable where a choice beside it is not proved to gain on it."""
        if self.verdict is None or default not in self.acceptable:
            return self
        return Cell(self.sizes, replace(self.verdict, acceptable=frozenset({default})))

    def cost(self, choice: Choice) -> float:
        """Log time that a choice costs beside the best acceptable one: what cannot be had attracts no split."""
        if self.verdict is None or choice == MISS:
            return 0.0 if self.verdict is None and choice == MISS else _UNKNOWN_COST
        loss = min(max(self.verdict.regret(choice) - self._least_regret, 0.0), _UNKNOWN_COST)
        return loss if choice in self.acceptable else loss + _UNACCEPTABLE_COST

    @cached_property
    def _least_regret(self) -> float:
        assert self.verdict is not None
        return min(self.verdict.regret(other) for other in self.acceptable)

    def lead(self, ahead: Choice, behind: Choice) -> float | None:
        """Log time by which one choice leads the other here, None where one of them has no time."""
        standings = {} if self.verdict is None else self.verdict.standings
        if ahead not in standings or behind not in standings:
            return None
        return standings[behind].log_ratio - standings[ahead].log_ratio
