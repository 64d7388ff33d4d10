"""The tuner's own search, and others that it was compared with.

A strategy is a function of what is known: the space (its times are not looked at), the trials so far, configurations to
begin with, a seed, and how many measurements there are in all. It returns what to measure next.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import TrialState, create_trial

from layerzero_runtime.kernel import Configuration
from layerzero_tune.search.configurations.proposals import next_batch
from layerzero_tune.search.configurations.search_policy import SearchPolicy
from layerzero_tune.search.configurations.trial import Trial, text_of
from search_comparison.recorded_space import RecordedSpace

Strategy = Callable[
    [RecordedSpace, Sequence[Trial], Sequence[Configuration], int, int],
    Sequence[Configuration],
]

STARTUP = 10
MAX_DRAWS = 20
# Kernel Tuner's greedy ILS: this share of the parameters changes by chance at a local optimum.
KICK = 0.3


def tuner(
    space: RecordedSpace, trials: Sequence[Trial], seeds: Sequence[Configuration], seed: int, budget: int
) -> Sequence[Configuration]:
    """What the tuner does, in its batches."""
    return next_batch(
        {text_of(found): found for found in space.valid}, trials, seeds, SearchPolicy(measurements=budget, seed=seed)
    )


def at_random(
    space: RecordedSpace, trials: Sequence[Trial], seeds: Sequence[Configuration], seed: int, budget: int
) -> Sequence[Configuration]:
    """The seeds, then all with equal chances."""
    known = {text_of(trial.configuration) for trial in trials}
    first = [configuration for configuration in seeds if text_of(configuration) not in known]
    if first:
        return first
    chance = random.Random(f"{seed} {len(trials)}")
    while text_of(drawn := chance.choice(space.valid)) in known:
        pass
    return [drawn]


class _UnknownError(Exception):
    """The walk has come to a configuration without a trial."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration


def greedy_ils(
    space: RecordedSpace, trials: Sequence[Trial], seeds: Sequence[Configuration], seed: int, budget: int
) -> Sequence[Configuration]:
    """Iterated local search as Kernel Tuner has it: move to the first neighbour that is faster, where there is none
    change some parameters by chance. The walk is repeated from its beginning until it leaves what is known."""
    known = {text_of(trial.configuration): trial for trial in trials}
    chance = random.Random(seed)

    def ratio(configuration: Configuration) -> float:
        trial = known.get(text_of(configuration))
        if trial is None:
            raise _UnknownError(configuration)
        return float("inf") if trial.log_ratio is None else trial.log_ratio

    try:
        place = min(seeds, key=ratio) if seeds else chance.choice(space.valid)
        for _ in range(100 * budget):
            while (faster := _first_faster(space, place, ratio, chance)) is not None:
                place = faster
            for _ in range(max(1, round(KICK * len(place)))):
                place = chance.choice(space.neighbours[text_of(place)] or space.valid)
            ratio(place)
    except _UnknownError as found:
        return [found.configuration]
    return at_random(space, trials, seeds, seed, budget)


def _first_faster(
    space: RecordedSpace, place: Configuration, ratio: Callable[[Configuration], float], chance: random.Random
) -> Configuration | None:
    here = ratio(place)
    around = list(space.neighbours[text_of(place)])
    chance.shuffle(around)
    return next((other for other in around if ratio(other) < here), None)


def then_descent(strategy: Strategy, share: float) -> Strategy:
    """Another strategy for a share of the measurements, then the neighbours of the best until none is left."""

    def propose(
        space: RecordedSpace, trials: Sequence[Trial], seeds: Sequence[Configuration], seed: int, budget: int
    ) -> Sequence[Configuration]:
        timed = [trial for trial in trials if trial.log_ratio is not None]
        if len(trials) >= share * budget and timed:
            known = {text_of(trial.configuration) for trial in trials}
            best = min(timed, key=lambda trial: trial.log_ratio or 0.0)
            around = [c for c in space.neighbours[text_of(best.configuration)] if text_of(c) not in known]
            if around:
                return [random.Random(f"{seed} {len(trials)}").choice(around)]
        return strategy(space, trials, seeds, seed, budget)

    return propose


def sampled(make: Callable[[int], BaseSampler], *, ordinal: bool = False) -> Strategy:
    """A sampler of Optuna's over categories, or over the values' ranks as integers, drawing one at a time; draws that
    are known or not valid are told as failed and drawn again."""

    def propose(
        space: RecordedSpace, trials: Sequence[Trial], seeds: Sequence[Configuration], seed: int, budget: int
    ) -> Sequence[Configuration]:
        known = {text_of(trial.configuration): trial for trial in trials}
        first = [configuration for configuration in seeds if text_of(configuration) not in known]
        if first or len(known) < STARTUP:
            return first or at_random(space, trials, seeds, seed, budget)
        values = {name: sorted({c[name] for c in space.valid}) for name in space.valid[0]}
        study = optuna.create_study(sampler=make(random.Random(f"{seed} {len(trials)}").getrandbits(31)))
        distributions: Mapping[str, BaseDistribution] = {
            name: IntDistribution(0, len(found) - 1) if ordinal else CategoricalDistribution(range(len(found)))
            for name, found in values.items()
        }
        for trial in trials:
            ranks = {name: values[name].index(value) for name, value in trial.configuration.items()}
            state = TrialState.PRUNED if trial.log_ratio is None else TrialState.COMPLETE
            study.add_trial(
                create_trial(state=state, value=trial.log_ratio, params=ranks, distributions=dict(distributions))
            )
        for _ in range(MAX_DRAWS):
            asked = study.ask(dict(distributions))
            drawn = {name: values[name][rank] for name, rank in asked.params.items()}
            if text_of(drawn) in space.times and text_of(drawn) not in known:
                return [drawn]
            study.tell(asked, state=TrialState.FAIL)
        return at_random(space, trials, seeds, seed, budget)

    return propose


STRATEGIES: Mapping[str, Strategy] = {
    "tuner": tuner,
    "tuner to the half, then descent": then_descent(tuner, 0.5),
    "TPE, categories": sampled(lambda seed: TPESampler(seed=seed, multivariate=True, n_startup_trials=1)),
    "TPE, ordinal integers": sampled(
        lambda seed: TPESampler(seed=seed, multivariate=True, n_startup_trials=1), ordinal=True
    ),
    "genetic algorithm (NSGA-II)": sampled(lambda seed: NSGAIISampler(seed=seed, population_size=20)),
    "greedy ILS (Kernel Tuner)": greedy_ils,
    "random": at_random,
}
