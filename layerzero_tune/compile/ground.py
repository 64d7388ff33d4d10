"""The ground of a tree: what each choice is expected to lose at the sizes that a static key serves, as arrays.

Its places are the measured cells and foreseen sizes between them (`foreseen`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
from numpy.typing import NDArray

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Sizes
from layerzero_tune.compile.arrays import Floats, Mask, Rows
from layerzero_tune.compile.chains import Chains
from layerzero_tune.compile.feature import Feature, features_at
from layerzero_tune.compile.judge import MINIMUM_GAIN, Choice, Verdict
from layerzero_tune.compile.regret import RegretModel
from layerzero_tune.measure.statistics import SLOWER_THRESHOLD

# Loss, in log time, of a choice that is illegal or has no time at a place.
_UNKNOWN = 2.0
# A choice that is expected to be slower than the default loses this share of its doubt beside that: where it is slower
# by little, it may be by much. Judged by cells that were left out, three times, tables of an EPYC have an efficiency of
# 0.9837 with this and 0.9836 without, and are slower than the default at 12 and 16 of 7,215; those of an H100 lose
# 0.0129 and 0.0135 at full attention, and are slower at 18 and 21 of 2,269.
_DOUBTED = 0.25
# Where times jump with the waves of a call's tiles, a choice that contests at a cell show to be slower than the default
# loses this many times more there, up to a limit in log time: what is gained in the waves beside does not make up for
# it, and no bucket is saved by it. Nor does it matter how many of the calls of its sizes it takes. Judged by 305
# contests of attention of an evaluation on an H100, tables with 10, 15 and 20 have efficiencies of 0.9962, 0.9963 and
# 0.9946, and are slower at 1, 0 and 0. By cells that were left out it costs 0.0004 at full attention in graphs, and
# 0.004 at cross attention, most of it at one of 794; with and without, 4 of 866 and 2 and 1 are slower.
_SLOWER, _SLOWER_AT_MOST = 15.0, 0.3
# The share of a measured cell's own contests in what is expected there; the rest is what the cells around it say too.
# Cross-validated on three results: 0, 0.5 and 1 give 0.9880, 0.9883 and 0.9879.
_OWN_SHARE = 0.5


@dataclass(frozen=True)
class Ground:
    """Places of one static key.

    Attributes:
        sizes: (places, axes).
        choices: what may serve.
        chains: how, each in a column: alone, or with another behind its guards.
        losses: (places, chains), log time beside the best safe chain, in shares of all places: summed over these they
            give a mean.
        expected: (places, chains), log ratios to the model's reference; NaN for a chain that cannot serve.
        measured: which places are measured cells.
        ratios, variances: (places, choices), of the gain on the default by contests; NaN where there is none.
        exempt: (choices,), those whose gain needs no proof.
    """

    sizes: NDArray[np.int64]
    choices: tuple[Choice, ...]
    chains: Chains
    losses: Floats
    expected: Floats
    measured: Mask
    ratios: Floats
    variances: Floats
    exempt: Mask

    @classmethod
    def of(
        cls,
        model: RegretModel,
        verdicts: Sequence[Verdict],
        candidates: Sequence[Choice],
        foreseen: Sequence[Sizes],
        serving: Callable[[Sequence[Choice], Sequence[Sizes]], Sequence[Sequence[Choice | None]]],
        passes: Callable[[Choice, SelectionContext], bool],
    ) -> Self:
        """The ground of these cells and of further sizes that a table serves.

        `candidates` are the choices that may serve. `serving` says what serves some sizes where a bucket gives a
        choice: the choice itself, the default behind its guards, or nothing where it is illegal. `passes` says whether
        a choice may serve a call as far as its sizes do not tell.
        """
        choices = tuple(candidates)
        default = model.verdicts[0].default
        cells = [verdict.sizes for verdict in verdicts]
        served = [*cells, *foreseen]
        columns: dict[Choice | None, int] = {choice: column for column, choice in enumerate(choices)}
        serves = np.array([[columns.get(choice, -1) for choice in line] for line in serving(choices, served)])
        taken = _shares_taken(model, choices, served, passes)
        chains = Chains.of(
            [c != default and bool(shares.min() < 1.0) for c, shares in zip(choices, taken.T, strict=True)]
        )
        expected, safe, doubts = _expected(model, choices, served, serves == np.arange(len(choices)))
        own, own_safe, takes = _own(verdicts, choices, expected[: len(cells)], safe[: len(cells)], passes)
        own_losses = _losses(chains.mixed(own, takes), chains.all_of(own_safe, takes))
        if model.waves is not None:
            own_losses += _SLOWER * chains.largest(_slowness(own))
        share = np.array([[0.0 if verdict.away else _OWN_SHARE] for verdict in verdicts])
        doubted = np.where(~safe & (expected > 0.0), _DOUBTED * doubts, 0.0)
        expected = chains.mixed(expected, taken)
        losses = _losses(expected, chains.all_of(safe, taken)) + chains.mixed(doubted, taken)
        losses = np.minimum(losses, _UNKNOWN)
        losses[: len(cells)] = (1.0 - share) * losses[: len(cells)] + share * own_losses
        column_of = chains.serving(serves)
        losses = np.where(column_of >= 0, np.take_along_axis(losses, np.maximum(column_of, 0), axis=1), losses)
        ratios, variances = _contests(verdicts, choices, len(served))
        return cls(
            np.array(served, dtype=np.int64),
            choices,
            chains,
            losses / len(served),
            expected,
            np.arange(len(served)) < len(cells),
            ratios,
            variances,
            np.array([choice == default or not model.default_is_measured for choice in choices]),
        )

    def features(self, rows: Rows, feature: Feature) -> NDArray[np.int64]:
        """A feature of these places."""
        return features_at(self.sizes[rows], feature)

    def ranking(self, rows: Rows) -> list[tuple[float, int]]:
        """What may serve these places, each with the loss that it has there, the least first: the chains whose choices
        the contests among them prove to gain on the default (`leaf_evidence.is_proved`), or that need no proof."""
        losses = self.losses[rows].sum(axis=0).tolist()
        proved = self._proved(rows).tolist()
        return sorted((round(losses[column], 12), column) for column in range(len(losses)) if proved[column])

    def cheapest(self, rows: Rows) -> tuple[float, int]:
        """The first of the ranking, which is never empty: the default needs no proof, or where it has no time none."""
        return self.ranking(rows)[0]

    def proves(self, column: int, rows: Rows) -> bool:
        """Whether the contests at these places prove that a chain gains on the default, or it needs no proof."""
        return bool(self._proved(rows)[column])

    def chain(self, column: int) -> tuple[Choice, ...]:
        """The choices of a chain, by its column."""
        head, behind = self.chains.heads[column], self.chains.behinds[column]
        return (self.choices[head],) if head == behind else (self.choices[head], self.choices[behind])

    def _proved(self, rows: Rows) -> Mask:
        held = rows[self.measured[rows]]
        known = ~np.isnan(self.ratios[held])
        counts = known.sum(axis=0)
        means = np.where(known, self.ratios[held], 0.0).sum(axis=0) / np.maximum(counts, 1)
        halves = np.sqrt(np.where(known, self.variances[held], 0.0).sum(axis=0)) / np.maximum(counts, 1)
        gains = (counts > 0) & (-(means + halves) > math.log1p(MINIMUM_GAIN))
        proved: Mask = gains | self.exempt
        return proved[self.chains.heads] & proved[self.chains.behinds]


def _expected(
    model: RegretModel, choices: Sequence[Choice], places: Sequence[Sizes], legal: Mask
) -> tuple[Floats, Mask, Floats]:
    """Log ratios by the regret model, NaN for a choice that cannot serve; which choices are safe, the default and those
    whose gain on it is expected to hold (`Estimate.upper`); and the doubts of the ratios, 0 where nothing is known."""
    estimates = model.estimates_at(choices, places)
    nothing = np.full(len(places), np.nan)
    ratios = np.stack([estimates[c].log_ratio if c in estimates else nothing for c in choices], axis=1)
    uppers = np.stack([estimates[c].upper if c in estimates else nothing for c in choices], axis=1)
    doubts = np.stack([estimates[c].doubt if c in estimates else np.zeros(len(places)) for c in choices], axis=1)
    ratios[~legal] = np.nan
    default = np.array([choice == model.verdicts[0].default for choice in choices])
    # Where the default has no time nothing is known to be safer.
    alone = np.isnan(ratios[:, default]).all(axis=1, keepdims=True)
    return ratios, ~np.isnan(ratios) & (default | (uppers < 0.0) | alone), doubts


def _shares_taken(
    model: RegretModel,
    choices: Sequence[Choice],
    places: Sequence[Sizes],
    passes: Callable[[Choice, SelectionContext], bool],
) -> Floats:
    """(places, choices), the shares of the cells around whose calls a choice takes: guards may turn away a part of
    them, as those of a kernel for a single sequence do."""
    if not model.default_is_measured:
        return np.ones((len(places), len(choices)))

    return model.shares_around([partial(_takes, choice, passes) for choice in choices], places)


def _takes(choice: Choice, passes: Callable[[Choice, SelectionContext], bool], cell: Verdict) -> bool:
    """Whether a choice takes the calls of a cell, as far as its sizes do not tell: its kernel ran there, or may."""
    return choice[0] in _running(cell) or passes(choice, cell.context)


def _running(verdict: Verdict) -> frozenset[str]:
    """The kernels that have a time at a cell in any configuration."""
    return frozenset(kernel_id for kernel_id, _ in verdict.standings)


def _own(
    verdicts: Sequence[Verdict],
    choices: Sequence[Choice],
    expected: Floats,
    safe: Mask,
    passes: Callable[[Choice, SelectionContext], bool],
) -> tuple[Floats, Mask, Floats]:
    """The log ratios by the contests of each cell; of the choices that are safe there, those that they say are; and
    whose calls a choice takes, as shares.

    A choice without a time there counts as expected if its kernel has one in another configuration. If its guards turn
    the cell's calls away it takes none of them; else it failed.
    """
    ratios = np.array([[_log_ratio(verdict, choice) for choice in choices] for verdict in verdicts])
    takes = np.array([[float(_takes(choice, passes, verdict)) for choice in choices] for verdict in verdicts])
    for row, verdict in enumerate(verdicts):
        running = _running(verdict)
        for column, choice in enumerate(choices):
            if choice not in verdict.standings and choice[0] in running:
                ratios[row, column] = expected[row, column]
    gains = [
        [choice in verdict.acceptable or choice == verdict.default or verdict.gains(choice) for choice in choices]
        for verdict in verdicts
    ]
    return ratios, ~np.isnan(ratios) & safe & np.array(gains), takes


def _slowness(ratios: Floats) -> Floats:
    """How much slower than the default choices are, in log time; 0 below `SLOWER_THRESHOLD`."""
    found: Floats = np.where(ratios > math.log(SLOWER_THRESHOLD), np.minimum(ratios, _SLOWER_AT_MOST), 0.0)
    return found


def _losses(ratios: Floats, safe: Mask) -> Floats:
    """Beside the best safe chain of each place; a faster one that is not safe loses and gains nothing."""
    known = ~np.isnan(ratios)
    best = np.where(safe, ratios, math.inf).min(axis=1, keepdims=True)
    best = np.where(np.isfinite(best), best, 0.0)
    losses = np.clip(np.where(known, ratios, math.inf) - best, 0.0, _UNKNOWN)
    return np.where(known.any(axis=1, keepdims=True), losses, 0.0)


def _contests(verdicts: Sequence[Verdict], choices: Sequence[Choice], places: int) -> tuple[Floats, Floats]:
    ratios, variances = np.full((places, len(choices)), np.nan), np.zeros((places, len(choices)))
    for row, verdict in enumerate(verdicts):
        for column, choice in enumerate(choices):
            standing = verdict.standings.get(choice)
            if standing is not None and verdict.reference == verdict.default:
                ratios[row, column] = standing.log_ratio
                variances[row, column] = (standing.high - standing.log_ratio) ** 2
    return ratios, variances


def _log_ratio(verdict: Verdict, choice: Choice) -> float:
    standing = verdict.standings.get(choice)
    return math.nan if standing is None else standing.log_ratio
