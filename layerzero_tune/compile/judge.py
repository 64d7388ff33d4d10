"""Judging: from the contests at one cell to a verdict, a winner or a tie set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from layerzero_runtime.context import SelectionContext
from layerzero_runtime.operation import Operation, Sizes, StaticKey
from layerzero_runtime.operations import operation_named
from layerzero_tune.compile.distrust import doubts, is_disturbed
from layerzero_tune.identity import canonical_json
from layerzero_tune.measure.statistics import LOG_RESOLUTION, SLOWER_THRESHOLD, paired_logs, paired_ratios
from layerzero_tune.results.measurement import Measurement
from layerzero_tune.results.schema import JsonTexts

# An entry differs from the default only where the 95% bound of the gain is above 1% (contract 4).
MINIMUM_GAIN = 0.01
# A choice within 0.5% of the winner counts as tied even where the interval is narrower: below what a contest repeats.
TIE_MARGIN = 0.005
# A screening has a few short looks: its ratios may be off by this factor either way, as times of separate runs are.
SCREENING_DOUBT = 2.0

# Log ratio beyond which no threshold lies: a gain, a tie margin, or what counts as slower than the default.
DECIDED = math.log(SLOWER_THRESHOLD)

Choice = tuple[str, str]  # (kernel id, canonical JSON of the configuration)


@dataclass(frozen=True, slots=True)
class Standing:
    """How a choice stands against the reference choice at one cell.

    Attributes:
        log_ratio: mean of log(time / reference's time); negative is faster.
        low, high: 95% interval of that mean, by bootstrap unless all rounds lie beyond `DECIDED` on one side; for a
            choice that was only screened, `SCREENING_DOUBT` either way. Wider by the doubt in disturbed contests where
            there are no others.
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
        away: how far the key that it was measured under lies from the one that it speaks for, in octaves of the
            feature that they differ in (`pooling`).
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
    away: float = 0.0

    @property
    def served(self) -> Choice:
        """The fastest of what an entry may give here."""
        return min(self.acceptable, key=lambda choice: (self.log_ratio(choice), choice))

    def log_ratio(self, choice: Choice) -> float:
        """log(time of the choice / time of the reference), infinite for a choice without a time."""
        standing = self.standings.get(choice)
        return math.inf if standing is None else standing.log_ratio

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


@dataclass(frozen=True)
class _Contest:
    """The rows of a contest that have a time, by choice, and whether something disturbed it."""

    jobs: Mapping[Choice, Measurement]
    disturbed: bool


def describe_choice(choice: Choice) -> str:
    kernel_id, configuration = choice
    return kernel_id if configuration == "{}" else f"{kernel_id} {configuration}"


def choice_described(text: str) -> Choice:
    """The choice of which `describe_choice` gave the text."""
    kernel_id, _, configuration = text.partition(" ")
    return kernel_id, configuration or "{}"


def judge(rows: Iterable[Measurement]) -> dict[tuple[str, StaticKey], tuple[Verdict, ...]]:
    """Verdicts by operation and static key, sorted by sizes; cells in which nothing has a time are left out.

    Searches of configurations bear no witness: of many noisy screenings the best one is lucky. Nor do contests during
    which the GPU was slowed down.
    """
    cells: dict[tuple[str, StaticKey, Sizes], list[Measurement]] = {}
    by_context: dict[int, list[Measurement]] = {}  # rows share their contexts, whose keys take longer than their ids
    for row in rows:
        if row.is_search or row.is_slowed:
            continue
        cell = by_context.get(id(row.context))
        if cell is None:
            operation = operation_named(row.context.operation)
            key = (operation.name, operation.static_key(row.context), operation.sizes(row.context))
            cell = by_context[id(row.context)] = cells.setdefault(key, [])
        cell.append(row)
    verdicts: dict[tuple[str, StaticKey], list[Verdict]] = {}
    texts = JsonTexts()
    for (name, static_key, sizes), found in cells.items():
        verdict = _judge_cell(operation_named(name), sizes, found, texts)
        if verdict is not None:
            verdicts.setdefault((name, static_key), []).append(verdict)
    return {
        key: tuple(sorted(found, key=lambda verdict: verdict.sizes))
        for key, found in sorted(verdicts.items(), key=lambda item: (item[0][0], repr(item[0][1])))
    }


def _judge_cell(operation: Operation, sizes: Sizes, rows: Sequence[Measurement], texts: JsonTexts) -> Verdict | None:
    contests = _contests(rows, texts)
    if not contests:
        return None
    default: Choice = (operation.default_kernel, canonical_json({}))
    reference = default if any(default in contest.jobs for contest in contests) else _fastest(contests)
    standings = _standings(contests, reference, DECIDED)
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
    return Verdict(
        context=_first_context(rows),
        sizes=sizes,
        standings=standings,
        default=default,
        reference=reference,
        best=best,
        tied=tied,
        acceptable=acceptable,
        reference_ns=median(_time(contest.jobs[reference]) for contest in contests if reference in contest.jobs),
        measured_at=max(row.measured_at for row in rows),
    )


def _contests(rows: Sequence[Measurement], texts: JsonTexts) -> tuple[_Contest, ...]:
    found: dict[str, list[Measurement]] = {}
    for row in sorted(rows, key=lambda row: (row.contest_id, row.job_id)):
        if row.status == "ok" and row.screen_ns is not None:
            found.setdefault(row.contest_id, []).append(row)
    return tuple(
        _Contest({(row.kernel_id, texts.of_mapping(row.configuration)): row for row in jobs}, is_disturbed(jobs))
        for jobs in found.values()
    )


def _first_context(rows: Sequence[Measurement]) -> SelectionContext:
    contexts = list({id(row.context): row.context for row in rows}.values())
    return contexts[0] if len(contexts) == 1 else min(contexts, key=lambda context: canonical_json(context.to_dict()))


def _time(row: Measurement) -> float:
    assert row.screen_ns is not None
    return median(row.samples_ns) if row.samples_ns else row.screen_ns


def _fastest(contests: Sequence[_Contest]) -> Choice:
    """The choice with a time in the most contests, the fastest of these."""
    times: dict[Choice, list[float]] = {}
    for contest in contests:
        for choice, row in contest.jobs.items():
            times.setdefault(choice, []).append(_time(row))
    return min(times, key=lambda choice: (-len(times[choice]), median(times[choice]), choice))


def _standings(contests: Sequence[_Contest], reference: Choice, decided: float) -> dict[Choice, Standing]:
    """Ratios within contests alone, pooled over the contests that hold both sides.

    Disturbed contests do not count for a choice that others hold too. Where they are all there is, their doubt widens
    its interval: leaving them out would make a hole in the table where the default, at least, is known to serve.
    `decided` as in `paired_ratios`.
    """
    anchored = [contest for contest in contests if reference in contest.jobs]
    paired: dict[Choice, list[_Contest]] = {}
    screened: dict[Choice, list[_Contest]] = {}
    for contest in anchored:
        rounds = len(contest.jobs[reference].samples_ns)
        for choice, row in contest.jobs.items():
            held = paired if rounds and len(row.samples_ns) == rounds else screened
            held.setdefault(choice, []).append(contest)
    together: dict[tuple[int, ...], list[Choice]] = {}
    for choice, found in paired.items():
        together.setdefault(tuple(map(id, found)), []).append(choice)
    standings: dict[Choice, Standing] = {}
    for choices in together.values():
        standings |= _paired(_trusted(paired[choices[0]]), choices, reference, decided)
    for choice in screened.keys() - paired.keys():
        standings[choice] = _screened(_trusted(screened[choice]), choice, reference)
    return dict(sorted(standings.items()))


def _trusted(contests: Sequence[_Contest]) -> Sequence[_Contest]:
    """The undisturbed contests, all where there are none."""
    return [contest for contest in contests if not contest.disturbed] or contests


def _paired(
    contests: Sequence[_Contest], choices: Sequence[Choice], reference: Choice, decided: float
) -> dict[Choice, Standing]:
    """The standings of choices that have rounds in all of these contests."""
    logs = [
        paired_logs([contest.jobs[choice].samples_ns for choice in choices], contest.jobs[reference].samples_ns)
        for contest in contests
    ]
    doubt: Sequence[float] = ()
    if contests[0].disturbed:
        found = [doubts(contest.jobs[reference], part) for contest, part in zip(contests, logs, strict=True)]
        doubt = [max(each) for each in zip(*found, strict=True)]
    pooled = np.concatenate(logs, axis=1)
    ratios = paired_ratios(pooled, decided, doubt)
    return {
        choice: Standing(ratio.mean_log_ratio, ratio.low, ratio.high, pooled.shape[1])
        for choice, ratio in zip(choices, ratios, strict=True)
    }


def _screened(contests: Sequence[_Contest], choice: Choice, reference: Choice) -> Standing:
    found = [(contest.jobs[choice].screen_ns, contest.jobs[reference].screen_ns) for contest in contests]
    ratios = [math.log(time / anchor) for time, anchor in found if time is not None and anchor is not None]
    # Rounded as the paired ratios are: the last bits of a logarithm differ between machines.
    estimate = round(math.fsum(ratios) / len(ratios) / LOG_RESOLUTION) * LOG_RESOLUTION
    doubt = math.log(SCREENING_DOUBT)
    return Standing(estimate, estimate - doubt, estimate + doubt, 0)


def _tied(contests: Sequence[_Contest], best: Choice, measured: Mapping[Choice, Standing]) -> Iterable[Choice]:
    """Choices whose paired ratio to the best is not shown to be above the tie margin."""
    margin = math.log1p(TIE_MARGIN)
    slower = _slower_in_every_round(contests, best)
    rivals = [
        _Contest({choice: row for choice, row in contest.jobs.items() if choice not in slower}, contest.disturbed)
        for contest in contests
    ]
    against_best = _standings(rivals, best, margin)
    for choice in measured:
        standing = against_best.get(choice)
        if standing is not None and standing.rounds and standing.low <= margin:
            yield choice


def _slower_in_every_round(contests: Sequence[_Contest], best: Choice) -> frozenset[Choice]:
    """The choices of undisturbed contests that took longer than the best and the tie margin in each of their rounds:
    so they do in every resample of these, and need no interval."""
    slowest_lead: dict[Choice, float] = {}
    for contest in contests:
        anchor = contest.jobs.get(best)
        if anchor is None or not anchor.samples_ns:
            continue
        choices = [c for c, row in contest.jobs.items() if len(row.samples_ns) == len(anchor.samples_ns)]
        times = np.array([contest.jobs[choice].samples_ns for choice in choices])
        leads = (times / np.array(anchor.samples_ns)).min(axis=1)
        for choice, lead in zip(choices, leads.tolist(), strict=True):
            certain = 0.0 if contest.disturbed else lead
            slowest_lead[choice] = min(certain, slowest_lead.get(choice, certain))
    # Above by more than the rounding of logarithms.
    threshold = (1.0 + TIE_MARGIN) * (1.0 + 10.0 * LOG_RESOLUTION)
    return frozenset(choice for choice, lead in slowest_lead.items() if lead > threshold)
