"""Which configurations to measure next, and which have come out best, given what is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice

from layerzero_runtime.kernel import Configuration
from layerzero_tune.search.configurations.search_policy import DEFAULT_POLICY, SearchPolicy
from layerzero_tune.search.configurations.trial import Trial, text_of


def next_batch(
    valid: Mapping[str, Configuration],
    trials: Sequence[Trial],
    seeds: Sequence[Configuration] = (),
    policy: SearchPolicy = DEFAULT_POLICY,
    bound_ns: float | None = None,
) -> tuple[Configuration, ...]:
    """The valid configurations to measure together next; none once the search is over.

    It follows from the arguments alone: a search goes on wherever its trials are read from. What has a trial is never
    proposed again, whether it failed or not.

    Args:
        valid: all configurations to choose from by their texts, in a fixed order.
        trials: what is known, in the order of its measurement.
        seeds: configurations to begin with, the most promising first; those that are not valid here are left out.
        bound_ns: the shortest time of a call that the device allows, in ns, where it is known.
    """
    known = {text_of(trial.configuration) for trial in trials}
    left = {text: configuration for text, configuration in valid.items() if text not in known}
    count = min(policy.batch, left_to_measure(valid, trials, policy, bound_ns))
    if count == 0:
        return ()
    first = {text: left[text] for text in map(text_of, seeds) if text in left}
    if len(valid) <= policy.enumerated:
        return tuple(islice((first | left).values(), count))
    from layerzero_tune.search.configurations.tpe import propose  # Optuna takes a second to import

    return propose(valid, trials, tuple(first.values()), count, policy.seed)


def left_to_measure(
    valid: Mapping[str, Configuration], trials: Sequence[Trial], policy: SearchPolicy, bound_ns: float | None
) -> int:
    """How many configurations a search may still measure, 0 once it is over; arguments as for `next_batch`."""
    if _reaches(bound_ns, trials, policy.bound_margin):
        return 0
    spent = len({text_of(trial.configuration) for trial in trials} & valid.keys())
    limit = len(valid) if len(valid) <= policy.enumerated else min(policy.measurements, len(valid))
    return max(0, limit - spent)


def best_trials(trials: Sequence[Trial], count: int) -> tuple[Configuration, ...]:
    """At most `count` configurations, the fastest first."""
    return tuple(trial.configuration for _, _, trial in _ranked(trials)[:count])


def finalists(trials: Sequence[Trial], policy: SearchPolicy = DEFAULT_POLICY) -> tuple[Configuration, ...]:
    """The configurations that are worth measuring beside all other kernels, by the screening: within the policy's
    margin of the fastest, the kernel's own choice included, which has a log ratio of 0.

    Half of them are the fastest. The others are the fastest of the earliest contests, with which the best of the points
    around began: where many do equally well, neighbouring points so have some in common, and a table needs fewer.
    """
    ranked = _ranked(trials)
    limit = min((ratio for ratio, _, _ in ranked), default=0.0)
    limit = min(limit, 0.0) + math.log1p(policy.finalist_margin)
    close = [trial for ratio, _, trial in ranked if ratio <= limit]
    fastest = policy.finalists // 2
    others = sorted(close[fastest:], key=lambda trial: trial.batch)
    return tuple(trial.configuration for trial in (*close[:fastest], *others[: policy.finalists - fastest]))


def _ranked(trials: Sequence[Trial]) -> list[tuple[float, str, Trial]]:
    timed = [(trial.log_ratio, text_of(trial.configuration), trial) for trial in trials if trial.log_ratio is not None]
    return sorted(timed, key=lambda found: found[:2])


def _reaches(bound_ns: float | None, trials: Sequence[Trial], margin: float) -> bool:
    times = [trial.time_ns for trial in trials if trial.time_ns is not None]
    return bound_ns is not None and bool(times) and min(times) <= bound_ns * (1.0 + margin)
