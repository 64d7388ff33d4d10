"""Judging: from the contests at one cell to a verdict, a winner or a tie set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Operation, Sizes, StaticKey
from layerzero_runtime.operations import operation_named
from layerzero_tune.identity import canonical_json
from layerzero_tune.measure.statistics import LOG_RESOLUTION, paired_log_ratio
from layerzero_tune.results.measurement import Measurement

# An entry differs from the default only where the 95% bound of the gain is above 1% (contract 4).
MINIMUM_GAIN = 0.01
# A choice within 0.5% of the winner counts as tied even where the interval is narrower: below what a contest repeats.
TIE_MARGIN = 0.005
# A screening has a few short looks: its ratios may be off by this factor either way, as times of separate runs are.
SCREENING_DOUBT = 2.0

Choice = tuple[str, str]  # (kernel id, canonical JSON of the configuration)


@dataclass(frozen=True)
class Standing:
    """How a choice stands against the reference choice at one cell.

    Attributes:
        log_ratio: mean of log(time / reference's time); negative is faster.
        low, high: 95% bootstrap interval of that mean; for a choice that was only screened, `SCREENING_DOUBT` either
            way.
        rounds: paired rounds behind it, 0 for a screening estimate.
    """

    log_ratio: float
    low: float
    high: float
    rounds: int

    @property
    def is_gain(self) -> bool:
        """Whether the choice is proved to be faster than the reference by more than `MINIMUM_GAIN`."""
        return self.high < -math.log1p(MINIMUM_GAIN)


@dataclass(frozen=True)
class Verdict:
    """What the contests at one cell (static key and sizes) say.

    Attributes:
        context: a measured context of the cell.
        reference: the default, or the fastest choice where the default has no time.
        best: the choice with the lowest mean.
        tied: choices that are not shown to be slower than the best, which is among them.
        acceptable: choices that an entry may give here (contract 4): the tied ones that are proved to gain on the
            default, or the default alone.
        reference_ns: median time of the reference in ns.
        measured_at: the latest contest's time, UTC.
    """

    context: SelectionContext
    sizes: Sizes
    standings: Mapping[Choice, Standing]
    default: Choice
    reference: Choice
    best: Choice
    tied: frozenset[Choice]
    acceptable: frozenset[Choice]
    reference_ns: float
    measured_at: str

    def gains(self, choice: Choice) -> bool:
        """Whether the choice is proved to gain on the default here."""
        standing = self.standings.get(choice)
        return self.reference == self.default and standing is not None and standing.is_gain

    def regret(self, choice: Choice) -> float:
        """log(time of the choice / time of the best), infinite for a choice without a time."""
        standing = self.standings.get(choice)
        if standing is None:
            return math.inf
        return max(0.0, standing.log_ratio - self.standings[self.best].log_ratio)


def choice_of(row: Measurement) -> Choice:
    return (row.kernel_id, canonical_json(dict(row.configuration)))


def judge(rows: Iterable[Measurement]) -> dict[tuple[str, StaticKey], tuple[Verdict, ...]]:
    """Verdicts by operation and static key, sorted by sizes; cells in which nothing has a time are left out."""
    cells: dict[tuple[str, StaticKey, Sizes], list[Measurement]] = {}
    for row in rows:
        operation = operation_named(row.context.operation)
        key = (operation.name, operation.static_key(row.context), operation.sizes(row.context))
        cells.setdefault(key, []).append(row)
    verdicts: dict[tuple[str, StaticKey], list[Verdict]] = {}
    for (name, static_key, sizes), found in cells.items():
        verdict = _judge_cell(operation_named(name), sizes, found)
        if verdict is not None:
            verdicts.setdefault((name, static_key), []).append(verdict)
    return {
        key: tuple(sorted(found, key=lambda verdict: verdict.sizes))
        for key, found in sorted(verdicts.items(), key=lambda item: (item[0][0], repr(item[0][1])))
    }


def _judge_cell(operation: Operation, sizes: Sizes, rows: Sequence[Measurement]) -> Verdict | None:
    contests: dict[str, dict[Choice, Measurement]] = {}
    for row in sorted(rows, key=lambda row: (row.contest_id, row.job_id)):
        if row.status == "ok" and row.screen_ns is not None:
            contests.setdefault(row.contest_id, {})[choice_of(row)] = row
    if not contests:
        return None
    default: Choice = (operation.default_kernel, canonical_json({}))
    reference = default if any(default in jobs for jobs in contests.values()) else _fastest(contests)
    standings = _standings(contests, reference)
    measured = {choice: standing for choice, standing in standings.items() if standing.rounds}
    best = min(measured or standings, key=lambda choice: (standings[choice].log_ratio, choice))
    tied = frozenset({best, *_tied(contests, best, measured)})
    gaining = frozenset(choice for choice in tied if standings[choice].is_gain)
    if reference != default:
        acceptable = tied
    elif default in tied or not gaining:
        acceptable = frozenset({default})
    else:
        acceptable = gaining
    jobs = [jobs[reference] for jobs in contests.values() if reference in jobs]
    return Verdict(
        context=rows[0].context if len(rows) == 1 else min((row.context for row in rows), key=_context_order),
        sizes=sizes,
        standings=standings,
        default=default,
        reference=reference,
        best=best,
        tied=tied,
        acceptable=acceptable,
        reference_ns=median(_time(job) for job in jobs),
        measured_at=max(row.measured_at for row in rows),
    )


def _context_order(context: SelectionContext) -> str:
    return canonical_json(context.to_dict())


def _time(row: Measurement) -> float:
    assert row.screen_ns is not None
    return median(row.samples_ns) if row.samples_ns else row.screen_ns


def _fastest(contests: Mapping[str, Mapping[Choice, Measurement]]) -> Choice:
    """The choice with a time in the most contests, the fastest of these."""
    times: dict[Choice, list[float]] = {}
    for jobs in contests.values():
        for choice, row in jobs.items():
            times.setdefault(choice, []).append(_time(row))
    return min(times, key=lambda choice: (-len(times[choice]), median(times[choice]), choice))


def _standings(contests: Mapping[str, Mapping[Choice, Measurement]], reference: Choice) -> dict[Choice, Standing]:
    """Ratios within contests alone, pooled over the contests that hold both sides."""
    pairs: dict[Choice, tuple[list[float], list[float]]] = {}
    screened: dict[Choice, list[float]] = {}
    for jobs in contests.values():
        anchor = jobs.get(reference)
        if anchor is None or anchor.screen_ns is None:
            continue
        for choice, row in jobs.items():
            if row.samples_ns and len(row.samples_ns) == len(anchor.samples_ns):
                times, baseline = pairs.setdefault(choice, ([], []))
                times.extend(row.samples_ns)
                baseline.extend(anchor.samples_ns)
            elif row.screen_ns is not None:
                screened.setdefault(choice, []).append(math.log(row.screen_ns / anchor.screen_ns))
    standings: dict[Choice, Standing] = {}
    for choice in sorted({*pairs, *screened}):
        if choice in pairs:
            ratio = paired_log_ratio(*pairs[choice])
            standings[choice] = Standing(ratio.mean_log_ratio, ratio.low, ratio.high, len(pairs[choice][0]))
        else:
            estimate = math.fsum(screened[choice]) / len(screened[choice])
            # Rounded as the paired ratios are: the last bits of a logarithm differ between machines.
            estimate = round(estimate / LOG_RESOLUTION) * LOG_RESOLUTION
            doubt = math.log(SCREENING_DOUBT)
            standings[choice] = Standing(estimate, estimate - doubt, estimate + doubt, 0)
    return standings


def _tied(
    contests: Mapping[str, Mapping[Choice, Measurement]], best: Choice, measured: Mapping[Choice, Standing]
) -> Iterable[Choice]:
    """Choices whose paired ratio to the best is not shown to be above the tie margin."""
    against_best = _standings(contests, best)
    for choice in measured:
        standing = against_best.get(choice)
        if standing is not None and standing.rounds and standing.low <= math.log1p(TIE_MARGIN):
            yield choice
